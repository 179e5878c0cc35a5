//! One file per noun: each verb makes its call and prints the answer.

mod ca;
mod cluster;
mod console;
mod export;
mod host;
mod monitor;
mod osd;
mod pg;
mod pool;
mod rebuild;
mod scrub;
mod snapshot;
mod transfer;
mod vm;
mod volume;

use crate::args::Command;
use crate::config::{self, Flags};
use crate::output::Out;
use crate::rpc::Monitors;
use anyhow::{Result, bail};
use std::io::{BufRead, IsTerminal, Write};

/// The global flags.
pub struct Context {
    pub out: Out,
    pub yes: bool,
    pub flags: Flags,
}

impl Context {
    pub fn monitors(&self) -> Result<Monitors> {
        Monitors::new(config::target(&self.flags)?)
    }

    /// Asks before `what` destroys something.
    pub fn confirm(&self, what: &str) -> Result<()> {
        if self.yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            bail!("{what}: this cannot be undone; repeat with --yes to do it");
        }
        write!(std::io::stderr(), "{what}: this cannot be undone. Type yes to do it: ")?;
        let mut answer = String::new();
        std::io::stdin().lock().read_line(&mut answer)?;
        match answer.trim() {
            "yes" => Ok(()),
            _ => bail!("{what}: not done, the answer was not yes"),
        }
    }
}

pub async fn run(cx: &Context, command: Command) -> Result<()> {
    match command {
        Command::Status => cluster::status(cx).await,
        Command::Health => cluster::health(cx).await,
        Command::Events { follow, last } => cluster::events(cx, follow, last).await,
        Command::Ca { verb } => ca::run(&cx.out, verb),
        Command::Monitor { verb } => monitor::run(cx, verb).await,
        Command::Osd { verb } => osd::run(cx, verb).await,
        Command::Pool { verb } => pool::run(cx, verb).await,
        Command::Pg { verb } => pg::run(cx, verb).await,
        Command::Volume { verb } => volume::run(cx, verb).await,
        Command::Snapshot { verb } => snapshot::run(cx, verb).await,
        Command::Export { verb } => export::run(cx, verb).await,
        Command::Host { verb } => host::run(cx, verb).await,
        Command::Vm { verb } => vm::run(cx, verb).await,
        Command::Rebuild { verb } => rebuild::run(cx, verb).await,
        Command::Scrub { verb } => scrub::run(cx, verb).await,
        // Handled before: they need no monitors.
        Command::Dev { .. } | Command::Completions { .. } | Command::Manual { .. } => Ok(()),
    }
}
