use super::*;
use gabion_proto::ids::ClusterId;
use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
use tempfile::TempDir;

struct Build;

impl StoreBuilder<Types, log::Log, machine::Machine, TempDir> for Build {
    async fn build(&self) -> Result<(TempDir, log::Log, machine::Machine), StorageError<u64>> {
        let dir = TempDir::new().unwrap();
        let db = open_db(dir.path()).unwrap();
        Ok((dir, log::Log::new(db.clone()), machine::Machine::open(db).unwrap()))
    }
}

#[test]
fn storage_conforms() {
    Suite::test_all(Build).unwrap();
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let consensus = Consensus::open(dir.path(), 1, "127.0.0.1:1", true).await.unwrap();
    let cluster = ClusterId([3; 16]);
    consensus.propose(Command::Bootstrap { cluster }).await.unwrap().unwrap();
    // More than one snapshot's worth, so that the start reads a snapshot and the log after it.
    for n in 0..SNAPSHOT_EVERY + 10 {
        let command =
            Command::OpenSession { client: gabion_proto::ids::ClientId(0), host: format!("h{}", n % 7) };
        consensus.propose(command).await.unwrap().unwrap();
    }
    let before = consensus.state();
    consensus.shutdown().await;
    drop(consensus);
    let again = Consensus::open(dir.path(), 1, "127.0.0.1:1", false).await.unwrap();
    assert_eq!(*again.state(), *before);
    again.shutdown().await;
}

#[tokio::test]
async fn an_empty_directory_needs_bootstrap_and_a_full_one_refuses_it() {
    let dir = TempDir::new().unwrap();
    let refused = Consensus::open(dir.path(), 1, "127.0.0.1:1", false).await.unwrap_err();
    assert!(matches!(refused, ConsensusError::NotInitialised(_)), "{refused}");
    let consensus = Consensus::open(dir.path(), 1, "127.0.0.1:1", true).await.unwrap();
    consensus.shutdown().await;
    drop(consensus);
    let refused = Consensus::open(dir.path(), 1, "127.0.0.1:1", true).await.unwrap_err();
    assert!(matches!(refused, ConsensusError::Initialised(_)), "{refused}");
}
