//! A bundle: its archive, its signatures, a signed manifest, a signed index, its frames.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| slipway_fuzz::targets::bundle(data));
