//! The initrd.
