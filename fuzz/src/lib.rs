//! What the fuzz targets share with the test that replays their corpus.

pub mod targets;
