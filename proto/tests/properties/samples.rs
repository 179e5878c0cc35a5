//! Valid maps, messages and trees made from a seed.

use bytes::Bytes;
use gabion_proto::blocks::{Content, Extent, ExtentKind, block_crcs};
use gabion_proto::frame::Frame;
use gabion_proto::ids::*;
use gabion_proto::limits::*;
use gabion_proto::map::*;
use gabion_proto::msg::*;
use gabion_proto::placement::mix;
use std::collections::BTreeMap;

/// A stream of numbers that a seed determines.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }
    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.any() % n
    }
    pub fn flag(&mut self) -> bool {
        self.below(2) == 1
    }
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.any() as u8).collect()
    }
}

pub fn osd(host: &str, rack: &str, weight: u32) -> OsdInfo {
    OsdInfo {
        host: host.into(),
        rack: rack.into(),
        addr: String::new(),
        weight,
        up: true,
        in_cluster: true,
        incarnation: Incarnation(1),
        disk: ClusterId::default(),
        capacity_bytes: 1 << 40,
    }
}

/// `hosts` hosts, two to a rack, with `per_host` OSDs each of the given weight.
pub fn tree(hosts: u32, per_host: u32, mut weight: impl FnMut(u32) -> u32) -> BTreeMap<OsdId, OsdInfo> {
    (0..hosts * per_host)
        .map(|i| {
            let host = i / per_host;
            (OsdId(i), osd(&format!("host-{host}"), &format!("rack-{}", host / 2), weight(i)))
        })
        .collect()
}

pub fn pool(redundancy: Redundancy, failure_domain: FailureDomain, pg_count: u32) -> Pool {
    Pool {
        name: "p".into(),
        redundancy,
        min_size: redundancy.width() as u32,
        failure_domain,
        pg_count,
        object_bytes: OBJECT_BYTES_DEFAULT,
    }
}

fn members(n: &mut Numbers, width: usize, holes: bool) -> Vec<OsdId> {
    let len = n.below(width as u64 + 1) as usize;
    let mut out: Vec<OsdId> = Vec::new();
    while out.len() < len {
        let next = OsdId(n.below(40) as u32);
        if holes && n.below(4) == 0 {
            out.push(OsdId::NONE);
        } else if !out.contains(&next) {
            out.push(next);
        }
    }
    out
}

fn primary(n: &mut Numbers, acting: &[OsdId]) -> Option<OsdId> {
    acting.iter().copied().find(|o| *o != OsdId::NONE).filter(|_| n.flag())
}

/// A valid map of the given epoch.
pub fn map(seed: u64, epoch: u64) -> ClusterMap {
    let n = &mut Numbers(mix(seed));
    let mut map = ClusterMap { cluster: ClusterId([7; 16]), epoch: Epoch(epoch), ..Default::default() };
    for _ in 0..n.below(12) {
        let info = OsdInfo {
            addr: if n.flag() { format!("127.0.0.1:{}", n.below(65_536)) } else { "[::1]:7000".into() },
            up: n.flag(),
            in_cluster: n.flag(),
            incarnation: Incarnation(n.any()),
            disk: ClusterId([n.any() as u8; 16]),
            capacity_bytes: n.any(),
            ..osd("node-a", if n.flag() { "" } else { "r1" }, n.any() as u32)
        };
        map.osds.insert(OsdId(n.below(40) as u32), info);
    }
    for _ in 0..n.below(4) {
        let erasure = n.flag();
        let redundancy = if erasure {
            Redundancy::Erasure { k: 1 + n.below(8) as u32, m: 1 + n.below(4) as u32 }
        } else {
            Redundancy::Replicated { size: 1 + n.below(u64::from(REPLICAS_MAX)) as u32 }
        };
        let domain = [FailureDomain::Osd, FailureDomain::Host, FailureDomain::Rack][n.below(3) as usize];
        let (id, pool) = (PoolId(n.below(9) as u32), pool(redundancy, domain, 1 + n.below(6) as u32));
        if map.pools.contains_key(&id) {
            continue;
        }
        for index in 0..pool.pg_count {
            let acting = members(n, redundancy.width(), erasure);
            let interval = n.below(epoch + 1);
            let mut past = Vec::new();
            for e in (0..interval).rev().take(n.below(3) as usize) {
                let acting = members(n, redundancy.width(), erasure);
                past.insert(0, PastInterval { interval: Epoch(e), primary: primary(n, &acting), acting });
            }
            let record = PgRecord {
                up: members(n, redundancy.width(), erasure),
                primary: primary(n, &acting),
                acting,
                interval: Epoch(interval),
                activated: n.flag(),
                clean: n.flag(),
                past,
            };
            map.pgs.insert(PgId { pool: id, index }, record.into());
        }
        map.pools.insert(id, pool);
    }
    for _ in 0..n.below(6) {
        let attachment = Attachment {
            generation: Generation(n.any()),
            client: ClientId(n.any()),
            session: Session(n.any()),
            root: VolumeId(n.any()),
            top: LayerId(n.any() as u32),
            size_bytes: n.any(),
            snapshot: n.flag().then(|| SnapshotId(n.any())),
        };
        map.attachments.insert(VolumeId(n.below(20)), attachment);
    }
    map.removed_volumes = (0..n.below(6)).map(|_| VolumeId(n.below(100))).collect();
    for _ in 0..n.below(6) {
        map.removed_layers.insert((VolumeId(100 + n.below(9)), LayerId(n.below(9) as u32)));
    }
    map.removed_pools = (0..n.below(6)).map(|_| PoolId(100 + n.below(100) as u32)).collect();
    map
}

/// Valid content: runs of data and zeros with gaps.
pub fn content(seed: u64) -> Content {
    let n = &mut Numbers(mix(seed));
    let (mut extents, mut data, mut at) = (Vec::new(), Vec::new(), 0u32);
    for _ in 0..n.below(6) {
        let first_block = at + n.below(4) as u32;
        let block_count = 1 + n.below(3) as u32;
        let kind = if n.flag() {
            let bytes = n.bytes((block_count * BLOCK_BYTES) as usize);
            let crcs = block_crcs(&bytes);
            data.extend(bytes);
            ExtentKind::Data { crcs }
        } else {
            ExtentKind::Zero
        };
        extents.push(Extent { first_block, block_count, kind });
        at = first_block + block_count;
    }
    Content { extents, data: data.into() }
}

/// A frame of one of many kinds.
pub fn frame(seed: u64) -> Frame {
    let n = &mut Numbers(mix(seed));
    let content = content(n.any());
    let pg = PgId { pool: PoolId(n.below(9) as u32), index: n.any() as u32 };
    let object =
        ObjectId { volume: VolumeId(n.any()), index: n.any() as u32, layer: LayerId(n.below(4) as u32) };
    let version = Version::from_raw(n.any());
    let peer = |n: &mut Numbers, body| {
        Message::Peer(PeerMsg {
            from: OsdId(n.below(99) as u32),
            from_incarnation: Incarnation(n.any()),
            to: OsdId(n.below(99) as u32),
            to_incarnation: Incarnation(n.any()),
            epoch: Epoch(n.any()),
            pg,
            interval: Epoch(n.any()),
            body,
        })
    };
    let mut data = Bytes::new();
    let message = match n.below(16) {
        0 => Message::Hello(Hello {
            cluster: ClusterId([n.any() as u8; 16]),
            role: Role::Client { id: ClientId(n.any()) },
            refusal: n.flag().then(|| "another cluster".into()),
        }),
        1 => {
            data = content.data;
            let kind = OpKind::Write { extents: content.extents };
            Message::Op(ClientOp {
                epoch: Epoch(n.any()),
                pg,
                client: ClientId(n.any()),
                session: Session(n.any()),
                generation: Generation(n.any()),
                volume: VolumeId(n.any()),
                object,
                kind,
            })
        }
        2 => {
            data = content.data;
            Message::OpReply(OpReply::Data { extents: content.extents })
        }
        3 => Message::OpReply(OpReply::Retry { epoch: Epoch(n.any()), why: RetryWhy::Busy }),
        4 => {
            let write = match n.below(3) {
                0 => SubWriteKind::Note,
                1 => {
                    data = content.data;
                    SubWriteKind::Write { extents: content.extents }
                }
                _ => {
                    data = content.data;
                    let (whole, added) =
                        content.extents.split_at(n.below(1 + content.extents.len() as u64) as usize);
                    SubWriteKind::Delta { whole: whole.to_vec(), added: added.to_vec() }
                }
            };
            let body = PeerBody::SubWrite { tid: n.any(), object, version, prev: Version::ZERO, write };
            peer(n, body)
        }
        5 => {
            let entry = ObjectEntry {
                object,
                version,
                missing: n.flag(),
                deleted: n.flag(),
                uncertain: n.flag().then(|| Version::from_raw(n.any())),
                held: n.flag().then(|| (Version::from_raw(n.any()), n.flag())),
                base: n.flag().then(|| Version::from_raw(n.any())),
            };
            let entries = vec![entry; n.below(50) as usize];
            let body = PeerBody::List { after: Some(object), entries, last: n.flag() };
            peer(n, body)
        }
        6 => {
            data = content.data;
            let body = PeerBody::ShardData { tid: n.any(), result: Ok(content.extents) };
            peer(n, body)
        }
        7 => {
            let (first_row, row_count) = (n.any() as u32, n.any() as u32);
            let body = PeerBody::ShardRead { tid: n.any(), object, version, first_row, row_count };
            peer(n, body)
        }
        8 => {
            let body = PeerBody::Commit { objects: vec![(object, version); n.below(50) as usize] };
            peer(n, body)
        }
        9 => {
            let range = if n.flag() { ScrubRange::One(object) } else { ScrubRange::After(Some(object)) };
            let body = PeerBody::ScrubRead { tid: n.any(), range, deep: n.flag() };
            peer(n, body)
        }
        10 => {
            let entry = ScrubEntry {
                object,
                version,
                deleted: n.flag(),
                digest: n.any(),
                unreadable: n.flag().then(|| n.any() as u32),
            };
            let entries = vec![entry; n.below(SCRUB_ENTRIES_MAX as u64 + 1) as usize];
            let body = PeerBody::ScrubInfo { tid: n.any(), entries, last: n.flag() };
            peer(n, body)
        }
        11 => {
            let (first_block, block_count) = (n.any() as u32, n.any() as u32);
            let below = (0..n.below(5)).map(|_| LayerId(n.any() as u32)).collect();
            let body = PeerBody::BlockRead { tid: n.any(), object, below, first_block, block_count };
            peer(n, body)
        }
        12 => {
            data = content.data;
            let body = PeerBody::BlockData { tid: n.any(), result: Ok(content.extents) };
            peer(n, body)
        }
        13 => {
            let have = vec![[n.any() as u8; 32]; n.below(u64::from(PIECE_LEAVES) + 1) as usize];
            let first_block = n.any() as u32;
            let body = PeerBody::Pull { tid: n.any(), object, version, first_block, have };
            peer(n, body)
        }
        14 => {
            let (deleted, over) = (n.flag(), n.flag().then(|| Version::from_raw(n.any())));
            let piece = n.flag().then(|| {
                data = content.data.clone();
                PieceImage { same: 0, extents: content.extents.clone(), end: n.any() as u32, bad: Vec::new() }
            });
            let body = PeerBody::Push { tid: n.any(), object, version, deleted, over, piece };
            peer(n, body)
        }
        _ => {
            let piece = match n.flag() {
                true => Err(SubResult::VersionMismatch),
                false => {
                    data = content.data;
                    let (same, end) = (n.any() as u32, n.any() as u32);
                    let bad = (0..n.below(4)).map(|_| (n.any() as u32, n.any() as u32)).collect();
                    Ok(PieceImage { same, extents: content.extents, end, bad })
                }
            };
            let first_block = n.any() as u32;
            let body = PeerBody::PullReply { tid: n.any(), object, version, first_block, piece };
            peer(n, body)
        }
    };
    Frame { request: n.any(), message, data }
}
