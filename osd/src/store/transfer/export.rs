//! Off a stopped store, which is only read.

use super::file::{Exported, Header, Totals, Writer};
use super::{RETIRED, TransferError, at, write_durably};
use crate::store::chunk_image::ChunkImage;
use crate::store::device::Device;
use crate::store::frozen::{Frozen, open_frozen};
use crate::store::kv::Kv;
use crate::store::layout::{self, BLOCK, ChunkRecord, kind};
use crate::store::read::pending_block;
use crate::store::view::ChunkOverlay;
use crate::store::{Store, StoreError};
use bytes::Bytes;
use gabion_proto::blocks::{Content, Extent, ExtentKind};
use gabion_proto::ids::*;
use gabion_proto::limits::BLOCKS_PER_CHUNK;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Copies a group of the stopped store in `data_dir` to `file`, which is there when all of it is. With `retire` the
/// store is marked first, durably, so that nobody serves it any more.
pub fn export(
    data_dir: &Path,
    pg: PgId,
    file: &Path,
    retire: bool,
) -> Result<(Header, Totals), TransferError> {
    let mut frozen = open_frozen(data_dir)?;
    if file.try_exists().map_err(at(file))? {
        return Err(TransferError::Refused(format!("{} exists and is left alone", file.display())));
    }
    let header = frozen.header(pg, retire || data_dir.join(RETIRED).exists())?;
    if retire {
        write_durably(data_dir, RETIRED, &format!("retired by the export of group {pg}\n"))?;
    }
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = file.with_file_name(name);
    let created = OpenOptions::new().write(true).create(true).truncate(true).open(&partial);
    let out = BufWriter::with_capacity(1 << 20, created.map_err(at(&partial))?);
    let (out, totals) = frozen.export(&header, out)?;
    let done = out.into_inner().map_err(|e| e.into_error()).and_then(|f| f.sync_all());
    done.map_err(at(&partial))?;
    std::fs::rename(&partial, file).map_err(at(file))?;
    let dir = file.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))?;
    Ok((header, totals))
}

impl<D: Device, K: Kv> Frozen<D, K> {
    pub(in crate::store) fn header(&mut self, pg: PgId, retired: bool) -> Result<Header, TransferError> {
        let meta = self.groups()?.into_iter().find(|(id, _)| *id == pg).map(|(_, meta)| meta);
        let meta = meta.ok_or_else(|| TransferError::Refused(format!("the store has no group {pg}")))?;
        Ok(Header { identity: self.identity(), pg, meta, retired })
    }

    /// One object is in memory at a time.
    pub(in crate::store) fn export<W: Write>(
        &mut self,
        header: &Header,
        out: W,
    ) -> Result<(W, Totals), TransferError> {
        let (store, pg) = (&mut self.0, header.pg);
        let mut writer = Writer::new(out, header)?;
        let mut failed = None;
        let mut written = |result: Result<(), TransferError>| {
            result.map_err(|e| {
                failed = Some(e);
                StoreError::Invalid("the export was broken off".into())
            })
        };
        let objects = store.list(pg, None, usize::MAX)?;
        let missing = store.list_missing(pg, None, usize::MAX)?;
        let (index, device, geometry) = (&store.index, &mut store.device, store.geometry);
        let homes = &store.homes;
        let walk = || {
            for (object, state) in objects {
                let home = homes.home(pg, &object);
                let mut committed = Blocks::default();
                index.each(&layout::object_key(kind::CHUNK, home, object), |key, value| {
                    let chunk = ChunkRecord::decode(value.record()?)?;
                    let overlay = index.overlay(&key)?;
                    let image = ChunkImage::read(device, geometry, &chunk, &overlay)?;
                    committed.chunk(layout::parse_numbered(&key)?.2, &chunk, &image);
                    Ok(())
                })?;
                let mut prepared = Blocks::default();
                index.each(&layout::object_key(kind::PENDING_CHUNK, home, object), |key, value| {
                    let chunk = ChunkRecord::decode(value.record()?)?;
                    let image = ChunkImage::read(device, geometry, &chunk, &ChunkOverlay::default())?;
                    prepared.chunk(layout::parse_numbered(&key)?.2, &chunk, &image);
                    Ok(())
                })?;
                index.each(&layout::object_key(kind::PENDING, home, object), |key, value| {
                    let block = layout::parse_numbered(&key)?.2;
                    let data = pending_block(value)?;
                    prepared.block(block, data.map(|d| (d.crc, Bytes::copy_from_slice(d.bytes.get()))));
                    Ok(())
                })?;
                written(writer.object(&Exported {
                    object,
                    state,
                    committed: committed.content(),
                    prepared: prepared.content(),
                    bad: committed.bad,
                    bad_prepared: prepared.bad,
                }))?;
            }
            for (object, needed) in &missing {
                written(writer.missing(*object, needed))?;
            }
            Ok(())
        };
        let walked: Result<(), StoreError> = walk();
        match failed {
            Some(e) => Err(e),
            None => walked.map_err(TransferError::from).and_then(|()| writer.end()),
        }
    }
}

/// Blocks of one version: data with its checksum, or zeros.
#[derive(Default)]
struct Blocks {
    blocks: BTreeMap<u32, Option<(u32, Bytes)>>,
    bad: BTreeSet<u32>,
}

impl Blocks {
    fn block(&mut self, block: u32, data: Option<(u32, Bytes)>) {
        if data.as_ref().is_some_and(|(crc, bytes)| crc32fast::hash(bytes) != *crc) {
            self.bad.insert(block);
        }
        self.blocks.insert(block, data);
    }

    fn chunk(&mut self, number: u32, chunk: &ChunkRecord, image: &ChunkImage) {
        let first = number * BLOCKS_PER_CHUNK;
        for bit in layout::bits(chunk.zero) {
            self.block(first + bit, None);
        }
        for bit in layout::bits(chunk.data) {
            let bytes = Bytes::copy_from_slice(image.block(bit));
            self.block(first + bit, Some((chunk.crcs[bit as usize], bytes)));
        }
    }

    fn content(&mut self) -> Content {
        let mut extents: Vec<Extent> = Vec::new();
        let mut data = Vec::with_capacity(self.blocks.len() * BLOCK);
        for (block, found) in std::mem::take(&mut self.blocks) {
            let last = extents.last_mut().filter(|e| e.first_block + e.block_count == block);
            match (found, last) {
                (None, Some(Extent { kind: ExtentKind::Zero, block_count, .. })) => *block_count += 1,
                (None, _) => {
                    extents.push(Extent { first_block: block, block_count: 1, kind: ExtentKind::Zero })
                }
                (Some((crc, bytes)), last) => {
                    data.extend_from_slice(&bytes);
                    match last {
                        Some(Extent { kind: ExtentKind::Data { crcs }, block_count, .. }) => {
                            *block_count += 1;
                            crcs.push(crc);
                        }
                        _ => {
                            let kind = ExtentKind::Data { crcs: vec![crc] };
                            extents.push(Extent { first_block: block, block_count: 1, kind });
                        }
                    }
                }
            }
        }
        Content { extents, data: data.into() }
    }
}
