//! Layers of changes over the index: what is newer lies in memory, what is older in the [`Kv`] below.

use super::buffer::Blocks;
use super::kv::Kv;
use super::layout::{self, Key, kind};
use super::{Pulse, StoreError};
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};

const PAGE: usize = 1024;

/// Records of the index that are kept decoded from RocksDB, twice at most.
const CACHED_MAX: usize = 32 * 1024;

/// The bytes of one data block.
#[derive(Clone, Debug)]
pub enum BlockBytes {
    /// As they came; they have not been in the journal under this key.
    Raw(Bytes),
    /// In the buffer of the journal record that made them durable.
    Journaled(Blocks),
}

impl BlockBytes {
    pub fn get(&self) -> &[u8] {
        match self {
            BlockBytes::Raw(bytes) => bytes,
            BlockBytes::Journaled(blocks) => blocks.bytes(),
        }
    }
}

/// One block of data and its checksum.
#[derive(Clone, Debug)]
pub struct DataBlock {
    pub crc: u32,
    pub bytes: BlockBytes,
}

/// A value: a record of the index, or a block of data.
#[derive(Clone, Debug)]
pub enum Value {
    Record(Bytes),
    Block(DataBlock),
}

impl Value {
    pub fn record(&self) -> Result<&Bytes, StoreError> {
        match self {
            Value::Record(bytes) => Ok(bytes),
            Value::Block(_) => Err(StoreError::Fatal("a data block stands in a record's place".into())),
        }
    }
}

impl From<Vec<u8>> for Value {
    fn from(bytes: Vec<u8>) -> Value {
        Value::Record(bytes.into())
    }
}

/// Changes: `None` deletes.
pub type View = BTreeMap<Key, Option<Value>>;

/// What has `prefix` in a view, from `from` on.
pub fn range<'a>(
    view: &'a View,
    prefix: &'a [u8],
    from: &[u8],
) -> impl Iterator<Item = (&'a Key, &'a Option<Value>)> {
    let start = prefix.max(from);
    view.range::<[u8], _>((std::ops::Bound::Included(start), std::ops::Bound::Unbounded))
        .take_while(move |(k, _)| k.starts_with(prefix))
}

/// Up to `limit` pairs with `prefix` from `from` on; later layers win.
pub fn scan(
    kv: &impl Kv,
    layers: &[&View],
    prefix: &[u8],
    from: &[u8],
    limit: usize,
) -> Result<Vec<(Key, Value)>, StoreError> {
    let mut out = Vec::new();
    let mut from = from.to_vec();
    loop {
        let page = kv.scan(prefix, &from, PAGE.max(limit.min(4 * PAGE))).map_err(StoreError::Fatal)?;
        let full = page.len() >= PAGE.max(limit.min(4 * PAGE));
        let end = if full { page.last().map(|(k, _)| k.clone()) } else { None };
        let mut merged = View::new();
        for (key, value) in page {
            merged.insert(known_key(&key)?, Some(value.into()));
        }
        for layer in layers {
            for (key, value) in range(layer, prefix, &from)
                .take_while(|(k, _)| end.as_ref().is_none_or(|end| ***k <= end[..]))
            {
                merged.insert(*key, value.clone());
            }
        }
        out.extend(merged.into_iter().filter_map(|(k, v)| Some((k, v?))).take(limit - out.len()));
        match end {
            Some(end) if out.len() < limit => {
                from = end;
                from.push(0);
            }
            _ => return Ok(out),
        }
    }
}

/// What `read` takes from each value with `prefix` whose key is `wanted`, in no order; later layers win. Nothing is kept of other values: they
/// may be many times as many.
pub fn pick<T>(
    kv: &impl Kv,
    layers: &[&View],
    prefix: &[u8],
    wanted: impl Fn(&[u8]) -> bool,
    read: impl Fn(&[u8]) -> Result<T, StoreError>,
    pulse: &dyn Fn(),
) -> Result<Vec<(Key, T)>, StoreError> {
    let mut newer: BTreeMap<Key, Option<&Value>> = BTreeMap::new();
    for layer in layers {
        newer.extend(range(layer, prefix, prefix).filter(|(k, _)| wanted(k)).map(|(k, v)| (*k, v.as_ref())));
    }
    let (mut out, mut looked_at, mut result) = (Vec::new(), 0, Ok(()));
    let swept = kv.sweep(prefix, &mut |key, value| {
        looked_at += 1;
        if looked_at % PAGE == 0 {
            pulse();
        }
        if wanted(key) && !newer.contains_key(key) {
            result = known_key(key).and_then(|k| {
                out.push((k, read(value)?));
                Ok(())
            });
        }
        result.is_ok()
    });
    swept.map_err(StoreError::Fatal)?;
    result?;
    for (key, value) in newer.into_iter().filter_map(|(k, v)| Some((k, v?))) {
        let bytes = match value {
            Value::Record(bytes) => bytes,
            Value::Block(block) => block.bytes.get(),
        };
        out.push((key, read(bytes)?));
    }
    Ok(out)
}

fn known_key(key: &[u8]) -> Result<Key, StoreError> {
    Key::new(key).ok_or_else(|| StoreError::Fatal("a key of the index is too long".into()))
}

/// The index with what the journal holds on top of it.
pub struct Index<K: Kv> {
    pub kv: K,
    /// Durable in the journal only; overlay blocks too.
    pub dirty: View,
    /// The same, on its way to slots and index.
    pub frozen: View,
    cache: HashMap<Key, Option<Value>>,
    /// The generation before; an entry found here moves to `cache`.
    cache_old: HashMap<Key, Option<Value>>,
    /// Called after every page of what takes many.
    pub pulse: Pulse,
}

impl<K: Kv> Index<K> {
    pub fn new(kv: K) -> Index<K> {
        Index {
            kv,
            dirty: View::new(),
            frozen: View::new(),
            cache: HashMap::new(),
            cache_old: HashMap::new(),
            pulse: Box::new(|| ()),
        }
    }

    pub fn get(&mut self, key: &Key) -> Result<Option<Value>, StoreError> {
        if let Some(value) = self.in_memory(key) {
            return Ok(value.clone());
        }
        if key.kind() == kind::OVERLAY {
            return Ok(None);
        }
        if let Some(value) = self.cache.get(key) {
            return Ok(value.clone());
        }
        let value = match self.cache_old.remove(key) {
            Some(value) => value,
            None => self.kv.get(key).map_err(StoreError::Fatal)?.map(Value::from),
        };
        if matches!(key.kind(), kind::CHUNK | kind::OBJECT) {
            self.keep(*key, value.clone());
        }
        Ok(value)
    }

    /// The same without remembering it, for those who look at everything once.
    pub fn peek(&self, key: &Key) -> Result<Option<Value>, StoreError> {
        match self.in_memory(key) {
            Some(value) => Ok(value.clone()),
            None if key.kind() == kind::OVERLAY => Ok(None),
            None => Ok(self.kv.get(key).map_err(StoreError::Fatal)?.map(Value::from)),
        }
    }

    /// The newest durable value that is not in the index yet.
    pub fn in_memory(&self, key: &Key) -> Option<&Option<Value>> {
        self.dirty.get(key).or_else(|| self.frozen.get(key))
    }

    /// What [`Index::get`] finds, where it finds it without a change of what is remembered. The outer `None`: it would have to ask
    /// the index, or to move something.
    pub fn remembered(&self, key: &Key) -> Option<&Option<Value>> {
        self.in_memory(key).or_else(|| self.cache.get(key))
    }

    fn keep(&mut self, key: Key, value: Option<Value>) {
        if self.cache.len() >= CACHED_MAX {
            self.cache_old = std::mem::take(&mut self.cache);
        }
        self.cache_old.remove(&key);
        self.cache.insert(key, value);
    }

    /// As of everything durable.
    pub fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<(Key, Value)>, StoreError> {
        scan(&self.kv, &[&self.frozen, &self.dirty], prefix, from, limit)
    }

    /// The keys with `prefix` that are `wanted`, in no order.
    pub fn pick(&self, prefix: &[u8], wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<(Key, ())>, StoreError> {
        pick(&self.kv, &[&self.frozen, &self.dirty], prefix, wanted, |_| Ok(()), &self.pulse)
    }

    /// Calls `each` with everything with `prefix`, in order, holding one page at a time.
    pub fn each(
        &self,
        prefix: &[u8],
        mut each: impl FnMut(Key, Value) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut from = prefix.to_vec();
        loop {
            let page = self.scan(prefix, &from, PAGE)?;
            let full = page.len() == PAGE;
            if let Some((last, _)) = page.last() {
                from = last.to_vec();
                from.push(0);
            }
            for (key, value) in page {
                each(key, value)?;
            }
            if !full {
                return Ok(());
            }
            // Not for a short look: one may be asked for again and again, and find all in memory while the disk hangs.
            (self.pulse)();
        }
    }

    /// The overlay blocks of a chunk, as a mask and by block.
    pub fn overlay(&self, chunk: &Key) -> Result<ChunkOverlay<'_>, StoreError> {
        let mut overlay = ChunkOverlay::default();
        overlay_of(&self.frozen, chunk, &mut overlay)?;
        overlay_of(&self.dirty, chunk, &mut overlay)?;
        Ok(overlay)
    }

    /// What was frozen is in slots and index now.
    pub fn thaw(&mut self) {
        for (key, value) in std::mem::take(&mut self.frozen) {
            if matches!(key.kind(), kind::CHUNK | kind::OBJECT) {
                self.keep(key, value);
            }
        }
    }
}

/// Overlay blocks of one chunk.
#[derive(Default)]
pub struct ChunkOverlay<'a> {
    pub mask: u32,
    pub blocks: [Option<&'a DataBlock>; gabion_proto::limits::BLOCKS_PER_CHUNK as usize],
}

/// Adds what one layer says about a chunk's overlay.
pub fn overlay_of<'a>(view: &'a View, chunk: &Key, out: &mut ChunkOverlay<'a>) -> Result<(), StoreError> {
    if view.is_empty() {
        return Ok(());
    }
    let (pg, object, number) = layout::parse_numbered(chunk)?;
    let block_key = |block| layout::numbered_key(kind::OVERLAY, pg, object, block);
    let first = number * gabion_proto::limits::BLOCKS_PER_CHUNK;
    let last = first + gabion_proto::limits::BLOCKS_PER_CHUNK - 1;
    for (key, value) in view.range(block_key(first)..=block_key(last)) {
        let bit = layout::parse_numbered(key)?.2 - first;
        match value {
            Some(Value::Block(block)) => {
                out.mask |= 1 << bit;
                out.blocks[bit as usize] = Some(block);
            }
            Some(Value::Record(_)) => {
                return Err(StoreError::Fatal("a record stands in an overlay block's place".into()));
            }
            None => {
                out.mask &= !(1 << bit);
                out.blocks[bit as usize] = None;
            }
        }
    }
    Ok(())
}
