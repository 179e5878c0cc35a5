//! The command `gabion`: what an operator types, turned into calls of the gRPC API, and `gabion
//! dev`, which runs a whole cluster on this machine.
//!
//! [`args`] defines every noun, verb and flag, [`commands`] has one file per noun, [`dev`] owns the
//! development cluster. A command answers through [`output::Out`], an error becomes one line on
//! stderr ([`fail`]).

pub mod args;
pub mod commands;
pub mod config;
pub mod dev;
pub mod fail;
pub mod output;
pub mod rpc;
pub mod size;

use anyhow::{Context as _, Result};
use args::{Cli, Command};
use clap::CommandFactory;

/// Runs a parsed command line.
pub fn run(cli: Cli) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let out = output::Out::new(cli.output, cli.no_color);
    let flags = config::Flags {
        monitors: cli.monitors,
        tls_ca: cli.tls_ca,
        tls_cert: cli.tls_cert,
        tls_key: cli.tls_key,
    };
    let context = commands::Context { out, yes: cli.yes, flags };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Dev { verb } => dev::run(&context, verb).await,
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Cli::command(), "gabion", &mut std::io::stdout());
                Ok(())
            }
            Command::Manual { dir } => clap_mangen::generate_to(Cli::command(), &dir)
                .with_context(|| format!("cannot write manual pages to {}", dir.display())),
            other => commands::run(&context, other).await,
        }
    });
    // A thread that is blocked reading the terminal must not hold up the exit.
    runtime.shutdown_background();
    result
}
