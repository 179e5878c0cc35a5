//! The bytes of an exported group: a header, records that are chained by their checksums, an end.
//! Nothing here panics on bad bytes, and nothing allocates more than what is there.

use super::TransferError;
use crate::store::{Identity, Needed, ObjectState, PgMeta};
use bytes::Bytes;
use gabion_proto::blocks::{Content, Extent};
use gabion_proto::ids::*;
use gabion_proto::limits::OBJECT_BYTES_MAX;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeSet;
use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"GABIONEX";
pub const VERSION: u32 = 2;
const HEADER_BYTES_MAX: u32 = 4096;
/// An object in two versions, and what describes them.
const RECORD_BYTES_MAX: u32 = 2 * OBJECT_BYTES_MAX + (1 << 20);

mod tag {
    pub const OBJECT: u8 = 1;
    pub const MISSING: u8 = 2;
    pub const END: u8 = 3;
}

/// What an export says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Of the store that it was taken from.
    pub identity: Identity,
    pub pg: PgId,
    pub meta: PgMeta,
    /// The store will not be served any more.
    pub retired: bool,
}

/// What an export holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub objects: u64,
    /// Entries of the missing map.
    pub missing: u64,
    pub data_blocks: u64,
    /// Of them, those that could not be read, or had another checksum. They stay unreadable.
    pub bad_blocks: u64,
}

/// An object with all its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    pub object: ObjectId,
    pub state: ObjectState,
    pub committed: Content,
    /// What is written beside the committed version.
    pub prepared: Content,
    /// Blocks of either whose bytes are not what their checksum says.
    pub bad: BTreeSet<u32>,
    pub bad_prepared: BTreeSet<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Object(Box<Exported>),
    Missing(ObjectId, Needed),
}

/// An object without its data.
#[derive(Serialize, Deserialize)]
struct Head {
    object: ObjectId,
    state: ObjectState,
    committed: Vec<Extent>,
    prepared: Vec<Extent>,
    bad: Vec<u32>,
    bad_prepared: Vec<u32>,
    /// Bytes of the committed content; the rest is of the other.
    committed_bytes: u32,
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, TransferError> {
    postcard::to_stdvec(value).map_err(|e| TransferError::Refused(format!("cannot encode a record: {e}")))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, TransferError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(damaged("a record cannot be read")),
    }
}

fn damaged(what: impl Into<String>) -> TransferError {
    TransferError::Damaged(what.into())
}

fn chained(before: u32, parts: &[&[u8]]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&before.to_le_bytes());
    parts.iter().for_each(|p| crc.update(p));
    crc.finalize()
}

/// Writes an export.
pub struct Writer<W> {
    out: W,
    crc: u32,
    totals: Totals,
}

impl<W: Write> Writer<W> {
    pub fn new(mut out: W, header: &Header) -> Result<Writer<W>, TransferError> {
        let body = encode(header)?;
        let head = [&MAGIC[..], &VERSION.to_le_bytes(), &(body.len() as u32).to_le_bytes(), &body].concat();
        let crc = chained(0, &[&head]);
        write(&mut out, &[&head, &crc.to_le_bytes()])?;
        Ok(Writer { out, crc, totals: Totals::default() })
    }

    pub(super) fn record(&mut self, tag: u8, body: &[&[u8]]) -> Result<(), TransferError> {
        let len: usize = body.iter().map(|b| b.len()).sum();
        let len = u32::try_from(len).ok().filter(|len| *len <= RECORD_BYTES_MAX);
        let len = len.ok_or_else(|| TransferError::Refused("an object is too large".into()))?.to_le_bytes();
        let tag = [tag];
        let parts = [&[&tag[..], &len], body].concat();
        self.crc = chained(self.crc, &parts);
        write(&mut self.out, &[&parts[..], &[&self.crc.to_le_bytes()]].concat())
    }

    pub fn object(&mut self, o: &Exported) -> Result<(), TransferError> {
        let head = encode(&Head {
            object: o.object,
            state: o.state,
            committed: o.committed.extents.clone(),
            prepared: o.prepared.extents.clone(),
            bad: o.bad.iter().copied().collect(),
            bad_prepared: o.bad_prepared.iter().copied().collect(),
            committed_bytes: o.committed.data.len() as u32,
        })?;
        let len = (head.len() as u32).to_le_bytes();
        self.record(tag::OBJECT, &[&len, &head, &o.committed.data, &o.prepared.data])?;
        self.totals.count(o);
        Ok(())
    }

    pub fn missing(&mut self, object: ObjectId, needed: &Needed) -> Result<(), TransferError> {
        self.record(tag::MISSING, &[&encode(&(object, needed))?])?;
        self.totals.missing += 1;
        Ok(())
    }

    pub fn end(mut self) -> Result<(W, Totals), TransferError> {
        let totals = self.totals;
        self.record(tag::END, &[&encode(&totals)?])?;
        Ok((self.out, totals))
    }
}

fn write(out: &mut impl Write, parts: &[&[u8]]) -> Result<(), TransferError> {
    let done = parts.iter().try_for_each(|p| out.write_all(p));
    done.map_err(|source| TransferError::Io { path: "the export".into(), source })
}

impl Totals {
    fn count(&mut self, o: &Exported) {
        self.objects += 1;
        self.data_blocks += (o.committed.data_blocks().count() + o.prepared.data_blocks().count()) as u64;
        self.bad_blocks += (o.bad.len() + o.bad_prepared.len()) as u64;
    }
}

/// Reads an export; every record is checked before it is handed out.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    pub header: Header,
    crc: u32,
    totals: Totals,
    last_object: Option<ObjectId>,
    last_missing: Option<ObjectId>,
    ended: bool,
}

impl<R: Read> Reader<R> {
    pub fn new(mut from: R) -> Result<Reader<R>, TransferError> {
        let head: [u8; 16] = take(&mut from)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if head[..8] != MAGIC[..] {
            return Err(damaged("this is not one"));
        }
        if word(8) != VERSION {
            return Err(TransferError::Version(word(8)));
        }
        let body = take_bytes(&mut from, word(12), HEADER_BYTES_MAX)?;
        let crc = chained(0, &[&head, &body]);
        if take(&mut from)? != crc.to_le_bytes() {
            return Err(damaged("its header has another checksum"));
        }
        let header: Header = decode(&body)?;
        if header.meta.activated > header.meta.promised {
            return Err(damaged("its group contradicts itself"));
        }
        let (totals, last_object, last_missing) = (Totals::default(), None, None);
        Ok(Reader { from, header, crc, totals, last_object, last_missing, ended: false })
    }

    /// The next one. `None` only behind the end record, when what it says has come.
    pub fn next(&mut self) -> Result<Option<Item>, TransferError> {
        if self.ended {
            return Ok(None);
        }
        let [tag] = take(&mut self.from)?;
        let len: [u8; 4] = take(&mut self.from)?;
        let body = take_bytes(&mut self.from, u32::from_le_bytes(len), RECORD_BYTES_MAX)?;
        let crc = chained(self.crc, &[&[tag], &len, &body]);
        if take(&mut self.from)? != crc.to_le_bytes() {
            return Err(damaged("a record has another checksum"));
        }
        self.crc = crc;
        match tag {
            tag::OBJECT => {
                let object = parse_object(body.into())?;
                self.check(&object)?;
                self.last_object = Some(object.object);
                self.totals.count(&object);
                Ok(Some(Item::Object(Box::new(object))))
            }
            tag::MISSING => {
                let (object, needed): (ObjectId, Needed) = decode(&body)?;
                if self.last_missing >= Some(object) {
                    return Err(damaged("missing objects are not in order"));
                }
                self.in_promise(object, needed.version)?;
                self.last_missing = Some(object);
                self.totals.missing += 1;
                Ok(Some(Item::Missing(object, needed)))
            }
            tag::END => {
                let totals: Totals = decode(&body)?;
                if totals != self.totals {
                    return Err(damaged("not everything is there that its end names"));
                }
                match self.from.read(&mut [0]) {
                    Ok(0) => self.ended = true,
                    Ok(_) => return Err(damaged("it goes on behind its end")),
                    Err(e) => return Err(unreadable(e)),
                }
                Ok(None)
            }
            tag => Err(damaged(format!("it has a record of the unknown kind {tag}"))),
        }
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// What a store could not have held.
    fn check(&self, o: &Exported) -> Result<(), TransferError> {
        let object = o.object;
        let bad = |why: &str| Err(damaged(format!("object {object}: {why}")));
        if self.last_object >= Some(object) || self.last_missing.is_some() {
            return bad("it is out of order");
        }
        let ObjectState { version, deleted, pending } = o.state;
        if pending.map_or(version == Version::ZERO, |p| p <= version) {
            return bad("its versions contradict each other");
        }
        if (deleted || version == Version::ZERO) && !o.committed.extents.is_empty() {
            return bad("it has content and no version of it");
        }
        if pending.is_none() && !o.prepared.extents.is_empty() {
            return bad("it has content of a pending version and no such version");
        }
        for (content, unreadable) in [(&o.committed, &o.bad), (&o.prepared, &o.bad_prepared)] {
            if let Err(e) = content.validate(false) {
                return bad(&e.to_string());
            }
            let wrong = |(block, bytes, crc)| crc32fast::hash(bytes) != crc && !unreadable.contains(&block);
            if content.data_blocks().any(wrong) {
                return bad("a block has another checksum");
            }
        }
        self.in_promise(object, pending.unwrap_or(version))
    }

    fn in_promise(&self, object: ObjectId, version: Version) -> Result<(), TransferError> {
        if version.interval() > self.header.meta.promised {
            return Err(damaged(format!("object {object} is newer than what the group promised")));
        }
        Ok(())
    }
}

fn parse_object(body: Bytes) -> Result<Exported, TransferError> {
    let short = || damaged("an object is cut short");
    let (len, rest) = body.split_first_chunk::<4>().ok_or_else(short)?;
    let (head, data) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(short)?;
    let head: Head = decode(head)?;
    let (committed, prepared) = data.split_at_checked(head.committed_bytes as usize).ok_or_else(short)?;
    Ok(Exported {
        object: head.object,
        state: head.state,
        committed: Content { extents: head.committed, data: body.slice_ref(committed) },
        prepared: Content { extents: head.prepared, data: body.slice_ref(prepared) },
        bad: head.bad.into_iter().collect(),
        bad_prepared: head.bad_prepared.into_iter().collect(),
    })
}

fn unreadable(e: io::Error) -> TransferError {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => TransferError::CutShort,
        _ => TransferError::Io { path: "the export".into(), source: e },
    }
}

fn take<const N: usize>(from: &mut impl Read) -> Result<[u8; N], TransferError> {
    let mut out = [0; N];
    from.read_exact(&mut out).map_err(unreadable)?;
    Ok(out)
}

/// As many bytes as are named, if they are not more than `max` and are there: the buffer grows with what comes.
fn take_bytes(from: &mut impl Read, len: u32, max: u32) -> Result<Vec<u8>, TransferError> {
    if len > max {
        return Err(damaged(format!("a record of {len} bytes")));
    }
    let mut out = Vec::new();
    from.take(u64::from(len)).read_to_end(&mut out).map_err(unreadable)?;
    if out.len() < len as usize {
        return Err(TransferError::CutShort);
    }
    Ok(out)
}
