//! Answers as a table, JSON or YAML. A command builds JSON values, which are the contract; the
//! table is drawn from them: fields that end in `_bytes` are shown human and exact.

use crate::size;
use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
    Yaml,
}

#[derive(Clone, Copy)]
pub struct Out {
    pub format: Format,
    color: bool,
}

#[derive(Clone, Copy)]
pub enum Paint {
    Good,
    Warn,
    Bad,
}

impl Out {
    pub fn new(format: Format, no_color: bool) -> Out {
        let asked_not = no_color || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Out { format, color: !asked_not && std::io::stdout().is_terminal() }
    }

    pub fn is_table(&self) -> bool {
        self.format == Format::Table
    }

    /// A list under `key`, one row each, with the fields of `columns`.
    pub fn list(&self, key: &str, rows: Vec<Value>, columns: &[&str]) -> Result<()> {
        if !self.is_table() {
            let mut object = Map::new();
            object.insert(key.to_owned(), Value::Array(rows));
            return self.value(&Value::Object(object));
        }
        let heads = columns.iter().map(|c| heading(c).replace('_', "-").to_uppercase()).collect();
        let body = rows.iter().map(|row| columns.iter().map(|c| cell(c, &row[*c])).collect());
        let grid: Vec<Vec<String>> = std::iter::once(heads).chain(body).collect();
        let width = |at: usize| grid.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns.len()).map(width).collect();
        let lines: Vec<String> = grid
            .iter()
            .map(|row| {
                let cells: Vec<_> = row.iter().zip(&widths).map(|(c, w)| format!("{c:w$}")).collect();
                cells.join("  ").trim_end().to_owned()
            })
            .collect();
        self.text(&lines.join("\n"))
    }

    /// One thing with all its fields.
    pub fn show(&self, value: &Value) -> Result<()> {
        if !self.is_table() {
            return self.value(value);
        }
        let Value::Object(fields) = value else { return self.text(&value.to_string()) };
        let names: Vec<_> = fields.keys().map(|k| heading(k).replace('_', " ")).collect();
        let width = names.iter().map(String::len).max().unwrap_or(0);
        let lines: Vec<_> = fields
            .iter()
            .zip(&names)
            .map(|((key, value), name)| format!("{name:width$}  {}", cell(key, value)).trim_end().to_owned())
            .collect();
        self.text(&lines.join("\n"))
    }

    /// That something is done: a sentence, or the thing as it is now.
    pub fn done(&self, sentence: &str, value: Value) -> Result<()> {
        if self.is_table() { self.text(sentence) } else { self.value(&value) }
    }

    /// One value of a stream: JSON lines or YAML documents.
    pub fn item(&self, value: &Value) -> Result<()> {
        match self.format {
            Format::Json => self.text(&value.to_string()),
            _ => self.text(&format!("---\n{}", yaml(value).trim_end())),
        }
    }

    /// The whole answer as JSON or YAML.
    pub fn value(&self, value: &Value) -> Result<()> {
        match self.format {
            Format::Yaml => self.text(yaml(value).trim_end()),
            _ => self.text(&serde_json::to_string_pretty(value)?),
        }
    }

    pub fn text(&self, text: &str) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{text}")?;
        Ok(stdout.flush()?)
    }

    pub fn paint(&self, paint: Paint, text: &str) -> String {
        let code = match paint {
            Paint::Good => 32,
            Paint::Warn => 33,
            Paint::Bad => 31,
        };
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A word of advice that is no part of the answer.
pub fn note(text: &str) {
    // Advice that nobody can read is not worth failing for.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// For a done destructive action.
pub fn removed(name: impl Into<Value>) -> Value {
    json!({ "removed": name.into() })
}

fn heading(key: &str) -> &str {
    key.strip_suffix("_bytes").unwrap_or(key)
}

fn cell(key: &str, value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(s) if s.is_empty() => "-".to_owned(),
        Value::String(s) => printable(s),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(n) => match n.as_u64().filter(|_| key.ends_with("_bytes")) {
            Some(bytes) => size::human_exact(bytes),
            None => n.to_string(),
        },
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(|v| cell("", v)).collect::<Vec<_>>().join(","),
        Value::Object(fields) => {
            fields.iter().map(|(k, v)| format!("{k}={}", cell(k, v))).collect::<Vec<_>>().join(" ")
        }
    }
}

/// Text from outside never drives the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Block YAML (1.2). Strings are written as JSON strings, which YAML takes as they are.
pub fn yaml(value: &Value) -> String {
    let mut text = String::new();
    block(value, 0, &mut text);
    text
}

fn block(value: &Value, depth: usize, text: &mut String) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                let plain = key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                    && key.starts_with(|c: char| c.is_ascii_alphabetic());
                let key = if plain { key.clone() } else { Value::from(key.as_str()).to_string() };
                let _ = write!(text, "{pad}{key}:");
                nested(value, depth, text);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let _ = write!(text, "{pad}-");
                nested(item, depth, text);
            }
        }
        scalar => {
            let _ = writeln!(text, "{pad}{scalar}");
        }
    }
}

fn nested(value: &Value, depth: usize, text: &mut String) {
    let is_block = match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if is_block {
        text.push('\n');
        block(value, depth + 1, text);
    } else {
        let _ = writeln!(text, " {value}");
    }
}
