use super::*;
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

fn at(index: u64) -> openraft::LogId<u64> {
    openraft::LogId::new(openraft::CommittedLeaderId::new(1, 1), index)
}

/// The leader's snapshot may come while one of our own is being made. After it the log begins behind it.
#[tokio::test]
async fn a_snapshot_is_not_overwritten_by_an_older_one() {
    use openraft::storage::{RaftSnapshotBuilder, RaftStateMachine};
    let (dir, _, mut machine) = Build.build().await.unwrap();
    let blank = |index| openraft::Entry { log_id: at(index), payload: openraft::EntryPayload::Blank };
    machine.apply([blank(1), blank(2)]).await.unwrap();
    let mut builder = machine.get_snapshot_builder().await;
    let (mut meta, data) = {
        let made = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        (made.meta, made.snapshot)
    };
    meta.last_log_id = Some(at(9));
    machine.install_snapshot(&meta, data).await.unwrap();
    let older = builder.build_snapshot().await.unwrap();
    assert_eq!(older.meta.last_log_id, Some(at(2)));
    let kept = machine.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(kept.meta.last_log_id, Some(at(9)));
    drop((machine, builder));
    let mut again = machine::Machine::open(open_db(dir.path()).unwrap()).unwrap();
    assert_eq!(again.applied_state().await.unwrap().0, Some(at(9)));
    // And it goes on from there.
    again.apply([blank(10)]).await.unwrap();
    again.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let kept = again.get_current_snapshot().await.unwrap().unwrap();
    assert_eq!(kept.meta.last_log_id, Some(at(10)));
}

async fn open(dir: &TempDir, start: Start) -> Result<Consensus, ConsensusError> {
    Consensus::open(dir.path(), Setup::new(1, "127.0.0.1:1", start)).await
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let consensus = open(&dir, Start::Bootstrap).await.unwrap();
    // More than one snapshot's worth, so that the start reads a snapshot and the log after it.
    for n in 0..SNAPSHOT_EVERY + 10 {
        let command =
            Command::OpenSession { client: gabion_proto::ids::ClientId(0), host: format!("h{}", n % 7) };
        consensus.propose(command).await.unwrap().unwrap();
    }
    let before = consensus.state();
    consensus.close().await;
    let again = open(&dir, Start::Resume).await.unwrap();
    assert_eq!(*again.state(), *before);
    again.close().await;
}

#[tokio::test]
async fn an_empty_directory_needs_bootstrap_and_a_full_one_refuses_it() {
    let dir = TempDir::new().unwrap();
    let refused = open(&dir, Start::Resume).await.unwrap_err();
    assert!(matches!(refused, ConsensusError::NotInitialised), "{refused}");
    open(&dir, Start::Bootstrap).await.unwrap().close().await;
    let refused = open(&dir, Start::Bootstrap).await.unwrap_err();
    assert!(matches!(refused, ConsensusError::Initialised), "{refused}");
    let other = Consensus::open(dir.path(), Setup::new(2, "127.0.0.1:1", Start::Resume)).await.unwrap_err();
    assert!(matches!(other, ConsensusError::OtherMonitor { kept: 1, asked: 2 }), "{other}");
}

/// Entries in the log, by its column family and not by what openraft says.
fn entries(dir: &TempDir) -> usize {
    let db = open_db(&dir.path().join("raft")).unwrap();
    db.iterator_cf(log::family(&db, log::FAMILY).unwrap(), rocksdb::IteratorMode::Start).count()
}

#[tokio::test]
async fn the_log_does_not_grow_without_bound() {
    let dir = TempDir::new().unwrap();
    let setup = Setup { snapshot_every: 100, ..Setup::new(1, "127.0.0.1:1", Start::Bootstrap) };
    let consensus = Consensus::open(dir.path(), setup).await.unwrap();
    for n in 0..1_000 {
        let text = n.to_string();
        consensus.propose(Command::Announce { text }).await.unwrap().unwrap();
    }
    // Snapshots are made aside; the last one may still be under way.
    let mut metrics = consensus.raft().metrics();
    metrics.wait_for(|m| m.purged.is_some_and(|p| p.index >= 800)).await.unwrap();
    drop(metrics);
    consensus.close().await;
    assert!(entries(&dir) <= 300, "{} entries are left", entries(&dir));
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused_and_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let consensus = open(&dir, Start::Bootstrap).await.unwrap();
    let before = consensus.state();
    let text = "x".repeat(COMMAND_BYTES_MAX);
    let refused = consensus.propose(Command::Announce { text }).await.unwrap().unwrap_err();
    assert_eq!(refused.kind, crate::state::RefusalKind::Invalid);
    assert_eq!(consensus.state(), before);
    consensus.close().await;
}

#[tokio::test]
async fn what_waits_goes_into_one_entry_and_each_is_answered_for_itself() {
    let dir = TempDir::new().unwrap();
    let consensus = open(&dir, Start::Bootstrap).await.unwrap();
    let before = consensus.raft().metrics().borrow().last_log_index.unwrap();
    let mut all = tokio::task::JoinSet::new();
    for n in 0..400u128 {
        let consensus = consensus.clone();
        all.spawn(async move {
            // Each eighth is refused; each request is made twice.
            let command = match n % 8 {
                0 => Command::RemoveExport { id: 1 },
                _ => Command::OpenSession { client: gabion_proto::ids::ClientId(0), host: "h".into() },
            };
            (n / 2, consensus.propose_for(Some(RequestId(n / 2)), command).await.unwrap())
        });
    }
    let mut answers = BTreeMap::<u128, Vec<CommandResult>>::new();
    while let Some(answered) = all.join_next().await {
        let (request, answer) = answered.unwrap();
        answers.entry(request).or_default().push(answer);
    }
    assert_eq!(answers.len(), 200);
    let mut sessions = std::collections::BTreeSet::new();
    for (request, both) in &answers {
        assert_eq!(both[0], both[1], "request {request}");
        if let Ok(crate::state::Reply::Session { client, .. }) = &both[0] {
            assert!(sessions.insert(*client), "request {request} has the answer of another one");
        }
    }
    let entries = consensus.raft().metrics().borrow().last_log_index.unwrap() - before;
    assert!(entries < 100, "{entries} entries");
    let state = consensus.state();
    consensus.close().await;
    let again = open(&dir, Start::Resume).await.unwrap();
    assert_eq!(*again.state(), *state);
    again.close().await;
}

#[tokio::test]
async fn the_only_monitor_cannot_be_removed_and_nobody_is_not_added() {
    let dir = TempDir::new().unwrap();
    let consensus = open(&dir, Start::Bootstrap).await.unwrap();
    let refused = consensus.remove_monitor(1, None).await.unwrap_err();
    assert!(matches!(refused, MembershipError::Precondition(_)), "{refused}");
    assert!(matches!(consensus.remove_monitor(7, None).await, Err(MembershipError::NotFound(7))));
    assert!(matches!(consensus.add_monitor("localhost").await, Err(MembershipError::Invalid(_))));
    let refused = consensus.add_monitor("127.0.0.1:1").await.unwrap_err();
    assert!(refused.to_string().contains("127.0.0.1:1"), "{refused}");
    assert_eq!(consensus.members().len(), 1);
    consensus.close().await;
}
