//! Between two runs of the core, and at the end: the store answers what it owes, or has stopped for good.

use super::run::ServerError;
use crate::core::StartState;
use crate::store::driver::StoreDriver;
use crate::store::{ConcurrentStore, StoreError};
use gabion_proto::limits::DISK_SILENT_MAX;
use std::pin::pin;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Why the store has stopped for good, once it has.
pub type Fatal = watch::Receiver<Option<String>>;

/// Once this OSD is to stop, a disk that is slow but not silent has so long to answer everything. What was acknowledged is durable
/// anyway.
const STOP_WAIT: Duration = DISK_SILENT_MAX.saturating_mul(2);

/// Resolves when the store has stopped for good, or its thread is gone. Cancel-safe.
async fn stopped(fatal: &mut Fatal) -> ServerError {
    let _ = fatal.changed().await;
    ServerError::Fatal(fatal.borrow().clone().unwrap_or_else(|| "the store's thread is gone".into()))
}

/// Waits until the store has answered everything; not for one that has stopped, nor for ever once `stop` is cancelled.
pub async fn drain<S: ConcurrentStore + 'static, T: Send + 'static>(
    store: &mut StoreDriver<S, T>,
    outstanding: &mut usize,
    fatal: &mut Fatal,
    stop: &CancellationToken,
) -> Result<(), ServerError> {
    let mut late = pin!(async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_WAIT).await;
    });
    let mut answered = Vec::new();
    store.away();
    while *outstanding > 0 {
        tokio::select! {
            biased;
            e = stopped(fatal) => return Err(e),
            () = store.ready() => {
                store.turn(&mut answered);
                *outstanding -= answered.drain(..).len();
            }
            () = &mut late => {
                warn!(outstanding, "the disk is too slow to be waited for");
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The groups as the store has them now, for the next run; none when there is to be no other. Nothing else is asked of the store.
pub async fn reload<S: ConcurrentStore + 'static, T: Send + 'static>(
    store: &mut StoreDriver<S, T>,
    fatal: &mut Fatal,
    stop: &CancellationToken,
) -> Result<Option<StartState>, ServerError> {
    let (tx, mut rx) = tokio::sync::oneshot::channel();
    store.away().pgs(move |result| {
        let _ = tx.send(result);
    });
    let mut nothing = Vec::new();
    loop {
        tokio::select! {
            biased;
            e = stopped(fatal) => return Err(e),
            () = stop.cancelled() => return Ok(None),
            answer = &mut rx => {
                return match answer {
                    Ok(Ok(pgs)) => Ok(Some(pgs)),
                    Ok(Err(StoreError::Fatal(why))) => Err(ServerError::Fatal(why)),
                    Ok(Err(e)) => Err(e.into()),
                    Err(_) => Err(ServerError::Fatal("the store's thread is gone".into())),
                };
            }
            // It may be on its way with the question.
            () = store.ready() => store.turn(&mut nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::driver_tests::{Hanging, any_write, hanging, on_a_runtime};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const PATIENCE: Duration = Duration::from_secs(20);

    fn store() -> (StoreDriver<Hanging, ()>, Arc<AtomicBool>, Fatal) {
        let (tx, fatal) = watch::channel(None);
        let (store, broken) = hanging(false, move |why| _ = tx.send_replace(Some(why)));
        (store, broken, fatal)
    }

    fn write(store: &mut StoreDriver<Hanging, ()>) {
        let answers = store.answers();
        store.commit(any_write(), move |_| answers.put(()));
    }

    #[test]
    fn a_disk_that_hangs_ends_what_waits_for_it() {
        on_a_runtime(async {
            let hangs = |e: ServerError| match e {
                ServerError::Fatal(why) => assert!(why.contains("not answered"), "{why}"),
                e => panic!("{e}"),
            };
            for stops in [false, true] {
                let stop = CancellationToken::new();
                let (mut store, broken, mut fatal) = store();
                write(&mut store);
                let mut outstanding = 1;
                drain(&mut store, &mut outstanding, &mut fatal, &stop).await.expect("answers");
                assert_eq!(outstanding, 0);
                broken.store(true, Ordering::Relaxed);
                write(&mut store);
                outstanding = 1;
                if stops {
                    stop.cancel();
                }
                let drained = drain(&mut store, &mut outstanding, &mut fatal, &stop);
                let result = tokio::time::timeout(PATIENCE, drained).await.expect("in time");
                hangs(result.expect_err("it hangs"));
            }
            let (mut store, broken, mut fatal) = store();
            broken.store(true, Ordering::Relaxed);
            write(&mut store);
            let stop = CancellationToken::new();
            let reloaded = reload(&mut store, &mut fatal, &stop);
            let result = tokio::time::timeout(PATIENCE, reloaded).await.expect("in time");
            hangs(result.expect_err("it hangs"));
        });
    }

    #[test]
    fn a_reload_hears_of_the_end() {
        on_a_runtime(async {
            let (mut store, broken, mut fatal) = store();
            broken.store(true, Ordering::Relaxed);
            write(&mut store);
            let stop = CancellationToken::new();
            stop.cancel();
            let reloaded = reload(&mut store, &mut fatal, &stop);
            let result = tokio::time::timeout(PATIENCE, reloaded).await.expect("in time");
            assert!(matches!(result, Ok(None)), "{result:?}");
        });
    }

    /// It becomes calm with everything, so that it wants to come, again and again.
    #[test]
    fn a_store_that_is_on_its_way_is_reloaded_from() {
        on_a_runtime(async {
            let (mut store, _, mut fatal) = store();
            for _ in 0..100 {
                for _ in 0..4 {
                    let (tx, rx) = tokio::sync::oneshot::channel();
                    store.away().commit(any_write(), |result| _ = tx.send(result));
                    rx.await.expect("an answer").expect("works");
                }
                let stop = CancellationToken::new();
                let reloaded = reload(&mut store, &mut fatal, &stop);
                let result = tokio::time::timeout(PATIENCE, reloaded).await.expect("in time");
                assert_eq!(result.expect("reloads").map(|pgs| pgs.len()), Some(1));
            }
        });
    }
}
