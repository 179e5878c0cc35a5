//! Recovery at the primary: what members miss is brought to them, object by object (rule P4).
//!
//! An object that misses on the primary is pulled from somebody who has exactly the needed version; what others
//! miss is then pushed. Reads and writes wait while the primary misses the object, or while it is *uncertain* (the authority
//! disagreed about it). Writes go on while others miss it, as long as enough members have it: who misses it notes the version
//! that it is at now. They wait while it is under way, and it is under way only while no write of it is. Wanted objects go first.
//!
//! Objects move in pieces, and of what somebody has an older copy of only what differs (see `intake`). Each piece passes the throttle;
//! between two of them clients' operations get to the disks and onto the link. What waits for somebody who is late (a message was
//! lost, or a disk is slow) neither takes a place nor counts as moving, so that others go on; so much may be let pass at once as does
//! not fill the queue of who is slow. It stays reserved, and its writes wait, until it has come or is given up.
//!
//! [`record`] is what is missed, where it is, and what is under way; [`drive`] moves it; [`lost`] is about copies that
//! cannot be read, and who else may have one.

mod drive;
mod lost;
mod record;

pub use record::{BYTES_AT_ONCE, Coded, PASSED_MS, Recovery};

use super::intake::{Intake, Step};
use super::member::{piece_image, replace_ops, sub_result};
use super::*;
use crate::core::Damage;
use crate::store::{ObjectState, Piece};
use gabion_proto::blocks::Content;
use record::{AGAIN_MS, AT_ONCE, Leg, Stage, UNREADABLE_AGAIN_MS, Wish, Work};
