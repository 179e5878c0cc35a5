//! The control protocol: lines of JSON over a Unix socket, up to four clients.
//!
//! | request | answer in `ok` |
//! |---|---|
//! | `{"id":1,"command":"status"}` | [`Status`] |
//! | `{"id":2,"command":"power-button"}` | `null`: pressed |
//! | `{"id":3,"command":"attach","volume":V,"socket":S}` | `null`: the guest has been told of the disk |
//! | `{"id":4,"command":"detach","volume":V}` | `null`: the guest has been asked; the event below follows |
//!
//! An answer is `{"id":N,"ok":...}` or `{"id":N,"error":"..."}`. Events go to every client:
//! `{"event":"detached","volume":V}` and `{"event":"ended",...}` with the fields of [`End`]. A client
//! that sends a line that is too long, or lets answers pile up, is disconnected.

use super::board::End;
use super::limits::{CONTROL_BACKLOG_BYTES_MAX, CONTROL_LINE_BYTES_MAX};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub id: u64,
    #[serde(flatten)]
    pub command: Command,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "command")]
pub enum Command {
    Status,
    PowerButton,
    Attach { volume: String, socket: PathBuf },
    Detach { volume: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    pub vcpus: u32,
    pub memory_bytes: u64,
    /// By slot; the boot disk first.
    pub disks: Vec<DiskStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    pub volume: String,
    pub socket: PathBuf,
    pub slot: u8,
    /// Whether its gateway is there.
    pub connected: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    Detached { volume: String },
    Ended(End),
}

pub fn answer(id: u64, result: Result<Value, String>) -> Value {
    match result {
        Ok(value) => json!({ "id": id, "ok": value }),
        Err(error) => json!({ "id": id, "error": error }),
    }
}

/// One connected client.
pub struct Client {
    pub stream: UnixStream,
    partial: Vec<u8>,
    outgoing: Vec<u8>,
}

impl Client {
    pub fn new(stream: UnixStream) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        Ok(Client { stream, partial: Vec::new(), outgoing: Vec::new() })
    }

    pub fn wants_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The requests that have arrived; an error ends the client. What is not a request is answered here.
    pub fn receive(&mut self) -> io::Result<Vec<Request>> {
        let mut buffer = [0; 4096];
        let mut requests = Vec::new();
        // What is left is announced again.
        for _ in 0..CONTROL_LINE_BYTES_MAX / buffer.len() {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.partial.extend_from_slice(&buffer[..n]);
                    self.cut(&mut requests)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(requests),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(requests)
    }

    fn cut(&mut self, requests: &mut Vec<Request>) -> io::Result<()> {
        while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(request) => requests.push(request),
                Err(error) => {
                    let id = serde_json::from_slice::<Value>(&line).ok().and_then(|v| v["id"].as_u64());
                    self.send(&answer(id.unwrap_or(0), Err(format!("not a request: {error}"))))?;
                }
            }
        }
        if self.partial.len() > CONTROL_LINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long"));
        }
        Ok(())
    }

    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.outgoing, message)?;
        self.outgoing.push(b'\n');
        if self.outgoing.len() > CONTROL_BACKLOG_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, "it does not read its answers"));
        }
        self.flush()
    }

    /// Writes what the socket takes now.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(n) => drop(self.outgoing.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    #[test]
    fn requests_and_events_are_what_the_table_says() {
        let parse = |text| serde_json::from_str::<Request>(text).unwrap();
        assert_eq!(parse(r#"{"id":1,"command":"status"}"#).command, Command::Status);
        assert_eq!(parse(r#"{"id":2,"command":"power-button"}"#).command, Command::PowerButton);
        let attach = parse(r#"{"id":3,"command":"attach","volume":"v","socket":"/s"}"#);
        assert_eq!(attach.command, Command::Attach { volume: "v".into(), socket: "/s".into() });
        let text = |event: &Event| serde_json::to_string(event).unwrap();
        assert_eq!(text(&Event::Detached { volume: "v".into() }), r#"{"event":"detached","volume":"v"}"#);
        let ended = Event::Ended(End::Failed("x".into()));
        assert_eq!(text(&ended), r#"{"event":"ended","how":"failed","detail":"x"}"#);
        assert_eq!(serde_json::from_str::<Event>(&text(&ended)).unwrap(), ended);
    }

    #[test]
    fn nonsense_is_answered_and_endless_lines_are_not_kept() {
        let (end, stream) = UnixStream::pair().unwrap();
        let mut client = Client::new(stream).unwrap();
        let mut reader = BufReader::new(end.try_clone().unwrap());
        (&end)
            .write_all(b"{\"id\":7,\"command\":\"dance\"}\n\xff\n{\"id\":8,\"command\":\"status\"}\n")
            .unwrap();
        let requests = client.receive().unwrap();
        assert_eq!(requests, [Request { id: 8, command: Command::Status }]);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert!(line.contains("\"id\":7") && line.contains("not a request"), "{line}");
        let long = vec![b'x'; CONTROL_LINE_BYTES_MAX + 8192];
        let writer = std::thread::spawn(move || (&end).write_all(&long));
        let refused = (0..1000).find_map(|_| {
            std::thread::yield_now();
            client.receive().err()
        });
        assert_eq!(refused.unwrap().kind(), io::ErrorKind::InvalidData);
        drop(client);
        let _ = writer.join().unwrap();
    }
}
