//! A service behind every combination of sides.

use super::{Access, Connector, Incoming};
use crate::tls::tests::Ca;
use crate::tls::{Role, Security};
use gabion_proto::pb::console_service_client::ConsoleServiceClient;
use gabion_proto::pb::console_service_server::{ConsoleService, ConsoleServiceServer};
use gabion_proto::pb::{ConsoleInput, ConsoleOutput};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt as _;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Response, Status, Streaming};

/// Answers what it is sent.
struct Echo;

#[tonic::async_trait]
impl ConsoleService for Echo {
    type ConsoleStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<ConsoleOutput, Status>> + Send>>;
    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let echo = request.into_inner().map(|input| input.map(|i| ConsoleOutput { data: i.data }));
        Ok(Response::new(Box::pin(echo)))
    }
}

async fn serve(security: Security) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let incoming = Incoming::new(listener, security).unwrap();
    let addr = incoming.local_addr();
    let server = tonic::transport::Server::builder()
        .layer(Access(|path, role| path == "/gabion.v1.ConsoleService/Console" && role == Role::Admin))
        .add_service(ConsoleServiceServer::new(Echo))
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    addr
}

async fn call(addr: SocketAddr, security: Security, want: Role) -> Result<Vec<u8>, Status> {
    raw_call(addr, security, want).await.map_err(super::explained)
}

async fn raw_call(addr: SocketAddr, security: Security, want: Role) -> Result<Vec<u8>, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).unwrap();
    let channel =
        endpoint.connect_with_connector_lazy(Connector::new(addr, security, want, Duration::from_secs(20)));
    let sent: Vec<ConsoleInput> =
        (0..100).map(|i| ConsoleInput { vm: "v".into(), data: vec![i; 30_000] }).collect();
    let mut answers =
        ConsoleServiceClient::new(channel).console(tokio_stream::iter(sent)).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(answer) = answers.message().await? {
        bytes.extend(answer.data);
    }
    Ok(bytes)
}

#[tokio::test]
async fn plain_and_tls_carry_the_same() {
    let ca = Ca::new("prod");
    let want: Vec<u8> = (0..100).flat_map(|i| vec![i; 30_000]).collect();
    let plain = call(serve(Security::plain()).await, Security::plain(), Role::Host).await;
    assert_eq!(plain.unwrap(), want);
    let tls = call(serve(ca.security(Role::Host)).await, ca.security(Role::Admin), Role::Host).await;
    assert_eq!(tls.unwrap(), want);
}

#[tokio::test]
async fn a_role_is_held_to_what_it_may() {
    let ca = Ca::new("prod");
    let addr = serve(ca.security(Role::Host)).await;
    for role in Role::ALL.into_iter().filter(|r| *r != Role::Admin) {
        let refused = call(addr, ca.security(role), Role::Host).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        let want = format!("the certificate is of {role} node-a of cluster prod, which may not call Console");
        assert_eq!(refused.message(), want);
    }
    // A host's certificate does not make a monitor.
    let refused = call(addr, ca.security(Role::Admin), Role::Monitor).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let want = "TLS: its certificate is of host node-a of cluster prod, wanted is one of role monitor";
    assert_eq!(refused.message(), want);
}

#[tokio::test]
async fn who_does_not_belong_is_told_so() {
    let (ours, theirs) = (Ca::new("prod"), Ca::new("prod"));
    let addr = serve(ours.security(Role::Host)).await;
    let plain = serve(Security::plain()).await;
    let cases = [
        (addr, Security::plain(), "TLS: it speaks TLS, this process is configured without"),
        (addr, theirs.security(Role::Admin), "TLS: its certificate is not from this cluster's CA"),
        (
            addr,
            ours.showing(&theirs, Role::Admin),
            "TLS: it refuses this process's certificate: it is not from its CA; its log says more",
        ),
        (
            addr,
            ours.expired(Role::Admin),
            "TLS: it refuses this process's certificate: it has expired, or is not valid yet; its log says more",
        ),
        (plain, ours.security(Role::Admin), "TLS: it does not speak TLS, this process does"),
    ];
    for (addr, security, want) in cases {
        let shown = format!("{security:?}");
        let status = call(addr, security, Role::Host).await.unwrap_err();
        assert!(status.message().contains(want), "{shown}: {status:?}");
    }
    // The server is as before.
    call(addr, ours.security(Role::Admin), Role::Host).await.unwrap();
}

#[tokio::test]
async fn silent_connections_hold_up_nobody() {
    let ca = Ca::new("prod");
    let addr = serve(ca.security(Role::Host)).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    call(addr, ca.security(Role::Admin), Role::Host).await.unwrap();
    // They are hung up on in the end.
    use tokio::io::AsyncReadExt;
    let mut last = silent.pop().unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), last.read(&mut [0; 16])).await;
    assert!(ended.is_ok(), "a silent connection is never closed");
}
