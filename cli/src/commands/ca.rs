//! `gabion ca`: the cluster's certificate authority, offline. Needs no cluster.

use crate::args::CaVerb;
use crate::output::Out;
use anyhow::Result;
use gabion_common::tls::authority::{Authority, Request};
use serde_json::json;

pub fn run(out: &Out, verb: CaVerb) -> Result<()> {
    match verb {
        CaVerb::Create { dir, cluster, days } => {
            let authority = Authority::create(&dir, &cluster, days)?;
            let sentence = format!(
                "CA of cluster {} in {}: ca.crt goes to every node; keep ca.key where nobody else reads it, and a copy of it\nnext: gabion ca issue --ca {} ROLE NAME --out DIR",
                authority.cluster(),
                dir.display(),
                dir.display()
            );
            out.done(&sentence, json!({ "cluster": authority.cluster(), "dir": dir, "days": days }))
        }
        CaVerb::Issue { ca, role, name, addresses, out: dir, file, days, renew } => {
            let authority = Authority::open(&ca)?;
            let stem = file.unwrap_or_else(|| role.name().to_owned());
            let files = authority.issue_into(&dir, &stem, &Request { role, name, addresses, days }, renew)?;
            let sentence = format!(
                "certificate {} and key {} for {days} days, CA {}",
                files.cert.display(),
                files.key.display(),
                files.ca.display()
            );
            let value = json!({
                "role": role.name(),
                "ca": files.ca,
                "cert": files.cert,
                "key": files.key,
                "days": days,
            });
            out.done(&sentence, value)
        }
    }
}
