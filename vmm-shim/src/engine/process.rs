//! A guest as a process: it outlives the agent, and a later agent knows it again by its pid *and* the
//! time it started, so that a reused pid is never taken for it.

use serde::{Deserialize, Serialize};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks since boot, field 22 of `/proc/PID/stat` (proc(5)).
    pub start_ticks: u64,
}

impl Process {
    /// The live process with this pid.
    pub fn find(pid: i32) -> Option<Process> {
        let (state, start_ticks) = stat(pid)?;
        // A zombie has ended; only its parent has not looked yet.
        (state != 'Z' && state != 'X').then_some(Process { pid, start_ticks })
    }

    pub fn is_alive(&self) -> bool {
        Process::find(self.pid) == Some(*self)
    }

    /// SIGKILL; nothing happens when it is gone.
    pub fn kill(&self) {
        if !self.is_alive() {
            return;
        }
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid)
            && let Err(error) = rustix::process::kill_process(pid, rustix::process::Signal::KILL)
        {
            tracing::warn!(pid = self.pid, %error, "cannot kill a guest");
        }
    }

    /// Waits until it has ended; false when it has not within `limit`.
    pub async fn ended_within(&self, limit: Duration) -> bool {
        let all = async {
            while self.is_alive() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }
}

fn stat(pid: i32) -> Option<(char, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so count from the last one.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn knows_a_process_again_and_sees_it_end() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let process = Process::find(child.id() as i32).unwrap();
        assert!(process.is_alive());
        assert!(!Process { start_ticks: process.start_ticks + 1, ..process }.is_alive());
        process.kill();
        assert!(process.ended_within(Duration::from_secs(10)).await);
        child.wait().unwrap();
    }
}
