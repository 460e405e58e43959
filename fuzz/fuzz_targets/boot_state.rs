//! The two sectors of the boot state, in any condition.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| slipway_fuzz::targets::boot_state(data));
