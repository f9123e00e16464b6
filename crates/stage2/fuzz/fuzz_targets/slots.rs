//! `cargo +nightly fuzz run slots`, in crates/stage2.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    tidemark_stage2_fuzz::slots(bytes);
});
