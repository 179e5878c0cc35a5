use super::*;
use crate::state::slow::SlowPolicy;

const LEASE: u64 = 3_500;

fn state_with_osd() -> (MonitorState, OsdId, Incarnation) {
    let mut state = MonitorState::default();
    state.apply(0, Command::Bootstrap { cluster: ClusterId([1; 16]) }).unwrap();
    let disk = ClusterId([2; 16]);
    let (host, rack) = ("h0".to_owned(), String::new());
    state
        .apply(
            0,
            Command::AddOsd { disk, host: host.clone(), rack: rack.clone(), weight: 1, capacity_bytes: 0 },
        )
        .unwrap();
    let osd = *state.map.osds.keys().next().unwrap();
    boot(&mut state, osd);
    let incarnation = state.map.osds[&osd].incarnation;
    (state, osd, incarnation)
}

fn boot(state: &mut MonitorState, osd: OsdId) {
    let (disk, addr) = (ClusterId([2; 16]), "127.0.0.1:1".to_owned());
    let command =
        Command::BootOsd { osd, disk, addr, host: "h0".into(), rack: String::new(), capacity_bytes: 0 };
    state.apply(0, command).unwrap();
}

fn run(state: &mut MonitorState, commands: Vec<Command>) {
    for command in commands {
        state.apply(0, command).unwrap();
    }
}

#[test]
fn a_new_detector_waits_a_whole_lease() {
    let (state, osd, incarnation) = state_with_osd();
    let mut detector = FailureDetector::new(Timing::default());
    for now in (1_000..1_000 + LEASE).step_by(100) {
        assert_eq!(detector.step(now, &state, Event::Tick), vec![], "at {now}");
    }
    let out = detector.step(1_000 + LEASE, &state, Event::Tick);
    assert!(
        matches!(out[..], [Command::MarkDown { osd: o, incarnation: i, .. }] if o == osd && i == incarnation)
    );
}

#[test]
fn a_renewal_puts_the_end_off_and_the_end_is_final() {
    let (state, osd, incarnation) = state_with_osd();
    let mut detector = FailureDetector::new(Timing::default());
    detector.step(0, &state, Event::Tick);
    assert!(detector.renew(3_000, &state, osd, incarnation));
    assert_eq!(detector.step(6_499, &state, Event::Tick), vec![]);
    assert_eq!(detector.step(6_500, &state, Event::Tick).len(), 1);
    // Decided but not agreed on yet: a late heartbeat gets no new lease.
    assert!(!detector.renew(6_501, &state, osd, incarnation));
    assert_eq!(detector.step(6_600, &state, Event::Tick), vec![]);
    assert_eq!(detector.step(7_500, &state, Event::Tick).len(), 1, "proposed again");
}

#[test]
fn an_older_run_gets_no_lease() {
    let (mut state, osd, old) = state_with_osd();
    let mut detector = FailureDetector::new(Timing::default());
    boot(&mut state, osd);
    let new = state.map.osds[&osd].incarnation;
    assert!(!detector.renew(0, &state, osd, old));
    assert!(detector.renew(0, &state, osd, new));
}

#[test]
fn goodbye_then_out_then_back_in() {
    let (mut state, osd, incarnation) = state_with_osd();
    let mut detector = FailureDetector::new(Timing { down_out_ms: 10_000, ..Timing::default() });
    assert!(detector.renew(0, &state, osd, incarnation));
    let out = detector.step(10, &state, Event::Goodbye { osd, incarnation });
    assert!(!detector.renew(11, &state, osd, incarnation));
    run(&mut state, out);
    assert!(!state.map.osds[&osd].up);
    assert_eq!(detector.step(20, &state, Event::Tick), vec![]);
    assert_eq!(detector.step(10_019, &state, Event::Tick), vec![]);
    let out = detector.step(10_020, &state, Event::Tick);
    assert_eq!(out, vec![Command::OutOsd { osd, automatic: true }]);
    run(&mut state, out);
    assert!(!state.map.osds[&osd].in_cluster);
    boot(&mut state, osd);
    assert!(state.map.osds[&osd].in_cluster && state.map.osds[&osd].up);
}

/// Four OSDs, one of which is slow, and an operator's policy.
struct Slowed {
    state: MonitorState,
    detector: FailureDetector,
    now: u64,
    window: u64,
}

impl Slowed {
    const ODD: OsdId = OsdId(2);

    fn new(evict_after_s: u64) -> Slowed {
        use crate::state::tests::cluster;
        let mut state = cluster(4, 4);
        let policy = SlowPolicy { evict_after_s, limit_ms: 10_000 };
        state.apply(0, Command::SetSlowPolicy(policy)).unwrap();
        let mut slowed =
            Slowed { state, detector: FailureDetector::new(Timing::default()), now: 0, window: 0 };
        slowed.recovered();
        slowed
    }

    fn recovered(&mut self) {
        use crate::state::tests::{activate, clean, pg};
        for index in 0..4 {
            activate(&mut self.state, pg(index));
            clean(&mut self.state, pg(index));
        }
    }

    /// Windows of five seconds, until something is decided.
    fn pass(&mut self, windows: u32) -> Option<Command> {
        for _ in 0..windows {
            (self.now, self.window) = (self.now + 5_000, self.window + 1);
            for osd in self.state.map.osds.keys().copied().collect::<Vec<_>>() {
                let incarnation = self.state.map.osds[&osd].incarnation;
                self.detector.renew(self.now, &self.state, osd, incarnation);
                let mean_us = if osd == Slowed::ODD { 400_000 } else { 1_000 };
                let writes = Some(pb::LatencyFigures { count: 100, mean_us, p95_us: mean_us });
                let peers = vec![pb::PeerLatency { osd: osd.0, writes, reads: None }];
                let window = pb::LatencyWindow { number: self.window, length_ms: 5_000, peers };
                self.detector.latency(self.now, &self.state, (osd, incarnation), &window);
            }
            if let Some(command) = self.detector.step(self.now, &self.state, Event::Tick).into_iter().next() {
                return Some(command);
            }
        }
        None
    }

    fn evicts(&self) -> Option<Command> {
        let incarnation = self.state.map.osds[&Slowed::ODD].incarnation;
        Some(Command::EvictSlow { osd: Slowed::ODD, incarnation })
    }
}

#[test]
fn a_slow_osd_is_only_shown_by_default() {
    let mut slowed = Slowed::new(0);
    assert_eq!(slowed.pass(100), None);
    assert_eq!(slowed.detector.slow()[0].osd, Slowed::ODD);
}

#[test]
fn a_slow_osd_is_taken_out_by_policy() {
    let mut slowed = Slowed::new(60);
    let command = slowed.pass(100);
    assert_eq!(command, slowed.evicts());
    // Three windows until it is slow, then the time of the policy.
    assert_eq!(slowed.now, 15_000 + 60_000);
    run(&mut slowed.state, command.into_iter().collect());
    assert!(!slowed.state.map.osds[&Slowed::ODD].in_cluster);
    assert_eq!(slowed.pass(20), None, "once");
}

/// The time of the policy begins when all else is well.
#[test]
fn a_slow_osd_stays_while_something_else_is_wrong() {
    let mut slowed = Slowed::new(60);
    crate::state::tests::boot(&mut slowed.state, 0).unwrap();
    assert_eq!(slowed.pass(100), None);
    slowed.recovered();
    let began = slowed.now;
    assert_eq!(slowed.pass(100), slowed.evicts());
    assert_eq!(slowed.now, began + 60_000);
}

#[test]
fn who_is_slow_gets_no_other_chance_to_delay_writes() {
    let mut slowed = Slowed::new(0);
    assert_eq!(slowed.pass(4), None);
    let (pg, record) = slowed.state.map.pgs.iter().find(|(_, r)| r.acting.contains(&Slowed::ODD)).unwrap();
    let (pg, interval) = (*pg, record.interval);
    let osd = record.primary.unwrap();
    let of = |osd: OsdId| slowed.state.map.osds[&osd].incarnation;
    let (incarnation, peer_incarnation) = (of(osd), of(Slowed::ODD));
    let suspect =
        Command::SuspectPeer { osd, incarnation, pg, interval, peer: Slowed::ODD, peer_incarnation };
    run(&mut slowed.state, vec![suspect]);
    assert_eq!(slowed.pass(30), None);
    // Fast again, by a detector that knows nothing else.
    slowed.detector = FailureDetector::new(Timing::default());
    slowed.detector.step(slowed.now, &slowed.state, Event::Tick);
    let again = slowed.detector.step(slowed.now + SUSPECT_MS, &slowed.state, Event::Tick);
    assert!(again.iter().any(|c| matches!(c, Command::ClearSuspect { peer, .. } if *peer == Slowed::ODD)));
}

#[test]
fn a_report_of_a_late_member_counts_from_the_limit_on() {
    let mut slowed = Slowed::new(0);
    let (pg, record) = slowed.state.map.pgs.iter().next().unwrap();
    let (pg, interval, osd) = (*pg, record.interval, record.primary.unwrap());
    let peer = *record.acting.iter().find(|o| **o != osd).unwrap();
    let of = |osd: OsdId| slowed.state.map.osds[&osd].incarnation;
    let (incarnation, peer_incarnation) = (of(osd), of(peer));
    let stuck = |age_ms| Event::Stuck { osd, incarnation, pg, interval, peer, peer_incarnation, age_ms };
    for (limit_ms, age_ms, acts) in
        [(10_000, 9_999, false), (10_000, 10_000, true), (4_000, 4_000, true), (60_000, 59_999, false)]
    {
        let policy = SlowPolicy { evict_after_s: 0, limit_ms };
        slowed.state.apply(0, Command::SetSlowPolicy(policy)).unwrap();
        let out = slowed.detector.step(0, &slowed.state, stuck(age_ms));
        assert_eq!(out.len(), usize::from(acts), "{age_ms} of {limit_ms}");
    }
}
