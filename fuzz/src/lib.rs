//! Code shared by the fuzz targets and the test that replays their corpus.

pub mod targets;
