//! `cargo xtask verify`, `sim`, `soak`, `mutants`, `test-faults` and `test-vm`: what the repository checks about itself.

mod licences;
mod sim;
mod step;
mod test_faults;
mod test_vm;
mod verify;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask verify
       cargo xtask licences
       cargo xtask sim --seeds N [--from S] [--pool COPIES|K+M] [--short | --too-few-members | --scenario NAME]
       cargo xtask soak [--minutes M | --seeds N] [--from S] [--pool COPIES|K+M]
       cargo xtask mutants [--rule NAME] [--seeds N]
       cargo xtask test-faults
       cargo xtask test-vm [--compare]";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["verify"] => verify::run(),
        ["licences"] => licences::run().map(|summary| println!("{summary}")),
        ["test-faults"] => test_faults::run(),
        ["test-vm"] => test_vm::run(),
        ["test-vm", "--compare"] => test_vm::compare(),
        ["sim", ref rest @ ..] => sim::run(rest),
        ["soak", ref rest @ ..] => sim::soak(rest),
        ["mutants", ref rest @ ..] => sim::mutants(rest),
        _ => Err(anyhow::anyhow!("{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}
