//! Compose: base, overlay, wheels and what the build itself adds become one ext4 image.

pub mod tree;
