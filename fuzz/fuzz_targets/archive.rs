//! A backup to restore: zstd, tar, and the rules for unpacking.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| slipway_fuzz::targets::backup(data));
