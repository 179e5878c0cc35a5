//! What the README shows works as it stands there, one command after the other.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// The commands of the section "By hand", without what sets up the shell.
fn commands(readme: &str) -> Vec<&str> {
    let section = readme.split("## By hand").nth(1).unwrap_or_default();
    let section = section.split("\n## ").next().unwrap_or_default();
    let lines = section.lines().filter_map(|line| line.strip_prefix("    gabion "));
    lines.map(|line| line.split(" #").next().unwrap_or_default().trim()).collect()
}

fn shell(line: &str, directory: &Path, binaries: &Path) -> Result<()> {
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH")?);
    let out = Command::new("sh")
        .args(["-c", line])
        .current_dir(directory)
        .env("PATH", path)
        .env_remove("GABION_CONFIG")
        .env_remove("GABION_MONITORS")
        .output()
        .with_context(|| format!("cannot run: {line}"))?;
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    println!("$ {line}\n{said}");
    ensure!(out.status.success(), "{line}: {said}");
    Ok(())
}

#[test]
fn the_commands_of_the_readme_work() -> Result<()> {
    let readme = include_str!("../../README.md");
    let test = std::env::current_exe()?;
    let binaries = test.ancestors().nth(2).context("the test is not in a target directory")?;
    let directory = tempfile::Builder::new().prefix("gab").tempdir()?;
    let image =
        ["qemu-img create -q -f qcow2 debian.qcow2 64M", "qemu-io -c 'write -P 7 1M 1M' debian.qcow2"];
    for line in image {
        shell(line, directory.path(), binaries)?;
    }
    let commands = commands(readme);
    ensure!(commands.len() > 10 && commands[0] == "dev up", "the README shows other things: {commands:?}");
    let mut result = Ok(());
    for command in &commands {
        result = shell(&format!("gabion {command}"), directory.path(), binaries);
        if result.is_err() {
            shell("gabion dev down --wipe", directory.path(), binaries)?;
            break;
        }
    }
    result
}
