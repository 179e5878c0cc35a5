//! The binary as scripts see it: exit status, one line on stderr, where the monitors come from.

use std::path::Path;
use std::process::{Command, Output};

fn gabion(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gabion"));
    command.current_dir(dir).env("HOME", dir).env_remove("GABION_CONFIG").env_remove("GABION_MONITORS");
    command
}

fn stderr(out: &Output) -> String {
    String::from_utf8(out.stderr.clone()).unwrap()
}

/// Refused: status 1 and one line that names all of `parts`.
fn assert_refused(out: &Output, parts: &[&str]) {
    let text = stderr(out);
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(out.stdout.is_empty());
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

fn write_config(path: &Path, monitors: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, format!("monitors = [{monitors}]\n")).unwrap();
}

#[test]
fn wrong_usage_is_2() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["nonsense"][..],
        &["osd", "show", "x"],
        &["pool", "create", "p"],
        &["pool", "create", "p", "--replicas", "3", "--ec", "4+2"],
        &["volume", "create", "v", "--size", "1.5G", "--pool", "p"],
        &["export", "add", "v"],
        &["-o", "xml", "status"],
        &["snapshot", "create", "v"],
        &["osd", "slow-policy", "--evict-after", "soon"],
        &["vm", "create", "v", "--cpus", "1", "--memory", "1G", "--disk", "d", "--cpu", "pentium"],
    ] {
        let out = gabion(dir.path()).args(args).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{args:?}: {}", stderr(&out));
    }
}

#[test]
fn a_host_is_checked_without_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let out = gabion(dir.path()).args(["-o", "json", "host", "check"]).output().unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let memory = |field: &str| answer[field].as_u64().unwrap();
    assert!(memory("cpus") > 0 && memory("memory_bytes") > memory("guest_memory_bytes"));
    assert!(!answer["engine_reason"].as_str().unwrap().is_empty());
    match answer["engine"].as_str().unwrap() {
        "native" => assert!(answer["kvm"] == "opens" && answer["virtualization"].is_string()),
        "qemu" => assert!(answer["qemu"].is_string()),
        "none" => {
            assert_eq!(out.status.code(), Some(1));
            return;
        }
        other => panic!("engine {other}"),
    }
    assert!(out.status.success());
}

#[test]
fn no_monitors_says_how_to_name_them() {
    let dir = tempfile::tempdir().unwrap();
    if Path::new("/etc/gabion/client.toml").exists() {
        return;
    }
    let out = gabion(dir.path()).arg("status").output().unwrap();
    assert_refused(&out, &["gabion dev up", "--monitors", "GABION_CONFIG"]);
}

#[test]
fn a_cluster_that_the_disk_cannot_hold_is_refused_before_it_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let out = gabion(dir.path()).args(["dev", "up", "--osds", "64", "--osd-size", "1000T"]).output().unwrap();
    assert_refused(&out, &["64 OSDs", "--osd-size"]);
}

#[test]
fn an_unreachable_monitor_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = gabion(dir.path()).args(["--monitors", "127.0.0.1:1", "pool", "ls"]).output().unwrap();
    assert_refused(&out, &["pool list", "127.0.0.1:1", "gabion dev up"]);
}

#[test]
fn the_nearest_config_wins() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    write_config(&at.join(".config/gabion/client.toml"), "\"127.0.0.1:2\"");
    let tries = || gabion(at).arg("status").output().unwrap();
    assert_refused(&tries(), &["127.0.0.1:2"]);
    write_config(&at.join(".gabion/client.toml"), "\"127.0.0.1:3\"");
    assert_refused(&tries(), &["127.0.0.1:3"]);
    let named = at.join("named.toml");
    write_config(&named, "\"127.0.0.1:4\"");
    let out = gabion(at).arg("status").env("GABION_CONFIG", &named).output().unwrap();
    assert_refused(&out, &["127.0.0.1:4"]);
    let out = gabion(at)
        .arg("status")
        .env("GABION_CONFIG", &named)
        .env("GABION_MONITORS", "127.0.0.1:5")
        .output()
        .unwrap();
    assert_refused(&out, &["127.0.0.1:5"]);
    let out = gabion(at)
        .args(["status", "--monitors", "127.0.0.1:6"])
        .env("GABION_MONITORS", "127.0.0.1:5")
        .output()
        .unwrap();
    assert_refused(&out, &["127.0.0.1:6"]);
}

#[test]
fn a_bad_config_names_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    for (text, part) in [
        ("monitors = []", "no monitors"),
        ("monitors = [\"localhost\"]", "localhost"),
        ("monitor = [\"127.0.0.1:1\"]", "monitor"),
        ("\0\u{ff}", "c.toml"),
    ] {
        std::fs::write(&path, text).unwrap();
        let out = gabion(dir.path()).arg("status").env("GABION_CONFIG", &path).output().unwrap();
        assert_refused(&out, &["c.toml", part]);
    }
    let missing = dir.path().join("missing.toml");
    let out = gabion(dir.path()).arg("status").env("GABION_CONFIG", &missing).output().unwrap();
    assert_refused(&out, &["missing.toml", "No such file"]);
}

#[test]
fn destroying_needs_yes() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = gabion(dir.path());
    command.args(["--monitors", "127.0.0.1:1", "volume", "rm", "v"]).stdin(std::process::Stdio::null());
    assert_refused(&command.output().unwrap(), &["volume v", "destroyed", "--yes"]);
}

#[test]
fn an_even_number_of_monitors_is_refused_clearly() {
    let dir = tempfile::tempdir().unwrap();
    for count in ["0", "2", "4", "7"] {
        let out = gabion(dir.path()).args(["dev", "up", "--monitors", count]).output().unwrap();
        assert_refused(&out, &["--monitors", count, "1, 3 or 5"]);
    }
    assert!(!dir.path().join(".gabion").exists());
}

#[test]
fn down_without_a_cluster_wipes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("precious"), "x").unwrap();
    let out = gabion(dir.path()).args(["dev", "down", "--wipe", "--dir", "."]).output().unwrap();
    assert_refused(&out, &["nothing is removed"]);
    assert!(dir.path().join("precious").exists());
}

#[test]
fn completions_know_the_verbs() {
    let dir = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let out = gabion(dir.path()).args(["completions", shell]).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success() && text.contains("reweight"), "{shell}");
    }
}
