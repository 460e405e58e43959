//! What was decided and refused, as one JSON object a line on `data`, bounded in size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::root::Root;

/// Bytes after which a file is set aside.
const MAX_FILE: u64 = 256 * 1024;

/// Files kept beside the current one: with it 1 MiB in all, some five thousand events.
const KEPT: u32 = 3;

/// Longest line that is written or read back.
const MAX_LINE: usize = 16 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one; shows where lines are missing.
    pub number: u64,
    /// Seconds since 1970 by the robot's clock, which may be wrong: a robot may have none.
    pub time: u64,
    /// First characters of the kernel's boot id: events with the same one are of one start.
    pub boot: String,
    /// Which kind, in kebab-case.
    pub event: String,
    /// What else there is to say.
    #[serde(flatten)]
    pub details: Map<String, Value>,
}

/// The log.
#[derive(Debug, Clone)]
pub struct Events {
    folder: PathBuf,
    boot: String,
}

impl Events {
    /// The log of this robot. Nothing is written before the first event.
    pub fn new(root: &Root) -> Self {
        let boot = root.boot_id().unwrap_or_default().chars().take(8).collect();
        Self { folder: root.state().join("log"), boot }
    }

    /// Adds an event and makes it durable. The log never stands in the way of an update: what cannot
    /// be logged is said on standard error, so that the system's journal has it.
    pub fn add(&self, event: &str, details: Value) {
        if let Err(error) = self.append(event, &details) {
            let place = self.folder.display();
            eprintln!("slotd: the event `{event}` {details} is not in {place}: {error}");
        }
    }

    fn append(&self, event: &str, details: &Value) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        // Not the current file itself: that one is renamed.
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.folder.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        let path = self.file(0);
        if fs::metadata(&path).is_ok_and(|meta| meta.len() >= MAX_FILE) {
            for number in (0..KEPT).rev() {
                let (from, to) = (self.file(number), self.file(number + 1));
                if from.exists() {
                    fs::rename(from, to)?;
                }
            }
        }
        let number = self.last_number()? + 1;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let details = details.as_object().cloned().unwrap_or_default();
        let line =
            Event { number, time, boot: self.boot.clone(), event: event.to_owned(), details };
        let mut line = serde_json::to_vec(&line)?;
        if line.len() >= MAX_LINE {
            return Err(io::Error::other("it is too long"));
        }
        line.push(b'\n');
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(&path)?;
        // What a power cut left of the line before stays a line of its own.
        let length = file.metadata()?.len();
        let mut last = [b'\n'];
        if let Some(at) = length.checked_sub(1) {
            file.read_exact_at(&mut last, at)?;
        }
        if last != *b"\n" {
            line.insert(0, b'\n');
        }
        file.write_all(&line)?;
        file.sync_data()
    }

    fn last_number(&self) -> io::Result<u64> {
        let newest = (0..=KEPT).map(|n| read_file(&self.file(n))).find_map(|events| match events {
            Ok(events) => events.last().map(|event| Ok(event.number)),
            Err(error) => Some(Err(error)),
        });
        newest.unwrap_or(Ok(0))
    }

    /// All events that are kept, oldest first. Lines that a power cut has damaged are left out.
    ///
    /// # Errors
    /// When a file is there and cannot be read.
    pub fn read(&self) -> io::Result<Vec<Event>> {
        let mut all = Vec::new();
        for number in (0..=KEPT).rev() {
            all.append(&mut read_file(&self.file(number))?);
        }
        Ok(all)
    }

    fn file(&self, number: u32) -> PathBuf {
        let name =
            if number == 0 { "events.jsonl".to_owned() } else { format!("events.{number}.jsonl") };
        self.folder.join(name)
    }
}

fn read_file(path: &std::path::Path) -> io::Result<Vec<Event>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    // A file is closed by the first line that reaches MAX_FILE.
    let mut input = BufReader::new(file.take(MAX_FILE + 2 * MAX_LINE as u64));
    let mut events = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(events);
        }
        if let Ok(event) = serde_json::from_slice(&line) {
            events.push(event);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]
mod tests {
    use super::*;
    use serde_json::json;

    fn log() -> (tempfile::TempDir, Events) {
        let dir = tempfile::tempdir().unwrap();
        let events = Events::new(&Root::new(dir.path()));
        (dir, events)
    }

    #[test]
    fn what_is_added_is_read() {
        let (_dir, events) = log();
        assert_eq!(events.read().unwrap(), []);
        events.add("installed", json!({ "slot": "b", "version": "1.2.0" }));
        events.add("refused", json!({ "code": "wrong-board" }));
        let read = events.read().unwrap();
        assert_eq!(read.iter().map(|e| e.number).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(read[0].details["slot"], "b");
        assert_eq!(read[1].event, "refused");
    }

    #[test]
    fn the_size_is_bounded_and_the_newest_are_kept() {
        let (dir, events) = log();
        let long = "x".repeat(8000);
        for _ in 0..200 {
            events.add("long", json!({ "text": long }));
        }
        let bytes: u64 = fs::read_dir(dir.path().join("data/slotd/log"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(bytes < u64::from(KEPT + 1) * (MAX_FILE + MAX_LINE as u64), "{bytes}");
        let read = events.read().unwrap();
        assert_eq!(read.last().unwrap().number, 200);
        assert!(read.len() > 90, "{}", read.len());
        assert!(read.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
    }

    #[test]
    fn a_torn_line_costs_one_event() {
        let (_dir, events) = log();
        events.add("one", json!({}));
        events.add("two", json!({}));
        let path = events.file(0);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 7]).unwrap();
        events.add("three", json!({}));
        let names: Vec<String> = events.read().unwrap().into_iter().map(|e| e.event).collect();
        assert_eq!(names, ["one", "three"]);
    }
}
