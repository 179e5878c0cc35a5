//! What daemons tell each other and keep goes through its encoding, by the functions that the daemons use: maps, whole ones and increments; messages of the
//! data path, in their frames; the monitors' commands and snapshots. What does not survive that is a finding.

use crate::network::Place;
use crate::world::World;
use bytes::{Bytes, BytesMut};
use gabion_common::map_watch;
use gabion_monitor::state::{Command, MonitorState, Stamped};
use gabion_proto::frame::{Frame, FrameError};
use gabion_proto::ids::Epoch;
use gabion_proto::map::{ClusterMap, MapIncrement};
use gabion_proto::msg::Message;
use gabion_proto::pb::{self, map_update::Update};
use prost::Message as _;
use std::collections::VecDeque;
use std::sync::Arc;

/// Increments that are kept for who follows the map: fewer than monitors keep, so that whole maps are sent, too.
const INCREMENTS_MAX: usize = 24;

/// How the map has changed.
#[derive(Default)]
pub struct Increments(VecDeque<Increment>);

struct Increment {
    from: Epoch,
    to: Epoch,
    encoded: Bytes,
}

impl Increments {
    pub fn push(&mut self, old: &ClusterMap, new: &ClusterMap) {
        let update = Some(Update::Increment((&MapIncrement::between(old, new)).into()));
        let encoded = pb::MapUpdate { update }.encode_to_vec().into();
        self.0.push_back(Increment { from: old.epoch, to: new.epoch, encoded });
        if self.0.len() > INCREMENTS_MAX {
            self.0.pop_front();
        }
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// What a stream sends to who has a map of `have`, up to this one, and what that is to the tally.
    fn updates(&self, have: Epoch, to: &ClusterMap) -> (Vec<Bytes>, &'static str) {
        let first = self.0.iter().position(|i| i.from == have).filter(|_| have > Epoch(0));
        let last = self.0.iter().position(|i| i.to == to.epoch);
        match (first, last) {
            (Some(first), Some(last)) if first <= last => {
                (self.0.range(first..=last).map(|i| i.encoded.clone()).collect(), "increment of a map")
            }
            _ => {
                let update = Some(Update::Full(to.into()));
                (vec![pb::MapUpdate { update }.encode_to_vec().into()], "whole map")
            }
        }
    }
}

fn followed(have: &ClusterMap, updates: Vec<Bytes>) -> Result<Option<ClusterMap>, String> {
    let mut map = None;
    for update in updates {
        let update = pb::MapUpdate::decode(update).map_err(|e| e.to_string())?;
        map = Some(map_watch::updated(map.as_ref().unwrap_or(have), update).map_err(|e| e.to_string())?);
    }
    Ok(map)
}

/// What comes of a frame but its data, which are sent as they are.
fn through_frame(frame: &Frame) -> Result<Option<Frame>, FrameError> {
    let mut head = BytesMut::from(&frame.encode_head()?[..]);
    match frame.data.is_empty() {
        true => Frame::decode(&mut head),
        false => Ok(Frame::decode_head(&mut head, 1)?.map(|(came, _)| came)),
    }
}

fn through_log(stamped: &Stamped) -> Result<Stamped, postcard::Error> {
    postcard::from_bytes(&postcard::to_stdvec(stamped)?)
}

fn through_snapshot(state: &MonitorState) -> Result<MonitorState, postcard::Error> {
    postcard::from_bytes(&postcard::to_stdvec(state)?)
}

impl World {
    /// What who has one map makes of what it is told of a later one. None: a finding.
    pub fn told(&mut self, who: Place, have: &ClusterMap, sent: &ClusterMap) -> Option<Arc<ClusterMap>> {
        let (updates, what) = self.monitor.increments.updates(have.epoch, sent);
        *self.tally.messages.entry(what).or_default() += updates.len() as u64;
        match followed(have, updates) {
            Ok(Some(map)) if map == *sent => return Some(Arc::new(map)),
            Ok(map) => {
                self.finding =
                    Some(format!("{who:?} has {map:?} of the map of {}, which is {sent:?}", sent.epoch));
            }
            Err(e) => self.finding = Some(format!("{who:?} refuses the map of {}: {e}", sent.epoch)),
        }
        None
    }

    /// The newest map, for who has none.
    pub fn told_anew(&mut self, who: Place) -> Arc<ClusterMap> {
        let newest = self.published();
        self.told(who, &ClusterMap::default(), &newest).unwrap_or(newest)
    }

    /// A message as it arrives, without its data. None: a finding.
    pub fn framed(&mut self, request: u64, message: Message, data: &Bytes) -> Option<Message> {
        let frame = Frame { request, message, data: data.clone() };
        match through_frame(&frame) {
            Ok(Some(came)) if came.message == frame.message && came.request == request => {
                return Some(came.message);
            }
            Ok(came) => self.finding = Some(format!("sent {:?}, and {came:?} came", frame.message)),
            Err(e) => self.finding = Some(format!("{:?} cannot be sent: {e}", frame.message)),
        }
        None
    }

    /// A command as it comes out of the log. None: a finding.
    pub fn logged(&mut self, command: Command) -> Option<Command> {
        let stamped = Stamped { unix_ms: self.now, request: None, term: None, command };
        match through_log(&stamped) {
            Ok(read) if read == stamped => return Some(read.command),
            read => self.finding = Some(format!("logged {stamped:?}, and read {read:?}")),
        }
        None
    }

    /// The monitor starts from its snapshot.
    pub fn read_snapshot(&mut self) {
        match through_snapshot(&self.monitor.state) {
            Ok(state) if state == self.monitor.state => self.monitor.state = state,
            Ok(_) => self.finding = Some("a snapshot of the monitor's state is not that state".into()),
            Err(e) => self.finding = Some(format!("a snapshot of the monitor's state cannot be read: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gabion_proto::ids::ClusterId;

    #[test]
    fn who_is_not_far_behind_gets_increments_and_others_the_whole_map() {
        let map = |epoch| match epoch {
            0 => ClusterMap::default(),
            _ => ClusterMap { cluster: ClusterId([1; 16]), epoch: Epoch(epoch), ..Default::default() },
        };
        let mut increments = Increments::default();
        (1..=40).for_each(|epoch| increments.push(&map(epoch), &map(epoch + 1)));
        for (have, count, kind) in [
            (40, 1, "increment of a map"),
            (20, 21, "increment of a map"),
            (3, 1, "whole map"),
            (0, 1, "whole map"),
        ] {
            let (updates, what) = increments.updates(Epoch(have), &map(41));
            assert_eq!((updates.len(), what), (count, kind), "{have}");
            assert_eq!(followed(&map(have), updates), Ok(Some(map(41))), "{have}");
        }
    }
}
