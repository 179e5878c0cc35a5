//! Every crate that is built in must carry a licence that `deny.toml` allows.
//!
//! Works without cargo-deny, from `cargo metadata` and the same list. A crate's licence is an SPDX
//! expression: one allowed branch of an OR is enough, all branches of an AND are needed. What does
//! not parse or carries no licence is refused.

use crate::step;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeSet;

#[derive(Deserialize)]
struct Policy {
    licenses: Allowed,
}
#[derive(Deserialize)]
struct Allowed {
    allow: BTreeSet<String>,
}
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}
#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

/// Judges all packages of the lock file; answers a line that counts them.
pub fn run() -> Result<String> {
    let path = step::top().join("deny.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let policy: Policy = toml::from_str(&text).context("deny.toml")?;
    let bytes = step::output(step::cargo(&["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Metadata = serde_json::from_slice(&bytes).context("output of cargo metadata")?;
    let mut refused = Vec::new();
    for p in &metadata.packages {
        let licence = p.license.as_deref().unwrap_or("");
        if !allowed(licence, &policy.licenses.allow) {
            refused.push(format!("{} {}: {licence:?}", p.name, p.version));
        }
    }
    if !refused.is_empty() {
        bail!("licences that deny.toml does not allow:\n  {}", refused.join("\n  "));
    }
    Ok(format!("{} packages, all licences allowed", metadata.packages.len()))
}

/// Whether an SPDX expression (or the older `A/B`, which means OR) can be satisfied from `allow`.
fn allowed(expression: &str, allow: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let ok = any_of(&tokens, &mut at, allow);
    at == tokens.len() && ok == Some(true)
}

fn any_of(tokens: &[&str], at: &mut usize, allow: &BTreeSet<String>) -> Option<bool> {
    let mut ok = all_of(tokens, at, allow)?;
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        ok |= all_of(tokens, at, allow)?;
    }
    Some(ok)
}

fn all_of(tokens: &[&str], at: &mut usize, allow: &BTreeSet<String>) -> Option<bool> {
    let mut ok = one(tokens, at, allow)?;
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        ok &= one(tokens, at, allow)?;
    }
    Some(ok)
}

/// A licence, one with an exception, or an expression in parentheses. `None`: malformed.
fn one(tokens: &[&str], at: &mut usize, allow: &BTreeSet<String>) -> Option<bool> {
    let token = *tokens.get(*at)?;
    *at += 1;
    match token {
        "(" => {
            let ok = any_of(tokens, at, allow)?;
            (tokens.get(*at) == Some(&")")).then(|| *at += 1)?;
            Some(ok)
        }
        ")" | "OR" | "AND" | "WITH" => None,
        licence if tokens.get(*at) == Some(&"WITH") => {
            let exception = tokens.get(*at + 1)?;
            *at += 2;
            // An exception only ever grants more, so the plain licence is enough.
            Some(allow.contains(licence) || allow.contains(&format!("{licence} WITH {exception}")))
        }
        licence => Some(allow.contains(licence)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_judged() {
        let allow: BTreeSet<String> = ["MIT", "Apache-2.0", "Unicode-3.0"].map(String::from).into();
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "GPL-3.0/MIT",
            "Apache-2.0 WITH LLVM-exception",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
            "GPL-2.0 OR MIT AND Apache-2.0",
        ] {
            assert!(allowed(good, &allow), "{good}");
        }
        for bad in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT OR Apache-2.0) AND GPL-3.0",
            "MIT MIT",
            "(MIT",
            "MIT)",
            "MIT OR",
            "OR",
            "GPL-2.0 WITH Classpath-exception-2.0",
        ] {
            assert!(!allowed(bad, &allow), "{bad}");
        }
    }
}
