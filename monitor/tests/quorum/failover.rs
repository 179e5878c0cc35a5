//! The leader, and others, are killed at random moments under a stream of changes.

use crate::cluster::Cluster;
use crate::load::Load;
use gabion_monitor::raft::Start;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_when_monitors_are_killed() {
    let mut rng = StdRng::seed_from_u64(7);
    let mut cluster = Cluster::start(3, 200).await;
    let load = Load::start(&cluster, 3).await;
    for round in 0..6 {
        load.goes_on(rng.random_range(5..40)).await;
        // Mostly the leader; whoever it is, in the middle of whatever it does.
        let victim = if round % 3 == 2 { rng.random_range(1..=3) } else { cluster.leader().await };
        cluster.kill(victim);
        load.goes_on(10).await;
        cluster.launch(victim, Start::Resume).await;
        cluster.all_up(3).await;
    }
    load.goes_on(20).await;
    load.check(&cluster).await;
}
