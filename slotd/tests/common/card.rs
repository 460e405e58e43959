//! A card in memory that records every write and flush, and simulates what a power cut may leave.
//!
//! Its cache is volatile. Any subset of unflushed writes may be lost, torn or reordered when the power
//! fails. [`Storage::read_at`] includes them, like the kernel's page cache; [`Storage::read_back`] does not:
//! a restart would find only what a flush has made durable. A flush covers only its own part, because
//! `fdatasync` on one partition does not flush another.
//! A torn write may also destroy the erase block around it ([`Sectors::Around`]).
#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io;
use std::sync::{Arc, Mutex};

use bundle::bootstate::Slot;
use slotd::Result;
use slotd::machine::SlotStorage;
use slotd::storage::Storage;

/// Bytes that a card erases at once, and that a torn write may destroy. 4 MiB is the alignment of partitions
/// in the plan (`xtask/src/plan/resolve.rs`), and the largest erase group of common SD cards and eMMC.
pub const ERASE: u64 = 4 << 20;

/// The parts of a card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The area before the slots: the boot state's sectors, the volume with `autoboot.txt`, or the whole disk in
    /// a test that changes the partition table.
    Gap = 0,
    A = 1,
    B = 2,
    BootA = 3,
    BootB = 4,
}

const PLACES: [Place; 5] = [Place::Gap, Place::A, Place::B, Place::BootA, Place::BootB];

/// The operations on the card.
#[derive(Debug, Clone)]
pub enum Op {
    Write(Place, u64, Vec<u8>),
    Flush(Place),
}

/// The content of the parts; those for boot files are empty where slots have none.
pub type Content = [Vec<u8>; 5];

#[derive(Debug, Default)]
struct Inner {
    /// Including unflushed writes, as the kernel shows it.
    seen: Content,
    /// The durable content.
    durable: Content,
    /// Indices into `ops` of writes that no flush has made durable.
    waiting: Vec<usize>,
    ops: Vec<(Op, Option<Vec<u8>>)>,
    /// A bit that every write at this byte of slot b loses.
    bad_byte: Option<u64>,
    /// A part whose writes and flushes are acknowledged but dropped.
    lost: Option<Place>,
}

/// The card; clones are the same card.
#[derive(Clone, Default)]
pub struct Card {
    inner: Arc<Mutex<Inner>>,
    journal: Option<std::path::PathBuf>,
}

impl Card {
    /// `journal`: a file whose content is recorded with each operation.
    pub fn new(content: Content, journal: Option<std::path::PathBuf>) -> Self {
        let inner = Inner { seen: content.clone(), durable: content, ..Inner::default() };
        Self { inner: Arc::new(Mutex::new(inner)), journal }
    }

    pub fn break_byte(&self, at: u64) {
        self.inner.lock().unwrap().bad_byte = Some(at);
    }

    /// From now on acknowledges writes to this part but drops them.
    pub fn lose(&self, place: Place) {
        self.inner.lock().unwrap().lost = Some(place);
    }

    pub fn repair(&self) {
        let mut inner = self.inner.lock().unwrap();
        (inner.bad_byte, inner.lost) = (None, None);
    }

    /// What a restart would find, without unflushed writes.
    pub fn content(&self) -> Content {
        self.inner.lock().unwrap().durable.clone()
    }

    /// All operations, each with the journal at that moment.
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
        self.card.inner.lock().unwrap().seen[self.place as usize].len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        read(&self.card.inner.lock().unwrap().seen[self.place as usize], offset, buffer)
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        read(&self.card.inner.lock().unwrap().durable[self.place as usize], offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let journal = self.card.journal.as_ref().and_then(|path| std::fs::read(path).ok());
        let mut inner = self.card.inner.lock().unwrap();
        let at = inner.ops.len();
        inner.waiting.push(at);
        inner.ops.push((Op::Write(self.place, offset, bytes.to_vec()), journal));
        let seen = &mut inner.seen[self.place as usize];
        let Some(place) = seen.get_mut(offset as usize..offset as usize + bytes.len()) else {
            panic!("a write beyond the partition's end: {} bytes at {offset}", bytes.len());
        };
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let journal = self.card.journal.as_ref().and_then(|path| std::fs::read(path).ok());
        let mut guard = self.card.inner.lock().unwrap();
        let inner = &mut *guard;
        for at in std::mem::take(&mut inner.waiting) {
            let Op::Write(place, offset, bytes) = &inner.ops[at].0 else { continue };
            if *place != self.place {
                inner.waiting.push(at);
                continue;
            }
            if inner.lost == Some(*place) {
                continue;
            }
            let kept = &mut inner.durable[*place as usize][*offset as usize..][..bytes.len()];
            kept.copy_from_slice(bytes);
            let bad = inner.bad_byte.filter(|_| *place == Place::B);
            if let Some(byte) = bad.and_then(|bad| bad.checked_sub(*offset))
                && let Some(byte) = kept.get_mut(byte as usize)
            {
                *byte ^= 0x10;
            }
        }
        inner.ops.push((Op::Flush(self.place), journal));
        Ok(())
    }
}

fn read(content: &[u8], offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let bytes = content.get(offset as usize..).and_then(|bytes| bytes.get(..buffer.len()));
    buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
    Ok(())
}

impl SlotStorage for Card {
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

/// Where the parts begin on the disk, when each begins at a multiple of `alignment` bytes.
pub fn starts(content: &Content, alignment: u64) -> [u64; 5] {
    let mut next = 0;
    PLACES.map(|place| {
        let start = next;
        next = (start + content[place as usize].len() as u64).next_multiple_of(alignment);
        start
    })
}

/// What a card may hold when the power fails after `cut` operations: everything before a part's last
/// flush, and any selection of later writes, torn at sectors, chosen by `luck`. `starts` has the positions
/// of the parts, to determine what a torn write destroys.
pub fn after_cut(
    before: &Content,
    ops: &[(Op, Option<Vec<u8>>)],
    cut: usize,
    starts: [u64; 5],
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
        let sectors = bytes.len().div_ceil(512);
        let moment = Moment { last: at + 1 == cut, sectors, place: *place };
        let sectors = if at < durable[*place as usize] { Sectors::All } else { luck(moment) };
        for (number, sector) in bytes.chunks(512).enumerate() {
            let written = match sectors {
                Sectors::All => true,
                Sectors::None => false,
                Sectors::First(n) | Sectors::Around(n, _) => number < n,
                Sectors::From(n) => number >= n,
            };
            if written {
                let start = *offset as usize + number * 512;
                content[*place as usize][start..start + sector.len()].copy_from_slice(sector);
            }
        }
        if let Sectors::Around(_, seed) = sectors {
            let at = starts[*place as usize] + offset;
            destroy(&mut content, starts, at, at + bytes.len() as u64, seed);
        }
    }
    content
}

/// Overwrites about half of the 4 KiB blocks in the erase blocks that hold `from..to` of the disk, in whichever
/// part they are.
fn destroy(content: &mut Content, starts: [u64; 5], from: u64, to: u64, seed: u64) {
    let (from, to) = (from / ERASE * ERASE, to.next_multiple_of(ERASE));
    for (part, start) in content.iter_mut().zip(starts) {
        for (number, block) in part.chunks_mut(4096).enumerate() {
            let at = start + number as u64 * 4096;
            let random = (seed ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if (from..to).contains(&at) && random >> 63 == 1 {
                // A byte that no system in these tests contains.
                block.fill((random >> 56) as u8);
            }
        }
    }
}

/// An unflushed write at the moment of the cut.
pub struct Moment {
    /// Whether it is the last operation before the cut.
    pub last: bool,
    /// Its length in sectors.
    pub sectors: usize,
    /// Its position.
    pub place: Place,
}

/// The part of a write that reached the card.
#[derive(Debug, Clone, Copy)]
pub enum Sectors {
    All,
    None,
    First(usize),
    From(usize),
    /// The first sectors; and the erase block around the write was being rewritten: any part of it may be lost,
    /// chosen by the seed.
    Around(usize, u64),
}
