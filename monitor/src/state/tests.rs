use super::*;
use gabion_proto::map::{FailureDomain, Redundancy};
use proptest::prelude::*;

pub(crate) fn boot(state: &mut MonitorState, n: u8) -> CommandResult {
    state.apply(
        0,
        Command::BootOsd {
            osd: OsdId(u32::from(n)),
            disk: ClusterId([n + 1; 16]),
            addr: format!("127.0.0.1:{}", 7000 + u16::from(n)),
            host: format!("h{n}"),
            rack: String::new(),
            capacity_bytes: 1 << 40,
        },
    )
}

pub(crate) fn down(state: &mut MonitorState, n: u32) {
    let incarnation = state.map.osds[&OsdId(n)].incarnation;
    state.apply(0, Command::MarkDown { osd: OsdId(n), incarnation, reason: "test".into() }).unwrap();
}

pub(crate) fn cluster(osds: u8, pgs: u32) -> MonitorState {
    let mut state = MonitorState::default();
    state.apply(0, Command::Bootstrap { cluster: ClusterId([9; 16]) }).unwrap();
    for n in 0..osds {
        let disk = ClusterId([n + 1; 16]);
        let (host, rack) = (format!("h{n}"), String::new());
        let reply = state.apply(0, Command::AddOsd { disk, host, rack, weight: 0, capacity_bytes: 1 << 40 });
        assert_eq!(reply, Ok(Reply::Osd(OsdId(u32::from(n)))));
        boot(&mut state, n).unwrap();
    }
    state.apply(0, pool("p", 3, pgs)).unwrap();
    state
}

pub(super) fn pool(name: &str, size: u32, pg_count: u32) -> Command {
    Command::CreatePool {
        name: name.into(),
        redundancy: Redundancy::Replicated { size },
        min_size: 0,
        failure_domain: FailureDomain::Host,
        pg_count,
        object_bytes: 0,
    }
}

pub(crate) fn pg(index: u32) -> PgId {
    PgId { pool: PoolId(1), index }
}

pub(super) fn report(state: &MonitorState, pg: PgId) -> (OsdId, Incarnation, Epoch) {
    let record = &state.map.pgs[&pg];
    let osd = record.primary.unwrap();
    (osd, state.map.osds[&osd].incarnation, record.interval)
}

pub(crate) fn activate(state: &mut MonitorState, pg: PgId) {
    let (osd, incarnation, interval) = report(state, pg);
    state.apply(0, Command::PgActivated { osd, incarnation, pg, interval }).unwrap();
}

pub(crate) fn clean(state: &mut MonitorState, pg: PgId) {
    let (osd, incarnation, interval) = report(state, pg);
    state.apply(0, Command::PgClean { osd, incarnation, pg, interval }).unwrap();
}

#[test]
fn adding_a_disk_again_answers_the_same_id() {
    let mut state = cluster(2, 1);
    let epoch = state.map.epoch;
    let again = Command::AddOsd {
        disk: ClusterId([1; 16]),
        host: "h0".into(),
        rack: String::new(),
        weight: 0,
        capacity_bytes: 1 << 40,
    };
    assert_eq!(state.apply(0, again), Ok(Reply::Osd(OsdId(0))));
    assert_eq!(state.map.epoch, epoch);
    assert_eq!(state.map.osds[&OsdId(0)].weight, 65_536);
}

#[test]
fn another_disk_cannot_boot_under_an_id() {
    let mut state = cluster(1, 1);
    let refused = state.apply(
        0,
        Command::BootOsd {
            osd: OsdId(0),
            disk: ClusterId([77; 16]),
            addr: "127.0.0.1:1".into(),
            host: "h0".into(),
            rack: String::new(),
            capacity_bytes: 0,
        },
    );
    assert_eq!(refused.unwrap_err().kind, RefusalKind::Precondition);
}

#[test]
fn an_interval_that_never_activated_is_not_remembered() {
    let mut state = cluster(3, 1);
    let victim = state.map.pgs[&pg(0)].acting[2];
    down(&mut state, victim.0);
    assert_eq!(state.map.pgs[&pg(0)].past, vec![]);
    assert_eq!(state.map.pgs[&pg(0)].acting.len(), 2);
    assert!(state.map.pgs[&pg(0)].up.contains(&victim));
}

#[test]
fn activated_intervals_pile_up_until_clean() {
    let mut state = cluster(3, 1);
    activate(&mut state, pg(0));
    let first = state.map.pgs[&pg(0)].clone();
    let (primary, victim) = (first.acting[0], first.acting[2]);
    down(&mut state, victim.0);
    let second = state.map.pgs[&pg(0)].clone();
    assert_eq!(second.past.len(), 1);
    assert_eq!(second.past[0].interval, first.interval);
    assert_eq!((second.interval, second.activated, second.clean), (state.map.epoch, false, false));
    activate(&mut state, pg(0));
    boot(&mut state, victim.0 as u8).unwrap();
    let third = state.map.pgs[&pg(0)].clone();
    assert_eq!(third.past.iter().map(|p| p.interval).collect::<Vec<_>>(), [first.interval, second.interval]);
    assert_eq!(third.primary, Some(primary), "who came back is not the primary");
    activate(&mut state, pg(0));
    clean(&mut state, pg(0));
    assert_eq!(state.map.pgs[&pg(0)].past, vec![]);
    // After clean only that interval matters.
    down(&mut state, victim.0);
    let past = &state.map.pgs[&pg(0)].past;
    assert_eq!(past.iter().map(|p| p.interval).collect::<Vec<_>>(), [third.interval]);
}

#[test]
fn a_fresh_member_never_leads_while_an_old_one_acts() {
    let mut state = cluster(4, 16);
    for index in 0..16 {
        activate(&mut state, pg(index));
    }
    let before = state.map.pgs.clone();
    for n in 0..4 {
        down(&mut state, n);
        state.apply(0, Command::OutOsd { osd: OsdId(n), automatic: true }).unwrap();
        for (id, record) in &state.map.pgs {
            let primary = record.primary.unwrap();
            assert!(
                before[id].acting.contains(&primary),
                "{id}: {primary} was not in {:?}",
                before[id].acting
            );
        }
        boot(&mut state, n as u8).unwrap();
    }
}

#[test]
fn a_new_run_of_a_member_begins_an_interval() {
    let mut state = cluster(3, 1);
    activate(&mut state, pg(0));
    let before = state.map.pgs[&pg(0)].clone();
    boot(&mut state, before.acting[1].0 as u8).unwrap();
    let after = &state.map.pgs[&pg(0)];
    assert_eq!(after.acting, before.acting);
    assert!(after.interval > before.interval && !after.activated);
}

#[test]
fn min_size_begins_an_interval() {
    let mut state = cluster(3, 1);
    let before = state.map.pgs[&pg(0)].interval;
    state.apply(0, Command::SetPool { name: "p".into(), min_size: Some(1) }).unwrap();
    assert!(state.map.pgs[&pg(0)].interval > before);
}

#[test]
fn a_pool_gets_more_copies_and_fewer() {
    let mut state = cluster(4, 3);
    let set = |state: &mut MonitorState, replicas, min_size| {
        state.apply(0, Command::SetReplicas { name: "p".into(), replicas, min_size })
    };
    (0..3).for_each(|n| activate(&mut state, pg(n)));
    let three = state.map.pgs.clone();
    let refused = set(&mut state, 1, None).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Invalid, "min-size 2 of one copy: {refused}");
    set(&mut state, 2, None).unwrap();
    for (id, record) in &state.map.pgs {
        assert_eq!((record.up.len(), record.acting.len()), (2, 2));
        assert!(record.acting.iter().all(|o| three[id].acting.contains(o)), "nothing moves");
        assert!(!record.activated && record.interval > three[id].interval);
        assert_eq!(record.past.last().unwrap().acting, three[id].acting, "the third may still be needed");
    }
    (0..3).for_each(|n| activate(&mut state, pg(n)));
    let two = state.map.pgs.clone();
    set(&mut state, 4, Some(3)).unwrap();
    for (id, record) in &state.map.pgs {
        assert_eq!(record.acting.len(), 4);
        assert!(two[id].acting.contains(&record.primary.unwrap()), "whoever has the data leads");
    }
    assert_eq!(state.map.pools[&PoolId(1)].min_size, 3);
    let before = state.map.epoch;
    set(&mut state, 4, None).unwrap();
    assert_eq!(state.map.epoch, before, "nothing changed");
    assert_eq!(set(&mut state, 9, None).unwrap_err().kind, RefusalKind::Invalid);
}

#[test]
fn shards_do_not_change_in_number() {
    let mut state = cluster(4, 1);
    let create = Command::CreatePool {
        name: "e".into(),
        redundancy: Redundancy::Erasure { k: 2, m: 1 },
        min_size: 0,
        failure_domain: FailureDomain::Host,
        pg_count: 1,
        object_bytes: 0,
    };
    state.apply(0, create).unwrap();
    let before = state.clone();
    let change = Command::SetReplicas { name: "e".into(), replicas: 3, min_size: None };
    assert_eq!(state.apply(0, change).unwrap_err().kind, RefusalKind::Invalid);
    assert_eq!(state, before, "a refusal changes nothing");
}

#[test]
fn reports_of_the_wrong_interval_or_sender_are_refused() {
    let mut state = cluster(3, 1);
    let (osd, incarnation, interval) = report(&state, pg(0));
    let other = state.map.pgs[&pg(0)].acting[1];
    let wrong = [
        (other, state.map.osds[&other].incarnation, interval),
        (osd, Incarnation(incarnation.0 + 1), interval),
        (osd, incarnation, Epoch(interval.0 - 1)),
    ];
    let before = state.clone();
    for (osd, incarnation, interval) in wrong {
        for command in [
            Command::PgActivated { osd, incarnation, pg: pg(0), interval },
            Command::PgClean { osd, incarnation, pg: pg(0), interval },
        ] {
            assert_eq!(state.apply(0, command).unwrap_err().kind, RefusalKind::Aborted);
        }
    }
    let early = Command::PgClean { osd, incarnation, pg: pg(0), interval };
    assert_eq!(state.apply(0, early).unwrap_err().kind, RefusalKind::Precondition);
    assert_eq!(state, before, "a refusal changes nothing");
}

#[test]
fn too_few_members_cannot_activate() {
    let mut state = cluster(3, 1);
    let acting = state.map.pgs[&pg(0)].acting.clone();
    down(&mut state, acting[1].0);
    down(&mut state, acting[2].0);
    let (osd, incarnation, interval) = report(&state, pg(0));
    let refused = state.apply(0, Command::PgActivated { osd, incarnation, pg: pg(0), interval });
    assert_eq!(refused.unwrap_err().kind, RefusalKind::Precondition);
}

#[test]
fn a_suspect_is_left_out_until_it_gets_another_chance() {
    let mut state = cluster(3, 1);
    activate(&mut state, pg(0));
    let (osd, incarnation, interval) = report(&state, pg(0));
    let peer = state.map.pgs[&pg(0)].acting[1];
    let peer_incarnation = state.map.osds[&peer].incarnation;
    state
        .apply(0, Command::SuspectPeer { osd, incarnation, pg: pg(0), interval, peer, peer_incarnation })
        .unwrap();
    assert!(!state.map.pgs[&pg(0)].acting.contains(&peer));
    assert!(state.map.osds[&peer].up, "it is not declared dead");
    assert_eq!(state.map.pgs[&pg(0)].past.len(), 1);
    state.apply(0, Command::ClearSuspect { pg: pg(0), peer, peer_incarnation }).unwrap();
    assert!(state.map.pgs[&pg(0)].acting.contains(&peer));
}

fn suspect(state: &mut MonitorState, group: PgId, peer: OsdId) {
    let (osd, incarnation, interval) = report(state, group);
    let peer_incarnation = state.map.osds[&peer].incarnation;
    state
        .apply(0, Command::SuspectPeer { osd, incarnation, pg: group, interval, peer, peer_incarnation })
        .unwrap();
}

#[test]
fn a_primary_may_ask_to_be_left_out() {
    let mut state = cluster(3, 1);
    activate(&mut state, pg(0));
    let primary = state.map.pgs[&pg(0)].primary.unwrap();
    suspect(&mut state, pg(0), primary);
    let record = &state.map.pgs[&pg(0)];
    assert_eq!(record.members().count(), 2);
    assert!(!record.acting.contains(&primary));
}

/// Without it too few would be left: the same members agree anew on what they have.
#[test]
fn a_primary_that_cannot_be_spared_gets_an_interval() {
    let mut state = cluster(3, 1);
    activate(&mut state, pg(0));
    let third = state.map.pgs[&pg(0)].acting[2];
    down(&mut state, third.0);
    activate(&mut state, pg(0));
    let before = state.map.pgs[&pg(0)].clone();
    suspect(&mut state, pg(0), before.primary.unwrap());
    let record = state.map.pgs[&pg(0)].clone();
    assert_eq!((&record.acting, record.primary), (&before.acting, before.primary));
    assert_eq!((record.interval, record.activated), (state.map.epoch, false));
    assert!(record.past.iter().any(|p| p.interval == before.interval), "{:?}", record.past);
}

/// A primary that has lost its network, but not the monitors, accuses one after the other.
#[test]
fn who_accuses_everybody_is_left_out_itself() {
    let mut state = cluster(3, 1);
    activate(&mut state, pg(0));
    let acting = state.map.pgs[&pg(0)].acting.clone();
    suspect(&mut state, pg(0), acting[1]);
    assert_eq!(state.map.pgs[&pg(0)].acting, [acting[0], acting[2]]);
    activate(&mut state, pg(0));
    suspect(&mut state, pg(0), acting[2]);
    let record = &state.map.pgs[&pg(0)];
    assert_eq!(BTreeSet::from_iter(record.members()), BTreeSet::from([acting[1], acting[2]]));
}

/// Whom others have already found at fault is not believed.
#[test]
fn the_word_of_a_suspect_counts_against_itself() {
    let mut state = cluster(3, 64);
    let group_of = |state: &MonitorState, osd: OsdId| {
        state.map.pgs.iter().find(|(_, r)| r.primary == Some(osd)).map(|(id, _)| *id).unwrap()
    };
    let (bad, good) = (OsdId(0), OsdId(1));
    let others = group_of(&state, good);
    activate(&mut state, others);
    suspect(&mut state, others, bad);
    let own = group_of(&state, bad);
    activate(&mut state, own);
    suspect(&mut state, own, good);
    let record = &state.map.pgs[&own];
    assert_eq!(BTreeSet::from_iter(record.members()), BTreeSet::from([good, OsdId(2)]));
}

/// With two copies nobody can be left out without standing still; then it is the peer.
#[test]
fn with_two_copies_the_peer_is_left_out() {
    let mut state = cluster(3, 1);
    state.apply(0, pool("q", 2, 1)).unwrap();
    let group = PgId { pool: PoolId(2), index: 0 };
    activate(&mut state, group);
    let acting = state.map.pgs[&group].acting.clone();
    suspect(&mut state, group, acting[1]);
    assert_eq!(state.map.pgs[&group].acting, [acting[0]]);
}

#[test]
fn generations_and_sessions_never_repeat() {
    let mut state = cluster(3, 1);
    state
        .apply(0, Command::CreateVolume { name: "v".into(), pool: "p".into(), size_bytes: 1 << 20 })
        .unwrap();
    let mut open = |client| match state.apply(0, Command::OpenSession { client, host: "h".into() }) {
        Ok(Reply::Session { client, session }) => (client, session),
        other => panic!("{other:?}"),
    };
    let (a, a1) = open(ClientId(0));
    let (b, b1) = open(ClientId(0));
    let (same, a2) = open(a);
    assert!(same == a && a2 > a1 && b != a);
    let attach = |state: &mut MonitorState, client, session, take_over| {
        state.apply(0, Command::AttachVolume { volume: "v".into(), client, session, take_over })
    };
    let generation = |reply: CommandResult| match reply {
        Ok(Reply::Attached { generation, .. }) => generation,
        other => panic!("{other:?}"),
    };
    assert_eq!(attach(&mut state, a, a1, false).unwrap_err().kind, RefusalKind::Aborted, "an older session");
    let g1 = generation(attach(&mut state, a, a2, false));
    assert_eq!(generation(attach(&mut state, a, a2, false)), g1);
    assert_eq!(attach(&mut state, b, b1, false).unwrap_err().kind, RefusalKind::Precondition);
    let g2 = generation(attach(&mut state, b, b1, true));
    let detach = |client, generation| Command::DetachVolume { volume: "v".into(), client, generation };
    assert!(state.apply(0, detach(a, g1)).is_err(), "a fenced client detaches nothing");
    assert_eq!(
        state.apply(0, Command::RemoveVolume { name: "v".into() }).unwrap_err().kind,
        RefusalKind::Precondition
    );
    state.apply(0, detach(b, g2)).unwrap();
    let g3 = generation(attach(&mut state, a, a2, false));
    assert!(g1 < g2 && g2 < g3);
    let epoch = state.map.epoch;
    let fenced = state.apply(0, Command::FenceVolume { volume: "v".into() }).unwrap();
    assert!(
        matches!(fenced, Reply::Fenced { epoch: e } if e > epoch),
        "the OSDs must hear of it: {fenced:?}"
    );
    let g4 = generation(attach(&mut state, a, a2, false));
    assert!(g4 > g3, "a fenced attachment does not come back");
    assert!(state.apply(0, detach(a, g3)).is_err());
    state.apply(0, detach(a, g4)).unwrap();
    state.apply(0, Command::RemoveVolume { name: "v".into() }).unwrap();
    assert_eq!(state.map.removed_volumes.len(), 1);
}

#[test]
fn bad_pools_are_refused() {
    let mut state = cluster(3, 1);
    let kind = |r: CommandResult| r.unwrap_err().kind;
    assert_eq!(kind(state.apply(0, pool("p", 3, 1))), RefusalKind::Exists);
    assert_eq!(kind(state.apply(0, pool("no spaces", 3, 1))), RefusalKind::Invalid);
    assert_eq!(kind(state.apply(0, pool("q", 99, 1))), RefusalKind::Invalid);
    assert_eq!(kind(state.apply(0, pool("q", 3, 1 << 30))), RefusalKind::Invalid);
    assert_eq!(state.map.pools[&PoolId(1)].min_size, 2);
}

#[test]
fn exports_of_a_vm_live_from_start_to_stop() {
    let mut state = cluster(3, 1);
    for name in ["boot", "data"] {
        state
            .apply(0, Command::CreateVolume { name: name.into(), pool: "p".into(), size_bytes: 1 << 20 })
            .unwrap();
    }
    let disk = |v: &str| DiskRequest { volume: v.into(), serial: String::new() };
    let vm = |engine: &str, cpu_model: &str| Command::CreateVm {
        name: "vm".into(),
        cpus: 1,
        memory_bytes: 1 << 30,
        disks: vec![disk("boot")],
        host: "h0".into(),
        kernel_args: String::new(),
        engine: engine.into(),
        cpu_model: cpu_model.into(),
        nics: Vec::new(),
    };
    let refused = |state: &mut MonitorState, command| state.apply(0, command).unwrap_err().to_string();
    assert!(refused(&mut state, vm("bochs", "")).contains("native or qemu"));
    assert!(refused(&mut state, vm("", "pentium")).contains("host, generic, kvm64"));
    state.apply(0, vm("", "")).unwrap();
    assert_eq!(state.vms["vm"].cpu_model, "host");
    let set = |action| Command::SetVmState { name: "vm".into(), action };
    state.apply(0, set(VmAction::Start)).unwrap();
    assert_eq!(state.exports.len(), 1);
    state.apply(0, Command::AttachDisk { vm: "vm".into(), disk: disk("data") }).unwrap();
    assert_eq!(state.exports.len(), 2);
    assert!(state.apply(0, Command::RemoveVolume { name: "data".into() }).is_err());
    state.apply(0, Command::DetachDisk { vm: "vm".into(), volume: "data".into() }).unwrap();
    assert_eq!(state.exports.len(), 2, "the guest still has it");
    let volume = state.volume_named("data").unwrap();
    state.apply(0, Command::DiskReleased { vm: "vm".into(), volume }).unwrap();
    assert_eq!(state.exports.len(), 1);
    state.apply(0, set(VmAction::Stop)).unwrap();
    assert!(state.apply(0, Command::VmStopped { name: "vm".into(), action_number: 1 }).is_err(), "stale");
    assert!(state.apply(0, Command::RemoveVm { name: "vm".into() }).is_err());
    state.apply(0, Command::VmStopped { name: "vm".into(), action_number: 2 }).unwrap();
    assert_eq!(state.exports.len(), 0);
    state.apply(0, Command::RemoveVm { name: "vm".into() }).unwrap();
}

#[test]
fn network_cards_are_checked_and_given_once() {
    let mut state = cluster(3, 1);
    for name in ["a", "b"] {
        let volume = Command::CreateVolume { name: name.into(), pool: "p".into(), size_bytes: 1 << 20 };
        state.apply(0, volume).unwrap();
    }
    let mut create = |name: &str, host: &str, nics: &[(&str, &str)]| {
        let command = Command::CreateVm {
            name: name.into(),
            cpus: 1,
            memory_bytes: 1 << 30,
            disks: vec![DiskRequest { volume: name.into(), serial: String::new() }],
            host: host.into(),
            kernel_args: String::new(),
            engine: String::new(),
            cpu_model: String::new(),
            nics: nics.iter().map(|(tap, mac)| Nic { tap: (*tap).into(), mac: (*mac).into() }).collect(),
        };
        state.apply(0, command).map(|_| state.vms[name].nics.clone()).map_err(|e| e.to_string())
    };
    let mac = "02:00:5e:10:00:0A";
    for (nics, why) in [
        (&[("t/0", "")][..], "tap device"),
        (&[("t0", "01:00:00:00:00:00")], "not the address of one card"),
        (&[("t0", ""), ("t0", "")], "VM a has the tap device t0"),
        (&[("t0", mac), ("t1", mac)], "02:00:5e:10:00:0a"),
        (&[("t0", ""), ("t1", ""), ("t2", ""), ("t3", ""), ("t4", "")], "at most 4"),
    ] {
        let error = create("a", "h0", nics).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    let nics = create("a", "h0", &[("t0", mac), ("t1", "")]).unwrap();
    assert_eq!(nics[0].mac, "02:00:5e:10:00:0a", "in one spelling");
    assert!(nics[1].mac.starts_with("02:"));
    assert!(create("b", "h0", &[("t1", "")]).unwrap_err().contains("VM a has the tap device t1 of host h0"));
    assert!(create("b", "h1", &[("t1", mac)]).unwrap_err().contains("VM a"));
    create("b", "h1", &[("t1", "")]).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Boot(u8),
    Down(u8),
    Out(u8),
    In(u8),
    Weight(u8, u32),
    Activate(u32),
    Clean(u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..5u8).prop_map(Step::Boot),
        (0..5u8).prop_map(Step::Down),
        (0..5u8).prop_map(Step::Out),
        (0..5u8).prop_map(Step::In),
        (0..5u8, 0..4u32).prop_map(|(n, w)| Step::Weight(n, w << 16)),
        (0..3u32).prop_map(Step::Activate),
        (0..3u32).prop_map(Step::Clean),
    ];
    proptest::collection::vec(step, 1..60)
}

/// Everybody can be told of it: who refuses a map stands still.
pub fn can_be_told(state: &MonitorState) -> bool {
    let told = gabion_proto::pb::ClusterMap::from(&state.map);
    gabion_proto::map::ClusterMap::try_from(told).as_ref() == Ok(&state.map)
}

proptest! {
    /// Whatever happens: one epoch per change, intervals named by the epoch that began them, and every
    /// member set that was activated since the group was last clean is known.
    #[test]
    fn intervals_lose_nothing(steps in steps()) {
        let mut state = cluster(5, 3);
        let mut wrote: BTreeMap<PgId, Vec<BTreeSet<OsdId>>> = BTreeMap::new();
        for step in steps {
            let before = state.map.clone();
            let _ = match step {
                Step::Boot(n) => boot(&mut state, n),
                Step::Down(n) => {
                    let osd = OsdId(u32::from(n));
                    let incarnation = state.map.osds[&osd].incarnation;
                    state.apply(0, Command::MarkDown { osd, incarnation, reason: String::new() })
                }
                Step::Out(n) => state.apply(0, Command::OutOsd { osd: OsdId(u32::from(n)), automatic: false }),
                Step::In(n) => state.apply(0, Command::InOsd { osd: OsdId(u32::from(n)) }),
                Step::Weight(n, weight) => state.apply(0, Command::ReweightOsd { osd: OsdId(u32::from(n)), weight }),
                Step::Activate(i) if state.map.pgs[&pg(i)].primary.is_some() => {
                    let (osd, incarnation, interval) = report(&state, pg(i));
                    let done = state.apply(0, Command::PgActivated { osd, incarnation, pg: pg(i), interval });
                    if done.is_ok() {
                        wrote.entry(pg(i)).or_default().push(state.map.pgs[&pg(i)].members().collect());
                    }
                    done
                }
                Step::Clean(i) if state.map.pgs[&pg(i)].primary.is_some() => {
                    let (osd, incarnation, interval) = report(&state, pg(i));
                    let done = state.apply(0, Command::PgClean { osd, incarnation, pg: pg(i), interval });
                    if done.is_ok() {
                        let sets = wrote.entry(pg(i)).or_default();
                        *sets = vec![state.map.pgs[&pg(i)].members().collect()];
                    }
                    done
                }
                Step::Activate(_) | Step::Clean(_) => Ok(Reply::Done),
            };
            if state.map != before {
                prop_assert_eq!(state.map.epoch, before.epoch.next());
            }
            prop_assert!(can_be_told(&state), "{:?}", state.map);
            for (id, record) in &state.map.pgs {
                let old = &before.pgs[id];
                let moved = (&old.acting, old.primary) != (&record.acting, record.primary);
                if moved {
                    prop_assert_eq!(record.interval, state.map.epoch);
                    prop_assert!(!record.activated && !record.clean);
                }
                prop_assert!(record.members().all(|o| state.map.osds[&o].up));
                prop_assert_eq!(record.primary, record.acting.first().copied());
                let mut known: Vec<BTreeSet<OsdId>> =
                    record.past.iter().map(|p| p.acting.iter().copied().collect()).collect();
                known.push(record.members().collect());
                for set in wrote.get(id).into_iter().flatten() {
                    prop_assert!(known.contains(set), "{} forgot {:?}: {:?}", id, set, record);
                }
            }
        }
    }
}
