//! A disk that fails while it is in use: what clients hear, and how the group gets rid of the member.

use super::*;

#[test]
fn a_disk_that_stops_for_good_is_no_input_error() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    let read = rig.read(0, 0);
    rig.answer_read(Err(StoreError::Fatal("gone".into())));
    assert_eq!(rig.reply(read), Some(&OpReply::Retry { epoch: Epoch(10), why: RetryWhy::NotActive }));
}

fn reported(rig: &Rig) -> Vec<u32> {
    rig.core.stuck_peers().iter().map(|s| s.peer).collect()
}

fn refuse_write(rig: &mut Rig) {
    let token = rig.held.pop_front().expect("a write waits in the store");
    rig.step(Event::Committed { token, result: Err(StoreError::NoSpace) });
}

#[test]
fn a_primary_whose_store_refuses_a_write_asks_to_be_left_out() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    rig.hold_writes = true;
    let write = rig.write(0, 0);
    refuse_write(&mut rig);
    assert!(matches!(rig.reply(write), Some(OpReply::Retry { .. })));
    assert_eq!(reported(&rig), [1], "at once: two others go on");
}

#[test]
fn a_primary_that_the_group_cannot_do_without_takes_its_time() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2]);
    rig.hold_writes = true;
    rig.write(0, 0);
    refuse_write(&mut rig);
    assert!(reported(&rig).is_empty());
    rig.tick(10_000);
    assert_eq!(reported(&rig), [1]);
}

#[test]
fn versions_that_run_out_are_replaced_in_time() {
    let mut rig = Rig::active(&[(0, version(10, (1 << 31) - 2)), (1, version(10, u32::MAX))], &[1, 2, 3]);
    rig.write(0, 0);
    assert!(reported(&rig).is_empty());
    rig.write(0, 1);
    assert_eq!(reported(&rig), [1]);
    // And if nobody listens, the last one is answered.
    let last = rig.write(1, 0);
    assert!(matches!(rig.reply(last), Some(OpReply::Retry { .. })));
}
