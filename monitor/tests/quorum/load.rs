//! Changes by several operators at once, and the oracle: what was answered is so, and nothing was done
//! twice.
//!
//! Each operator makes volumes of names that nobody ever used and removes some of its own. So a
//! creation can only be refused when it was carried out twice, and a removal likewise.

use crate::cluster::Cluster;
use gabion_common::monitor_client::{MonitorClient, is_transient};
use gabion_proto::pb;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::task::JoinHandle;

/// What is known of one name in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    There(u64),
    Removed,
    /// No answer came, or only that none would: it may be either way.
    Unknown,
}

pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    operators: Vec<JoinHandle<BTreeMap<String, Fate>>>,
}

const POOL: &str = "p";

async fn create(monitors: &MonitorClient, name: &str) -> Result<u64, tonic::Status> {
    let call = monitors.once(|m| {
        let (name, pool) = (name.to_owned(), POOL.to_owned());
        let request = pb::CreateVolumeRequest { name, pool, size_bytes: 1 << 20 };
        async move { m.admin().create_volume(request).await }
    });
    call.await.map(|v| v.id)
}

async fn remove(monitors: &MonitorClient, name: &str) -> Result<(), tonic::Status> {
    let call = monitors.once(|m| {
        let request = pb::NameRequest { name: name.to_owned() };
        async move { m.admin().remove_volume(request).await }
    });
    call.await.map(drop)
}

async fn operate(
    monitors: MonitorClient,
    operator: usize,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
) -> BTreeMap<String, Fate> {
    let mut fates = BTreeMap::new();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let name = format!("o{operator}-{n}");
        let fate = match create(&monitors, &name).await {
            Ok(_) if n % 3 == 0 => match remove(&monitors, &name).await {
                Ok(()) => Fate::Removed,
                Err(s) if is_transient(&s) => Fate::Unknown,
                Err(s) => panic!("{name} was made and its removal refused: {s}"),
            },
            Ok(id) => Fate::There(id),
            Err(s) if is_transient(&s) => Fate::Unknown,
            Err(s) => panic!("{name} is a new name and was refused: {s}"),
        };
        fates.insert(name, fate);
        done.fetch_add(1, Ordering::Relaxed);
    }
    fates
}

impl Load {
    /// `operators` of them, until [`Load::check`].
    pub async fn start(cluster: &Cluster, operators: usize) -> Load {
        let kind = Some(pb::redundancy::Kind::Replicas(3));
        let request = pb::CreatePoolRequest {
            name: POOL.into(),
            redundancy: Some(pb::Redundancy { kind }),
            pg_count: 8,
            ..Default::default()
        };
        let client = cluster.client();
        let make = client.until_answered("pool", |m| {
            let request = request.clone();
            async move { m.admin().create_pool(request).await }
        });
        make.await.unwrap();
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let operator = |n| tokio::spawn(operate(cluster.client().fork(), n, stop.clone(), done.clone()));
        let operators = (0..operators).map(operator).collect();
        Load { stop, done, operators }
    }

    /// Changes that have ended.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until `more` changes have ended from now on.
    pub async fn goes_on(&self, more: usize) {
        let until = self.done() + more;
        crate::cluster::eventually("changes go on", async || {
            assert!(self.operators.iter().all(|o| !o.is_finished()), "an operator was answered wrongly");
            (self.done() >= until).then_some(())
        })
        .await;
    }

    /// Ends the load and compares what there is with what was answered.
    pub async fn check(self, cluster: &Cluster) {
        self.stop.store(true, Ordering::Relaxed);
        let mut fates = BTreeMap::new();
        for operator in self.operators {
            fates.extend(operator.await.unwrap());
        }
        let client = cluster.client();
        let listed =
            client.until_answered("list", |m| async move { m.admin().list_volumes(pb::Empty {}).await });
        let listed = listed.await.unwrap().volumes;
        let there: BTreeMap<String, u64> = listed.iter().map(|v| (v.name.clone(), v.id)).collect();
        assert_eq!(there.len(), listed.len(), "a name is there twice");
        let ids: BTreeSet<u64> = there.values().copied().collect();
        assert_eq!(ids.len(), there.len(), "an id is there twice");
        for (name, fate) in &fates {
            match fate {
                Fate::There(id) => assert_eq!(there.get(name), Some(id), "{name} was made and is lost"),
                Fate::Removed => assert_eq!(there.get(name), None, "{name} was removed and is back"),
                Fate::Unknown => {}
            }
        }
        for name in there.keys() {
            assert!(fates.contains_key(name), "nobody asked for {name}");
        }
        // Ids are given one by one: none was given for something done twice.
        let unknown = fates.values().filter(|f| **f == Fate::Unknown).count();
        let probe = create(&cluster.client(), "probe").await.unwrap() as usize;
        let certain = fates.len() - unknown + 1;
        assert!(
            (certain..=certain + unknown).contains(&probe),
            "{probe} ids for {certain} to {} volumes",
            certain + unknown
        );
        assert!(unknown * 10 <= fates.len(), "{unknown} of {} changes got no answer", fates.len());
    }
}
