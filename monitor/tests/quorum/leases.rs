//! Leases when the leader is cut off from the other monitors but not from the OSDs (rule P6).

use crate::cluster::{Cluster, eventually};
use gabion_common::clock::boottime_ms;
use gabion_common::monitor_client::{MonitorClient, headers};
use gabion_monitor::raft::Start;
use gabion_proto::limits::LEASE;
use gabion_proto::pb;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tonic::Code;

async fn boot(monitors: &MonitorClient) -> (u32, u64) {
    let added = monitors.once(|m| async move {
        let disk = vec![1; 16];
        let request =
            pb::AddOsdRequest { disk, host: "h".into(), capacity_bytes: 1 << 34, ..Default::default() };
        m.admin().add_osd(request).await
    });
    let added = added.await.unwrap();
    let booted = monitors.once(|m| {
        let request = pb::BootRequest {
            id: added.id,
            cluster: added.cluster.clone(),
            disk: vec![1; 16],
            addr: "127.0.0.1:7100".into(),
            host: "h".into(),
            rack: String::new(),
            capacity_bytes: 1 << 34,
        };
        async move { m.osd().boot(request).await }
    });
    (added.id, booted.await.unwrap().incarnation)
}

fn beat(id: u32, incarnation: u64) -> pb::HeartbeatRequest {
    pb::HeartbeatRequest { id, incarnation, ..Default::default() }
}

/// The OSD can reach only the old leader. Whatever that one grants must have run out when the new one
/// says that the OSD is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_grants_nothing_that_outlasts_it() {
    let cluster = Cluster::start(3, 1_000).await;
    let (id, incarnation) = boot(&cluster.client()).await;
    let old = cluster.leader().await;
    let ends = Arc::new(AtomicU64::new(0));
    let granted = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let osd = {
        let (ends, granted, stop) = (ends.clone(), granted.clone(), stop.clone());
        let client = cluster.client_of(old);
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let sent = boottime_ms();
                let answer = client.osd().heartbeat(beat(id, incarnation)).await;
                if let Ok(reply) = answer {
                    ends.fetch_max(sent + reply.into_inner().lease_ms, Ordering::Relaxed);
                    granted.fetch_add(1, Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    };
    eventually("leases", async || (granted.load(Ordering::Relaxed) > 5).then_some(())).await;
    cluster.cut_off(old);

    let others: Vec<String> = (1..=3).filter(|i| *i != old).map(|i| cluster.addr(i)).collect();
    let others = MonitorClient::new(&others).unwrap();
    let down_ms = eventually("the OSD is down for the new leader", async || {
        let osds = others.once(|m| async move { m.admin().list_osds(pb::Empty {}).await }).await.ok()?.osds;
        (!osds[0].up).then(boottime_ms)
    })
    .await;
    // The old leader is asked on: a lease that it grants now would be one too many.
    tokio::time::sleep(LEASE / 2).await;
    stop.store(true, Ordering::Relaxed);
    osd.await.unwrap();
    let ends = ends.load(Ordering::Relaxed);
    assert!(ends <= down_ms, "a lease runs {} ms into the time of the next leader", ends - down_ms);

    // Nor does it answer operators, from what it has, unless they ask for that.
    let alone = cluster.client_of(old);
    let refused = alone.admin().list_osds(pb::Empty {}).await.unwrap_err();
    assert!(refused.code() == Code::Unavailable && headers::is_no_quorum(&refused), "{refused}");
    let status = alone.with_stale_ok().status().get_status(pb::Empty {}).await.unwrap().into_inner();
    assert!(status.stale && status.monitors.iter().all(|m| !m.leader));
    let codes: Vec<_> = status.health.unwrap().checks.into_iter().map(|c| c.code).collect();
    assert!(codes.contains(&"MON_QUORUM_LOST".into()), "{codes:?}");
    let refused = alone.map().watch_map(pb::WatchMapRequest { have_epoch: 0 }).await.unwrap_err();
    assert!(headers::is_no_quorum(&refused), "{refused}");

    // Back among the others it sends the OSD to the leader, which has it boot again.
    cluster.heal();
    cluster.all_up(3).await;
    let leader = cluster.leader().await;
    if leader != old {
        eventually("the way to the leader", async || {
            let refused = alone.osd().heartbeat(beat(id, incarnation)).await.err()?;
            (refused.metadata().get(headers::LEADER)? == &cluster.addr(leader)).then_some(())
        })
        .await;
    }
    let client = cluster.client();
    let refused = client.once(|m| async move { m.osd().heartbeat(beat(id, incarnation)).await }).await;
    assert_eq!(refused.unwrap_err().code(), Code::Aborted);
    let (same, again) = boot(&client).await;
    assert!(same == id && again > incarnation);
    client.once(|m| async move { m.osd().heartbeat(beat(id, again)).await }).await.unwrap();
}

/// OSDs that were heard from all the time are not declared down when the quorum returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quorum_that_returns_finds_the_osds_up() {
    let mut cluster = Cluster::start(3, 1_000).await;
    let client = cluster.client();
    let (id, incarnation) = boot(&client).await;
    let leader = cluster.leader().await;
    let stop = Arc::new(AtomicBool::new(false));
    let refusals = Arc::new(AtomicU64::new(0));
    let osd = {
        let (stop, refusals, client) = (stop.clone(), refusals.clone(), client.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                match client.osd().heartbeat(beat(id, incarnation)).await {
                    Ok(_) => {}
                    Err(s) if s.code() == Code::Aborted => return Err(s),
                    Err(s) => {
                        client.failed(&s);
                        refusals.fetch_add(1, Ordering::Relaxed);
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(())
        })
    };
    let others: Vec<u64> = (1..=3).filter(|i| *i != leader).collect();
    others.iter().for_each(|o| cluster.kill(*o));
    let lost_ms = boottime_ms();
    // Longer than a lease and its grace, while the OSD goes on asking in vain.
    eventually("the leases have run out", async || {
        let long = boottime_ms() > lost_ms + 2 * LEASE.as_millis() as u64;
        (long && refusals.load(Ordering::Relaxed) > 5).then_some(())
    })
    .await;
    for other in others {
        cluster.launch(other, Start::Resume).await;
    }
    cluster.all_up(3).await;
    // And as long again under whoever leads now.
    tokio::time::sleep(LEASE + LEASE / 2).await;
    stop.store(true, Ordering::Relaxed);
    osd.await.unwrap().unwrap();
}
