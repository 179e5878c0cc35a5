//! Errors as an operator reads them: one line that names the thing, the cause and the way out.

use anyhow::{Error, anyhow};
use gabion_common::monitor_client::headers;
use std::io::ErrorKind;
use tonic::{Code, Status};

/// The line for stderr.
pub fn line(error: &Error) -> String {
    let text = format!("{error:#}");
    format!("gabion: {}", text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The reader of our output left, as `head` does: no failure.
pub fn is_broken_pipe(error: &Error) -> bool {
    error
        .chain()
        .any(|e| e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe))
}

/// What a refusal by the monitors means for `thing` (such as `volume vm1`).
pub fn from_status(thing: &str, monitors: &[String], status: &Status) -> Error {
    let noun = thing.split_whitespace().next().unwrap_or("");
    let cause = sentence(status.message());
    let way_out = match status.code() {
        _ if headers::is_no_quorum(status) => {
            return anyhow!("{thing}: {cause}; start the monitors that are down, see gabion status");
        }
        Code::Unavailable if headers::is_answer(status) => "; try again".to_owned(),
        Code::Unavailable if cause.starts_with("TLS:") => {
            return anyhow!(
                "{thing}: the monitor at {} cannot be used: {cause}; see [tls] in client.toml or --tls-ca, --tls-cert and --tls-key",
                monitors.join(", ")
            );
        }
        Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled => {
            return anyhow!(
                "{thing}: no monitor at {} answers ({cause}); start the cluster (gabion dev up) or name its monitors with --monitors",
                monitors.join(", ")
            );
        }
        Code::NotFound if ["pool", "osd", "volume", "export", "host", "vm"].contains(&noun) => {
            format!("; see gabion {noun} ls")
        }
        Code::AlreadyExists => "; choose another name".to_owned(),
        Code::Unimplemented => "; the monitors are of a version without it".to_owned(),
        _ => String::new(),
    };
    anyhow!("{thing}: {cause}{way_out}")
}

fn sentence(message: &str) -> &str {
    match message.trim().trim_end_matches('.') {
        "" => "refused without a reason",
        text => text,
    }
}
