//! `gabion`: parse, run, and turn what came out into an exit status.

use clap::Parser;
use gabion_cli::args::Cli;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match gabion_cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if gabion_cli::fail::is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            // Nothing is left to tell when stderr is gone.
            let _ = writeln!(std::io::stderr(), "{}", gabion_cli::fail::line(&e));
            ExitCode::FAILURE
        }
    }
}
