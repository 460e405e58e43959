//! A card in memory that remembers every write and flush, and what a power cut may leave of it.

use std::io;
use std::sync::{Arc, Mutex};

use bundle::bootstate::Slot;
use slotd::Result;
use slotd::install::Slots;
use slotd::storage::Storage;

/// The parts of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Gap = 0,
    A = 1,
    B = 2,
    BootA = 3,
    BootB = 4,
}

const PLACES: [Place; 5] = [Place::Gap, Place::A, Place::B, Place::BootA, Place::BootB];

/// What happened to it.
#[derive(Debug, Clone)]
pub enum Op {
    Write(Place, u64, Vec<u8>),
    Flush(Place),
}

/// The content of the parts; those for boot files are empty where slots have none.
pub type Content = [Vec<u8>; 5];

#[derive(Debug, Default)]
struct Inner {
    content: Content,
    ops: Vec<(Op, Option<Vec<u8>>)>,
    /// A bit that every write at this byte of slot b loses.
    bad_byte: Option<u64>,
}

/// The card; clones are the same card.
#[derive(Clone, Default)]
pub struct Card {
    inner: Arc<Mutex<Inner>>,
    journal: Option<std::path::PathBuf>,
}

impl Card {
    /// `journal`: a file that is noted with each operation, as it is at that moment.
    pub fn new(content: Content, journal: Option<std::path::PathBuf>) -> Self {
        let inner = Inner { content, ..Inner::default() };
        Self { inner: Arc::new(Mutex::new(inner)), journal }
    }

    pub fn break_byte(&self, at: u64) {
        self.inner.lock().unwrap().bad_byte = Some(at);
    }

    pub fn repair(&self) {
        self.inner.lock().unwrap().bad_byte = None;
    }

    pub fn content(&self) -> Content {
        self.inner.lock().unwrap().content.clone()
    }

    /// Everything that happened, each with the journal as it was then.
    pub fn ops(&self) -> Vec<(Op, Option<Vec<u8>>)> {
        self.inner.lock().unwrap().ops.clone()
    }

    pub fn part(&self, place: Place) -> Part {
        Part { card: self.clone(), place }
    }

    /// Bytes written to each part.
    pub fn written(&self) -> [u64; 5] {
        let mut sums = [0; 5];
        for (op, _) in self.ops() {
            if let Op::Write(place, _, bytes) = op {
                sums[place as usize] += bytes.len() as u64;
            }
        }
        sums
    }
}

/// One part of the card.
pub struct Part {
    card: Card,
    place: Place,
}

impl Storage for Part {
    fn size(&self) -> u64 {
        self.card.inner.lock().unwrap().content[self.place as usize].len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let inner = self.card.inner.lock().unwrap();
        let bytes = inner.content[self.place as usize].get(offset as usize..);
        let bytes = bytes.and_then(|bytes| bytes.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let journal = self.card.journal.as_ref().and_then(|path| std::fs::read(path).ok());
        let mut inner = self.card.inner.lock().unwrap();
        inner.ops.push((Op::Write(self.place, offset, bytes.to_vec()), journal));
        let bad = inner.bad_byte.filter(|_| self.place == Place::B);
        let content = &mut inner.content[self.place as usize];
        let Some(place) = content.get_mut(offset as usize..offset as usize + bytes.len()) else {
            panic!("a write beyond the partition's end: {} bytes at {offset}", bytes.len());
        };
        place.copy_from_slice(bytes);
        if let Some(at) = bad.and_then(|bad| bad.checked_sub(offset))
            && let Some(byte) = place.get_mut(at as usize)
        {
            *byte ^= 0x10;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let journal = self.card.journal.as_ref().and_then(|path| std::fs::read(path).ok());
        self.card.inner.lock().unwrap().ops.push((Op::Flush(self.place), journal));
        Ok(())
    }
}

impl Slots for Card {
    fn open(&self, slot: Slot, role: &str) -> Result<Box<dyn Storage>> {
        let place = match (role, slot) {
            ("root", Slot::A) => Place::A,
            ("root", Slot::B) => Place::B,
            ("boot", Slot::A) => Place::BootA,
            ("boot", Slot::B) => Place::BootB,
            _ => panic!("no partition has the role {role}"),
        };
        Ok(Box::new(self.part(place)))
    }
}

/// What a card may hold when the power goes after `cut` operations: everything before a part's last
/// flush, and of what came after it any choice, torn at sectors, as `luck` has it.
pub fn after_cut(
    before: &Content,
    ops: &[(Op, Option<Vec<u8>>)],
    cut: usize,
    mut luck: impl FnMut(Moment) -> Sectors,
) -> Content {
    let mut content = before.clone();
    let ops = &ops[..cut];
    let flushed = |place: Place| {
        ops.iter()
            .rposition(|(op, _)| matches!(op, Op::Flush(p) if *p == place))
            .map_or(0, |at| at + 1)
    };
    let durable = PLACES.map(flushed);
    for (at, (op, _)) in ops.iter().enumerate() {
        let Op::Write(place, offset, bytes) = op else { continue };
        let moment = Moment { last: at + 1 == cut, sectors: bytes.len().div_ceil(512) };
        let sectors = if at < durable[*place as usize] { Sectors::All } else { luck(moment) };
        for (number, sector) in bytes.chunks(512).enumerate() {
            let written = match sectors {
                Sectors::All => true,
                Sectors::None => false,
                Sectors::First(n) => number < n,
                Sectors::From(n) => number >= n,
            };
            if written {
                let start = *offset as usize + number * 512;
                content[*place as usize][start..start + sector.len()].copy_from_slice(sector);
            }
        }
    }
    content
}

/// An unflushed write at the moment of the cut.
pub struct Moment {
    /// Whether it is the last operation before the cut.
    pub last: bool,
    /// How many sectors it has.
    pub sectors: usize,
}

/// What reached the card of one write.
#[derive(Clone, Copy)]
pub enum Sectors {
    All,
    None,
    First(usize),
    From(usize),
}
