//! Properties of the pure parts of the protocol crate, each over many generated inputs.

mod blocks;
mod frame;
mod map;
mod placement;
mod samples;

#[path = "../../fuzz/fuzz_targets/frame_body.rs"]
mod frame_body;

/// Few cases, no files left behind: the whole suite runs in seconds.
pub fn config(cases: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config { cases, failure_persistence: None, ..Default::default() }
}
