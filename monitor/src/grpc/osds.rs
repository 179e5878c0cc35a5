//! `OsdService`: boots, leases, reports of groups.

use super::leadership::open;
use super::rebuild::Recovered;
use super::view::{damaged_object, unix_ms};
use super::{Monitor, invalid};
use crate::decide::Event;
use crate::raft::ConsensusError;
use crate::state::intervals::earlier_primaries;
use crate::state::scrubs::ScrubResult;
use crate::state::{Command, Reply};
use gabion_common::clock::boottime_ms;
use gabion_proto::convert;
use gabion_proto::ids::*;
use gabion_proto::limits::{DAMAGED_NAMED_MAX, LEASE};
use gabion_proto::pb::{self, Empty};
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

/// The run of an OSD that reports, as primary, and the group and interval that it reports of.
struct Reporter {
    osd: OsdId,
    incarnation: Incarnation,
    pg: PgId,
    interval: Epoch,
}

impl From<&pb::PgIntervalReport> for Reporter {
    fn from(r: &pb::PgIntervalReport) -> Self {
        Reporter {
            osd: OsdId(r.osd),
            incarnation: Incarnation(r.incarnation),
            pg: PgId { pool: PoolId(r.pool), index: r.index },
            interval: Epoch(r.interval),
        }
    }
}

/// Peers that one heartbeat may report; the rest comes with the next.
const STUCK_MAX: usize = 64;

impl Monitor {
    /// No lease is granted without proof of a quorum, but the OSD is not silent either: when the quorum
    /// returns it must not be declared down for what the monitors lacked.
    fn heard(&self, osd: OsdId, incarnation: Incarnation) {
        if let Some(lead) = &mut *self.0.lead.lock() {
            // Not told to the OSD: what is remembered only ends later than any lease.
            lead.detector.renew(boottime_ms(), &self.state(), osd, incarnation);
        }
    }

    /// Acts on peers that do not work, aside: a lease does not wait for agreement on what was reported.
    /// While the reports of earlier heartbeats are dealt with, these are dropped: the next one brings them
    /// again.
    fn report_stuck(&self, osd: OsdId, incarnation: Incarnation, stuck: Vec<pb::StuckPeer>) {
        if stuck.is_empty() {
            return;
        }
        let Ok(permit) = self.0.stuck_reports.clone().try_acquire_owned() else { return };
        let monitor = self.clone();
        tokio::spawn(async move {
            let _permit = permit;
            for s in stuck.into_iter().take(STUCK_MAX) {
                let event = Event::Stuck {
                    osd,
                    incarnation,
                    pg: PgId { pool: PoolId(s.pool), index: s.pg },
                    interval: Epoch(s.interval),
                    peer: OsdId(s.peer),
                    peer_incarnation: Incarnation(s.peer_incarnation),
                    age_ms: s.age_ms,
                };
                monitor.detect(event).await;
            }
        });
    }
}

#[tonic::async_trait]
impl pb::osd_service_server::OsdService for Monitor {
    async fn boot(&self, request: Request<pb::BootRequest>) -> Answer<pb::BootReply> {
        let (id, r) = open(request)?;
        let cluster = convert::identity("cluster", &r.cluster).map_err(invalid)?;
        if let Some(mine) = self.0.consensus.cluster().filter(|mine| *mine != cluster) {
            return Err(Status::failed_precondition(format!(
                "this is cluster {mine}, the disk belongs to {cluster}"
            )));
        }
        let disk = convert::identity("disk", &r.disk).map_err(invalid)?;
        let command = Command::BootOsd {
            osd: OsdId(r.id),
            disk,
            addr: r.addr,
            host: r.host,
            rack: r.rack,
            capacity_bytes: r.capacity_bytes,
        };
        match self.propose_for(id, command).await? {
            Reply::Booted { incarnation, epoch } => {
                tracing::info!(osd = r.id, incarnation = incarnation.0, "booted");
                Ok(Response::new(pb::BootReply { incarnation: incarnation.0, epoch: epoch.0 }))
            }
            other => Err(Status::internal(format!("unexpected answer {other:?}"))),
        }
    }

    async fn heartbeat(&self, request: Request<pb::HeartbeatRequest>) -> Answer<pb::HeartbeatReply> {
        let mut r = request.into_inner();
        let (osd, incarnation) = (OsdId(r.id), Incarnation(r.incarnation));
        // Rule P6, see `decide`: the proof begins after the request has come.
        let term = match self.confirm().await {
            Ok(term) => term,
            Err(status) => {
                self.heard(osd, incarnation);
                return Err(status);
            }
        };
        let (state, renewed) = match &mut *self.0.lead.lock() {
            Some(lead) if lead.term == term => {
                // The state is read under the lock: an older one may call up who was marked down since.
                let state = self.state();
                let renewed = lead.detector.renew(boottime_ms(), &state, osd, incarnation);
                if let Some(window) = r.latency.as_ref().filter(|_| renewed) {
                    lead.detector.latency(boottime_ms(), &state, (osd, incarnation), window);
                }
                (state, renewed)
            }
            // A later term has begun meanwhile: the OSD asks again.
            _ => return Err(self.failed(ConsensusError::NotLeader)),
        };
        if !renewed {
            return Err(Status::aborted(format!("{osd} is not up as {incarnation}: boot again")));
        }
        let led = r.pgs.iter().map(|s| PgId { pool: PoolId(s.pool), index: s.index });
        let scrubs = state.scrub_orders(unix_ms(), led).into_iter().map(|o| pb::ScrubOrder {
            pool: o.pg.pool.0,
            index: o.pg.index,
            number: o.number,
            deep: o.deep,
        });
        let scrubs = scrubs.collect();
        let stuck = std::mem::take(&mut r.stuck);
        let slow_osds = {
            let mut volatile = self.0.volatile.lock();
            volatile.heartbeat(&state, osd, r);
            volatile.slow.iter().map(|s| s.osd.0).collect()
        };
        self.0.osd_reports.send_modify(|n| *n += 1);
        self.report_stuck(osd, incarnation, stuck);
        Ok(Response::new(pb::HeartbeatReply {
            lease_ms: LEASE.as_millis() as u64,
            epoch: state.map.epoch.0,
            scrubs,
            scrub_rate_bytes_per_s: state.scrub_settings.rate_bytes_per_s,
            rebuild_rate_bytes_per_s: state.rebuild_rate_bytes_per_s,
            slow_limit_ms: state.slow_policy.limit_ms,
            slow_osds,
        }))
    }

    async fn pg_activated(&self, request: Request<pb::PgIntervalReport>) -> Answer<Empty> {
        let Reporter { osd, incarnation, pg, interval } = request.get_ref().into();
        // Rule P6. Once the interval is over there is nobody to wait for: the proposal says so.
        self.in_force(interval, |state, osd| {
            let current = state.map.pgs.get(&pg).filter(|record| record.interval == interval);
            current.is_some_and(|record| earlier_primaries(record).contains(&osd))
        })
        .await?;
        self.propose(Command::PgActivated { osd, incarnation, pg, interval }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn pg_clean(&self, request: Request<pb::PgIntervalReport>) -> Answer<Empty> {
        let r = request.into_inner();
        let Reporter { osd, incarnation, pg, interval } = (&r).into();
        // Before the group is clean for anybody who watches.
        let recovered = Recovered { objects: r.recovered_objects, bytes: r.recovered_bytes };
        self.0.volatile.lock().recovered(&self.state(), osd, incarnation, recovered);
        self.propose(Command::PgClean { osd, incarnation, pg, interval }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn pg_filled(&self, request: Request<pb::PgIntervalReport>) -> Answer<Empty> {
        let Reporter { osd, incarnation, pg, interval } = request.get_ref().into();
        self.propose(Command::PgFilled { osd, incarnation, pg, interval }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn pg_scrubbed(&self, request: Request<pb::PgScrubReport>) -> Answer<Empty> {
        let r = request.into_inner();
        let damaged = r.damaged.into_iter().take(DAMAGED_NAMED_MAX).map(damaged_object).collect();
        self.propose(Command::PgScrubbed {
            osd: OsdId(r.osd),
            incarnation: Incarnation(r.incarnation),
            pg: PgId { pool: PoolId(r.pool), index: r.index },
            interval: Epoch(r.interval),
            result: ScrubResult {
                number: r.number,
                deep: r.deep,
                objects: r.objects,
                findings: r.findings,
                repaired: r.repaired,
                damaged_objects: r.damaged_objects,
                damaged,
            },
        })
        .await?;
        Ok(Response::new(Empty {}))
    }

    async fn goodbye(&self, request: Request<pb::GoodbyeRequest>) -> Answer<Empty> {
        let r = request.into_inner();
        self.confirm().await?;
        self.detect(Event::Goodbye { osd: OsdId(r.id), incarnation: Incarnation(r.incarnation) }).await;
        Ok(Response::new(Empty {}))
    }
}
