//! Runs other programs from the top of the repository.

use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The top of the repository.
pub fn top() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or(here.clone(), PathBuf::from)
}

/// Cargo as it was when it started us, else the one in the path.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(top());
    command
}

/// Runs to the end with its output shown.
pub fn show(mut command: Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", name(&command)))?;
    if !status.success() {
        bail!("{} ended with {status}", name(&command));
    }
    Ok(())
}

/// Runs to the end and answers its standard output.
pub fn output(mut command: Command) -> Result<Vec<u8>> {
    let out = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", name(&command)))?;
    if !out.status.success() {
        bail!("{} ended with {}", name(&command), out.status);
    }
    Ok(out.stdout)
}

/// Whether it runs and succeeds; its output is dropped.
pub fn works(mut command: Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

fn name(command: &Command) -> String {
    let mut name = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        name.push(' ');
        name.push_str(&arg.to_string_lossy());
    }
    name
}
