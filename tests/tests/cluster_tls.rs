//! A whole cluster over TLS: it works, under failures too, and whoever does not belong is refused in one
//! sentence that both sides' logs have.

use anyhow::{Context, Result, bail, ensure};
use gabion_common::net::{self, NetError};
use gabion_common::tls::{Role, Security, TlsFiles};
use gabion_proto::ids::{ClientId, ClusterId, Incarnation, OsdId};
use gabion_proto::msg::{Hello, Role as HelloRole};
use gabion_tests::cluster::Cluster;
use gabion_tests::mirror::Mirror;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const LOGGED_WITHIN: Duration = Duration::from_secs(20);

#[test]
fn a_cluster_over_tls() -> Result<()> {
    let cluster = Cluster::start_tls(3, 3)?;
    let before = cluster.daemons()?;
    let volume = cluster.volume("v", "16M")?;
    let mirror = Mirror::start(&volume.socket, "v", 16 << 20, 6);
    // Connections break and come back, and so does the leader.
    let osds = cluster.names("osd")?;
    cluster.kill(&osds[0], false)?;
    cluster.kill(&leader(&cluster)?, false)?;
    let report = mirror.finish()?;
    ensure!(report.writes > 0 && report.blocks > 0, "{report:?}");
    cluster.wait_clean(Duration::from_secs(120))?;

    strangers(&cluster)?;
    pretenders(&cluster)?;
    lonely_daemons(&cluster)?;

    // Nobody was hurt: whoever was not killed here is the same process.
    let killed = 2;
    let same = cluster.daemons()?.iter().zip(&before).filter(|(new, old)| new["pid"] == old["pid"]).count();
    ensure!(same == before.len() - killed, "{same} of {} processes are the same", before.len());
    Ok(())
}

fn leader(cluster: &Cluster) -> Result<String> {
    let daemons = cluster.daemons()?;
    let leader = daemons.iter().find(|d| d["leader"] == true).context("no leader")?;
    Ok(format!("monitor.{}", leader["id"].as_str().context("no id")?))
}

/// A config file of a client that names this cluster's monitors.
fn config(dir: &Path, monitors: &str, tls: Option<(&Path, &str)>) -> Result<PathBuf> {
    let mut text = format!("monitors = [\"{monitors}\"]\n");
    if let Some((files, role)) = tls {
        let file = |name: String| files.join(name).display().to_string();
        text += &format!(
            "[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
            file("ca.crt".into()),
            file(format!("{role}.crt")),
            file(format!("{role}.key"))
        );
    }
    let path = dir.join("client.toml");
    std::fs::write(&path, text)?;
    Ok(path)
}

fn refused(result: Result<String>, want: &str) -> Result<()> {
    let said = match result {
        Ok(said) => bail!("not refused, but answered {said}; wanted {want:?}"),
        Err(e) => e.to_string(),
    };
    ensure!(said.contains(want), "{said:?} does not say {want:?}");
    ensure!(said.lines().count() == 1, "more than one line: {said}");
    Ok(())
}

fn logged(cluster: &Cluster, daemon: &str, want: &str) -> Result<()> {
    let started = Instant::now();
    while !cluster.log(daemon)?.contains(want) {
        ensure!(started.elapsed() < LOGGED_WITHIN, "the log of {daemon} does not say {want:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Plain clients, and clients of another cluster's CA.
fn strangers(cluster: &Cluster) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let monitor = cluster.addr("monitor.1")?;
    let plain = config(dir.path(), &monitor, None)?;
    refused(
        cluster.run_by(&plain, &["status"]),
        "cannot be used: TLS: it speaks TLS, this process is configured without; see [tls] in client.toml",
    )?;
    logged(cluster, "monitor.1", "refusal=TLS: it does not speak TLS, this process does")?;

    let theirs = dir.path().join("theirs");
    let (ca, out) = (path(&dir.path().join("ca"))?, path(&theirs)?);
    cluster.run(&["ca", "create", &ca, "--cluster", "dev"])?;
    cluster.run(&["ca", "issue", "--ca", &ca, "admin", "mallory", "--out", &out])?;
    let foreign = config(dir.path(), &monitor, Some((&theirs, "admin")))?;
    refused(cluster.run_by(&foreign, &["status"]), "TLS: its certificate is not from this cluster's CA")?;
    // Who knows our CA's certificate, which is no secret, still has none of its own.
    std::fs::copy(cluster.dir().join("tls/ca.crt"), theirs.join("ca.crt"))?;
    refused(cluster.run_by(&foreign, &["status"]), "this certificate is not from the CA")?;

    // The same on the data path.
    let osd = cluster.names("osd")?.remove(0);
    let addr = cluster.addr(&osd)?;
    std::fs::copy(dir.path().join("ca/ca.crt"), theirs.join("ca.crt"))?;
    let files = |name: &str| theirs.join(name);
    let files = TlsFiles { ca: files("ca.crt"), cert: files("admin.crt"), key: files("admin.key") };
    let foreign = Security::load(&files, &[Role::Admin])?;
    let client = HelloRole::Client { id: ClientId(77) };
    let error = hello(&addr, client, &Security::plain())?;
    ensure!(error.to_string() == "TLS: it speaks TLS, this process is configured without", "{error}");
    logged(cluster, &osd, "error=TLS: it does not speak TLS, this process does")?;
    let error = hello(&addr, client, &foreign)?;
    ensure!(error.to_string() == "TLS: its certificate is not from this cluster's CA", "{error}");
    logged(cluster, &osd, "error=TLS: it refuses this process's certificate: it is not from its CA")
}

/// Certificates of this cluster, used for what they are not.
fn pretenders(cluster: &Cluster) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let monitor = cluster.addr("monitor.1")?;
    let ours = cluster.dir().join("tls");
    let viewer = config(dir.path(), &monitor, Some((&ours, "viewer")))?;
    cluster.run_by(&viewer, &["status"])?;
    cluster.run_by(&viewer, &["rebuild", "status"])?;
    refused(
        cluster.run_by(&viewer, &["--yes", "volume", "rm", "v"]),
        "the certificate is of viewer dev of cluster dev, which may not call RemoveVolume",
    )?;
    // The command takes no daemon's certificate.
    let gateway = config(dir.path(), &monitor, Some((&ours, "gateway")))?;
    refused(
        cluster.run_by(&gateway, &["status"]),
        "is of gateway dev of cluster dev, wanted is one of role admin",
    )?;

    let osd = cluster.names("osd")?.remove(0);
    let addr = cluster.addr(&osd)?;
    let files = |role: &str| TlsFiles {
        ca: ours.join("ca.crt"),
        cert: ours.join(format!("{role}.crt")),
        key: ours.join(format!("{role}.key")),
    };
    let gateway = Security::load(&files("gateway"), &[Role::Gateway])?;
    let pretender = HelloRole::Osd { id: OsdId(1), incarnation: Incarnation(1) };
    let error = hello(&addr, pretender, &gateway)?;
    ensure!(
        error.to_string().contains("is of gateway dev of cluster dev, which may not be an OSD"),
        "{error}"
    );
    logged(cluster, &osd, "which may not be an OSD here")
}

/// Daemons that are configured wrongly say so and end.
fn lonely_daemons(cluster: &Cluster) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let monitor = cluster.addr("monitor.1")?;
    let data = path(&dir.path().join("osd"))?;
    let ours = cluster.dir().join("tls");
    let file = |name: &str| path(&ours.join(name));
    let format = ["format", "--data-dir", &data, "--size", "512M", "--host", "h", "--monitors", &monitor];
    let daemon = |name: &str, args: &[&str], want: &str| -> Result<()> {
        let out = Command::new(cluster.binary(name)).args(args).output()?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.code() == Some(1) && said.contains(want), "{args:?}: {}: {said}", out.status);
        ensure!(!said.contains("panicked"), "{said}");
        Ok(())
    };
    daemon("gabion-osd", &format, "TLS: it speaks TLS, this process is configured without")?;
    let tls = [
        "--tls-ca",
        &file("ca.crt")?,
        "--tls-cert",
        &file("gateway.crt")?,
        "--tls-key",
        &file("gateway.key")?,
    ];
    daemon("gabion-osd", &[&format[..], &tls].concat(), "wanted is one of role osd or admin")?;
    let open = ["--listen", "0.0.0.0:0", "--data-dir", &data];
    let exposed = "refusing to listen on 0.0.0.0:0 without TLS";
    daemon("gabion-monitor", &[&open[..], &["--bootstrap"]].concat(), exposed)?;
    let run = [&["run"], &open[..], &["--host", "h", "--monitors", &monitor]].concat();
    daemon("gabion-osd", &run, exposed)?;
    // It goes on to where it has no disk.
    daemon("gabion-osd", &[&run[..], &["--insecure"]].concat(), "INSECURE: serving without TLS")
}

/// What comes of a hello to the OSD at `addr`.
fn hello(addr: &str, role: HelloRole, security: &Security) -> Result<NetError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let hello = Hello { cluster: ClusterId([9; 16]), role, refusal: None };
    // Of no cluster: a certificate is looked at before the cluster's id.
    match runtime.block_on(net::connect(addr, &hello, security)) {
        Ok(_) => bail!("{addr} takes it"),
        Err(error) => Ok(error),
    }
}

fn path(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path that is no text")
}
