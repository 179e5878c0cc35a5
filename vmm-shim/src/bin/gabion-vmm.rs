//! `gabion-vmm`: one guest. Started by `gabion-host`; runs until the guest ends.

use anyhow::{Context, Result};
use clap::Parser;
use gabion_vmm_shim::vmm::board::End;
use gabion_vmm_shim::vmm::config::Config;
use gabion_vmm_shim::vmm::machine::Machine;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "gabion-vmm", version, about = "One Gabion guest on KVM")]
struct Args {
    /// The machine, as JSON.
    #[arg(long)]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    gabion_common::telemetry::init("gabion-vmm");
    match run(&args) {
        Ok(End::PoweredOff | End::RestartAsked) => ExitCode::SUCCESS,
        Ok(End::Failed(why)) => {
            tracing::error!(why, "the guest failed");
            ExitCode::FAILURE
        }
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<End> {
    let text = std::fs::read(&args.config).with_context(|| args.config.display().to_string())?;
    let config: Config = serde_json::from_slice(&text).with_context(|| args.config.display().to_string())?;
    Ok(Machine::new(config)?.run()?)
}
