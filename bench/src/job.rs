//! The jobs that every target runs.

use clap::ValueEnum;
use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    #[value(name = "randwrite")]
    RandWrite,
    #[value(name = "randread")]
    RandRead,
    #[value(name = "write")]
    Write,
    #[value(name = "read")]
    Read,
}

impl Pattern {
    pub fn name(self) -> &'static str {
        match self {
            Pattern::RandWrite => "randwrite",
            Pattern::RandRead => "randread",
            Pattern::Write => "write",
            Pattern::Read => "read",
        }
    }

    pub fn writes(self) -> bool {
        matches!(self, Pattern::RandWrite | Pattern::Write)
    }

    pub fn random(self) -> bool {
        matches!(self, Pattern::RandWrite | Pattern::RandRead)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub name: String,
    pub pattern: Pattern,
    pub block_bytes: u32,
    pub depth: u16,
}

impl Job {
    pub fn new(name: &str, pattern: Pattern, block_bytes: u32, depth: u16) -> Job {
        Job { name: name.to_owned(), pattern, block_bytes, depth }
    }
}

pub fn standard() -> Vec<Job> {
    vec![
        Job::new("randwrite-4k-qd1", Pattern::RandWrite, 4096, 1),
        Job::new("randwrite-4k-qd32", Pattern::RandWrite, 4096, 32),
        Job::new("randread-4k-qd1", Pattern::RandRead, 4096, 1),
        Job::new("randread-4k-qd32", Pattern::RandRead, 4096, 32),
        Job::new("seqwrite-1m-qd8", Pattern::Write, 1 << 20, 8),
        Job::new("seqread-1m-qd8", Pattern::Read, 1 << 20, 8),
    ]
}
