//! A disk that was formatted for one cluster is ready for that one only: `format` with the monitors of another
//! refuses it in one sentence and leaves it as it is.

use gabion_osd::store::{self, Identity};
use gabion_proto::ids::{ClusterId, OsdId};
use gabion_proto::pb;
use gabion_proto::pb::status_service_server::{StatusService, StatusServiceServer};
use std::net::SocketAddr;
use std::path::Path;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

/// A monitor that says which cluster it is of, and nothing else.
struct Monitor(ClusterId);

type None<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl StatusService for Monitor {
    type WatchRebuildsStream = None<pb::RebuildStatus>;
    type WatchEventsStream = None<pb::Event>;
    async fn get_status(&self, _: Request<pb::Empty>) -> Result<Response<pb::ClusterStatus>, Status> {
        Ok(Response::new(pb::ClusterStatus { cluster: self.0.to_string(), ..Default::default() }))
    }
    async fn get_health(&self, _: Request<pb::Empty>) -> Result<Response<pb::HealthReport>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn watch_rebuilds(
        &self,
        _: Request<pb::WatchRebuildsRequest>,
    ) -> Result<Response<Self::WatchRebuildsStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn watch_events(
        &self,
        _: Request<pb::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn monitor(cluster: ClusterId) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(StatusServiceServer::new(Monitor(cluster)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    addr
}

async fn format(dir: &Path, monitor: &str) -> (Option<i32>, String) {
    let out = tokio::process::Command::new(env!("CARGO_BIN_EXE_gabion-osd"))
        .args(["format", "--size", "64M", "--monitors", monitor, "--host", "h", "--data-dir"])
        .arg(dir)
        .output()
        .await
        .unwrap();
    let said = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&said).into_owned())
}

#[tokio::test]
async fn format_refuses_another_clusters_store() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (ClusterId([1; 16]), ClusterId([2; 16]));
    let identity = Identity { cluster: theirs, osd: OsdId(3), disk: ClusterId([9; 16]) };
    store::format(dir.path(), 64 << 20, identity).unwrap();

    let (status, said) = format(dir.path(), &monitor(ours).await.to_string()).await;
    assert_eq!(status, Some(1), "{said}");
    let sentence =
        format!("holds osd.3 of cluster {theirs}, the monitors are of cluster {ours}; it is left alone");
    assert!(said.contains(&sentence) && !said.contains("ready"), "{said}");
    assert_eq!(store::info(dir.path()).unwrap().identity, identity);

    // Nobody there to ask: not ready either.
    let (status, said) = format(dir.path(), "127.0.0.1:1").await;
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("holds osd.3 already, and no monitor at 127.0.0.1:1 says whether of its cluster"),
        "{said}"
    );

    let (status, said) = format(dir.path(), &monitor(theirs).await.to_string()).await;
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("osd.3 is ready"), "{said}");
}
