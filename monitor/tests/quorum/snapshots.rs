//! A monitor that was away for too long, and one whose data is gone, catch up by snapshot.

use crate::cluster::{Cluster, eventually};
use gabion_common::monitor_client::MonitorClient;
use gabion_monitor::raft::Start;
use gabion_proto::pb::{self, map_update::Update};
use tonic::Code;

async fn changes(monitors: &MonitorClient, prefix: &str, count: usize) {
    for n in 0..count {
        let name = format!("{prefix}{n}");
        let kind = Some(pb::redundancy::Kind::Replicas(1));
        let request = pb::CreatePoolRequest {
            name: name.clone(),
            redundancy: Some(pb::Redundancy { kind }),
            pg_count: 1,
            ..Default::default()
        };
        let made = monitors.once(|m| {
            let request = request.clone();
            async move { m.admin().create_pool(request).await }
        });
        made.await.unwrap();
        let gone = monitors.once(|m| {
            let name = name.clone();
            async move { m.admin().remove_pool(pb::NameRequest { name }).await }
        });
        gone.await.unwrap();
    }
}

async fn epoch(monitors: &MonitorClient) -> u64 {
    monitors.once(|m| async move { m.status().get_status(pb::Empty {}).await }).await.unwrap().epoch
}

/// The epoch of the map that this one monitor serves, if it serves any.
async fn served(cluster: &Cluster, id: u64) -> Option<u64> {
    let request = pb::WatchMapRequest { have_epoch: 0 };
    let mut updates = cluster.client_of(id).map().watch_map(request).await.ok()?.into_inner();
    match updates.message().await.ok()??.update? {
        Update::Full(map) => Some(map.epoch),
        Update::Increment(_) => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lagging_and_a_wiped_monitor_catch_up() {
    let mut cluster = Cluster::start(3, 40).await;
    let leader = cluster.leader().await;
    let away = if leader == 3 { 2 } else { 3 };
    let monitors = cluster.client();
    cluster.kill(away);
    // More than twice what the log keeps.
    changes(&monitors, "a", 60).await;
    let now = epoch(&monitors).await;
    cluster.launch(away, Start::Resume).await;
    eventually("it has the map", async || (served(&cluster, away).await? >= now).then_some(())).await;
    cluster.all_up(3).await;

    // Empty under its old number it is nobody, and says what to do.
    cluster.kill(away);
    cluster.wipe(away);
    changes(&monitors, "b", 60).await;
    cluster.launch(away, Start::Join).await;
    eventually("its loss is noticed", async || {
        let members = cluster.members().await;
        let lost = members.iter().find(|m| m.id == away && !m.up)?;
        lost.error.contains("remove it and add it again").then_some(())
    })
    .await;
    let health = monitors.once(|m| async move { m.status().get_health(pb::Empty {}).await }).await.unwrap();
    let down = health.checks.iter().find(|c| c.code == "MON_DOWN").unwrap();
    assert!(down.details[0].contains(&format!("monitor.{away}")), "{down:?}");
    assert_eq!(cluster.add(away).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(served(&cluster, away).await, None);

    cluster.remove(away).await.unwrap();
    cluster.add(away).await.unwrap();
    let now = epoch(&monitors).await;
    eventually("it has the map", async || (served(&cluster, away).await? >= now).then_some(())).await;
    cluster.all_up(3).await;
    // It counts: the cluster does without another one.
    let other = (1..=3).find(|i| *i != away).unwrap();
    cluster.kill(other);
    changes(&monitors, "c", 5).await;
}
