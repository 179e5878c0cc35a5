//! What a client may do with a volume: the numbers that fence it (rules C1 and C2).

use gabion_proto::ids::{ClientId, Generation, Session, VolumeId};
use std::sync::atomic::{AtomicBool, Ordering};

/// One attachment. Once an OSD says that it is fenced it stays so: nothing attaches again by itself.
#[derive(Debug)]
pub struct Attached {
    pub volume: VolumeId,
    pub client: ClientId,
    pub session: Session,
    pub generation: Generation,
    fenced: AtomicBool,
}

impl Attached {
    pub fn new(volume: VolumeId, client: ClientId, session: Session, generation: Generation) -> Attached {
        Attached { volume, client, session, generation, fenced: AtomicBool::new(false) }
    }
    /// An observer, which may only read.
    pub fn observer() -> Attached {
        Attached::new(VolumeId(0), ClientId(0), Session(0), Generation(0))
    }
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }
    pub(super) fn fence(&self) -> bool {
        !self.fenced.swap(true, Ordering::AcqRel)
    }
}
