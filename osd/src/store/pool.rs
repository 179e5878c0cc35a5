//! Buffers for reads that are made once: the kernel knows their pages (io_uring's registered buffers), and nobody allocates
//! or zeroes them again.
//!
//! A buffer is lent as [`BlocksMut`] and comes back when the last one who has it lets go, in whatever thread. While all of a size are
//! lent, reads use plain memory. What a read before left in a buffer is still there: only what was read and checked is shown (`read.rs`).

use super::buffer::{Block, BlocksMut};
use parking_lot::Mutex;
use std::sync::Arc;

/// Buffers of how many blocks there are, and how many of them: single blocks, chunks, and what a large read asks for. 11 MiB.
const SIZES: [(usize, usize); 3] = [(1, 256), (32, 16), (256, 8)];

/// Lends buffers.
pub struct Pool {
    classes: Vec<Class>,
}

struct Class {
    blocks: usize,
    free: Mutex<Vec<(u16, Vec<Block>)>>,
}

/// Where a buffer belongs.
pub struct Place {
    pool: Arc<Pool>,
    class: usize,
    number: u16,
}

impl Pool {
    pub fn new() -> Pool {
        let mut number = 0;
        let classes = SIZES.iter().map(|&(blocks, count)| {
            let free = (0..count).map(|_| {
                number += 1;
                (number - 1, BlocksMut::zeroed(blocks).into_blocks())
            });
            Class { blocks, free: Mutex::new(free.collect()) }
        });
        Pool { classes: classes.collect() }
    }

    /// Address and bytes of every buffer, by number; none may be lent.
    pub fn regions(&self) -> Vec<(*const Block, usize)> {
        let all = self.classes.iter().flat_map(|class| {
            let free = class.free.lock();
            free.iter()
                .map(|(_, blocks)| (blocks.as_ptr(), size_of_val(blocks.as_slice())))
                .collect::<Vec<_>>()
        });
        all.collect()
    }

    /// A buffer of `count` blocks with anything in it, if there is one.
    pub fn lend(self: &Arc<Pool>, count: usize) -> Option<BlocksMut> {
        let class = self.classes.iter().position(|c| c.blocks >= count)?;
        let (number, blocks) = self.classes[class].free.lock().pop()?;
        Some(BlocksMut::lent(blocks, count, Place { pool: self.clone(), class, number }))
    }
}

impl Place {
    /// The buffer's number in this pool.
    pub fn number_in(&self, pool: &Arc<Pool>) -> Option<u16> {
        Arc::ptr_eq(&self.pool, pool).then_some(self.number)
    }

    pub fn give_back(&self, blocks: Vec<Block>) {
        self.pool.classes[self.class].free.lock().push((self.number, blocks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_lent_to_one_at_a_time_and_comes_back_from_any_thread() {
        let pool = Arc::new(Pool::new());
        let regions = pool.regions();
        let lent: Vec<BlocksMut> = std::iter::from_fn(|| pool.lend(3)).collect();
        assert_eq!((lent.len(), pool.lend(32).is_none()), (SIZES[1].1, true));
        assert!(pool.lend(257).is_none(), "nothing is that large");
        let mut addresses: Vec<*const u8> = lent.iter().map(|b| b.bytes().as_ptr()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), lent.len());
        for b in lent {
            assert_eq!(b.count(), 3);
            let (address, bytes) =
                regions[usize::from(b.place().and_then(|p| p.number_in(&pool)).expect("it is of this pool"))];
            assert_eq!((address.cast(), bytes), (b.bytes().as_ptr(), 32 * size_of::<Block>()));
            let shared = b.into_bytes(5);
            std::thread::spawn(move || drop(shared)).join().expect("it only lets go");
        }
        assert!(pool.lend(32).is_some());
    }
}
