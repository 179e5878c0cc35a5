//! A process of ours: its pid and its start time, so that a pid used again is never taken for it.

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// Clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
}

impl Process {
    /// The running process `pid`.
    pub fn of(pid: u32) -> Option<Process> {
        Some(Process { pid, start_ticks: start_ticks(pid)? })
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Sends a signal when it still runs.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| self.is_alive()) {
            // It may end between the check and here: then there is nothing to do.
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits until it is gone; false when it is not after `timeout`.
    pub async fn gone_within(&self, timeout: Duration) -> bool {
        let gone = async {
            while self.is_alive() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(timeout, gone).await.is_ok()
    }
}

fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_is_alive_until_it_is_killed() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_alive());
        let other = Process { start_ticks: process.start_ticks + 1, ..process };
        other.signal(Signal::KILL);
        assert!(!other.is_alive() && process.is_alive());
        process.signal(Signal::KILL);
        assert!(process.gone_within(Duration::from_secs(10)).await);
        child.wait().unwrap();
    }
}
