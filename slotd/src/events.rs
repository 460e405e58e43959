//! The log of decisions and refusals: one JSON object per line on `data`, bounded in size.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use contract::answer::RobotEvent;
use serde_json::{Map, Value};

use crate::durable::{self, is_missing};
use crate::lock::{LockScope, ProcessLock, private_dir};
use crate::root::RootDir;

/// Size in bytes after which a file is rotated.
const MAX_FILE: u64 = 256 * 1024;

/// Files kept besides the current one: 1 MiB in total, about five thousand events.
const KEPT: u32 = 3;

/// Longest line that is written or read, including the newline.
const MAX_LINE: usize = 16 * 1024;

/// The end of a shortened text or list.
const CUT: &str = "…";

/// How long all events of one caller together may wait while another process writes the log. A write to a card takes at
/// most 250 ms, 500 ms on SDXC (SD Physical Layer Simplified Specification 6.00, 4.6.2.2); an event needs a few writes.
const PATIENCE: Duration = Duration::from_secs(2);

/// The log.
#[derive(Debug, Clone)]
pub struct EventLog {
    root: RootDir,
    folder: PathBuf,
    boot: String,
    /// What is left of [`PATIENCE`].
    patience: Arc<Mutex<Duration>>,
}

impl EventLog {
    /// The log of this robot. Nothing is written before the first event.
    pub fn new(root: &RootDir) -> Self {
        let boot = root.boot_id().unwrap_or_default().chars().take(8).collect();
        let patience = Arc::new(Mutex::new(PATIENCE));
        Self { root: root.clone(), folder: root.state().join("log"), boot, patience }
    }

    /// Adds an event and makes it durable. The log never prevents an update: an event that cannot be logged is
    /// printed on standard error, so that the system's journal has it. Waits at most two seconds in total for
    /// other processes that write the log. An event that is too long for a line is shortened.
    pub fn add(&self, event: &str, details: Value) {
        if let Err(error) = self.append(event, &details) {
            let place = self.folder.display();
            crate::say!("slotd: cannot write the event `{event}` {details} to {place}: {error}");
        }
    }

    fn append(&self, event: &str, details: &Value) -> io::Result<()> {
        let _lock = {
            let mut patience = self.patience.lock().unwrap_or_else(PoisonError::into_inner);
            ProcessLock::acquire_within(&self.root, LockScope::Log, &mut patience)?
        };
        private_dir(&self.root.state())?;
        fs::create_dir_all(&self.folder)?;
        let path = self.file(0);
        // Anything other than a file is damage: a directory takes no lines, and a pipe would block.
        if fs::symlink_metadata(&path).is_ok_and(|about| !about.is_file()) {
            durable::remove(&path)?;
        }
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
        let event =
            RobotEvent { number, time, boot: self.boot.clone(), event: event.to_owned(), details };
        let mut line = encode_line(event)?;
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(&path)?;
        // After a power cut, the rest of an incomplete line stays a separate line.
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
    /// When a file exists and cannot be read.
    pub fn read(&self) -> io::Result<Vec<RobotEvent>> {
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

/// The event as a line of at most [`MAX_LINE`] bytes. Texts that are too long end with `…`, and `shortened` has the
/// length of the whole line in bytes.
fn encode_line(mut event: RobotEvent) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&event)?;
    let whole = line.len();
    let details = std::mem::take(&mut event.details);
    let mut longest = MAX_LINE / 2;
    while line.len() >= MAX_LINE {
        event.details = Map::new();
        if longest > 0 {
            event.details = shortened_map(&details, longest);
        }
        event.details.insert("shortened".to_owned(), whole.into());
        line = serde_json::to_vec(&event)?;
        if longest == 0 {
            break;
        }
        longest /= 2;
    }
    line.push(b'\n');
    Ok(line)
}

/// A value whose texts have at most `longest` bytes, and whose lists have at most `longest / 16` entries.
fn shorten(value: &Value, longest: usize) -> Value {
    match value {
        Value::String(text) if text.len() > longest => {
            let cut = (0..=longest).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            Value::String(format!("{}{CUT}", text.get(..cut).unwrap_or_default()))
        }
        Value::Array(values) => {
            let most = longest / 16;
            let mut kept: Vec<Value> =
                values.iter().take(most).map(|value| shorten(value, longest)).collect();
            if values.len() > most {
                kept.push(CUT.into());
            }
            Value::Array(kept)
        }
        Value::Object(map) => Value::Object(shortened_map(map, longest)),
        other => other.clone(),
    }
}

fn shortened_map(map: &Map<String, Value>, longest: usize) -> Map<String, Value> {
    let kept = map.iter().take(longest).filter(|(name, _)| name.len() <= longest);
    kept.map(|(name, value)| (name.clone(), shorten(value, longest))).collect()
}

fn read_file(path: &std::path::Path) -> io::Result<Vec<RobotEvent>> {
    let file = match durable::open(path) {
        Ok(file) => file,
        // Anything other than a file is damage: it holds no events.
        Err(error) if is_missing(&error) || error.kind() == io::ErrorKind::InvalidData => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    // The first line that reaches MAX_FILE ends a file.
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
#[expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail by panicking"
)]
mod tests {
    use super::*;
    use serde_json::json;

    fn log() -> (tempfile::TempDir, EventLog) {
        let dir = tempfile::tempdir().unwrap();
        let events = EventLog::new(&RootDir::new(dir.path()));
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
    fn damage_in_the_place_of_a_file_makes_nobody_wait() {
        for place in ["events.jsonl", "events.1.jsonl"] {
            for damage in ["pipe", "folder", "link to itself", "link to a pipe"] {
                let (dir, events) = log();
                events.add("first", json!({}));
                let path = dir.path().join("data/slotd/log").join(place);
                crate::durable::remove(&path).unwrap();
                let pipe = dir.path().join("pipe");
                let at = if damage == "pipe" { &path } else { &pipe };
                let mode = rustix::fs::Mode::from_raw_mode(0o600);
                let kind = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(rustix::fs::CWD, at, kind, mode, 0).unwrap();
                match damage {
                    "folder" => fs::create_dir(&path).unwrap(),
                    "link to itself" => std::os::unix::fs::symlink(&path, &path).unwrap(),
                    "link to a pipe" => std::os::unix::fs::symlink(&pipe, &path).unwrap(),
                    _ => {}
                }
                events.add("second", json!({}));
                let read = events.read().unwrap();
                assert_eq!(read.last().unwrap().event, "second", "{place}, {damage}");
            }
        }
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

    /// Texts whose bytes in JSON differ: plain, escaped to two and to six bytes, of two and four bytes.
    const LETTERS: [&str; 6] = ["x", "\"", "\u{1}", "\u{7f}", "é", "🦀"];

    #[test]
    fn a_line_of_any_length_is_kept() {
        let (dir, events) = log();
        events.add("empty", json!({ "reason": "" }));
        let frame = fs::metadata(events.file(0)).unwrap().len() as usize;
        fs::remove_dir_all(dir.path().join("data")).unwrap();
        let mut shortened = [0, 0];
        for letter in LETTERS {
            let bytes = serde_json::to_vec(letter).unwrap().len() - 2;
            // From a little below the limit to a little above, in steps of one letter; and far above.
            let near = (MAX_LINE - frame) / bytes;
            for letters in (near - 20..near + 20).chain([20 << 10, 200 << 10]) {
                let text = letter.repeat(letters);
                fs::remove_dir_all(dir.path().join("data")).ok();
                events.add("plain", json!({ "reason": text, "slot": "b" }));
                let length = fs::metadata(events.file(0)).unwrap().len() as usize;
                assert!(length <= MAX_LINE, "{letter:?} {letters}: {length}");
                let read = events.read().unwrap();
                let [event] = read.as_slice() else { panic!("{letter:?} {letters}: {read:?}") };
                assert_eq!((event.event.as_str(), &event.details["slot"]), ("plain", &json!("b")));
                let kept = event.details["reason"].as_str().unwrap();
                let cut = event.details.contains_key("shortened");
                shortened[usize::from(cut)] += 1;
                if cut {
                    let kept = kept.strip_suffix(CUT).unwrap();
                    assert!(text.starts_with(kept) && kept.len() > 1000, "{}", kept.len());
                } else {
                    assert_eq!(kept, text);
                }
            }
        }
        assert!(shortened.iter().all(|times| *times > 60), "{shortened:?}");
    }

    #[test]
    fn long_lists_and_deep_details_are_kept_in_part() {
        let (_dir, events) = log();
        let many: Vec<Value> =
            (0..10_000).map(|n| json!({ "path": n, "how": "content" })).collect();
        let wide: Map<String, Value> =
            (0..5_000).map(|n| (format!("name-{n}"), json!("x".repeat(50)))).collect();
        let mut deep = json!("y".repeat(30_000));
        for _ in 0..60 {
            deep = json!([deep, "z"]);
        }
        let name = "n".repeat(MAX_LINE);
        for details in
            [json!({ "all": many }), json!(wide), json!({ "deep": deep }), json!({ name: 1 })]
        {
            events.add("large", details.clone());
            let last = events.read().unwrap().pop().unwrap();
            assert_eq!(last.event, "large");
            assert_eq!(last.details["shortened"].as_u64().unwrap() as usize, {
                let whole =
                    RobotEvent { details: details.as_object().unwrap().clone(), ..last.clone() };
                serde_json::to_vec(&whole).unwrap().len()
            });
        }
        assert_eq!(events.read().unwrap().len(), 4);
    }
}
