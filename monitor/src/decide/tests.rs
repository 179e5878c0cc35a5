use super::*;

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
