//! What peering asks of members' lists (rule P10): only parts that are not the own ones.

use super::*;
use gabion_proto::msg::{ListDigest, ListParts};

const OBJECTS: u32 = 600;

fn objects() -> Vec<(u32, Version)> {
    (0..OBJECTS).map(|n| (n, version(5, 1))).collect()
}

/// What an OSD with these objects says of them when it is asked.
fn digests(objects: &[(u32, Version)]) -> Vec<ListDigest> {
    let mut member = Rig::new(objects);
    member.interval(10, &[2, 1], vec![past(5, &[2, 1])]);
    member.hear(2, PeerBody::Query);
    let mut sent = member.sent.into_iter();
    let info = sent.find_map(|(_, b)| if let PeerBody::Info { parts, .. } = b { Some(parts) } else { None });
    info.expect("an answer")
}

/// A primary of osd.1 and osd.2 that hears this of osd.2: what it asks for.
fn asks(rig: &mut Rig, parts: Vec<ListDigest>) -> Option<ListParts> {
    rig.interval(10, &[1, 2], vec![past(5, &[1, 2])]);
    rig.sent.clear();
    let count = u64::from(OBJECTS);
    let info =
        PeerBody::Info { activated: Epoch(5), object_count: count, missing_count: 0, shard: None, parts };
    rig.hear(2, info);
    rig.sent
        .iter()
        .find_map(|(_, b)| if let PeerBody::ListRequest { parts, .. } = b { Some(*parts) } else { None })
}

fn activation(rig: &Rig) -> Option<&Vec<ObjectEntry>> {
    rig.sent
        .iter()
        .find_map(|(_, b)| if let PeerBody::Activate { missing, .. } = b { Some(missing) } else { None })
}

#[test]
fn a_list_that_is_the_own_one_is_not_asked_for() {
    let mut rig = Rig::new(&objects());
    assert_eq!(asks(&mut rig, digests(&objects())), None);
    assert_eq!(activation(&rig), Some(&Vec::new()), "it lacks nothing");
    // As if it had been.
    let mut listed = Rig::new(&objects());
    assert_eq!(asks(&mut listed, Vec::new()), Some(ListParts::ALL));
    let page = objects().iter().map(|(o, v)| has(*o, *v)).collect();
    listed.hear(2, PeerBody::List { after: None, entries: page, last: true });
    assert_eq!((activation(&listed), &listed.commits), (activation(&rig), &rig.commits));
}

/// It was active later: it may know what this one does not, and did not merely forget.
#[test]
fn the_same_list_of_another_interval_is_compared_entry_by_entry() {
    let mut rig = Rig::new(&objects());
    rig.interval(10, &[1, 2], vec![past(5, &[1, 2]), past(7, &[2])]);
    rig.sent.clear();
    let (parts, count) = (digests(&objects()), u64::from(OBJECTS));
    let info =
        PeerBody::Info { activated: Epoch(7), object_count: count, missing_count: 0, shard: None, parts };
    rig.hear(2, info);
    assert_eq!(activation(&rig), Some(&Vec::new()));
    rig.activates(2);
    assert!(rig.reports.contains(&MonitorRequest::Activated { pg: PG, interval: Epoch(10) }));
}

#[test]
fn of_a_list_with_one_other_version_one_part_is_asked_for() {
    let (mut rig, mut its) = (Rig::new(&objects()), objects());
    its[321].1 = version(4, 9);
    let parts = asks(&mut rig, digests(&its)).expect("it asks");
    assert_eq!(parts.wanted.count_ones(), 1);
    let page: Vec<ObjectEntry> =
        its.iter().map(|(o, v)| has(*o, *v)).filter(|e| parts.contains(&e.object)).collect();
    assert!((1..60).contains(&page.len()) && page.iter().any(|e| e.object == object(321)), "{}", page.len());
    rig.hear(2, PeerBody::List { after: None, entries: page, last: true });
    // Both were active in interval 5 and disagree: the newer version, not yet shown.
    let lacks = activation(&rig).expect("everything is known");
    assert_eq!(
        lacks.iter().map(|e| (e.object, e.version)).collect::<Vec<_>>(),
        [(object(321), version(5, 1))]
    );
}

/// It has not even the objects that it could have said nothing of.
#[test]
fn a_part_that_lacks_an_object_is_not_the_same_one() {
    let (mut rig, mut its) = (Rig::new(&objects()), objects());
    its.remove(5);
    let parts = asks(&mut rig, digests(&its)).expect("it asks");
    assert!(parts.contains(&object(5)) && parts.wanted.count_ones() == 1);
}

#[test]
fn a_member_lists_the_parts_it_is_asked_for_in_pages_and_any_request_is_answered() {
    let mut rig = Rig::new(&objects());
    rig.interval(10, &[2, 1], vec![past(5, &[2, 1])]);
    rig.hear(2, PeerBody::Query);
    for parts in
        [ListParts { count: 8, wanted: 0b101 }, ListParts { count: 0, wanted: u64::MAX }, ListParts::ALL]
    {
        rig.sent.clear();
        rig.hear(2, PeerBody::ListRequest { after: Some(object(99)), parts });
        let [(_, PeerBody::List { entries, last: true, .. })] = &rig.sent[..] else {
            panic!("{:?}", rig.sent)
        };
        let expected = (100..OBJECTS).map(object).filter(|o| parts.contains(o));
        assert!(entries.iter().map(|e| e.object).eq(expected));
    }
}

#[test]
fn digests_that_are_none_mean_the_whole_list() {
    for parts in [Vec::new(), vec![[0; 16]; 65]] {
        let mut rig = Rig::new(&objects());
        assert_eq!(asks(&mut rig, parts), Some(ListParts::ALL));
    }
}
