//! Scrubs: an active, clean group is compared over all its members, object by object, by its primary.
//!
//! ```text
//!            order (Event::Scrub)
//!   (none) ──────────────────────▶ a batch of objects is asked for: ScrubRead ─▶ every acting member looks
//!     ▲                              ▲      in its store (`serve`) and answers ScrubInfo
//!     │                              │                         │
//!     │ reported                     │ next batch,             ▼
//!     │ (MonitorRequest::Scrubbed)   │ or object put off    judged (`compare`): replaced through recovery,
//!     └──────── end of the group ◀───┴──────────────────── damaged, put off, or good
//! ```
//!
//! *Light* compares versions, tombstones, which blocks there are, and their checksums, from the stores' records. *Deep* reads every
//! block against its checksum as well; of shards the parity is then computed anew (`parity`). Whatever a light scrub finds odd is
//! read deeply before anything is decided.
//!
//! - *Clients go first.* What was written to while copies were looked at proves nothing: it is put off and asked again. After some
//!   tries new writes of that one object wait while it is looked at.
//! - *Within its rate*: every member reads only as its OSD's budget allows ([`super::super::scrub_budget`]), one object at a time, and
//!   what is being read counts for what recovery may move.
//! - *A copy is replaced only by what was read and is good*: at the version that the primary knows, matching its checksums, and with the
//!   digest of all, or most, of the others. When all are unreadable somewhere, those at that version are put together (see `intake`).
//!   When a block is good in none, the object is *damaged*: nothing is touched, what can be read of it is still served (see `mend`), other reads fail, and the
//!   monitors hear of it.
//! - *An interval ends a pass.* The monitors name the group again until a pass was reported.

mod compare;
mod parity;
mod pass;
mod serve;

pub use pass::Scrub;
pub use serve::Reading;

use super::super::{Damage, ScrubReport};
