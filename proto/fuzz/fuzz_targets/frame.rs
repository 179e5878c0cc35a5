//! The data-path frame decoder over arbitrary bytes: `cargo +nightly fuzz run frame` in `proto/`.
#![no_main]

mod frame_body;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    frame_body::run(input);
});
