//! `gabion-bench`: the same jobs on every target, in alternating rounds, with the CPU of everything counted.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use gabion_bench::agreement::{self, AgreementOptions};
use gabion_bench::cluster::{self, ClusterOptions};
use gabion_bench::harness::{self, Plan};
use gabion_bench::index;
use gabion_bench::job::{Job, Pattern};
use gabion_bench::peering::{self, PeeringOptions};
use gabion_bench::rebuild::{self, RebuildOptions};
use gabion_bench::store::{self, StoreOptions};
use gabion_bench::target::{Pids, Target};
use gabion_bench::vhost::load::{self, Load};

#[derive(Parser)]
#[command(
    version,
    about = "Runs identical I/O jobs on several targets and counts the CPU-seconds of all involved"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the jobs on the named targets.
    Run {
        /// A target for fio, as NAME=FIO-ARGUMENTS; repeatable.
        #[arg(long = "target", value_name = "NAME=ARGS", value_parser = Target::parse_fio)]
        targets: Vec<Target>,
        /// A vhost-user-blk socket, as NAME=SOCKET; repeatable.
        #[arg(long = "vhost", value_name = "NAME=SOCKET", value_parser = Target::parse_vhost)]
        vhost: Vec<Target>,
        /// Processes whose CPU counts for a target, as NAME=PID,PID; repeatable.
        #[arg(long = "pids", value_name = "NAME=PIDS", value_parser = Pids::parse)]
        pids: Vec<Pids>,
        #[command(flatten)]
        plan: Plan,
    },
    /// Load one vhost-user-blk socket and print one line of JSON.
    Vhost {
        socket: PathBuf,
        #[arg(long, value_enum, default_value = "randwrite")]
        rw: Pattern,
        /// Bytes of one request.
        #[arg(long, default_value_t = 4096)]
        bs: u32,
        #[arg(long, default_value_t = 32)]
        depth: u16,
        #[arg(long, default_value_t = 10.0)]
        secs: f64,
        /// Bytes of the device to use; 0 is all of it.
        #[arg(long, default_value_t = 0)]
        size: u64,
        /// Drain and flush after every so many writes; 0 is never.
        #[arg(long, default_value_t = 0)]
        flush_every: u64,
    },
    /// Measure one object store beside fio on a file of the same disk.
    Store {
        #[command(flatten)]
        options: StoreOptions,
    },
    /// Open a store once and say what it took; `store --index` runs it.
    #[command(hide = true)]
    StoreOpen { dir: PathBuf },
    /// Start a development cluster, export volumes by NBD and vhost-user, and run the jobs on them and on a raw file.
    Cluster {
        #[command(flatten)]
        cluster: ClusterOptions,
        #[command(flatten)]
        plan: Plan,
    },
    /// Start a development cluster, lose OSDs for good and measure the rebuilds: with idle clients beside fio, and under a client's load.
    Rebuild {
        #[command(flatten)]
        options: RebuildOptions,
    },
    /// Peer many groups with many objects, OSDs and monitors in this process and in virtual time, and count CPU, memory and messages.
    Peering {
        #[command(flatten)]
        options: PeeringOptions,
    },
    /// Start monitors in this process and report many groups at once, as OSDs do after a power cut: what is agreed on in a second.
    Agreement {
        #[command(flatten)]
        options: AgreementOptions,
    },
}

fn main() -> Result<()> {
    let mut out = std::io::stdout();
    match Cli::parse().command {
        Command::Run { mut targets, vhost, pids, plan } => {
            targets.extend(vhost);
            for Pids { name, pids } in pids {
                let target = targets.iter_mut().find(|target| target.name == name);
                target.with_context(|| format!("--pids names {name}, which is no target"))?.pids.extend(pids);
            }
            harness::run(&targets, &plan, &mut out)?;
        }
        Command::Vhost { socket, rw, bs, depth, secs, size, flush_every } => {
            let job = Job::new("vhost", rw, bs, depth);
            let result = load::run(&Load { socket, job, secs, size_bytes: size, flush_every })?;
            writeln!(out, "{}", serde_json::to_string(&result)?)?;
        }
        Command::StoreOpen { dir } => index::open(&dir, &mut out)?,
        Command::Store { options } => store::run(&options, &mut out)?,
        Command::Agreement { options } => agreement::run(&options, &mut out)?,
        Command::Peering { options } => peering::run(&options, &mut out)?,
        Command::Rebuild { options } => rebuild::run(&options, &mut out)?,
        Command::Cluster { cluster, plan } => cluster::run(&cluster, &plan, &mut out)?,
    }
    Ok(())
}
