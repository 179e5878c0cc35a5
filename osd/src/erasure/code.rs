//! The arithmetic, behind a trait: the library may change, the matrix may not.

use super::{BLOCK, Block, Geometry, Rows};
use bytes::Bytes;
use parking_lot::Mutex;
use reed_solomon_erasure::galois_8;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Why shards could not be computed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodeError {
    #[error("{have} shards of different sizes or too few, {need} are needed")]
    TooFew { have: usize, need: usize },
    #[error("changes are of data shards, and of equally many rows of each")]
    Uneven,
    #[error("a code of {0}+{1} is not possible")]
    Shape(u8, u8),
    #[error("this processor lacks AVX2, which erasure coding needs here")]
    Processor,
}

/// Computes shards from others.
pub trait Code: Send + Sync {
    fn geometry(&self) -> Geometry;
    /// The shards `wanted`, from at least `k` others of one version with equally many rows.
    fn compute(&self, have: &BTreeMap<u8, Rows>, wanted: &[u8]) -> Result<BTreeMap<u8, Rows>, CodeError>;
    /// What is to be added to every parity shard when data shards change by these (the sums of old and new). Parity is linear: it
    /// is the parity of rows of which all else is zeros.
    fn added(&self, changes: &BTreeMap<u8, Rows>) -> Result<BTreeMap<u8, Rows>, CodeError>;
}

/// The code of [`super::MATRIX`], by `reed-solomon-erasure`.
pub struct ReedSolomon {
    geometry: Geometry,
    code: galois_8::ReedSolomon,
}

impl ReedSolomon {
    /// One for all groups: it keeps the matrices that it inverted.
    pub fn shared(geometry: Geometry) -> Result<Arc<dyn Code>, CodeError> {
        static CODES: Mutex<BTreeMap<(u8, u8), Arc<ReedSolomon>>> = Mutex::new(BTreeMap::new());
        let mut codes = CODES.lock();
        if let Some(code) = codes.get(&(geometry.k, geometry.m)) {
            return Ok(code.clone());
        }
        let code = Arc::new(ReedSolomon::new(geometry)?);
        codes.insert((geometry.k, geometry.m), code.clone());
        Ok(code)
    }

    pub fn new(geometry: Geometry) -> Result<ReedSolomon, CodeError> {
        // The library's vector code is compiled for processors that have it.
        #[cfg(target_arch = "x86_64")]
        if !std::arch::is_x86_feature_detected!("avx2") {
            return Err(CodeError::Processor);
        }
        let code = galois_8::ReedSolomon::new(geometry.k.into(), geometry.m.into())
            .map_err(|_| CodeError::Shape(geometry.k, geometry.m))?;
        Ok(ReedSolomon { geometry, code })
    }
}

impl Code for ReedSolomon {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn compute(&self, have: &BTreeMap<u8, Rows>, wanted: &[u8]) -> Result<BTreeMap<u8, Rows>, CodeError> {
        let (k, width) = (usize::from(self.geometry.k), self.geometry.width());
        let count = have.values().next().map_or(0, Vec::len);
        let fits = have.iter().all(|(n, rows)| *n < width && rows.len() == count);
        let too_few = || CodeError::TooFew { have: have.len(), need: k };
        if have.len() < k || !fits {
            return Err(too_few());
        }
        // Data shards where possible: nothing to invert if all of them are there.
        let used: Vec<(u8, &Rows)> = have.iter().take(k).map(|(n, rows)| (*n, rows)).collect();
        // Rows of zeros everywhere are zeros in every shard.
        let busy: Vec<usize> =
            (0..count).filter(|r| used.iter().any(|(_, rows)| rows[*r].is_some())).collect();
        let mut shards: Vec<Option<Vec<u8>>> = vec![None; usize::from(width)];
        for (n, rows) in &used {
            shards[usize::from(*n)] = Some(gather(rows, &busy));
        }
        if !busy.is_empty() {
            self.fill(&mut shards, wanted).map_err(|_| too_few())?;
        }
        let mut out = BTreeMap::new();
        for n in wanted {
            let bytes = shards.get_mut(usize::from(*n)).and_then(Option::take).unwrap_or_default();
            out.insert(*n, spread(bytes, &busy, count));
        }
        Ok(out)
    }

    fn added(&self, changes: &BTreeMap<u8, Rows>) -> Result<BTreeMap<u8, Rows>, CodeError> {
        let Geometry { k, m } = self.geometry;
        let count = changes.values().next().map_or(0, Vec::len);
        if !changes.iter().all(|(n, rows)| *n < k && rows.len() == count) {
            return Err(CodeError::Uneven);
        }
        let busy: Vec<usize> =
            (0..count).filter(|r| changes.values().any(|rows| rows[*r].is_some())).collect();
        let mut parity = vec![vec![0; busy.len() * BLOCK]; m.into()];
        // In ascending order, as the library wants it: the first shard's product replaces what is there, others are added.
        for (n, rows) in changes.iter().filter(|_| !busy.is_empty()) {
            let bytes = gather(rows, &busy);
            self.code.encode_single_sep((*n).into(), &bytes, &mut parity).map_err(|_| CodeError::Uneven)?;
        }
        Ok((k..).zip(parity.into_iter().map(|bytes| spread(bytes, &busy, count))).collect())
    }
}

/// The bytes of some rows, back to back.
fn gather(rows: &Rows, busy: &[usize]) -> Vec<u8> {
    let mut bytes = vec![0; busy.len() * BLOCK];
    for (to, from) in bytes.chunks_exact_mut(BLOCK).zip(busy) {
        if let Some(b) = rows[*from].as_ref().filter(|b| b.bytes.len() == BLOCK) {
            to.copy_from_slice(&b.bytes);
        }
    }
    bytes
}

/// The other way round: all other rows are zeros.
fn spread(bytes: Vec<u8>, busy: &[usize], count: usize) -> Rows {
    let mut rows: Rows = vec![None; count];
    let bytes = Bytes::from(bytes);
    for (i, row) in busy.iter().enumerate() {
        rows[*row] = Block::of(bytes.slice(i * BLOCK..(i + 1) * BLOCK));
    }
    rows
}

impl ReedSolomon {
    fn fill(&self, shards: &mut [Option<Vec<u8>>], wanted: &[u8]) -> Result<(), reed_solomon_erasure::Error> {
        let k = usize::from(self.geometry.k);
        let parity_wanted = wanted.iter().any(|n| *n >= self.geometry.k);
        if shards[..k].iter().all(Option::is_some) {
            // Only parity is missing, if anything.
            let len = shards[0].as_ref().map_or(0, Vec::len);
            let (data, parity) = shards.split_at_mut(k);
            let data: Vec<&[u8]> = data.iter().flatten().map(Vec::as_slice).collect();
            let mut new = vec![vec![0; len]; parity.len()];
            self.code.encode_sep(&data, &mut new)?;
            parity.iter_mut().zip(new).for_each(|(slot, bytes)| *slot = Some(bytes));
            Ok(())
        } else if parity_wanted {
            self.code.reconstruct(shards)
        } else {
            self.code.reconstruct_data(shards)
        }
    }
}
