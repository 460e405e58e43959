//! A key set, and a signature file that is checked against it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| slipway_fuzz::targets::key_set(data));
