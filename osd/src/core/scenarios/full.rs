//! Any full member is a full group: refused before anybody writes, and trimming goes on.

use super::*;
use gabion_proto::msg::OpError;

#[test]
fn a_full_member_refuses_writes_of_the_whole_group() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.hear(3, PeerBody::Full);
    rig.commits.clear();
    let write = rig.write(0, 0);
    assert_eq!(rig.reply(write), Some(&OpReply::Failed(OpError::NoSpace)));
    assert!(rig.commits.is_empty());
    let trim = OpKind::Zero { first_block: 0, block_count: 1, discard: true };
    rig.client(0, trim, Bytes::new());
    assert_eq!(rig.commits.len(), 1, "gives space back");
    // It has room again and says nothing any more.
    rig.now += 5_000;
    rig.write(0, 9);
    assert_eq!(rig.commits.len(), 2);
}

#[test]
fn a_full_member_says_so_until_it_has_room() {
    let mut rig = Rig::new(&[]);
    rig.interval(10, &[2, 1], vec![past(5, &[2, 1])]);
    rig.hear(2, PeerBody::Query);
    rig.hear(2, PeerBody::Activate { page: 0, missing: Vec::new(), last: true });
    rig.sent.clear();
    rig.step(Event::Full(true));
    for _ in 0..30 {
        rig.tick(100);
    }
    assert_eq!(rig.take_sent(), vec![(OsdId(2), PeerBody::Full); 3]);
    rig.step(Event::Full(false));
    for _ in 0..30 {
        rig.tick(100);
    }
    assert!(rig.sent.is_empty());
}
