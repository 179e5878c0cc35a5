//! `StatusService`: status, health, rebuilds and events.

use super::monitors::member;
use super::{Answers, Monitor, Sender, health, slow, view};
use crate::state::{EVENTS_MAX, EventSeverity};
use gabion_common::monitor_client::headers;
use gabion_proto::pb::{self, Empty};
use std::collections::HashMap;
use std::time::Duration;
use tonic::{Request, Response, Status};

/// How often rebuilds are shown.
const REBUILD_EVERY: Duration = Duration::from_millis(500);
/// Events shown when no number is asked for.
const EVENTS_DEFAULT: usize = 100;

fn event(e: &crate::state::Event) -> pb::Event {
    let severity = match e.severity {
        EventSeverity::Ok => pb::Severity::Ok,
        EventSeverity::Warn => pb::Severity::Warn,
        EventSeverity::Error => pb::Severity::Error,
    };
    pb::Event { unix_ms: e.unix_ms, epoch: e.epoch.0, severity: severity as i32, text: e.text.clone() }
}

async fn rebuilds(monitor: Monitor, until_clean: bool, tx: Sender<pb::RebuildStatus>) {
    let mut tick = tokio::time::interval(REBUILD_EVERY);
    loop {
        tick.tick().await;
        let status = view::rebuild(&monitor.state(), &monitor.0.volatile.lock());
        let clean = status.pgs_not_clean == 0;
        if tx.send(Ok(status)).await.is_err() || (clean && until_clean) {
            return;
        }
    }
}

async fn events(monitor: Monitor, last: usize, follow: bool, tx: Sender<pb::Event>) {
    let mut states = monitor.0.consensus.watch();
    let state = states.borrow_and_update().clone();
    let skip = state.events.len().saturating_sub(last);
    let mut shown = state.events.get(skip).map_or(0, |e| e.number.saturating_sub(1));
    loop {
        let state = states.borrow_and_update().clone();
        for e in state.events.iter().filter(|e| e.number > shown) {
            if tx.send(Ok(event(e))).await.is_err() {
                return;
            }
        }
        shown = state.events.back().map_or(shown, |e| e.number);
        if !follow || states.changed().await.is_err() {
            return;
        }
    }
}

impl Monitor {
    /// Whether there is proof of a quorum; without one it is an error, unless the caller takes an old
    /// answer.
    async fn confirm_or_stale(&self, request: &Request<Empty>) -> Result<bool, Status> {
        match self.confirm().await {
            Ok(_) => Ok(true),
            Err(status)
                if headers::is_no_quorum(&status) && request.metadata().contains_key(headers::STALE_OK) =>
            {
                Ok(false)
            }
            Err(status) => Err(status),
        }
    }
}

#[tonic::async_trait]
impl pb::status_service_server::StatusService for Monitor {
    type WatchRebuildsStream = Answers<pb::RebuildStatus>;
    type WatchEventsStream = Answers<pb::Event>;

    async fn get_status(&self, request: Request<Empty>) -> Result<Response<pb::ClusterStatus>, Status> {
        let quorum = self.quorum(self.confirm_or_stale(&request).await?);
        let state = self.state();
        let volatile = self.0.volatile.lock();
        let osds = view::osds(&state, &volatile);
        let mut pgs_by_state: HashMap<String, u32> = HashMap::new();
        for (id, record) in &state.map.pgs {
            let (words, _) = view::pg_state(&state, &volatile, *id, record);
            *pgs_by_state.entry(words.into()).or_default() += 1;
        }
        let (_, io) = volatile.meter.rates();
        let counted = || osds.iter().filter(|o| o.r#in);
        Ok(Response::new(pb::ClusterStatus {
            cluster: state.map.cluster.to_string(),
            epoch: state.map.epoch.0,
            health: Some(health::report(&state, &volatile, &quorum)),
            monitors: quorum.members.into_iter().map(member).collect(),
            stale: !quorum.held,
            slow_policy: Some(slow::policy(&state, &volatile)),
            osds: osds.len() as u32,
            osds_up: osds.iter().filter(|o| o.up).count() as u32,
            osds_in: counted().count() as u32,
            capacity_bytes: counted().map(|o| o.capacity_bytes).sum(),
            used_bytes: counted().map(|o| o.used_bytes).sum(),
            pools: state.map.pools.len() as u32,
            volumes: state.volumes.len() as u32,
            exports: state.exports.len() as u32,
            vms: state.vms.len() as u32,
            pgs_by_state,
            client_io: Some(pb::ClientIo {
                reads_per_s: io[0],
                writes_per_s: io[1],
                read_bytes_per_s: io[2],
                write_bytes_per_s: io[3],
            }),
            rebuild: Some(view::rebuild(&state, &volatile)),
        }))
    }

    async fn get_health(&self, request: Request<Empty>) -> Result<Response<pb::HealthReport>, Status> {
        let quorum = self.quorum(self.confirm_or_stale(&request).await?);
        Ok(Response::new(health::report(&self.state(), &self.0.volatile.lock(), &quorum)))
    }

    async fn watch_rebuilds(
        &self,
        request: Request<pb::WatchRebuildsRequest>,
    ) -> Result<Response<Self::WatchRebuildsStream>, Status> {
        let until_clean = request.into_inner().until_clean;
        let term = self.confirm().await?;
        Ok(Response::new(self.stream(self.deposed(term), |tx| rebuilds(self.clone(), until_clean, tx))))
    }

    async fn watch_events(
        &self,
        request: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let r = request.into_inner();
        let last = match r.last {
            0 => EVENTS_DEFAULT,
            n => (n as usize).min(EVENTS_MAX),
        };
        let term = self.confirm().await?;
        Ok(Response::new(self.stream(self.deposed(term), |tx| events(self.clone(), last, r.follow, tx))))
    }
}
