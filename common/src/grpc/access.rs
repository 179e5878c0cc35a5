//! Which role may make which call: a layer around all services of a server. A plain server knows nobody
//! and lets everybody in.

use super::Peer;
use crate::tls::Role;
use futures::future::{Either, Ready, ready};
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// Whether `role` may call `path` (`/package.Service/Method`).
pub type Rule = fn(path: &str, role: Role) -> bool;

/// The layer.
#[derive(Clone, Copy)]
pub struct Access(pub Rule);

impl<S> Layer<S> for Access {
    type Service = Guarded<S>;
    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, rule: self.0 }
    }
}

#[derive(Clone)]
pub struct Guarded<S> {
    inner: S,
    rule: Rule,
}

impl<S, E> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = E>,
{
    type Response = http::Response<Body>;
    type Error = E;
    type Future = Either<S::Future, Ready<Result<http::Response<Body>, E>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), E>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match refusal(&request, self.rule) {
            None => Either::Left(self.inner.call(request)),
            Some(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}

fn refusal(request: &http::Request<Body>, rule: Rule) -> Option<Status> {
    let Some(peer) = request.extensions().get::<Peer>() else {
        return Some(Status::internal("a connection from nowhere"));
    };
    let identity = peer.identity.as_ref()?;
    let path = request.uri().path();
    if rule(path, identity.role) {
        return None;
    }
    tracing::warn!(from = %peer.addr, %identity, path, "call refused: the certificate's role may not make it");
    let method = path.rsplit('/').next().unwrap_or_default();
    Some(Status::permission_denied(format!("the certificate is of {identity}, which may not call {method}")))
}
