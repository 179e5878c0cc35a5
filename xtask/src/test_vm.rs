//! `cargo xtask test-vm`: guests of a stock kernel in `gabion-vmm`, in a nested machine that has real
//! KVM whatever this one has (`tests/vm/nested.sh`).

use crate::step;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

/// Test programs of `gabion-vmm-shim` that need KVM, better real one.
const TESTS: &[&str] = &["micro_guest", "native_guest"];

/// Scenarios of a whole cluster, scripts of the outer machine.
const SCRIPTS: &[&str] = &["tests/vm/cluster.sh"];

/// Boot time and memory of `gabion-vmm` beside QEMU's.
const COMPARISON: &str = "tests/vm/compare-engines.sh";

/// Builds what the nested machine needs and runs it.
pub fn run() -> Result<()> {
    let messages = build()?;
    let mut command = nested(&messages)?;
    command.args(SCRIPTS.iter().map(|script| step::top().join(script)));
    for test in TESTS {
        command.arg(executable(&messages, test)?);
    }
    step::show(command)
}

/// Measures in the same machine, instead of testing.
pub fn compare() -> Result<()> {
    let mut command = nested(&build()?)?;
    command.env("GABION_VM_QEMU", "1").arg(step::top().join(COMPARISON));
    step::show(command)
}

fn build() -> Result<Vec<u8>> {
    // With the features of the whole workspace, as everything else is built.
    let mut args = vec!["build", "--quiet", "--locked", "--workspace", "--bins", "--example", "vhost_file"];
    args.extend(TESTS.iter().flat_map(|test| ["--test", test]));
    args.push("--message-format=json-render-diagnostics");
    step::output(step::cargo(&args))
}

fn nested(messages: &[u8]) -> Result<Command> {
    let vmm = executable(messages, "gabion-vmm")?;
    let bin_dir = vmm.parent().context("a program is in a directory")?;
    let mut command = Command::new(step::top().join("tests/vm/nested.sh"));
    command.arg(bin_dir);
    Ok(command)
}

/// Where cargo put the program of a target.
fn executable(messages: &[u8], name: &str) -> Result<PathBuf> {
    for message in serde_json::Deserializer::from_slice(messages).into_iter::<Value>() {
        let message = message.context("output of cargo build")?;
        if message["target"]["name"] == name
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo built no program {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name() {
        let messages = br#"{"target":{"name":"a"},"executable":null}
            {"target":{"name":"a"},"executable":"/x/a"}
            {"reason":"build-finished"}"#;
        assert_eq!(executable(messages, "a").unwrap(), PathBuf::from("/x/a"));
        assert!(executable(messages, "b").is_err());
        assert!(executable(b"{", "a").is_err());
    }
}
