//! One operation on one object, until it succeeds, is refused for good or its time is up.
//!
//! ```text
//!  newest map ─▶ group's primary ─▶ connection ─▶ ask ─▶ Done, Data ─▶ the caller
//!      ▲            │ none            │ none       │ Retry, lost        Failed ─▶ the caller
//!      └────────────┴── wait for a newer map, at most for a backoff ◀───┘
//! ```

use super::attachment::Attached;
use super::cluster::ClusterClient;
use bytes::Bytes;
use gabion_proto::blocks::Content;
use gabion_proto::ids::{Epoch, ObjectId, PoolId};
use gabion_proto::limits::BLOCK_BYTES;
use gabion_proto::map::ClusterMap;
use gabion_proto::msg::{ClientOp, OpError, OpKind, OpReply, RetryWhy};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// After so long one operation is worth a word in the log, once.
const SLOW: Duration = Duration::from_secs(10);

/// Why an operation will not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    #[error(transparent)]
    Refused(#[from] OpError),
    #[error("no answer within the I/O timeout")]
    TimedOut,
    #[error("the pool does not exist")]
    NoPool,
    #[error("the OSD's answer makes no sense")]
    BadAnswer,
}

/// Objects of pools, on behalf of one attachment.
pub struct ObjectClient {
    cluster: Arc<ClusterClient>,
    attached: Arc<Attached>,
    /// `None`: for ever.
    io_timeout: Option<Duration>,
}

impl ObjectClient {
    pub fn new(
        cluster: Arc<ClusterClient>,
        attached: Arc<Attached>,
        io_timeout: Option<Duration>,
    ) -> ObjectClient {
        ObjectClient { cluster, attached, io_timeout }
    }

    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Runs one operation. `data` goes with a write; what comes back is the content of a read, shape
    /// and checksums verified, or nothing. Operations on overlapping blocks must not run at the same
    /// time.
    pub async fn op(
        &self,
        pool: PoolId,
        object: ObjectId,
        kind: OpKind,
        data: Bytes,
    ) -> Result<Content, ObjectError> {
        if self.attached.is_fenced() {
            return Err(OpError::Fenced.into());
        }
        let attempts = self.attempts(pool, object, &kind, &data);
        let result = match self.io_timeout {
            None => attempts.await,
            Some(limit) => tokio::time::timeout(limit, attempts).await.unwrap_or(Err(ObjectError::TimedOut)),
        };
        if result == Err(ObjectError::Refused(OpError::Fenced)) && self.attached.fence() {
            tracing::error!(
                volume = %object.volume,
                generation = %self.attached.generation,
                "fenced: the volume was attached elsewhere, this attachment serves nothing any more"
            );
        }
        result
    }

    async fn attempts(
        &self,
        pool: PoolId,
        object: ObjectId,
        kind: &OpKind,
        data: &Bytes,
    ) -> Result<Content, ObjectError> {
        let mut wait = Wait::new(self.cluster.watch(), object);
        loop {
            let map = self.cluster.map();
            match self.attempt(&map, pool, object, kind, data).await? {
                Attempt::Answered(content) => return Ok(content),
                Attempt::Again { want, why } => wait.before_retry(map.epoch, want, &why).await,
            }
        }
    }

    async fn attempt(
        &self,
        map: &ClusterMap,
        pool: PoolId,
        object: ObjectId,
        kind: &OpKind,
        data: &Bytes,
    ) -> Result<Attempt, ObjectError> {
        let again = |why: String| Ok(Attempt::Again { want: Epoch(0), why });
        if map.removed_volumes.contains(&object.volume) {
            return Err(OpError::Removed.into());
        }
        let Some(pg) = map.pg_of(pool, object.volume, object.index) else {
            return if map.epoch == Epoch(0) { again("no map yet".into()) } else { Err(ObjectError::NoPool) };
        };
        let Some(primary) = map.pgs.get(&pg).and_then(|r| r.primary) else {
            return again(format!("group {pg} has no primary"));
        };
        let connection = match self.cluster.connection(primary).await {
            Ok(c) => c,
            Err(e) => return again(e.to_string()),
        };
        let op = ClientOp {
            epoch: map.epoch,
            pg,
            client: self.attached.client,
            session: self.attached.session,
            generation: self.attached.generation,
            volume: self.attached.volume,
            object,
            kind: kind.clone(),
        };
        let asked = match kind {
            OpKind::Read { first_block, block_count, .. } => Some((*first_block, *block_count)),
            OpKind::Write { .. } | OpKind::Zero { .. } => None,
        };
        let answer_bytes = asked.map_or(0, |(_, count)| count as usize * BLOCK_BYTES as usize);
        match (connection.call(op, data.clone(), answer_bytes).await, asked) {
            (Err(lost), _) => again(format!("{primary}: {lost}")),
            (Ok((OpReply::Retry { epoch, why }, _)), _) => {
                // A payload that arrives damaged is not the group's fault; all the others pass.
                if why == RetryWhy::BadChecksum {
                    tracing::warn!(osd = %primary, %object, "a write arrived damaged and is sent again");
                }
                Ok(Attempt::Again { want: epoch, why: format!("{primary} says {why:?}") })
            }
            (Ok((OpReply::Failed(e), _)), _) => Err(e.into()),
            (Ok((OpReply::Done { .. }, _)), None) => Ok(Attempt::Answered(Content::default())),
            (Ok((OpReply::Data { extents }, data)), Some((first, count))) => {
                let content = Content { extents, data };
                match content.validate(true) {
                    Ok(()) if lies_within(&content, first, count) => Ok(Attempt::Answered(content)),
                    Ok(()) => {
                        tracing::error!(osd = %primary, %object, "an answer with blocks that nobody asked for");
                        Err(ObjectError::BadAnswer)
                    }
                    Err(problem) => {
                        tracing::warn!(osd = %primary, %object, %problem, "an answer is damaged, asking again");
                        again(problem.to_string())
                    }
                }
            }
            (Ok((OpReply::Done { .. } | OpReply::Data { .. }, _)), _) => {
                tracing::error!(osd = %primary, %object, "an answer of the wrong kind");
                Err(ObjectError::BadAnswer)
            }
        }
    }
}

fn lies_within(content: &Content, first: u32, count: u32) -> bool {
    // Ascending and checked for overflow by `validate`.
    let end = content.extents.last().map_or(first, |e| e.first_block + e.block_count);
    content.extents.first().is_none_or(|e| e.first_block >= first) && end <= first + count
}

enum Attempt {
    Answered(Content),
    /// After a map of at least `want`, or a while.
    Again {
        want: Epoch,
        why: String,
    },
}

/// Waits between attempts, and says once when it takes long.
struct Wait {
    map: watch::Receiver<Arc<ClusterMap>>,
    object: ObjectId,
    tries: u32,
    since: tokio::time::Instant,
    said: bool,
}

impl Wait {
    fn new(map: watch::Receiver<Arc<ClusterMap>>, object: ObjectId) -> Wait {
        Wait { map, object, tries: 0, since: tokio::time::Instant::now(), said: false }
    }

    async fn before_retry(&mut self, used: Epoch, want: Epoch, why: &str) {
        if !self.said && self.since.elapsed() > SLOW {
            self.said = true;
            tracing::warn!(object = %self.object, why, "an operation waits");
        }
        let limit = BACKOFF_MIN.saturating_mul(1 << self.tries.min(8)).min(BACKOFF_MAX);
        self.tries += 1;
        let limit = limit.mul_f64(rand::random_range(0.5..1.0));
        let map = &mut self.map;
        let newer = async { map.wait_for(|m| m.epoch > used && m.epoch >= want).await.is_ok() };
        if let Ok(false) = tokio::time::timeout(limit, newer).await {
            // Nobody follows the map any more: only time passes.
            tokio::time::sleep(limit).await;
        }
    }
}

#[cfg(test)]
mod tests;
