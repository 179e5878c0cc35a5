//! Rounds over jobs and targets.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cpu;
use crate::fio;
use crate::job::{self, Job, Pattern};
use crate::report::{self, Measured, Run};
use crate::target::{Kind, Target};
use crate::vhost::load::{self, Load};

#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// How often every job runs on every target; the order of the targets turns each round.
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Seconds of one run.
    #[arg(long, default_value_t = 10.0)]
    pub secs: f64,
    /// Bytes of each target to use.
    #[arg(long, default_value_t = 1 << 30)]
    pub size: u64,
    /// Only these jobs, by name.
    #[arg(long = "only", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Skip the sequential write that fills each target first.
    #[arg(long)]
    pub no_fill: bool,
    /// Append one JSON line per run to this file.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

impl Plan {
    pub fn jobs(&self) -> Result<Vec<Job>> {
        let mut jobs = job::standard();
        for name in &self.only {
            if !jobs.iter().any(|job| job.name == *name) {
                let known: Vec<_> = jobs.iter().map(|job| job.name.as_str()).collect();
                bail!("no job {name}: there are {}", known.join(", "));
            }
        }
        jobs.retain(|job| self.only.is_empty() || self.only.contains(&job.name));
        if self.rounds == 0 || !(0.1..=86_400.0).contains(&self.secs) || self.size < 64 << 20 {
            bail!("a plan needs a round, 0.1 to 86400 seconds and at least 64 MiB");
        }
        Ok(jobs)
    }
}

/// Runs everything, prints a line per run and the table at the end. A run that fails is reported and left out.
pub fn run(targets: &[Target], plan: &Plan, out: &mut impl Write) -> Result<Vec<Run>> {
    if targets.is_empty() {
        bail!("name at least one --target or --vhost");
    }
    let jobs = plan.jobs()?;
    let mut json = match &plan.json {
        Some(path) => Some(
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot write {}", path.display()))?,
        ),
        None => None,
    };
    if !plan.no_fill {
        let fill = Job::new("fill", Pattern::Write, 1 << 20, 8);
        for target in targets {
            let filled = measure(target, &fill, plan.size, None)
                .with_context(|| format!("filling {}", target.name))?;
            writeln!(out, "# {} filled: {:.0} MB/s", target.name, filled.bandwidth_bytes_per_s / 1e6)?;
        }
    }
    let mut runs = Vec::new();
    for round in 0..plan.rounds {
        for job in &jobs {
            for turn in 0..targets.len() {
                let target = &targets[(turn + round as usize) % targets.len()];
                match run_once(target, job, plan, round) {
                    Ok(run) => {
                        let line = serde_json::to_string(&run)?;
                        writeln!(out, "{line}")?;
                        if let Some(file) = &mut json {
                            writeln!(file, "{line}")?;
                        }
                        runs.push(run);
                    }
                    Err(error) => writeln!(out, "# {} {} failed: {error:#}", target.name, job.name)?,
                }
                out.flush()?;
            }
        }
    }
    let names: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
    report::table(&jobs, &names, &runs, out)?;
    if runs.is_empty() {
        bail!("no run succeeded");
    }
    Ok(runs)
}

fn run_once(target: &Target, job: &Job, plan: &Plan, round: u32) -> Result<Run> {
    let client_s = || cpu::of_children_s() + cpu::of_self_s();
    let (daemons, client) = (cpu::of_pids_s(&target.pids)?, client_s());
    let measured = measure(target, job, plan.size, Some(plan.secs))?;
    let client_cpu_s = client_s() - client;
    let daemons_cpu_s = cpu::of_pids_s(&target.pids)? - daemons;
    Ok(Run {
        target: target.name.clone(),
        job: job.name.clone(),
        round,
        measured,
        daemons_cpu_s,
        client_cpu_s,
    })
}

fn measure(target: &Target, job: &Job, size_bytes: u64, secs: Option<f64>) -> Result<Measured> {
    match &target.kind {
        Kind::Fio(args) => fio::run(args, job, size_bytes, secs),
        Kind::Vhost(socket) => {
            let load = Load {
                socket: socket.clone(),
                job: job.clone(),
                secs: secs.unwrap_or(0.0),
                size_bytes,
                flush_every: 0,
            };
            load::run(&load)
        }
    }
}
