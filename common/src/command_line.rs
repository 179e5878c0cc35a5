//! The command line of a daemon and its configuration file, from one definition.
//!
//! `--config FILE` names a TOML file whose keys are the daemon's long options, with `_` for `-`:
//! `nbd_listen = "10.0.0.1:10809"` is `--nbd-listen 10.0.0.1:10809`. A list stands for an option that is
//! repeated. The values go through the same checks as those of the command line, which wins where both
//! give one. A key that is no option is refused. `--manual` prints the manual page.

use clap::{Arg, ArgAction, Command, Parser};
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::path::Path;
use std::process::exit;
use toml::Value;

/// No configuration file of a daemon is near this.
const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Options that make no sense in a file.
const NOT_IN_FILES: [&str; 4] = ["config", "help", "manual", "version"];
/// As for every wrong command line.
const USAGE: i32 = 2;

/// The validated command line of this process. Ends it with status 2 when something in it or in the
/// file is wrong.
pub fn parse<A: Parser>() -> A {
    let command = with_file(A::command());
    let args: Vec<OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|a| a == "--manual") {
        exit(i32::from(print_manual(command).is_err()));
    }
    let file = config_file(&args);
    let args = match expand(&command, args) {
        Ok(args) => args,
        Err(why) => wrong(&format!("error: {why}\n")),
    };
    let parsed = command.try_get_matches_from(args).and_then(|matches| A::from_arg_matches(&matches));
    parsed.unwrap_or_else(|e| {
        if !e.use_stderr() {
            e.exit();
        }
        let note = file.map(|f| format!("\nValues were also read from {}.\n", f.display()));
        wrong(&format!("{}{}", e.render(), note.unwrap_or_default()))
    })
}

fn wrong(text: &str) -> ! {
    // Nothing is left to tell when stderr is gone.
    let _ = std::io::stderr().write_all(text.as_bytes());
    exit(USAGE)
}

fn with_file(command: Command) -> Command {
    command.arg(
        Arg::new("config")
            .long("config")
            .value_name("FILE")
            .global(true)
            .help("TOML file whose keys are these options, with _ for -; the command line wins"),
    )
}

fn print_manual(command: Command) -> std::io::Result<()> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    std::io::stdout().write_all(&page)
}

fn config_file(args: &[OsString]) -> Option<OsString> {
    let mut args = args.iter().skip(1).take_while(|a| *a != "--");
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next().cloned();
        }
        if let Some(file) = arg.to_str().and_then(|a| a.strip_prefix("--config=")) {
            return Some(file.into());
        }
    }
    None
}

/// Puts what the file says behind the subcommand (or the program's name).
fn expand(command: &Command, mut args: Vec<OsString>) -> Result<Vec<OsString>, String> {
    let Some(file) = config_file(&args) else { return Ok(args) };
    let is_verb = |a: &OsString| *a != file && command.get_subcommands().any(|s| a == s.get_name());
    let verb = args.iter().position(is_verb);
    let target = verb.and_then(|at| command.find_subcommand(&args[at])).unwrap_or(command);
    let table = read(Path::new(&file))?;
    let more = options(target, &table, &args).map_err(|why| format!("{}: {why}", file.display()))?;
    let at = verb.unwrap_or(0) + 1;
    args.splice(at..at, more);
    Ok(args)
}

fn read(path: &Path) -> Result<toml::Table, String> {
    let shown = path.display();
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|e| format!("cannot read {shown}: {e}"))?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|e| format!("cannot read {shown}: {e}"))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("{shown} has more than {FILE_BYTES_MAX} bytes"));
    }
    text.parse().map_err(|e: toml::de::Error| format!("{shown}: {}", e.message()))
}

fn options(command: &Command, table: &toml::Table, given: &[OsString]) -> Result<Vec<OsString>, String> {
    let known: Vec<(String, &Arg)> = command
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(|long| (long, arg)))
        .filter(|(long, _)| !NOT_IN_FILES.contains(long))
        .map(|(long, arg)| (long.replace('-', "_"), arg))
        .collect();
    let mut options = Vec::new();
    for (key, value) in table {
        let Some((_, arg)) = known.iter().find(|(name, _)| name == key) else {
            let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
            return Err(format!("unknown key {key:?}; known are {}", names.join(", ")));
        };
        let long = format!("--{}", key.replace('_', "-"));
        if given.iter().any(|a| is_option(a, &long)) {
            continue;
        }
        match (arg.get_action(), value) {
            (ArgAction::SetTrue, Value::Boolean(true)) => options.push(long.into()),
            (ArgAction::SetTrue, Value::Boolean(false)) => {}
            (ArgAction::SetTrue, _) => return Err(format!("{key} is true or false")),
            (ArgAction::Append, Value::Array(items)) => {
                for item in items {
                    options.push(format!("{long}={}", scalar(key, item)?).into());
                }
            }
            (_, value) => options.push(format!("{long}={}", scalar(key, value)?).into()),
        }
    }
    Ok(options)
}

fn is_option(arg: &OsStr, long: &str) -> bool {
    arg.to_str()
        .and_then(|a| a.strip_prefix(long))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

fn scalar(key: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        other => Err(format!("{key} cannot be a {}; use a string or a whole number", other.type_str())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Subcommand};

    #[derive(Parser)]
    #[command(name = "d")]
    struct Flat {
        #[arg(long, value_delimiter = ',', required = true)]
        monitors: Vec<String>,
        #[arg(long)]
        nbd_listen: std::net::SocketAddr,
        #[arg(long)]
        read_only: bool,
        #[arg(long, default_value_t = 7)]
        limit: u64,
    }

    #[derive(Parser)]
    #[command(name = "d")]
    struct Nested {
        #[command(subcommand)]
        verb: Verb,
    }

    #[derive(Subcommand)]
    enum Verb {
        Run {
            #[arg(long)]
            host: String,
        },
        Check {
            dir: String,
        },
    }

    fn parse_with<A: Parser>(file: &str, args: &[&str]) -> Result<A, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.toml");
        std::fs::write(&path, file).unwrap();
        let mut all: Vec<OsString> = vec!["d".into()];
        all.extend(args.iter().map(OsString::from));
        all.extend(["--config".into(), path.into_os_string()]);
        let command = with_file(A::command());
        let args = expand(&command, all)?;
        let matches = command.try_get_matches_from(args).map_err(|e| e.to_string())?;
        A::from_arg_matches(&matches).map_err(|e| e.to_string())
    }

    const FLAT: &str = "monitors = [\"a:1\", \"b:2\"]\nnbd_listen = \"127.0.0.1:1\"\nread_only = true\n";

    #[test]
    fn a_file_stands_for_options_and_the_command_line_wins() {
        let flat: Flat = parse_with(FLAT, &["--limit", "9"]).unwrap();
        assert_eq!((flat.monitors.len(), flat.nbd_listen.port(), flat.limit), (2, 1, 9));
        assert!(flat.read_only);
        let flat: Flat = parse_with(FLAT, &["--monitors=c:3", "--nbd-listen", "127.0.0.1:2"]).unwrap();
        assert_eq!((flat.monitors, flat.nbd_listen.port(), flat.limit), (vec!["c:3".to_owned()], 2, 7));
    }

    #[test]
    fn keys_belong_to_the_subcommand() {
        let nested: Nested = parse_with("host = \"h1\"", &["run"]).unwrap();
        assert!(matches!(nested.verb, Verb::Run { host } if host == "h1"));
        let why = parse_with::<Nested>("host = \"h1\"", &["check", "run"]).err().unwrap();
        assert!(why.contains("unknown key \"host\""), "{why}");
        let why = parse_with::<Nested>("", &["check"]).err().unwrap();
        assert!(why.contains("<DIR>"), "{why}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (file, part) in [
            ("nbdlisten = 1", "unknown key \"nbdlisten\"; known are monitors, nbd_listen, read_only, limit"),
            ("config = \"other\"", "unknown key \"config\""),
            ("limit = 1.5", "limit cannot be a float"),
            ("limit = [1]", "limit cannot be a array"),
            ("read_only = \"yes\"", "read_only is true or false"),
            ("monitors = ", "d.toml"),
        ] {
            let why = parse_with::<Flat>(file, &[]).err().unwrap();
            assert!(why.contains(part), "{file}: {why}");
        }
        let file = FLAT.replace("127.0.0.1:1", "127.0.0.1");
        let why = parse_with::<Flat>(&file, &[]).err().unwrap();
        assert!(why.contains("invalid value '127.0.0.1' for '--nbd-listen"), "{why}");
        let long = format!("# {}", "x".repeat(FILE_BYTES_MAX as usize));
        assert!(parse_with::<Flat>(&long, &[]).err().unwrap().contains("more than"));
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        let command = with_file(Flat::command());
        let args = ["d", "--config=/nonexistent/d.toml"].map(OsString::from).to_vec();
        assert!(expand(&command, args).unwrap_err().contains("cannot read /nonexistent/d.toml"));
    }
}
