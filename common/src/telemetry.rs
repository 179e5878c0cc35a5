//! Logging of every daemon: `tracing` to standard error, filtered by `RUST_LOG` (default: `info` of our
//! own; the monitors say themselves what matters of their consensus library, which calls every
//! unanswered heartbeat an error).

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

const DEFAULT: &str = "info,openraft=off";

/// Starts logging for this process. A second call does nothing. A `RUST_LOG` that does not parse is
/// reported and replaced by the default.
pub fn init(daemon: &str) {
    let (filter, problem) = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => (EnvFilter::new(DEFAULT), Some(format!("RUST_LOG={text:?}: {error}"))),
        },
        _ => (EnvFilter::new(DEFAULT), None),
    };
    let started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init()
        .is_ok();
    if !started {
        return;
    }
    if let Some(problem) = problem {
        tracing::warn!(problem, "logging by default instead");
    }
    tracing::info!(daemon, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
}
