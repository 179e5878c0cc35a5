//! Into another stopped store of the same OSD: everything or nothing.

use super::file::{Exported, Header, Item, Reader, Totals};
use super::{TransferError, at, group_in, refuse_retired, write_durably};
use crate::store::chunk_store::ChunkStore;
use crate::store::device::Device;
use crate::store::frozen::GROUP_KINDS;
use crate::store::kv::Kv;
use crate::store::open::{self, Engine};
use crate::store::{Store, StoreError, Txn, TxnOp};
use gabion_proto::ids::*;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Names the group that is being imported, beside the store. As long as it is there the daemon does not start.
const UNFINISHED: &str = "import";
/// Transactions and bytes that are committed together.
const BATCH_TXNS: usize = 64;
const BATCH_BYTES: usize = 8 << 20;
/// Entries of the missing map in one transaction.
const MISSING_AT_ONCE: usize = 64;

/// What to import and where.
#[derive(Clone, Copy, Debug)]
pub struct Import<'a> {
    pub data_dir: &'a Path,
    pub file: &'a Path,
    /// Makes a store with the identity of this OSD, whose disk is not used any more, if there is none yet.
    pub as_osd: Option<OsdId>,
    /// Size of that store.
    pub size_bytes: Option<u64>,
    /// The operator's word that the disk of the export is destroyed, where the export does not say that it was retired.
    pub source_is_gone: bool,
}

/// What an import did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    pub header: Header,
    pub totals: Totals,
    /// An earlier run had finished and was only not told so.
    pub already: bool,
}

fn refused(why: String) -> TransferError {
    TransferError::Refused(why)
}

fn reader(file: &Path) -> Result<Reader<impl Read>, TransferError> {
    Reader::new(BufReader::with_capacity(1 << 20, File::open(file).map_err(at(file))?))
}

/// Carries out an import. Nothing is touched before all of the file was read and found good.
pub fn import(wanted: Import<'_>) -> Result<Imported, TransferError> {
    let mut checked = reader(wanted.file)?;
    while checked.next()?.is_some() {}
    let (header, totals) = (checked.header, checked.totals());
    drop(checked);
    prepare_store(&wanted, &header)?;
    let mut store = open::open_unfinished(wanted.data_dir, Engine::Auto)?;
    if store.identity() != header.identity {
        return Err(refused(foreign(&store.identity(), &header)));
    }
    let pg = header.pg;
    store.fits(&header)?;
    match (unfinished(wanted.data_dir)?, store.knows(pg)?) {
        (None, Knows::Nothing) => {}
        (None, Knows::Metadata) => {
            return Err(refused(format!("the store has group {pg} already; what is there is left alone")));
        }
        (None, Knows::Records) => {
            return Err(refused(format!(
                "the store has records of group {pg} without its metadata, and no import left them: see fsck"
            )));
        }
        (Some(other), _) if other != Some(pg) => return Err(refused(not_finished(other))),
        // The last step of an import is to make its metadata durable.
        (Some(_), Knows::Metadata) => {
            finish(wanted.data_dir)?;
            return Ok(Imported { header, totals, already: true });
        }
        (Some(_), _) => store.forget(pg)?,
    }
    write_durably(wanted.data_dir, UNFINISHED, &format!("{pg}\n"))?;
    let done = reader(wanted.file).and_then(|mut r| match r.header == header {
        true => store.import(&mut r),
        false => Err(refused("the export changed while it was read".into())),
    });
    if let Err(e) = done {
        // Where that fails too, the file beside the store stays, and the next run begins anew.
        if store.forget(pg).is_ok() {
            finish(wanted.data_dir)?;
        }
        return Err(e);
    }
    store.background()?;
    finish(wanted.data_dir)?;
    Ok(Imported { header, totals, already: false })
}

/// Removes what an import that did not finish has left; the group, if there was one.
pub fn abort(data_dir: &Path) -> Result<Option<PgId>, TransferError> {
    let mut store = open::open_unfinished(data_dir, Engine::Auto)?;
    let Some(pg) = unfinished(data_dir)? else { return Ok(None) };
    let pg = pg.ok_or_else(|| refused(not_finished(None)))?;
    if store.knows(pg)? == Knows::Metadata {
        finish(data_dir)?;
        return Err(refused(format!("the import of group {pg} had finished: there is nothing to abort")));
    }
    store.forget(pg)?;
    finish(data_dir)?;
    Ok(Some(pg))
}

fn foreign(have: &crate::store::Identity, header: &Header) -> String {
    let from = &header.identity;
    if have.cluster != from.cluster {
        return format!(
            "the export is of cluster {}, the store is of cluster {}",
            from.cluster, have.cluster
        );
    }
    format!(
        "the export is of {} (disk {}), the store is {} (disk {}): the cluster would not ask it for this group. \
         Import into an empty directory with --as-osd {}",
        from.osd, from.disk, have.osd, have.disk, from.osd.0
    )
}

/// The store to import into: the one that is there, or a new one that takes the place of a dead disk.
fn prepare_store(wanted: &Import<'_>, header: &Header) -> Result<(), TransferError> {
    let identity = header.identity;
    if let Some(osd) = wanted.as_osd
        && osd != identity.osd
    {
        return Err(refused(format!("the export is of {}, not of {osd}", identity.osd)));
    }
    let dir = wanted.data_dir;
    if open::info(dir).is_ok() {
        return Ok(());
    }
    if wanted.as_osd.is_none() {
        return Err(refused(format!(
            "there is no store in {}; --as-osd {} with --size makes one that takes the place of that OSD's disk",
            dir.display(),
            identity.osd.0
        )));
    }
    if !header.retired && !wanted.source_is_gone {
        return Err(refused(format!(
            "the disk of this export may still be served as {}, and two disks must never be one OSD: export with --retire, or \
             say --source-is-gone if that disk is destroyed",
            identity.osd
        )));
    }
    let size = wanted.size_bytes.ok_or_else(|| refused("a new store needs --size".into()))?;
    std::fs::create_dir_all(dir).map_err(at(dir))?;
    write_durably(dir, "disk-id", &format!("{}\n", identity.disk))?;
    Ok(open::format(dir, size, identity)?)
}

/// The group of an import that has not finished; `Some(None)` where that cannot be told.
fn unfinished(data_dir: &Path) -> Result<Option<Option<PgId>>, TransferError> {
    let path = data_dir.join(UNFINISHED);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(group_in(&text))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(at(&path)(e)),
    }
}

fn not_finished(pg: Option<PgId>) -> String {
    let group = pg.map_or("a group".into(), |pg| format!("group {pg}"));
    format!(
        "an import of {group} has not finished: repeat it, or remove what it left with `gabion-osd import --abort`"
    )
}

fn finish(data_dir: &Path) -> Result<(), TransferError> {
    let path = data_dir.join(UNFINISHED);
    std::fs::remove_file(&path).map_err(at(&path))?;
    File::open(data_dir).and_then(|d| d.sync_all()).map_err(at(data_dir))
}

/// For whoever opens the store to serve it, or to check it.
pub(in crate::store) fn refuse_unfinished(data_dir: &Path) -> Result<(), StoreError> {
    refuse_retired(data_dir)?;
    match unfinished(data_dir) {
        Ok(None) => Ok(()),
        Ok(Some(pg)) => Err(StoreError::Refused(not_finished(pg))),
        Err(e) => Err(StoreError::Fatal(e.to_string())),
    }
}

/// What a store has of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Knows {
    Nothing,
    Records,
    Metadata,
}

/// Brings an object to the state and content that was exported.
fn object_ops(o: Exported) -> Vec<TxnOp> {
    let (object, state) = (o.object, o.state);
    let mut ops = Vec::new();
    if state.version != Version::ZERO {
        let (version, deleted) = (state.version, state.deleted);
        ops.push(TxnOp::Replace { object, version, deleted, content: o.committed });
    }
    if let Some(version) = state.pending {
        ops.push(TxnOp::Prepare { object, base: state.version, version, content: o.prepared });
    }
    ops
}

impl<D: Device, K: Kv> ChunkStore<D, K> {
    /// Refuses a group that is not one of as many as those of its pool here, or whose records would lie among another one's (rule P9).
    pub(super) fn fits(&mut self, header: &Header) -> Result<(), TransferError> {
        let Header { pg, meta, .. } = *header;
        let counts =
            self.pgs()?.into_iter().filter(|(id, m)| id.pool == pg.pool && *id != pg && m.pg_count != 0);
        for (other, has) in counts.filter(|_| meta.pg_count != 0) {
            if has.pg_count != meta.pg_count {
                return Err(refused(format!(
                    "group {pg} was exported when its pool had {} groups; the store has group {other}, which is one of {}: start the \
                     OSD that it comes from under the present map first, and export again",
                    meta.pg_count, has.pg_count
                )));
            }
        }
        match self.homes.user_of(pg) {
            Some(other) => {
                Err(refused(format!("the store keeps records of group {other} under the number of {pg}")))
            }
            None => Ok(()),
        }
    }

    pub(super) fn knows(&mut self, pg: PgId) -> Result<Knows, StoreError> {
        if self.pgs()?.iter().any(|(id, _)| *id == pg) {
            return Ok(Knows::Metadata);
        }
        for k in GROUP_KINDS {
            // A group without metadata has a home of its own, see `Homes::after_removal`.
            for region in self.homes.regions(pg) {
                let prefix = region.key(k, pg);
                if !self.index.scan(&prefix, &prefix, 1)?.is_empty() {
                    return Ok(Knows::Records);
                }
            }
        }
        Ok(Knows::Nothing)
    }

    /// Deletes everything of a group.
    pub(super) fn forget(&mut self, pg: PgId) -> Result<(), StoreError> {
        self.commit_all(vec![Txn { pg, ops: vec![TxnOp::RemovePg], reserve: true }])
    }

    fn commit_all(&mut self, txns: Vec<Txn>) -> Result<(), StoreError> {
        self.commit(txns).into_iter().collect()
    }

    /// Stores what an export holds; the metadata, which makes it visible, when all the rest is durable.
    pub(super) fn import<R: Read>(&mut self, from: &mut Reader<R>) -> Result<(), TransferError> {
        let Header { pg, meta, .. } = from.header;
        let (mut batch, mut bytes, mut missing) = (Vec::new(), 0, Vec::new());
        let txn = |ops| Txn { pg, ops, reserve: true };
        while let Some(item) = from.next()? {
            match item {
                Item::Object(o) => {
                    bytes += o.committed.data.len() + o.prepared.data.len();
                    batch.push(txn(object_ops(*o)));
                }
                Item::Missing(object, needed) => {
                    missing.push(TxnOp::AddMissing { object, needed });
                    if missing.len() >= MISSING_AT_ONCE {
                        batch.push(txn(std::mem::take(&mut missing)));
                    }
                }
            }
            if batch.len() >= BATCH_TXNS || bytes >= BATCH_BYTES {
                self.commit_all(std::mem::take(&mut batch))?;
                bytes = 0;
            }
        }
        batch.push(txn(missing));
        self.commit_all(batch)?;
        Ok(self.commit_all(vec![txn(vec![TxnOp::SetMeta(meta)])])?)
    }
}
