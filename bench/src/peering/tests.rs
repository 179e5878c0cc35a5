use super::*;

fn options(groups: u32, objects: u64) -> PeeringOptions {
    PeeringOptions { groups, objects, osds: 6, replicas: 3, commit_ms: 2, batch: 16 }
}

#[test]
fn many_groups_peer_after_a_power_cut_and_around_the_loss_of_an_osd() {
    let o = options(64, 10_000);
    let outcome = measure(&o, |_| Ok(())).unwrap();
    let groups: Vec<_> = outcome.phases.iter().map(|p| (p.what, p.groups)).collect();
    assert_eq!(groups[0], ("made, empty", 64));
    assert_eq!(groups[1], ("power comes back", 64));
    // Those that have a copy there: half of them, three of six OSDs, as even as placement makes it.
    let affected = groups[2].1;
    assert!((28..=36).contains(&affected), "{groups:?}");
    assert_eq!(groups[3], ("it comes back", affected));
    assert_eq!(outcome.copies, 30_000);
    assert_eq!((outcome.written, outcome.recovered), (affected as u64, affected as u64));
    for p in &outcome.phases {
        assert!(p.traffic.reports >= 2 * p.groups as u64, "each is reported active, and clean: {p:?}");
        assert!(p.traffic.commits < p.traffic.reports, "{p:?}");
    }
}

#[test]
fn a_group_with_more_objects_than_one_message_names() {
    let outcome = measure(&options(1, 20_000), |_| Ok(())).unwrap();
    assert_eq!((outcome.copies, outcome.written, outcome.recovered), (60_000, 1, 1));
}
