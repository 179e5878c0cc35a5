//! Consoles over gRPC.

use super::{Hub, View};
use bytes::Bytes;
use gabion_proto::pb;
use gabion_proto::pb::console_service_server::ConsoleService;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

const INPUT_BYTES_MAX: usize = 64 << 10;
const OUTPUTS_MAX: usize = 64;

/// The consoles of the guests that run now, by guest.
#[derive(Clone, Default)]
pub struct Consoles {
    // Guests come and go on their own tasks while calls look them up.
    hubs: Arc<Mutex<HashMap<String, Hub>>>,
}

impl Consoles {
    pub fn insert(&self, vm: &str, hub: Hub) {
        self.lock().insert(vm.to_owned(), hub);
    }
    pub fn remove(&self, vm: &str) {
        self.lock().remove(vm);
    }
    fn view(&self, vm: &str) -> Option<View> {
        self.lock().get(vm).map(Hub::view)
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Hub>> {
        self.hubs.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[tonic::async_trait]
impl ConsoleService for Consoles {
    type ConsoleStream = ReceiverStream<Result<pb::ConsoleOutput, Status>>;

    async fn console(
        &self,
        request: Request<Streaming<pb::ConsoleInput>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut inputs = request.into_inner();
        let first = inputs
            .message()
            .await?
            .ok_or_else(|| Status::invalid_argument("the first message names the guest"))?;
        let view = self
            .view(&first.vm)
            .ok_or_else(|| Status::not_found(format!("guest {:?} does not run on this host", first.vm)))?;
        let (tx, rx) = mpsc::channel(OUTPUTS_MAX);
        tokio::spawn(output(view.replay, view.live, tx.clone()));
        tokio::spawn(async move {
            let mut data = first.data;
            loop {
                if data.len() > INPUT_BYTES_MAX {
                    let _ = tx.send(Err(Status::invalid_argument("too much input in one message"))).await;
                    return;
                }
                if !data.is_empty() && view.input.send(Bytes::from(data)).await.is_err() {
                    return;
                }
                tokio::select! {
                    next = inputs.message() => match next {
                        Ok(Some(next)) => data = next.data,
                        _ => return,
                    },
                    () = tx.closed() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }
}

async fn output(
    replay: Bytes,
    mut live: broadcast::Receiver<Bytes>,
    tx: mpsc::Sender<Result<pb::ConsoleOutput, Status>>,
) {
    let mut next = replay;
    loop {
        if !next.is_empty() && tx.send(Ok(pb::ConsoleOutput { data: next.to_vec() })).await.is_err() {
            return;
        }
        next = tokio::select! {
            () = tx.closed() => return,
            got = live.recv() => match got {
                Ok(bytes) => bytes,
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    Bytes::from_static(b"\r\n[some output was lost: this viewer is too slow]\r\n")
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
        };
    }
}
