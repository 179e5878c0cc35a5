//! Volumes, the sessions of data-path clients, and who holds which volume (rules C1 to C3).
//!
//! A generation belongs to one attachment and comes from a counter of the whole cluster, so none is
//! ever repeated, also after a detach.

use super::*;
use gabion_proto::limits::*;
use gabion_proto::map::Attachment;

impl MonitorState {
    pub(super) fn create_volume(&mut self, name: String, pool: &str, size_bytes: u64) -> CommandResult {
        let pool = self.pool_named(pool)?;
        self.check_size(pool, size_bytes)?;
        self.check_new_volume(&name)?;
        let root = VolumeId(self.counters.volume + 1);
        let layers = vec![LayerId(0)];
        self.roots.insert(root, LayerId(0));
        let volume = Volume { name, pool, size_bytes, root, layers, origin: None, taking: None };
        Ok(Reply::Volume(self.insert_volume(volume)))
    }

    pub(super) fn check_new_volume(&self, name: &str) -> Result<(), Refusal> {
        if !valid_volume_name(name) {
            return Err(Refusal::invalid(format!("{name:?} cannot be the name of a volume")));
        }
        if self.volume_names.contains_key(name) {
            return Err(Refusal::exists(format!("there is a volume {name:?} already")));
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {VOLUMES_MAX} volumes")));
        }
        Ok(())
    }

    pub(super) fn insert_volume(&mut self, volume: Volume) -> VolumeId {
        self.counters.volume += 1;
        let id = VolumeId(self.counters.volume);
        self.volume_names.insert(volume.name.clone(), id);
        self.volumes.insert(id, volume);
        id
    }

    fn check_size(&self, pool: PoolId, size_bytes: u64) -> Result<(), Refusal> {
        if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size_bytes) {
            return Err(Refusal::invalid(format!(
                "a volume has {VOLUME_BYTES_MIN} to {VOLUME_BYTES_MAX} bytes, not {size_bytes}"
            )));
        }
        if !size_bytes.is_multiple_of(u64::from(BLOCK_BYTES)) {
            return Err(Refusal::invalid(format!(
                "a volume's size is a multiple of {BLOCK_BYTES}, not {size_bytes}"
            )));
        }
        let object_bytes = u64::from(self.map.pools[&pool].object_bytes);
        if size_bytes.div_ceil(object_bytes) > u64::from(u32::MAX) {
            return Err(Refusal::invalid(format!(
                "{size_bytes} bytes are too many objects of {object_bytes} bytes"
            )));
        }
        Ok(())
    }

    /// Grows a volume, also while it is in use: its holder hears of it through the map.
    pub(super) fn resize_volume(&mut self, name: &str, size_bytes: u64) -> CommandResult {
        let id = self.volume_named(name)?;
        let v = &self.volumes[&id];
        let have = v.size_bytes;
        if size_bytes < have {
            return Err(Refusal::precondition(format!(
                "volume {name} has {have} bytes and does not shrink to {size_bytes}: copy it into a smaller one"
            )));
        }
        self.check_size(v.pool, size_bytes)?;
        if size_bytes == have {
            return Ok(Reply::Done);
        }
        if let Some(v) = self.volumes.get_mut(&id) {
            v.size_bytes = size_bytes;
        }
        if self.map.attachments.contains_key(&id) {
            self.bump(|map| {
                map.attachments.entry(id).and_modify(|a| a.size_bytes = size_bytes);
            });
        }
        self.event(EventSeverity::Ok, format!("volume {name} grew to {size_bytes} bytes"));
        Ok(Reply::Done)
    }

    pub(super) fn remove_volume(&mut self, name: &str) -> CommandResult {
        let id = self.volume_named(name)?;
        if let Some(vm) = self.vm_of(id) {
            return Err(Refusal::precondition(format!("volume {name} is a disk of VM {vm}")));
        }
        self.check_unused(id)?;
        let snapshots: Vec<&str> = self.snapshots_of(id).map(|(_, s)| s.name.as_str()).collect();
        if !snapshots.is_empty() {
            return Err(Refusal::precondition(format!(
                "volume {name} has the snapshots {}: remove them first",
                snapshots.join(", ")
            )));
        }
        let gone = self.volumes.remove(&id);
        self.volume_names.remove(name);
        if let Some(Volume { root, layers, .. }) = gone {
            self.bury(root, &layers);
        }
        self.event(EventSeverity::Ok, format!("volume {name} was removed"));
        Ok(Reply::Done)
    }

    /// The host of a client, for messages.
    pub fn host_of(&self, client: ClientId) -> &str {
        self.clients.get(&client).map_or("(unknown)", |c| c.host.as_str())
    }

    pub(super) fn open_session(&mut self, client: ClientId, host: String) -> CommandResult {
        if !valid_name(&host) {
            return Err(Refusal::invalid(format!("{host:?} cannot be the name of a host")));
        }
        if !self.clients.contains_key(&client) && self.clients.len() >= CLIENTS_MAX {
            return Err(Refusal::exhausted(format!("a cluster has at most {CLIENTS_MAX} clients")));
        }
        let client = match client.0 {
            0 => {
                // Clients may bring an identity of their own, so skip what is taken.
                loop {
                    self.counters.client += 1;
                    let id = ClientId(self.counters.client);
                    if !self.clients.contains_key(&id) {
                        break id;
                    }
                }
            }
            _ => client,
        };
        let record =
            self.clients.entry(client).or_insert(Client { session: Session(0), host: String::new() });
        record.session = Session(record.session.0 + 1);
        record.host = host;
        Ok(Reply::Session { client, session: record.session })
    }

    pub(super) fn attach_volume(
        &mut self,
        name: &str,
        client: ClientId,
        session: Session,
        take_over: bool,
    ) -> CommandResult {
        let id = self.volume_named(name)?;
        let current = self.clients.get(&client).map(|c| c.session);
        if current != Some(session) {
            return Err(Refusal::aborted(format!("{session} of {client} has ended: open a new session")));
        }
        let held = self.map.attachments.get(&id).cloned();
        // A holder that was restarted takes the snapshot that its last run was asked for: nothing of that run is in flight any more
        // when this attachment is in force.
        let renewed = held.as_ref().is_some_and(|h| h.client == client);
        let generation = match held {
            Some(held) if held.client == client => {
                if held.session == session {
                    return Ok(Reply::Attached {
                        volume: id,
                        generation: held.generation,
                        epoch: self.map.epoch,
                    });
                }
                held.generation
            }
            Some(held) if !take_over => {
                let host = self.host_of(held.client);
                return Err(Refusal::precondition(format!("volume {name} is attached on host {host}")));
            }
            held => {
                self.counters.generation += 1;
                if let Some(held) = held {
                    let (from, to) = (self.host_of(held.client).to_owned(), self.host_of(client).to_owned());
                    self.event(
                        EventSeverity::Warn,
                        format!("volume {name} was taken over from host {from} by {to}"),
                    );
                }
                Generation(self.counters.generation)
            }
        };
        let Some(v) = self.volumes.get_mut(&id) else { return Err(Refusal::not_found("no such volume")) };
        if !renewed {
            v.taking = None;
        }
        let attachment = Attachment {
            generation,
            client,
            session,
            root: v.root,
            top: v.layers.first().copied().unwrap_or_default(),
            size_bytes: v.size_bytes,
            snapshot: v.taking.as_ref().map(|(id, _)| *id),
        };
        self.bump(|map| {
            map.attachments.insert(id, attachment);
        });
        Ok(Reply::Attached { volume: id, generation, epoch: self.map.epoch })
    }

    pub(super) fn detach_volume(
        &mut self,
        name: &str,
        client: ClientId,
        generation: Generation,
    ) -> CommandResult {
        let id = self.volume_named(name)?;
        let Some(held) = self.map.attachments.get(&id) else { return Ok(Reply::Done) };
        if held.client != client || held.generation != generation {
            return Err(Refusal::precondition(format!(
                "volume {name} is not attached as {generation} by {client}"
            )));
        }
        self.unattach(id);
        Ok(Reply::Done)
    }

    /// Takes a volume away from whoever holds it: for a host that is dead or lost. The next attachment has
    /// a new generation, and the old holder's operations are refused from the new map on.
    pub(super) fn fence_volume(&mut self, name: &str) -> CommandResult {
        let id = self.volume_named(name)?;
        let Some(held) = self.map.attachments.get(&id).cloned() else {
            return Err(Refusal::precondition(format!("volume {name} is not attached")));
        };
        let served = |e: &Export| e.volume == id && e.snapshot.is_none();
        if let Some((export, e)) = self.exports.iter().find(|(_, e)| served(e)) {
            return Err(Refusal::precondition(format!(
                "volume {name} is exported on host {}: remove export {export} first",
                e.host
            )));
        }
        let host = self.host_of(held.client).to_owned();
        self.unattach(id);
        self.event(EventSeverity::Warn, format!("volume {name} was taken away from host {host}"));
        Ok(Reply::Fenced { epoch: self.map.epoch })
    }

    fn unattach(&mut self, id: VolumeId) {
        if let Some(v) = self.volumes.get_mut(&id) {
            v.taking = None;
        }
        self.bump(|map| {
            map.attachments.remove(&id);
        });
    }
}
