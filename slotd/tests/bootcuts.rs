//! The boot state as changed by the agent and the boot script, cut at every byte of every write, on a card with
//! a volatile cache: in every case the robot ends in the slot that was committed before or in the one that the
//! write selects, every trial is counted, and the result of a call is durable when it returns. The script is
//! `bootmodel`'s, which is tested to be equal to the real one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/card.rs"]
mod card;

use std::collections::{BTreeSet, VecDeque};

use bootmodel::script::{self, BootStateCopies, StartedKernel, WriteBehavior};
use bundle::bootstate::{BootState, SECTOR, Slot, find_newest};
use card::{Content, Op, Place};
use slotd::boot::{BootControl, Uboot};
use slotd::device::other_slot;

const SECTORS: [u64; 2] = [8, 16];

/// A disk with these copies.
fn disk(copies: &BootStateCopies) -> card::Card {
    let mut bytes = vec![0; 32 * SECTOR];
    for (copy, sector) in copies.iter().zip(SECTORS) {
        bytes[sector as usize * SECTOR..][..SECTOR].copy_from_slice(copy);
    }
    let [a, b, boot_a, boot_b] = [const { Vec::new() }; 4];
    card::Card::new([bytes, a, b, boot_a, boot_b], None)
}

fn copies(content: &Content) -> BootStateCopies {
    SECTORS.map(|sector| content[0][sector as usize * SECTOR..][..SECTOR].try_into().unwrap())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Arm,
    Commit,
    RollBack,
    Restart,
}

const STEPS: [Step; 4] = [Step::Arm, Step::Commit, Step::RollBack, Step::Restart];

/// A robot: its boot state and the running slot.
type Robot = (BootStateCopies, StartedKernel);

fn restart(copies: &BootStateCopies) -> script::ScriptRun {
    script::run(copies, |_| true, WriteBehavior::Good)
}

fn started(run: &script::ScriptRun) -> StartedKernel {
    run.started.expect("both slots load")
}

/// Operations on the copies, in order: a write of one, or (`None`) a flush.
type Event = Option<(usize, [u8; SECTOR])>;

/// What a step does to the copies, and the robot afterwards, with its durable state.
fn take(robot: &Robot, step: Step) -> (Vec<Event>, Robot) {
    let (before, running) = robot;
    let disk = disk(before);
    let flow = Uboot::new(disk.part(Place::Gap), SECTORS, running.slot);
    match step {
        Step::Arm => flow.arm_trial(other_slot(running.slot)),
        Step::Commit => flow.commit(),
        Step::RollBack => flow.roll_back(),
        Step::Restart => {
            let run = restart(before);
            let running = started(&run);
            // U-Boot has no cache: `mmc write` returns when the card has the data.
            let write = |write| [Some(write), None];
            return (run.writes.into_iter().flat_map(write).collect(), (run.copies, running));
        }
    }
    .expect("a good disk");
    let event = |(op, _): (Op, _)| -> Event {
        let Op::Write(Place::Gap, offset, bytes) = op else { return None };
        let index = SECTORS.iter().position(|s| s * SECTOR as u64 == offset);
        let sector = <[u8; SECTOR]>::try_from(bytes).expect("one sector, as a whole");
        Some((index.expect("nothing but the boot state is written"), sector))
    };
    let events = disk.ops().into_iter().map(event).collect();
    (events, (copies(&disk.content()), *running))
}

/// All possible results of a torn write: any number of bytes from the front or from the back.
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

fn counts(copies: &BootStateCopies) -> Option<(usize, BootState)> {
    find_newest(copies.iter().map(<[u8; SECTOR]>::as_slice))
}

/// The slot that runs when no more trial is started.
fn settle(copies: &BootStateCopies) -> Slot {
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

/// The committed slot after a step, the trial, and the trial's starts; a restart has the result of the
/// model.
fn wanted((copies, running): &Robot, step: Step) -> Option<(Slot, Option<Slot>, u32)> {
    let active = counts(copies).map_or(running.slot, |(_, state)| state.active);
    match step {
        Step::Arm => Some((active, Some(other_slot(running.slot)), 1)),
        Step::Commit => Some((running.slot, None, 0)),
        Step::RollBack => Some((active, None, 0)),
        Step::Restart => None,
    }
}

#[test]
fn every_cut_ends_in_a_committed_slot_and_no_trial_goes_uncounted() {
    let first = BootState::first().encode();
    let more = BootState { sequence: 4, active: Slot::B, trial: Some(Slot::A), tries: 2 }.encode();
    // A new card, one that was written, one that has lost a copy, one with two tries.
    let roots = [[[0; SECTOR]; 2], [first, [0; SECTOR]], [[0xff; SECTOR], first], [more, first]];
    let root = |copies: BootStateCopies| {
        let run = restart(&copies);
        ((copies, StartedKernel { trial: false, ..started(&run) }), 0)
    };
    let mut waiting: VecDeque<(Robot, u32)> = roots.map(root).into();
    let mut seen = BTreeSet::new();
    let (mut steps, mut points) = (0, 0);
    while let Some((robot, depth)) = waiting.pop_front() {
        if depth > 5 || !seen.insert((robot.0, robot.1.slot, robot.1.trial)) {
            continue;
        }
        for step in STEPS {
            let (events, after) = take(&robot, step);
            let context = || format!("{step:?} from {:?}", counts(&robot.0));
            steps += 1;
            let mut written = robot.0;
            for (index, sector) in events.iter().flatten() {
                written[*index] = *sector;
            }
            assert!(after.0 == written, "{}: not durable when it returned", context());
            if let Some(wanted) = wanted(&robot, step) {
                let (_, now) = counts(&after.0).expect("a state");
                assert_eq!((now.active, now.trial, now.tries), wanted, "{}", context());
            }
            // Both possible results: it never happened, or it was done.
            let allowed = [settle(&robot.0), settle(&after.0)];
            let mut durable = robot.0;
            let mut unflushed: Option<(usize, [u8; SECTOR])> = None;
            for event in events {
                match event {
                    None => {
                        if let Some((index, sector)) = unflushed.take() {
                            durable[index] = sector;
                        }
                    }
                    Some((index, new)) => {
                        let counting = counts(&durable).map(|(index, _)| index);
                        assert_ne!(counting, Some(index), "{}: writes what counts", context());
                        assert!(unflushed.is_none(), "{}: two writes, no flush", context());
                        unflushed = Some((index, new));
                    }
                }
                let Some((index, new)) = unflushed else { continue };
                for sector in torn(&durable[index], &new) {
                    let mut cut = durable;
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
            }
            waiting.push_back((after, depth + 1));
        }
    }
    println!("{} robots, {steps} steps, {points} cut points", seen.len());
    assert!(points > 10_000, "only {points} cut points");
}

#[test]
fn a_card_that_keeps_nothing_is_not_believed() {
    let disk = disk(&[BootState::first().encode(), [0; SECTOR]]);
    disk.lose(Place::Gap);
    let flow = Uboot::new(disk.part(Place::Gap), SECTORS, Slot::A);
    for refused in [flow.arm_trial(Slot::B), flow.commit(), flow.roll_back()] {
        assert_eq!(refused.unwrap_err().code, "boot-state");
    }
}

#[test]
fn a_card_that_refuses_writes_costs_the_trial_only() {
    let armed = BootState { sequence: 7, active: Slot::A, trial: Some(Slot::B), tries: 1 };
    let copies = [armed.encode(), [0; SECTOR]];
    let run = script::run(&copies, |_| true, WriteBehavior::Refuses);
    let expected = StartedKernel { slot: Slot::A, trial: false, unloadable: None };
    assert_eq!((run.started, run.copies), (Some(expected), copies));
}
