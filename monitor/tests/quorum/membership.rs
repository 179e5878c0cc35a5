//! Monitors are added and removed, the leader too, while changes go on.

use crate::cluster::Cluster;
use crate::load::Load;
use gabion_monitor::raft::Start;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_becomes_three_becomes_others_under_load() {
    let mut cluster = Cluster::start(1, 200).await;
    let load = Load::start(&cluster, 2).await;
    load.goes_on(20).await;
    for id in [2, 3] {
        cluster.launch(id, Start::Join).await;
        cluster.add(id).await.unwrap();
        load.goes_on(5).await;
    }
    cluster.all_up(3).await;
    // Again: nothing to do.
    cluster.add(3).await.unwrap();

    // The leader leaves; a client that knew only it learned of the others.
    let old = cluster.leader().await;
    cluster.remove(old).await.unwrap();
    load.goes_on(10).await;
    assert_ne!(cluster.leader().await, old);
    cluster.all_up(2).await;

    // One more, then the cluster is of three again without the first.
    cluster.launch(4, Start::Join).await;
    cluster.add(4).await.unwrap();
    cluster.all_up(3).await;
    load.goes_on(10).await;

    // What would leave no quorum is refused.
    let leader = cluster.leader().await;
    let other = cluster.members().await.iter().find(|m| m.id != leader).unwrap().id;
    cluster.kill(other);
    crate::cluster::eventually("it counts as down", async || {
        cluster.members().await.iter().any(|m| m.id == other && !m.up).then_some(())
    })
    .await;
    let third = cluster.members().await.iter().find(|m| m.id != leader && m.id != other).unwrap().id;
    let refused = cluster.remove(third).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    // The one that is down may go.
    cluster.remove(other).await.unwrap();
    load.goes_on(10).await;
    cluster.all_up(2).await;
    assert_eq!(cluster.remove(other).await.unwrap_err().code(), Code::NotFound);
    load.check(&cluster).await;
}
