//! What this daemon says to the monitors: boot, heartbeats, reports, goodbye.

use super::run::ServerError;
use crate::core::{MonitorRefused, MonitorRequest, ScrubReport, damaged_object};
use gabion_common::monitor_client::MonitorClient;
use gabion_common::tls::Security;
use gabion_proto::ids::*;
use gabion_proto::limits::LEASE;
use gabion_proto::pb::{
    BootRequest, GoodbyeRequest, HeartbeatReply, HeartbeatRequest, OsdStats, PgIntervalReport, PgScrubReport,
};
use std::time::Duration;
use tonic::Status;
use tracing::warn;

/// A monitor that holds a heartbeat for longer is taken for gone.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(1);

fn scrub_report(of: PgIntervalReport, r: ScrubReport) -> PgScrubReport {
    PgScrubReport {
        osd: of.osd,
        incarnation: of.incarnation,
        pool: of.pool,
        index: of.index,
        interval: of.interval,
        number: r.number,
        deep: r.deep,
        objects: r.objects,
        findings: r.findings,
        repaired: r.repaired,
        damaged_objects: r.damaged_objects,
        damaged: r.damaged.into_iter().map(damaged_object).collect(),
    }
}

/// The monitors, as one OSD sees them. Cheap to clone.
#[derive(Clone)]
pub struct Monitors {
    client: MonitorClient,
}

impl Monitors {
    pub fn new(addrs: &[String], security: Security) -> Result<Monitors, ServerError> {
        let client =
            MonitorClient::secured(addrs, security).map_err(|e| ServerError::Config(e.to_string()))?;
        Ok(Monitors { client })
    }

    /// The client itself, for following the map.
    pub fn client(&self) -> MonitorClient {
        self.client.clone()
    }

    /// Boots, however long the monitors take to answer. A refusal is final.
    pub async fn boot(&self, request: BootRequest) -> Result<(Incarnation, Epoch), ServerError> {
        let call = |m: MonitorClient| {
            let request = request.clone();
            async move { m.osd().boot(request).await }
        };
        match self.client.until_answered("boot", call).await {
            Ok(r) => Ok((Incarnation(r.incarnation), Epoch(r.epoch))),
            Err(s) => Err(ServerError::BootRefused(s.message().to_owned())),
        }
    }

    /// One try: an answer that comes later than a lease is of no use.
    pub async fn heartbeat(&self, request: HeartbeatRequest) -> Result<HeartbeatReply, Status> {
        // A leader that hangs must be left while the lease still runs.
        let call = self.client.with_call_timeout(HEARTBEAT_TIMEOUT);
        let call = call.once(|m| {
            let request = request.clone();
            async move { m.osd().heartbeat(request).await }
        });
        tokio::time::timeout(LEASE, call)
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")))
    }

    /// Reports until it is durable or refused. `stats` are those of the moment in which the report was made; only a clean
    /// group's report carries them.
    pub async fn report(
        &self,
        osd: OsdId,
        incarnation: Incarnation,
        request: MonitorRequest,
        stats: OsdStats,
    ) -> Result<(), MonitorRefused> {
        let (MonitorRequest::Activated { pg, interval }
        | MonitorRequest::Clean { pg, interval }
        | MonitorRequest::Filled { pg, interval }
        | MonitorRequest::Scrubbed { pg, interval, .. }) = request;
        let report = PgIntervalReport {
            osd: osd.0,
            incarnation: incarnation.0,
            pool: pg.pool.0,
            index: pg.index,
            interval: interval.0,
            recovered_objects: stats.recovered_objects,
            recovered_bytes: stats.recovered_bytes,
        };
        let call = |m: MonitorClient| {
            let request = request.clone();
            async move {
                match request {
                    MonitorRequest::Activated { .. } => m.osd().pg_activated(report).await,
                    MonitorRequest::Clean { .. } => m.osd().pg_clean(report).await,
                    MonitorRequest::Filled { .. } => m.osd().pg_filled(report).await,
                    MonitorRequest::Scrubbed { report: r, .. } => {
                        m.osd().pg_scrubbed(scrub_report(report, r)).await
                    }
                }
            }
        };
        self.client.until_answered("report", call).await.map(|_| ()).map_err(|_| MonitorRefused)
    }

    /// Tells them that this run ends; best effort.
    pub async fn goodbye(&self, osd: OsdId, incarnation: Incarnation) {
        let request = GoodbyeRequest { id: osd.0, incarnation: incarnation.0 };
        let call = self.client.once(|m| async move { m.osd().goodbye(request).await });
        match tokio::time::timeout(LEASE, call).await {
            Ok(Ok(_)) => {}
            Ok(Err(s)) => warn!(error = s.message(), "could not say goodbye; the lease will run out"),
            Err(_) => warn!("could not say goodbye in time; the lease will run out"),
        }
    }
}
