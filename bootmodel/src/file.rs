//! A file as a disk: the one place of this crate that touches a machine's own files.

use std::io;

use crate::firmware::ReadOnlyDisk;

impl ReadOnlyDisk for std::fs::File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
}
