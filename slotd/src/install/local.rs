//! Finds blocks of the bundle anywhere in the running slot, by their hashes in the index.
//!
//! Memory: four bytes for each block that is not zero, and five for its entry in the hash table.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use bundle::index::{is_zero, sha256};
use bundle::{BLOCK_SIZE, BlockIndex};

use super::scan::{SAMPLES, WORTHWHILE};
use crate::buffer::{AlignedBuffer, LOOK};
use crate::storage::Storage;

/// The positions of a payload's blocks in the running slot.
#[derive(Debug)]
pub struct LocalBlocks<'a> {
    index: &'a BlockIndex,
    /// Numbers of hashes, plus one, by hash; zero: empty. Open addressing.
    table: Vec<u32>,
    /// For each hash in the table: the running slot's block, plus one; zero: not found.
    places: Vec<AtomicU32>,
}

impl<'a> LocalBlocks<'a> {
    /// Reads the running slot, if a sample shows that it has much of the payload.
    pub fn read_running(index: &'a BlockIndex, running: &dyn Storage) -> Self {
        let used = index.used_blocks();
        let mut local = Self {
            index,
            table: vec![0; used as usize / 4 * 5 + 8],
            places: (0..used).map(|_| AtomicU32::new(0)).collect(),
        };
        for number in 0..used {
            let Some(hash) = index.hash(number) else { break };
            let mut at = local.start(hash);
            // A second block with the same hash is not added: the first one's position is used for both.
            while local.at(at).is_some_and(|known| index.hash(known) != Some(hash)) {
                at = local.after(at);
            }
            if local.at(at).is_none()
                && let Some(entry) = local.table.get_mut(at)
            {
                *entry = number + 1;
            }
        }
        if local.seems_similar(running) {
            local.survey(running);
        }
        local
    }

    /// The running slot's block with this hash.
    pub fn place(&self, hash: &[u8]) -> Option<u32> {
        let number = self.number(hash)?;
        self.places.get(number as usize)?.load(Ordering::Relaxed).checked_sub(1)
    }

    fn start(&self, hash: &[u8]) -> usize {
        let head = hash.iter().take(8).fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
        // Less than the table's length.
        (head % self.table.len() as u64) as usize
    }

    fn after(&self, at: usize) -> usize {
        if at + 1 == self.table.len() { 0 } else { at + 1 }
    }

    fn at(&self, at: usize) -> Option<u32> {
        self.table.get(at)?.checked_sub(1)
    }

    fn number(&self, hash: &[u8]) -> Option<u32> {
        let mut at = self.start(hash);
        loop {
            let number = self.at(at)?;
            if self.index.hash(number) == Some(hash) {
                return Some(number);
            }
            at = self.after(at);
        }
    }

    /// The number in the index of a whole block.
    fn look_up(&self, block: &[u8]) -> Option<u32> {
        if is_zero(block) {
            None
        } else {
            self.number(&bundle::index::truncate_hash(&sha256(block)))
        }
    }

    fn seems_similar(&self, running: &dyn Storage) -> bool {
        let blocks = running.size() / BLOCK_SIZE as u64;
        let step = (blocks / u64::from(SAMPLES * 4)).max(1);
        let mut buffer = AlignedBuffer::new(BLOCK_SIZE);
        let (mut seen, mut known) = (0_u32, 0_u32);
        for block in (0..blocks).step_by(step as usize) {
            let bytes = buffer.first_mut(BLOCK_SIZE);
            if running.read_back(block * BLOCK_SIZE as u64, bytes).is_ok() && !is_zero(bytes) {
                seen += 1;
                known += u32::from(self.look_up(bytes).is_some());
            }
        }
        seen > 0 && known * WORTHWHILE >= seen
    }

    fn survey(&self, running: &dyn Storage) {
        let transfers = (running.size() / LOOK as u64) as usize;
        let next = AtomicUsize::new(0);
        let work = || {
            let mut buffer = AlignedBuffer::new(LOOK);
            loop {
                let transfer = next.fetch_add(1, Ordering::Relaxed);
                if transfer >= transfers {
                    return;
                }
                let bytes = buffer.first_mut(LOOK);
                // Unreadable blocks are not used.
                if running.read_back(transfer as u64 * LOOK as u64, bytes).is_err() {
                    continue;
                }
                let start = (transfer * (LOOK / BLOCK_SIZE)) as u32;
                for (at, block) in (start..).zip(bytes.chunks(BLOCK_SIZE)) {
                    let place = self.look_up(block).and_then(|n| self.places.get(n as usize));
                    if let Some(place) = place {
                        place.store(at + 1, Ordering::Relaxed);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(work);
            work();
        });
    }
}
