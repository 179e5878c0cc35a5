//! What a job can run against.

use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// fio's own arguments that name the device.
    Fio(Vec<String>),
    /// A vhost-user-blk socket, for the built-in load generator.
    Vhost(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub name: String,
    pub kind: Kind,
    /// Daemons whose CPU counts.
    pub pids: Vec<i32>,
}

impl Target {
    pub fn parse_fio(text: &str) -> Result<Target, String> {
        let (name, rest) = split(text)?;
        let args: Vec<String> = rest.split_whitespace().map(str::to_owned).collect();
        Ok(Target { name, kind: Kind::Fio(args), pids: Vec::new() })
    }

    pub fn parse_vhost(text: &str) -> Result<Target, String> {
        let (name, rest) = split(text)?;
        Ok(Target { name, kind: Kind::Vhost(PathBuf::from(rest)), pids: Vec::new() })
    }
}

#[derive(Clone, Debug)]
pub struct Pids {
    pub name: String,
    pub pids: Vec<i32>,
}

impl Pids {
    pub fn parse(text: &str) -> Result<Pids, String> {
        let (name, rest) = split(text)?;
        let pids = rest
            .split(',')
            .map(|pid| match pid.trim().parse() {
                Ok(pid) if pid > 0 => Ok(pid),
                _ => Err(format!("{pid:?} is not a process id")),
            })
            .collect::<Result<_, _>>()?;
        Ok(Pids { name, pids })
    }
}

fn split(text: &str) -> Result<(String, &str), String> {
    match text.split_once('=') {
        Some((name, rest)) if !name.is_empty() && !rest.trim().is_empty() => Ok((name.to_owned(), rest)),
        _ => Err(format!("{text:?} is not of the form NAME=...")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_pids_are_parsed_or_named() {
        let target = Target::parse_fio("raw=--ioengine=io_uring --sync=dsync").unwrap();
        assert_eq!(target.name, "raw");
        assert_eq!(target.kind, Kind::Fio(vec!["--ioengine=io_uring".into(), "--sync=dsync".into()]));
        assert!(Target::parse_fio("raw").unwrap_err().contains("raw"));
        assert_eq!(Pids::parse("a=1,22").unwrap().pids, [1, 22]);
        assert!(Pids::parse("a=1,x").unwrap_err().contains('x'));
        assert!(Pids::parse("a=0").is_err());
    }
}
