//! `gabion dev`: a cluster of real daemons on loopback, under one directory.
//!
//! A detached supervisor (`gabion dev supervise`) is the parent of every daemon and the only writer
//! of `supervisor.json`; the verbs read that file and talk to the supervisor over
//! `supervisor.sock`. Nothing is ever found by name: a process is its pid *and* its start time.
//!
//! When the supervisor itself is killed, the daemons go on; the next `dev up` stops them by what
//! `supervisor.json` says and starts afresh on the same data.

mod control;
mod daemon;
mod down;
mod layout;
mod process;
mod status;
mod supervise;
mod up;

use crate::args::DevVerb;
use crate::commands::Context;
use anyhow::{Result, bail, ensure};

pub async fn run(context: &Context, verb: DevVerb) -> Result<()> {
    match verb {
        DevVerb::Up { dir, osds, hosts, osd_size, no_restart, down_out_secs, tls, timeout_secs } => {
            let monitors = monitor_count(&context.flags.monitors)?;
            let wanted = up::Wanted { osds, monitors, hosts, osd_size, no_restart, down_out_secs, tls };
            up::run(context, &dir.dir, wanted, std::time::Duration::from_secs(timeout_secs)).await
        }
        DevVerb::Down { dir, wipe } => down::run(context, &dir.dir, wipe).await,
        DevVerb::Status { dir } => status::run(context, &dir.dir).await,
        DevVerb::Start { dir, daemon } => control::run(context, &dir.dir, "start", &daemon).await,
        DevVerb::Stop { dir, daemon } => control::run(context, &dir.dir, "stop", &daemon).await,
        DevVerb::Kill { dir, daemon, stay_down: false } => {
            control::run(context, &dir.dir, "kill", &daemon).await
        }
        DevVerb::Kill { dir, daemon, stay_down: true } => {
            control::run(context, &dir.dir, "kill-stay", &daemon).await
        }
        DevVerb::Supervise { dir } => supervise::run(&dir.dir).await,
    }
}

/// `--monitors` is a number for `dev up` and addresses everywhere else; `GABION_MONITORS` names some
/// other cluster and does not matter here.
fn monitor_count(flag: &[String]) -> Result<u32> {
    if let [one] = flag
        && let Ok(count) = one.parse()
    {
        ensure!(
            [1, 3, 5].contains(&count),
            "--monitors {count}: run 1, 3 or 5 monitors; an even one more tolerates no more failures"
        );
        return Ok(count);
    }
    if flag.is_empty() || std::env::var("GABION_MONITORS").is_ok_and(|v| v == flag.join(",")) {
        return Ok(1);
    }
    bail!("--monitors {}: gabion dev up takes the number of monitors to run, not addresses", flag.join(","))
}
