//! Logging of every daemon: `tracing` to standard error, filtered by `RUST_LOG` (default `info`).

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Starts logging for this process. A second call does nothing. A `RUST_LOG` that does not parse is
/// reported and replaced by the default.
pub fn init(daemon: &str) {
    let (filter, problem) = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => (EnvFilter::new("info"), Some(format!("RUST_LOG={text:?}: {error}"))),
        },
        _ => (EnvFilter::new("info"), None),
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
        tracing::warn!(problem, "logging at info instead");
    }
    tracing::info!(daemon, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
}
