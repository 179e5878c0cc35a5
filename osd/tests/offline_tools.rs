//! The offline tools as people and scripts call them: what they print, and their exit status.

use gabion_osd::store::{self, Identity, PgMeta, Store, Txn, TxnOp};
use gabion_proto::blocks::Content;
use gabion_proto::ids::*;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

const IDENTITY: Identity = Identity { cluster: ClusterId([1; 16]), osd: OsdId(3), disk: ClusterId([2; 16]) };
const PG: PgId = PgId { pool: PoolId(1), index: 0x1f };
const OBJECT: ObjectId = ObjectId { volume: VolumeId(10), index: 16, layer: LayerId(0) };

fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_gabion-osd")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[track_caller]
fn ok(args: &[&str]) -> String {
    let (code, out, err) = run(args);
    assert_eq!(code, Some(0), "{args:?}: {out}{err}");
    out
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    serde_json::from_str(&ok(&[args, &["-o", "json"]].concat())).unwrap()
}

fn make(dir: &Path) {
    store::format(dir, 64 << 20, IDENTITY).unwrap();
    let mut store = store::open(dir).unwrap();
    let version = |n| Version::new(Epoch(4), n).unwrap();
    let data = Content::data(0, vec![7; 32 * 4096].into());
    let small = Content::data(2, vec![8; 4096].into());
    let ops = vec![
        TxnOp::SetMeta(PgMeta { promised: Epoch(5), activated: Epoch(4), shard: None, pg_count: 0 }),
        TxnOp::Write { object: OBJECT, prev: Version::ZERO, version: version(1), content: data },
        TxnOp::Write { object: OBJECT, prev: version(1), version: version(2), content: small },
    ];
    assert_eq!(store.commit(vec![Txn { pg: PG, ops, reserve: false }]), [Ok(())]);
}

#[test]
fn what_is_shown() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("osd");
    make(&data);
    let dir = data.to_str().unwrap();

    let info = json(&["info", dir]);
    assert_eq!((info["osd"].as_u64(), info["format_version"].as_u64()), (Some(3), Some(4)));
    assert!(ok(&["info", dir]).contains("osd.3"));

    let shown = json(&["dump", "a.10.0", "--data-dir", dir, "--blocks"]);
    let object = &shown["objects"][0];
    assert_eq!((object["pg"].as_str(), object["version"].as_str()), (Some("1.1f"), Some("4'2")));
    assert_eq!((object["promised"].as_u64(), object["activated"].as_u64()), (Some(5), Some(4)));
    let content = &object["committed"];
    assert_eq!(content["data"], serde_json::json!([{"first": 0, "last": 31}]));
    assert_eq!(
        (content["bad_blocks"].as_u64(), &content["chunks"][0]["journal_blocks"]),
        (Some(0), &1.into())
    );
    let blocks = content["blocks"].as_array().unwrap();
    assert_eq!((blocks.len(), &blocks[2]["at"], &blocks[3]["at"]), (32, &"journal".into(), &"slot".into()));
    let text = ok(&["dump", "a.10.0", "--data-dir", dir, "--pg", "1.1f"]);
    assert!(text.contains("version  4'2") && text.contains("32 blocks: 0-31"), "{text}");

    let listed = json(&["dump", "--data-dir", dir]);
    assert_eq!(
        (&listed["objects"][0]["object"], &listed["groups"][0]["pg"]),
        (&"a.10.0".into(), &"1.1f".into())
    );
    let text = ok(&["dump", "--list", "--data-dir", dir]);
    assert_eq!(text, "group 1.1f: promised interval 5, activated in 4\n1.1f a.10.0 4'2\n");
    assert_eq!(ok(&["dump", "--list", "--data-dir", dir, "--pg", "1.0"]), "");
    for wrong in [&["dump", "a.10", "--data-dir", dir][..], &["dump", "--blocks", "--data-dir", dir]] {
        assert_eq!(run(wrong).0, Some(2), "{wrong:?}");
    }
    let (code, _, err) = run(&["dump", "a.11.0", "--data-dir", dir]);
    assert!(code == Some(1) && err.contains("knows nothing of object a.11.0"), "{err}");

    let report = json(&["fsck", "--deep", dir]);
    assert_eq!((report["objects"].as_u64(), report["problem_count"].as_u64()), (Some(1), Some(0)));
}

#[test]
fn damage_ends_with_status_1() {
    let temp = tempfile::tempdir().unwrap();
    let data = temp.path().join("osd");
    make(&data);
    // In its place for good: a chunk that only the last record of the journal vouches for would not count.
    assert_eq!(store::open(&data).unwrap().background(), Ok(false));
    let dir = data.to_str().unwrap();
    let offset =
        json(&["dump", "a.10.0", "--data-dir", dir])["objects"][0]["committed"]["chunks"][0]["offset_bytes"]
            .as_u64()
            .unwrap();
    let block = data.join("block");
    let mut bytes = std::fs::read(&block).unwrap();
    bytes[offset as usize + 5 * 4096 + 100] ^= 1;
    std::fs::write(&block, bytes).unwrap();
    ok(&["fsck", dir]);
    let (code, out, _) = run(&["fsck", "--deep", dir]);
    assert!(code == Some(1) && out.contains("block 5, in slot") && out.contains("1 problems"), "{out}");
    assert!(ok(&["dump", "a.10.0", "--data-dir", dir]).contains("1 BAD blocks"));
}

#[test]
fn a_group_moves_to_a_new_disk_of_the_same_osd() {
    let temp = tempfile::tempdir().unwrap();
    let (old, new) = (temp.path().join("old"), temp.path().join("new"));
    make(&old);
    let (old, new) = (old.to_str().unwrap(), new.to_str().unwrap());
    let file = temp.path().join("group");
    let file = file.to_str().unwrap();
    let shown = ok(&["export", "--data-dir", old, "--pg", "1.1f", "--retire", file]);
    assert!(shown.contains("group 1.1f of osd.3") && shown.contains("32 blocks"), "{shown}");
    let (code, _, err) = run(&["import", "--data-dir", new, file]);
    assert!(code == Some(1) && err.contains("--as-osd 3"), "{err}");
    let done = json(&["import", "--data-dir", new, "--as-osd", "osd.3", "--size", "64M", file]);
    assert_eq!((done["pg"].as_str(), done["objects"].as_u64()), (Some("1.1f"), Some(1)));
    let (code, _, err) = run(&["import", "--data-dir", new, file]);
    assert!(code == Some(1) && err.contains("has group 1.1f already"), "{err}");
    assert!(ok(&["import", "--abort", "--data-dir", new]).contains("no unfinished import"));
    assert_eq!(
        json(&["dump", "a.10.0", "--data-dir", new])["objects"][0]["committed"]["digest"],
        json(&["dump", "a.10.0", "--data-dir", old])["objects"][0]["committed"]["digest"]
    );
    ok(&["fsck", "--deep", new]);
    assert_eq!(run(&["import", "--data-dir", new]).0, Some(2), "no file and no --abort");
}
