use super::super::*;
use gabion_proto::map::{Attachment, FailureDomain, Redundancy};

const MIB: u64 = 1 << 20;

fn cluster() -> MonitorState {
    let mut state = MonitorState::default();
    state.apply(0, Command::Bootstrap { cluster: ClusterId([9; 16]) }).unwrap();
    let pool = Command::CreatePool {
        name: "p".into(),
        redundancy: Redundancy::Replicated { size: 3 },
        min_size: 0,
        failure_domain: FailureDomain::Host,
        pg_count: 1,
        object_bytes: 0,
    };
    state.apply(0, pool).unwrap();
    create(&mut state, "v");
    state
}

fn create(state: &mut MonitorState, name: &str) {
    state
        .apply(0, Command::CreateVolume { name: name.into(), pool: "p".into(), size_bytes: 8 * MIB })
        .unwrap();
}

fn run(state: &mut MonitorState, command: Command) -> CommandResult {
    let (map, before) = (state.map.clone(), state.clone());
    let result = state.apply(7, command);
    if state.map != map {
        assert_eq!(state.map.epoch, map.epoch.next());
    }
    if result.is_err() {
        assert_eq!(*state, before, "a refusal changes nothing");
    }
    result
}

fn refusal(state: &mut MonitorState, command: Command) -> String {
    run(state, command).unwrap_err().message
}

fn snapshot(state: &mut MonitorState, name: &str) -> SnapshotId {
    match run(state, Command::BeginSnapshot { snapshot: name.into() }) {
        Ok(Reply::Snapshot(id)) => id,
        other => panic!("{other:?}"),
    }
}

fn clone(state: &mut MonitorState, snapshot: &str, name: &str) {
    run(state, Command::CloneVolume { snapshot: snapshot.into(), name: name.into() }).unwrap();
}

fn remove(name: &str) -> Command {
    Command::RemoveVolume { name: name.into() }
}

fn remove_snapshot(name: &str) -> Command {
    Command::RemoveSnapshot { snapshot: name.into() }
}

fn layers(state: &MonitorState, name: &str) -> Vec<u32> {
    let layers = match name.contains('@') {
        true => &state.snapshots[&state.snapshot_named(name).unwrap()].layers,
        false => &state.volumes[&state.volume_named(name).unwrap()].layers,
    };
    layers.iter().map(|l| l.0).collect()
}

fn attach(state: &mut MonitorState, volume: &str) -> (VolumeId, ClientId, Session, Generation) {
    let Ok(Reply::Session { client, session }) =
        run(state, Command::OpenSession { client: ClientId(1), host: "h".into() })
    else {
        panic!("no session")
    };
    let attach = Command::AttachVolume { volume: volume.into(), client, session, take_over: false };
    match run(state, attach) {
        Ok(Reply::Attached { volume, generation, .. }) => (volume, client, session, generation),
        other => panic!("{other:?}"),
    }
}

fn seal(holder: (VolumeId, ClientId, Session, Generation), snapshot: SnapshotId) -> Command {
    let (volume, client, session, generation) = holder;
    Command::SealSnapshot { volume, client, session, generation, snapshot }
}

fn held(state: &MonitorState, volume: VolumeId) -> Attachment {
    state.map.attachments[&volume].clone()
}

#[test]
fn a_volume_in_use_changes_layers_at_its_holders_word_only() {
    let mut state = cluster();
    let holder = attach(&mut state, "v");
    let id = snapshot(&mut state, "v@a");
    assert_eq!((held(&state, holder.0).top, held(&state, holder.0).snapshot), (LayerId(0), Some(id)));
    assert!(state.snapshots.is_empty());
    assert!(refusal(&mut state, Command::BeginSnapshot { snapshot: "v@b".into() }).contains("being taken"));
    let foreign = (holder.0, holder.1, holder.2, Generation(99));
    assert!(refusal(&mut state, seal(foreign, id)).contains("not attached"));
    let epoch = state.map.epoch;
    run(&mut state, seal(holder, id)).unwrap();
    assert_eq!(state.map.epoch, epoch.next());
    let now = held(&state, holder.0);
    assert_eq!((now.top, now.snapshot), (LayerId(1), None));
    assert_eq!(layers(&state, "v"), [1, 0]);
    assert_eq!(layers(&state, "v@a"), [0]);
    assert_eq!(state.snapshots[&id].unix_ms, 7);
    // Said again it changes nothing, also when the next snapshot is under way.
    let next = snapshot(&mut state, "v@b");
    let before = state.clone();
    run(&mut state, seal(holder, id)).unwrap();
    assert_eq!(state, before);
    run(&mut state, Command::GiveUpSnapshot { snapshot: next }).unwrap();
    run(&mut state, seal(holder, next)).unwrap();
    assert_eq!(layers(&state, "v"), [1, 0]);
    assert!(held(&state, holder.0).snapshot.is_none());
}

#[test]
fn a_restarted_holder_is_asked_again_and_another_one_is_not() {
    let mut state = cluster();
    let before = attach(&mut state, "v");
    let id = snapshot(&mut state, "v@a");
    let after = attach(&mut state, "v");
    assert_eq!(before.3, after.3);
    assert_eq!(held(&state, after.0).snapshot, Some(id));
    assert!(refusal(&mut state, seal(before, id)).contains("not attached"));
    run(&mut state, seal(after, id)).unwrap();
    assert_eq!(layers(&state, "v@a"), [0]);
    run(&mut state, remove_snapshot("v@a")).unwrap();
    let id = snapshot(&mut state, "v@a");
    let Ok(Reply::Session { client, session }) =
        run(&mut state, Command::OpenSession { client: ClientId(2), host: "i".into() })
    else {
        panic!("no session")
    };
    let take_over = Command::AttachVolume { volume: "v".into(), client, session, take_over: true };
    run(&mut state, take_over).unwrap();
    assert!(held(&state, after.0).snapshot.is_none());
    assert!(refusal(&mut state, seal(after, id)).contains("not attached"));
    assert!(state.snapshots.is_empty());
    run(&mut state, Command::FenceVolume { volume: "v".into() }).unwrap();
    let after = attach(&mut state, "v");
    snapshot(&mut state, "v@a");
    run(&mut state, Command::DetachVolume { volume: "v".into(), client: after.1, generation: after.3 })
        .unwrap();
    snapshot(&mut state, "v@a");
    assert_eq!(layers(&state, "v@a"), [1, 0]);
}

#[test]
fn what_something_is_made_of_stays_and_what_nothing_is_made_of_goes() {
    let mut state = cluster();
    snapshot(&mut state, "v@a");
    clone(&mut state, "v@a", "c");
    snapshot(&mut state, "c@x");
    clone(&mut state, "c@x", "d");
    assert_eq!(layers(&state, "d"), [4, 2, 0]);
    let root = state.volume_named("v").unwrap();
    assert!(state.volumes.values().all(|v| v.root == root));
    assert!(refusal(&mut state, remove("v")).contains("snapshots a"));
    assert!(refusal(&mut state, remove_snapshot("v@a")).contains("clones c"));
    assert!(refusal(&mut state, remove_snapshot("c@x")).contains("clones d"));
    assert!(refusal(&mut state, remove_snapshot("c@y")).contains("c@y"));
    assert!(refusal(&mut state, remove_snapshot("c")).contains("VOLUME@NAME"));
    run(&mut state, remove("d")).unwrap();
    assert_eq!(state.map.removed_layers, [(root, LayerId(4))].into());
    run(&mut state, remove_snapshot("c@x")).unwrap();
    assert_eq!(state.map.removed_layers.len(), 1, "c is still made of it");
    run(&mut state, remove("c")).unwrap();
    assert_eq!(state.map.removed_layers, [4, 2, 3].map(|l| (root, LayerId(l))).into());
    run(&mut state, remove_snapshot("v@a")).unwrap();
    run(&mut state, remove("v")).unwrap();
    assert_eq!(state.map.removed_volumes, [root].into());
    assert!(state.map.removed_layers.is_empty() && state.snapshots.is_empty() && state.roots.is_empty());
}

/// A snapshot stays readable when the volume goes back to an older one.
#[test]
fn rollback_drops_what_was_written_since_and_nothing_else() {
    let mut state = cluster();
    let root = state.volume_named("v").unwrap();
    snapshot(&mut state, "v@a");
    run(&mut state, Command::ResizeVolume { name: "v".into(), size_bytes: 16 * MIB }).unwrap();
    snapshot(&mut state, "v@b");
    let holder = attach(&mut state, "v");
    let rollback = Command::RollbackVolume { snapshot: "v@a".into() };
    assert!(refusal(&mut state, rollback.clone()).contains("attached on host h"));
    let detach = Command::DetachVolume { volume: "v".into(), client: holder.1, generation: holder.3 };
    run(&mut state, detach).unwrap();
    run(&mut state, rollback).unwrap();
    assert_eq!(layers(&state, "v"), [3, 0]);
    assert_eq!(layers(&state, "v@b"), [1, 0]);
    assert_eq!(state.volumes[&root].size_bytes, 8 * MIB);
    assert_eq!(state.map.removed_layers, [(root, LayerId(2))].into());
    run(&mut state, remove_snapshot("v@b")).unwrap();
    assert_eq!(state.map.removed_layers, [1, 2].map(|l| (root, LayerId(l))).into());
    // Numbers of layers are not given twice.
    snapshot(&mut state, "v@c");
    assert_eq!(layers(&state, "v"), [4, 3, 0]);
}

#[test]
fn volumes_grow_and_do_not_shrink() {
    let mut state = cluster();
    let holder = attach(&mut state, "v");
    let resize = |size_bytes| Command::ResizeVolume { name: "v".into(), size_bytes };
    assert!(refusal(&mut state, resize(4 * MIB)).contains("does not shrink"));
    assert!(refusal(&mut state, resize(8 * MIB + 1)).contains("multiple"));
    let epoch = state.map.epoch;
    run(&mut state, resize(8 * MIB)).unwrap();
    assert_eq!(state.map.epoch, epoch);
    run(&mut state, resize(9 * MIB)).unwrap();
    assert_eq!(held(&state, holder.0).size_bytes, 9 * MIB);
}

#[test]
fn snapshots_of_snapshots_and_bad_names_are_refused() {
    let mut state = cluster();
    snapshot(&mut state, "v@a");
    for name in ["v@a", "v@", "v@b@c", "v@b/c", "w@a", "v"] {
        refusal(&mut state, Command::BeginSnapshot { snapshot: name.into() });
    }
    let clone =
        |snapshot: &str, name: &str| Command::CloneVolume { snapshot: snapshot.into(), name: name.into() };
    for (from, to) in [("v@a", "v"), ("v@a", "x@y"), ("v@b", "c"), ("v", "c")] {
        refusal(&mut state, clone(from, to));
    }
    // A snapshot is exported on any host, and stays while it is.
    let export = |host: &str| Command::AddExport {
        volume: "v@a".into(),
        kind: ExportKind::Nbd,
        read_only: false,
        host: host.into(),
    };
    run(&mut state, export("h1")).unwrap();
    let Ok(Reply::Export(second)) = run(&mut state, export("h2")) else { panic!("not exported") };
    refusal(&mut state, export("h2"));
    assert!(state.exports.values().all(|e| e.read_only));
    assert!(refusal(&mut state, remove_snapshot("v@a")).contains("export"));
    run(&mut state, Command::RollbackVolume { snapshot: "v@a".into() }).unwrap();
    run(&mut state, Command::RemoveExport { id: second }).unwrap();
}
