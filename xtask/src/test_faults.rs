//! `cargo xtask test-faults`: real daemons that stand still for long, and networks that fall apart. Minutes, most of which are waiting; networks
//! need root.

use crate::step;
use anyhow::Result;

/// Test programs of `gabion-tests`; the shorter of their tests run with all others.
const TESTS: &[&str] = &["cluster_paused", "cluster_partitions"];

pub fn run() -> Result<()> {
    step::show(step::cargo(&["build", "--quiet", "--locked", "--workspace", "--bins"]))?;
    let mut args = vec!["test", "--quiet", "--locked", "-p", "gabion-tests"];
    args.extend(TESTS.iter().flat_map(|test| ["--test", test]));
    args.extend(["--", "--include-ignored", "--nocapture", "--test-threads", "2"]);
    step::show(step::cargo(&args))
}
