//! A backup that comes back: zstd, tar, and what may be unpacked.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| slipway_fuzz::targets::backup(data));
