//! Three monitors under a verified write load: each is killed in turn, the leader first, and nobody
//! notices; with two of them gone I/O waits, the command says so, and all goes on when one returns.

use anyhow::{Context, Result, ensure};
use gabion_tests::cluster::Cluster;
use gabion_tests::workload::Fio;
use serde_json::Value;
use std::time::{Duration, Instant};

const WITHIN: Duration = Duration::from_secs(60);

fn leader(cluster: &Cluster) -> Result<String> {
    let monitors = cluster.json(&["monitor", "ls"])?;
    let all = monitors["monitors"].as_array().context("no list of monitors")?;
    let leader = all.iter().find(|m| m["leader"] == true).context("no leader")?;
    Ok(format!("monitor.{}", leader["id"]))
}

fn all_up(status: &Value) -> Option<bool> {
    let monitors = status["monitors"].as_array()?;
    Some(status["quorum"] == true && monitors.len() == 3 && monitors.iter().all(|m| m["up"] == true))
}

fn has_check(status: &Value, code: &str) -> Option<bool> {
    Some(status["health"]["checks"].as_array()?.iter().any(|c| c["code"] == code))
}

/// A verified load that is under way.
fn load(cluster: &Cluster, uri: &str) -> Result<Fio> {
    let fio = Fio::verified_write(uri, "8M", 200)?;
    let busy = |s: &Value| Some(s["client_io"]["writes_per_s"].as_f64()? > 0.0);
    cluster.wait_for("writes arrive", WITHIN, busy)?;
    Ok(fio)
}

#[test]
fn monitors_are_killed_under_verified_writes() -> Result<()> {
    let cluster = Cluster::start_with(3, 4, "512M")?;
    let uri = cluster.volume("v", "8M")?.uri;

    let first = leader(&cluster)?;
    let mut victims = vec![first.clone()];
    victims.extend(cluster.names("monitor")?.into_iter().filter(|m| *m != first));
    for (n, victim) in victims.iter().enumerate() {
        let mut fio = load(&cluster, &uri)?;
        cluster.kill(victim, true)?;
        ensure!(fio.is_running()?, "fio ended before {victim} was killed");
        // Operators notice at most a moment's wait.
        cluster.run(&["volume", "create", &format!("n{n}"), "--size", "1M", "--pool", "p"])?;
        cluster.wait_for("health names it", WITHIN, |s| {
            let details =
                |c: &Value| c["code"] == "MON_DOWN" && c["details"].to_string().contains(victim.as_str());
            Some(s["quorum"] == true && s["health"]["checks"].as_array()?.iter().any(details))
        })?;
        cluster.revive(victim)?;
        cluster.wait_for("three monitors up", WITHIN, all_up)?;
        fio.finish().with_context(|| format!("while {victim} was killed"))?;
    }
    let volumes = cluster.json(&["volume", "ls"])?;
    let names: Vec<_> =
        volumes["volumes"].as_array().context("no volumes")?.iter().map(|v| &v["name"]).collect();
    ensure!(names.len() == 4, "v and one for each monitor, not {names:?}");

    // Two of three gone.
    let mut fio = load(&cluster, &uri)?;
    let last = leader(&cluster)?;
    let gone: Vec<String> = cluster.names("monitor")?.into_iter().filter(|m| *m != last).collect();
    for monitor in &gone {
        cluster.kill(monitor, true)?;
    }
    cluster.wait_for("status says that there is no quorum", WITHIN, |s| {
        Some(s["quorum"] == false && has_check(s, "MON_QUORUM_LOST")?)
    })?;
    let asked = Instant::now();
    let refused = cluster.run(&["volume", "create", "never", "--size", "1M", "--pool", "p"]);
    let refused = format!("{:#}", refused.err().context("a change without a quorum was accepted")?);
    ensure!(refused.contains("no quorum") && refused.contains("1 of 3"), "{refused}");
    ensure!(asked.elapsed() < WITHIN, "the refusal took {:?}", asked.elapsed());
    ensure!(fio.is_running()?, "fio ended although nothing can be acknowledged without leases");
    cluster.revive(&gone[0])?;
    fio.finish().context("after a monitor came back")?;
    cluster.run(&["volume", "create", "again", "--size", "1M", "--pool", "p"])?;
    cluster.revive(&gone[1])?;
    cluster.wait_for("three monitors up", WITHIN, all_up)?;
    cluster.wait_clean(WITHIN)
}
