//! `board/common/boot.scr.j2` as a pure function: which slot it starts and what it writes before the start.

use bundle::bootstate::{BootState, SECTOR, Slot, find_newest};

/// The two copies of the boot state.
pub type BootStateCopies = [[u8; SECTOR]; 2];

/// What happens to the script's own writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteBehavior {
    /// They reach the card.
    Good,
    /// They fail, or reading back gives other bytes.
    Refuses,
}

/// A kernel that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartedKernel {
    /// From this slot.
    pub slot: Slot,
    /// With `slipway.trial=1`.
    pub trial: bool,
    /// With `slipway.unloadable=`: the slot that was tried before and did not load.
    pub unloadable: Option<Slot>,
}

/// One run of the script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScriptRun {
    /// What was started; `None` when no slot loads (the script then restarts after a while).
    pub started: Option<StartedKernel>,
    /// The copies when the kernel starts.
    pub copies: BootStateCopies,
    /// What was written, in order: the copy's index and its new content.
    pub writes: Vec<(usize, [u8; SECTOR])>,
}

/// Runs the script. `loads` says whether a slot's file system mounts and its kernel, initrd and device
/// tree load.
pub fn run(
    copies: &BootStateCopies,
    loads: impl Fn(Slot) -> bool,
    card: WriteBehavior,
) -> ScriptRun {
    let mut state = Writer { copies: *copies, writes: Vec::new(), card };
    let Some((counts, known)) = find_newest(copies.iter().map(<[u8; SECTOR]>::as_slice)) else {
        return state.end(start_committed(Slot::A, None, loads));
    };
    let armed = known.trial.filter(|trial| *trial != known.active);
    let Some(trial) = armed.filter(|_| known.tries > 0 && known.sequence < u32::MAX) else {
        return state.end(start_committed(known.active, None, loads));
    };
    let counted = BootState { sequence: known.sequence + 1, tries: known.tries - 1, ..known };
    if !state.write(1 - counts, &counted) {
        return state.end(start_committed(known.active, None, loads));
    }
    if loads(trial) {
        let started = StartedKernel { slot: trial, trial: true, unloadable: None };
        return state.end(Some(started));
    }
    if counted.tries > 0 && counted.sequence < u32::MAX {
        let over = BootState { sequence: counted.sequence + 1, tries: 0, ..counted };
        // Whatever the trial's result, the committed slot starts next.
        state.write(counts, &over);
    }
    state.end(start_committed(known.active, Some(trial), loads))
}

/// Starts the committed slot, or the other one if that does not load.
fn start_committed(
    active: Slot,
    unloadable: Option<Slot>,
    loads: impl Fn(Slot) -> bool,
) -> Option<StartedKernel> {
    if loads(active) {
        return Some(StartedKernel { slot: active, trial: false, unloadable });
    }
    let other = if active == Slot::A { Slot::B } else { Slot::A };
    loads(other).then_some(StartedKernel { slot: other, trial: false, unloadable: Some(active) })
}

struct Writer {
    copies: BootStateCopies,
    writes: Vec<(usize, [u8; SECTOR])>,
    card: WriteBehavior,
}

impl Writer {
    fn write(&mut self, copy: usize, state: &BootState) -> bool {
        if self.card == WriteBehavior::Refuses {
            return false;
        }
        let sector = state.encode();
        self.copies[copy] = sector;
        self.writes.push((copy, sector));
        true
    }

    fn end(self, started: Option<StartedKernel>) -> ScriptRun {
        ScriptRun { started, copies: self.copies, writes: self.writes }
    }
}
