//! A disk that fails while it is in use: what clients hear, and how the group gets rid of the member.

use super::*;

#[test]
fn a_disk_that_stops_for_good_is_no_input_error() {
    let mut rig = Rig::active(&[(0, version(5, 1))], &[1, 2, 3]);
    let read = rig.read(0, 0);
    rig.answer_read(Err(StoreError::Fatal("gone".into())));
    assert_eq!(rig.reply(read), Some(&OpReply::Retry { epoch: Epoch(10), why: RetryWhy::NotActive }));
}
