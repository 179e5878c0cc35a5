use super::*;
use gabion_proto::map::OsdInfo;
use proptest::prelude::*;

fn state(osds: u32) -> MonitorState {
    let mut state = MonitorState::default();
    for n in 0..osds {
        let info = OsdInfo {
            host: format!("h{n}"),
            rack: String::new(),
            addr: String::new(),
            weight: 1,
            up: true,
            in_cluster: true,
            incarnation: Incarnation(u64::from(n) + 1),
            disk: ClusterId([n as u8; 16]),
            capacity_bytes: 0,
        };
        state.map.osds.insert(OsdId(n), info);
    }
    state
}

/// What one OSD is like in a window.
#[derive(Clone, Copy, Debug)]
struct Disk {
    write_us: u64,
    read_us: u64,
    ops: u64,
}

const WELL: Disk = Disk { write_us: 1_500, read_us: 300, ops: 500 };

fn figures(count: u64, mean_us: u64) -> Option<pb::LatencyFigures> {
    Some(pb::LatencyFigures { count, mean_us, p95_us: mean_us.saturating_mul(2) })
}

/// A cluster in which everybody works with everybody.
struct Rig {
    state: MonitorState,
    detector: SlowDetector,
    window: u64,
    /// Shards are read from peers, too.
    shards: bool,
}

impl Rig {
    fn new(osds: u32) -> Rig {
        Rig { state: state(osds), detector: SlowDetector::default(), window: 0, shards: false }
    }

    fn now(&self) -> u64 {
        self.window * WINDOW_MS
    }

    fn report(&mut self, osd: OsdId, number: u64, peers: Vec<pb::PeerLatency>) {
        let incarnation = self.state.map.osds[&osd].incarnation;
        let window = pb::LatencyWindow { number, length_ms: WINDOW_MS, peers };
        let now = self.now();
        self.detector.report(now, &self.state, osd, incarnation, &window);
    }

    /// One window; `seen` is how long what one sends another takes there, or at itself.
    fn pass_as(&mut self, disks: &[Disk], seen: impl Fn(OsdId, OsdId, u64) -> u64) {
        self.window += 1;
        for by in 0..disks.len() as u32 {
            let peer = |n: u32| {
                let d = disks[n as usize];
                let (by, osd) = (OsdId(by), OsdId(n));
                let ops = if by == osd { d.ops } else { d.ops / disks.len() as u64 };
                let reads = self.shards || by == osd;
                pb::PeerLatency {
                    osd: n,
                    writes: figures(ops, seen(by, osd, d.write_us)),
                    reads: reads.then(|| figures(ops, seen(by, osd, d.read_us))).flatten(),
                }
            };
            let peers = (0..disks.len() as u32).map(peer).collect();
            self.report(OsdId(by), self.window, peers);
        }
        let now = self.now();
        self.detector.tick(now, &self.state);
    }

    fn pass(&mut self, disks: &[Disk]) {
        self.pass_as(disks, |_, _, us| us);
    }

    fn slow(&self) -> Vec<u32> {
        self.detector.slow().map(|s| s.osd.0).collect()
    }
}

fn one_of(osds: usize, odd: usize, disk: Disk) -> Vec<Disk> {
    (0..osds).map(|n| if n == odd { disk } else { WELL }).collect()
}

#[test]
fn one_outlier_is_found_after_some_windows_and_let_go_after_some() {
    for (osds, disk) in [
        (3, Disk { write_us: 200_000, ops: 100, ..WELL }),
        (6, Disk { read_us: 90_000, ..WELL }),
        // One that hardly answers.
        (5, Disk { write_us: 2_000_000, read_us: 2_000_000, ops: 10 }),
    ] {
        let mut rig = Rig::new(osds);
        let bad = one_of(osds as usize, 1, disk);
        for _ in 1..SLOW_AT {
            rig.pass(&bad);
            assert_eq!(rig.slow(), [] as [u32; 0]);
        }
        let mut since = None;
        for _ in 0..20 {
            rig.pass(&bad);
            assert_eq!(rig.slow(), [1]);
            let slow = rig.detector.slow().next().unwrap();
            assert_eq!(*since.get_or_insert(slow.since_ms), slow.since_ms);
            assert_eq!(
                slow.evidence.others_us,
                if slow.evidence.reads { WELL.read_us } else { WELL.write_us }
            );
        }
        let well = vec![WELL; osds as usize];
        for _ in 1..SCORE_MAX {
            rig.pass(&well);
            assert_eq!(rig.slow(), [1]);
        }
        rig.pass(&well);
        assert_eq!(rig.slow(), [] as [u32; 0]);
    }
}

#[test]
fn now_and_then_is_not_slow() {
    let mut rig = Rig::new(4);
    let bad = one_of(4, 2, Disk { write_us: 300_000, ..WELL });
    for _ in 0..50 {
        rig.pass(&bad);
        rig.pass(&bad);
        assert_eq!(rig.slow(), [] as [u32; 0]);
        rig.pass(&[WELL; 4]);
        rig.pass(&[WELL; 4]);
    }
}

/// Its disk is fast, but whatever it is sent takes long: the link.
#[test]
fn a_slow_link_is_the_fault_of_whom_all_peers_find_slow() {
    let mut rig = Rig::new(4);
    let to_or_from_2 = |by: OsdId, osd: OsdId, us: u64| {
        let far = by != osd && (by == OsdId(2) || osd == OsdId(2));
        if far { us + 120_000 } else { us }
    };
    for _ in 0..SLOW_AT {
        rig.pass_as(&[WELL; 4], to_or_from_2);
    }
    assert_eq!(rig.slow(), [2]);
    let evidence = rig.detector.slow().next().unwrap().evidence;
    assert_eq!((evidence.accusers, evidence.witnesses), (3, 3));
}

/// One link alone: each of its ends has one accuser.
#[test]
fn one_word_is_not_enough() {
    let mut rig = Rig::new(5);
    for _ in 0..20 {
        rig.pass_as(&[WELL; 5], |by, osd, us| {
            let broken = [by, osd] == [OsdId(1), OsdId(2)] || [by, osd] == [OsdId(2), OsdId(1)];
            if broken { 500_000 } else { us }
        });
        assert_eq!(rig.slow(), [] as [u32; 0]);
    }
}

/// A process that stands still now and then measures its peers, too.
#[test]
fn who_finds_everybody_slow_accuses_nobody() {
    let mut rig = Rig::new(3);
    rig.shards = true;
    for _ in 0..20 {
        rig.pass_as(&[WELL; 3], |by, _, us| if by == OsdId(0) { us + 400_000 } else { us });
        assert!(!rig.slow().contains(&1) && !rig.slow().contains(&2), "{:?}", rig.slow());
    }
}

#[test]
fn half_of_them_is_nobody() {
    let bad = Disk { write_us: 300_000, ..WELL };
    let mut rig = Rig::new(4);
    for _ in 0..20 {
        rig.pass(&[bad, bad, WELL, WELL]);
        assert_eq!(rig.slow(), [] as [u32; 0]);
    }
    let mut rig = Rig::new(2);
    for _ in 0..20 {
        rig.pass(&[bad, WELL]);
        assert_eq!(rig.slow(), [] as [u32; 0], "of two nobody can say who is odd");
    }
}

/// Ten times the work of the others, as fast as they: a hot volume on a slow kind of disk.
#[test]
fn who_has_more_to_do_is_not_slow() {
    let mut rig = Rig::new(5);
    let idle = Disk { write_us: 9_000, read_us: 9_000, ops: 50 };
    // 100 a second, 64 at a time.
    let hot = Disk { write_us: 9_000, read_us: 640_000, ops: 500 };
    for _ in 0..20 {
        rig.pass(&[idle, idle, hot, idle, idle]);
        assert_eq!(rig.slow(), [] as [u32; 0]);
    }
    // The same queue, but nothing comes out of it.
    let bad = Disk { ops: 40, ..hot };
    for _ in 0..SLOW_AT {
        rig.pass(&[idle, idle, bad, idle, idle]);
    }
    assert_eq!(rig.slow(), [2]);
}

#[test]
fn a_new_run_and_a_return_begin_anew_and_silence_ends_it() {
    let bad = one_of(4, 0, Disk { write_us: 300_000, ..WELL });
    let slow = || {
        let mut rig = Rig::new(4);
        (0..SLOW_AT).for_each(|_| rig.pass(&bad));
        assert_eq!(rig.slow(), [0]);
        rig
    };
    let mut rig = slow();
    rig.state.map.osds.get_mut(&OsdId(0)).unwrap().incarnation = Incarnation(77);
    rig.pass(&[WELL; 4]);
    assert_eq!(rig.slow(), [] as [u32; 0]);

    let mut rig = slow();
    rig.state.map.osds.get_mut(&OsdId(0)).unwrap().in_cluster = false;
    rig.window += 1;
    let now = rig.now();
    rig.detector.tick(now, &rig.state);
    assert_eq!(rig.slow(), [0], "out, and nothing new is known");
    rig.state.map.osds.get_mut(&OsdId(0)).unwrap().in_cluster = true;
    rig.window += 1;
    let now = rig.now();
    rig.detector.tick(now, &rig.state);
    assert_eq!(rig.slow(), [] as [u32; 0]);

    let mut rig = slow();
    for _ in 0..FORGET_WINDOWS {
        assert_eq!(rig.slow(), [0]);
        rig.window += 1;
        let now = rig.now();
        rig.detector.tick(now, &rig.state);
    }
    assert_eq!(rig.slow(), [] as [u32; 0]);
}

#[test]
fn a_window_counts_once_and_strangers_do_not() {
    let mut rig = Rig::new(4);
    let bad = one_of(4, 3, Disk { write_us: 300_000, ..WELL });
    rig.pass(&bad);
    // The same windows again, as each heartbeat names them.
    for _ in 0..10 {
        let window = rig.window;
        for osd in 0..4 {
            rig.report(OsdId(osd), 1, vec![]);
        }
        rig.window = window + 1;
        let now = rig.now();
        rig.detector.tick(now, &rig.state);
        assert_eq!(rig.slow(), [] as [u32; 0]);
    }
    // Nonsense is no harm.
    let huge = figures(u64::MAX, u64::MAX);
    let peers = (0..100_000).map(|osd| pb::PeerLatency { osd, writes: huge, reads: huge }).collect();
    rig.report(OsdId(0), 2, peers);
    rig.window += 1;
    let now = rig.now();
    rig.detector.tick(now, &rig.state);
    assert!(rig.detector.reports[&OsdId(0)].peers.len() <= 4);
}

proptest! {
    /// However slow and busy, and whatever chance makes of it.
    #[test]
    fn an_even_cluster_accuses_nobody(
        osds in 3u32..12,
        mean_us in 100u64..3_000_000,
        ops in 1u64..5_000,
        shards: bool,
        chance in prop::collection::vec((50u64..200, 30u64..300), 12 * 30),
    ) {
        let mut rig = Rig::new(osds);
        rig.shards = shards;
        for window in 0..30 {
            // Each is up to twice as fast or slow as the mean, and has a third to thrice the work.
            let disks: Vec<Disk> = (0..osds as usize).map(|n| {
                let (speed, work) = chance[window * 12 + n];
                let us = mean_us * speed / 100;
                Disk { write_us: us, read_us: us, ops: ops * work / 100 }
            }).collect();
            // Spread of a factor of four at most: nobody is more than that from the median.
            rig.pass(&disks);
            prop_assert_eq!(rig.slow(), Vec::<u32>::new());
        }
    }

    #[test]
    fn one_outlier_and_nobody_else_is_found(
        osds in 3u32..12,
        odd in 0u32..12,
        mean_us in 100u64..20_000,
        times in 10u64..200,
        reads: bool,
        chance in prop::collection::vec(70u64..140, 12 * 10),
    ) {
        let odd = odd % osds;
        let mut rig = Rig::new(osds);
        for window in 0..10 {
            let disks: Vec<Disk> = (0..osds as usize).map(|n| {
                let us = mean_us * chance[window * 12 + n] / 100;
                let bad = (us * times).max(2 * FLOOR_US);
                let well = Disk { write_us: us, read_us: us, ops: 200 };
                match (n == odd as usize, reads) {
                    (false, _) => well,
                    (true, true) => Disk { read_us: bad, ..well },
                    (true, false) => Disk { write_us: bad, ..well },
                }
            }).collect();
            rig.pass(&disks);
            if window as u32 + 1 >= SLOW_AT {
                prop_assert_eq!(rig.slow(), vec![odd]);
            } else {
                prop_assert_eq!(rig.slow(), Vec::<u32>::new());
            }
        }
    }

    #[test]
    fn a_minority_at_most(
        osds in 3u32..10,
        windows in prop::collection::vec(prop::collection::vec((100u64..1_000_000, 1u64..1_000), 10), 1..20),
    ) {
        let mut rig = Rig::new(osds);
        for disks in windows {
            let disks: Vec<Disk> = disks.into_iter().take(osds as usize)
                .map(|(us, ops)| Disk { write_us: us, read_us: us, ops }).collect();
            rig.pass(&disks);
            let reports: BTreeMap<OsdId, &Report> = rig.detector.reports.iter().map(|(o, r)| (*o, r)).collect();
            let words = compare(&reports);
            let outliers = words.values().filter(|w| matches!(w, Word::Outlier(_))).count();
            prop_assert!(2 * outliers < words.len().max(1));
        }
    }
}

/// A few fast operations of the others are enough to compare with; a few slow ones are not enough to accuse, nor to acquit.
#[test]
fn in_a_cluster_with_little_to_do() {
    let all = |disk| (0..5).map(|n| if n == 1 { disk } else { Disk { ops: 5, ..WELL } }).collect::<Vec<_>>();
    let slow = all(Disk { write_us: 400_000, ops: 5, ..WELL });
    let doubtful = all(Disk { write_us: 90_000, ops: 5, ..WELL });
    let well = all(Disk { ops: 5, ..WELL });
    let mut rig = Rig::new(5);
    for _ in 0..10 {
        rig.pass(&doubtful);
        assert_eq!(rig.slow(), [] as [u32; 0]);
    }
    for _ in 0..SLOW_AT {
        rig.pass(&slow);
    }
    assert_eq!(rig.slow(), [1]);
    for _ in 0..10 {
        rig.pass(&doubtful);
        assert_eq!(rig.slow(), [1]);
    }
    for _ in 0..SLOW_AT {
        rig.pass(&well);
    }
    assert_eq!(rig.slow(), [] as [u32; 0]);
}

/// One leads all groups in use, and the others do something now and then: what they took in the last minute is compared with, and is forgotten.
#[test]
fn one_that_does_nearly_all_the_work() {
    let all = |lead: Disk, others: u64| {
        (0..4).map(|n| if n == 2 { lead } else { Disk { ops: others, ..WELL } }).collect::<Vec<_>>()
    };
    let slow = Disk { write_us: 400_000, read_us: 400_000, ops: 20 };
    let works_alone = |others: u64, windows: u64| {
        let mut rig = Rig::new(4);
        (0..windows).for_each(|_| rig.pass(&all(slow, others)));
        rig
    };
    assert_eq!(works_alone(0, 30).slow(), [] as [u32; 0], "nobody to compare with");
    assert_eq!(works_alone(1, 30).slow(), [2]);
    assert_eq!(works_alone(3, u64::from(SLOW_AT) + 2).slow(), [2]);
    assert_eq!(works_alone(3, 100).slow(), [2]);
    // Others that were fast a while ago and have nothing to do now are no measure.
    let mut rig = Rig::new(4);
    (0..5).for_each(|_| rig.pass(&[WELL; 4]));
    let fades = KNOWN_WINDOWS * 10;
    (0..fades).for_each(|_| rig.pass(&all(Disk { ops: 0, ..WELL }, 0)));
    (0..20).for_each(|_| rig.pass(&all(slow, 0)));
    assert_eq!(rig.slow(), [] as [u32; 0]);
}

/// Who was slow and has nothing to do is not judged by what is remembered of it.
#[test]
fn what_is_remembered_accuses_nobody() {
    let mut rig = Rig::new(4);
    let bad = one_of(4, 1, Disk { write_us: 400_000, read_us: 400_000, ops: 20 });
    (1..SLOW_AT).for_each(|_| rig.pass(&bad));
    let silent = one_of(4, 1, Disk { ops: 0, ..WELL });
    (0..20).for_each(|_| rig.pass(&silent));
    assert_eq!(rig.slow(), [] as [u32; 0]);
}
