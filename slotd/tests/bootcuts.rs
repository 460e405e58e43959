//! The boot state under the agent and the boot script, cut at every byte of every write: whatever is
//! left, the robot ends in what was committed before or in what the write was to choose, and no trial
//! goes uncounted. The script is `bootmodel`'s, which is proven equal to the real one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Mutex;

use bootmodel::script::{self, Card, Copies, Started};
use bundle::bootstate::{BootState, SECTOR, Slot, newest};
use slotd::boot::{BootFlow, Uboot};
use slotd::device::other;
use slotd::storage::Storage;

const SECTORS: [u64; 2] = [8, 16];

/// A disk that remembers every write.
struct Recorder {
    bytes: Mutex<Vec<u8>>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Recorder {
    fn new(copies: &Copies) -> Self {
        let mut bytes = vec![0; 32 * SECTOR];
        for (copy, sector) in copies.iter().zip(SECTORS) {
            bytes[sector as usize * SECTOR..][..SECTOR].copy_from_slice(copy);
        }
        Self { bytes: Mutex::new(bytes), writes: Mutex::new(Vec::new()) }
    }
}

impl Storage for Recorder {
    fn size(&self) -> u64 {
        32 * SECTOR as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        self.writes.lock().unwrap().push((offset, bytes.to_vec()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Arm,
    Commit,
    RollBack,
    Restart,
}

const STEPS: [Step; 4] = [Step::Arm, Step::Commit, Step::RollBack, Step::Restart];

/// A robot: its boot state, and what runs.
type Robot = (Copies, Started);

fn restart(copies: &Copies) -> script::Run {
    script::run(copies, |_| true, Card::Good)
}

fn started(run: &script::Run) -> Started {
    run.started.expect("both slots load")
}

/// What a step writes to which copy, in order, and the robot afterwards.
fn take(robot: &Robot, step: Step) -> (Vec<(usize, [u8; SECTOR])>, Robot) {
    let (copies, running) = robot;
    let disk = Recorder::new(copies);
    let flow = Uboot::new(&disk, SECTORS, running.slot);
    match step {
        Step::Arm => flow.arm_trial(other(running.slot)),
        Step::Commit => flow.commit(),
        Step::RollBack => flow.roll_back(),
        Step::Restart => {
            let run = restart(copies);
            let running = started(&run);
            return (run.writes, (run.copies, running));
        }
    }
    .expect("a good disk");
    let writes = disk.writes.lock().unwrap();
    let place = |(offset, bytes): &(u64, Vec<u8>)| {
        let index = SECTORS.iter().position(|s| s * SECTOR as u64 == *offset);
        let sector = <[u8; SECTOR]>::try_from(bytes.as_slice()).expect("one sector, as a whole");
        (index.expect("nothing but the boot state is written"), sector)
    };
    let writes: Vec<_> = writes.iter().map(place).collect();
    let mut after = *copies;
    writes.iter().for_each(|(index, sector)| after[*index] = *sector);
    (writes, (after, *running))
}

/// Everything that a torn write may leave: any number of bytes from the front or from the back.
fn torn(old: &[u8; SECTOR], new: &[u8; SECTOR]) -> BTreeSet<[u8; SECTOR]> {
    let mut variants = BTreeSet::new();
    for cut in 0..=SECTOR {
        let (mut front, mut back) = (*old, *new);
        front[..cut].copy_from_slice(&new[..cut]);
        back[..cut].copy_from_slice(&old[..cut]);
        variants.extend([front, back]);
    }
    variants
}

fn counts(copies: &Copies) -> Option<(usize, BootState)> {
    newest(copies.iter().map(<[u8; SECTOR]>::as_slice))
}

/// The slot that runs when no trial is started any more.
fn settle(copies: &Copies) -> Slot {
    let mut copies = *copies;
    for _ in 0..16 {
        let run = restart(&copies);
        if !started(&run).trial {
            return started(&run).slot;
        }
        copies = run.copies;
    }
    panic!("a trial without end");
}

#[test]
fn every_cut_ends_in_a_committed_slot_and_no_trial_goes_uncounted() {
    let first = BootState::first().encode();
    let more = BootState { sequence: 4, active: Slot::B, trial: Some(Slot::A), tries: 2 }.encode();
    // A new card, one that was written, one that has lost a copy, one with two tries.
    let roots = [[[0; SECTOR]; 2], [first, [0; SECTOR]], [[0xff; SECTOR], first], [more, first]];
    let root = |copies: Copies| {
        let run = restart(&copies);
        ((copies, Started { trial: false, ..started(&run) }), 0)
    };
    let mut waiting: VecDeque<(Robot, u32)> = roots.map(root).into();
    let mut seen = BTreeSet::new();
    let (mut steps, mut points) = (0, 0);
    while let Some((robot, depth)) = waiting.pop_front() {
        if depth > 5 || !seen.insert((robot.0, robot.1.slot, robot.1.trial)) {
            continue;
        }
        for step in STEPS {
            let (writes, after) = take(&robot, step);
            let context = || format!("{step:?} from {:?}", counts(&robot.0));
            steps += 1;
            // Both that a person may find: it never happened, or it was done.
            let allowed = [settle(&robot.0), settle(&after.0)];
            let mut copies = robot.0;
            for (index, new) in writes {
                let counting = counts(&copies).map(|(index, _)| index);
                assert_ne!(counting, Some(index), "{}: writes the copy that counts", context());
                for sector in torn(&copies[index], &new) {
                    let mut cut = copies;
                    cut[index] = sector;
                    points += 1;
                    let run = restart(&cut);
                    if started(&run).trial {
                        let (_, now) = counts(&cut).expect("a state");
                        let (_, left) = counts(&run.copies).expect("a state");
                        assert_eq!(left.tries + 1, now.tries, "{}: not counted", context());
                        assert_eq!(now.trial, Some(started(&run).slot), "{}", context());
                    }
                    assert!(allowed.contains(&settle(&cut)), "{}", context());
                }
                copies[index] = new;
            }
            waiting.push_back((after, depth + 1));
        }
    }
    println!("{} robots, {steps} steps, {points} cut points", seen.len());
    assert!(points > 10_000, "only {points} cut points");
}

#[test]
fn a_card_that_refuses_writes_costs_the_trial_only() {
    let armed = BootState { sequence: 7, active: Slot::A, trial: Some(Slot::B), tries: 1 };
    let copies = [armed.encode(), [0; SECTOR]];
    let run = script::run(&copies, |_| true, Card::Refuses);
    let expected = Started { slot: Slot::A, trial: false, unloadable: None };
    assert_eq!((run.started, run.copies), (Some(expected), copies));
}
