//! Calls to the monitors with errors for people.

use crate::config::Target;
use crate::fail;
use anyhow::{Error, Result};
use gabion_common::monitor_client::{MonitorClient, headers};
use gabion_common::tls::Security;
use std::future::Future;
use std::time::Duration;
use tonic::{Response, Status, Streaming};

/// Without a leader for this long there is no quorum, and not just an election.
const ELECTION_WITHIN: Duration = Duration::from_secs(8);

/// The monitors and how to name them in an error.
#[derive(Clone)]
pub struct Monitors {
    client: MonitorClient,
    addrs: Vec<String>,
}

impl Monitors {
    pub fn new(target: Target) -> Result<Monitors> {
        let client = MonitorClient::secured(&target.monitors, target.security)?;
        Ok(Monitors { client, addrs: target.monitors })
    }

    /// How this command connects.
    pub fn security(&self) -> Security {
        self.client.security()
    }

    /// For what is read from OSDs.
    pub fn client(&self) -> &MonitorClient {
        &self.client
    }

    /// Makes a call about `thing` at the first monitor that answers.
    pub async fn call<T, F, Fut>(&self, thing: &str, call: F) -> Result<T>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.client.once(call).await.map_err(|status| self.error(thing, &status))
    }

    /// The same for what says how the cluster is: when the monitors have no quorum, what one of them last
    /// knew.
    pub async fn latest<T, F, Fut>(&self, thing: &str, mut call: F) -> Result<T>
    where
        F: FnMut(MonitorClient) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = match self.client.with_retry_for(ELECTION_WITHIN).once(&mut call).await {
            Err(status) if headers::is_no_quorum(&status) => {
                self.client.with_stale_ok().once(&mut call).await
            }
            answer => answer,
        };
        answer.map_err(|status| self.error(thing, &status))
    }

    /// What `status` means for `thing`.
    pub fn error(&self, thing: &str, status: &Status) -> Error {
        fail::from_status(thing, &self.addrs, status)
    }

    /// The next message of a stream.
    pub async fn next<T>(&self, thing: &str, stream: &mut Streaming<T>) -> Result<Option<T>> {
        stream.message().await.map_err(|status| self.error(thing, &status))
    }
}

/// `$monitors.call(thing, ..)` for a unary call with a request that can be cloned.
#[macro_export]
macro_rules! rpc {
    ($monitors:expr, $thing:expr, $service:ident . $method:ident, $request:expr) => {{
        let request = $request;
        $monitors
            .call(&$thing, |c| {
                let request = request.clone();
                async move { c.$service().$method(request).await }
            })
            .await
    }};
}
