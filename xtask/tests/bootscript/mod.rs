//! The boot script in the real U-Boot (the package lock's, in QEMU) against its model: the same
//! slot, the same kernel arguments, the same bytes in the boot state afterwards. Kernels that only
//! print their name boot within a second. Logs are below `target/tmp/bootscript`.

mod rig;

use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use bootmodel::script::{self, BootStateCopies, WriteBehavior};
use bundle::bootstate::{BootState, SECTOR, Slot};

use rig::{Fault, Rig};

const ZERO: [u8; SECTOR] = [0; SECTOR];
const WHOLE: [Fault; 2] = [Fault::None, Fault::None];

fn rig() -> &'static Rig {
    static RIG: OnceLock<Rig> = OnceLock::new();
    RIG.get_or_init(|| Rig::new().expect("a card and a machine"))
}

fn committed(sequence: u32, active: Slot) -> [u8; SECTOR] {
    BootState { sequence, active, trial: None, tries: 0 }.encode()
}

fn on_trial(sequence: u32, active: Slot, trial: Slot, tries: u32) -> [u8; SECTOR] {
    BootState { sequence, active, trial: Some(trial), tries }.encode()
}

/// A sector with a fitting checksum over any text.
fn sealed(text: &[u8]) -> [u8; SECTOR] {
    let mut sector = ZERO;
    sector[4..4 + text.len()].copy_from_slice(text);
    let checksum = crc32fast::hash(&sector[4..]);
    sector[..4].copy_from_slice(&checksum.to_le_bytes());
    sector
}

/// The first `count` bytes of a write reached the card.
fn torn(old: &[u8; SECTOR], new: &[u8; SECTOR], count: usize) -> [u8; SECTOR] {
    let mut sector = *old;
    sector[..count].copy_from_slice(&new[..count]);
    sector
}

/// Starts a card in U-Boot and in the model, and compares every start.
fn agree(
    name: &str,
    copies: BootStateCopies,
    faults: [Fault; 2],
    cards: &[WriteBehavior],
) -> Result<()> {
    let seen = rig().starts(name, &copies, faults, cards).with_context(|| name.to_owned())?;
    let loads = |slot: Slot| faults[usize::from(slot == Slot::B)] == Fault::None;
    let mut copies = copies;
    for (number, (seen, card)) in seen.iter().zip(cards).enumerate() {
        let expected = script::run(&copies, loads, *card);
        ensure!(
            seen.started == expected.started,
            "{name}, start {number}: U-Boot started {:?}, the model {:?}",
            seen.started,
            expected.started
        );
        ensure!(
            seen.copies == expected.copies,
            "{name}, start {number}: U-Boot left {:?}, the model {:?}",
            seen.copies.each_ref().map(|copy| BootState::decode(copy)),
            expected.copies.each_ref().map(|copy| BootState::decode(copy)),
        );
        copies = expected.copies;
    }
    Ok(())
}

#[test]
fn every_state_and_fault_starts_what_the_model_says() -> Result<()> {
    use Fault::{HalfInstalled, NoInitrd, NoKernel, None, NotAKernel};
    use Slot::{A, B};
    use WriteBehavior::{Good, Refuses};
    let armed = [on_trial(5, A, B, 1), committed(4, A)];
    let twice = [committed(9, B), on_trial(10, B, A, 2)];
    let last = u32::MAX;
    let cases: &[(&str, BootStateCopies, [Fault; 2], &[WriteBehavior])] = &[
        ("new card", [ZERO, ZERO], WHOLE, &[Good]),
        ("first copy only", [committed(1, B), ZERO], WHOLE, &[Good]),
        ("second copy only", [ZERO, committed(1, B)], WHOLE, &[Good]),
        ("second is newer", [committed(0xf, A), committed(0x10, B)], WHOLE, &[Good]),
        ("first is newer", [committed(0x100, B), committed(0xff, A)], WHOLE, &[Good]),
        ("equal sequences", [committed(3, B), committed(3, A)], WHOLE, &[Good]),
        ("active is not a slot", [sealed(b"active=c\0seq=9\0"), committed(1, B)], WHOLE, &[Good]),
        (
            "trial is not a slot",
            [sealed(b"active=a\0seq=9\0trial=x\0tries=1\0"), ZERO],
            WHOLE,
            &[Good],
        ),
        ("no sequence", [sealed(b"active=b\0"), ZERO], WHOLE, &[Good]),
        ("unknown variable", [sealed(b"active=b\0seq=9\0tries=0\0why=x\0"), ZERO], WHOLE, &[Good]),
        ("trial without tries", [on_trial(5, A, B, 0), committed(4, A)], WHOLE, &[Good]),
        ("trial, then back", armed, WHOLE, &[Good, Good]),
        ("two tries, then back", twice, WHOLE, &[Good, Good, Good]),
        ("ten tries", [on_trial(0xf, B, A, 0x10), ZERO], WHOLE, &[Good]),
        ("trial of the committed slot", [on_trial(5, A, A, 3), ZERO], WHOLE, &[Good]),
        ("no sequence number left", [on_trial(last, A, B, 1), ZERO], WHOLE, &[Good]),
        (
            "one sequence number left",
            [on_trial(last - 1, A, B, 2), ZERO],
            [None, NoKernel],
            &[Good],
        ),
        ("trial: no kernel", armed, [None, NoKernel], &[Good, Good]),
        ("trial: no initrd", armed, [None, NoInitrd], &[Good]),
        ("trial: not a kernel", armed, [None, NotAKernel], &[Good]),
        ("trial: half installed", armed, [None, HalfInstalled], &[Good]),
        ("trial with tries: no kernel", twice, [NoKernel, None], &[Good, Good]),
        ("committed does not load", [committed(1, A), ZERO], [HalfInstalled, None], &[Good]),
        ("only the trial loads", armed, [NoKernel, None], &[Good, Good]),
        ("no state, a whole", [ZERO, ZERO], [None, HalfInstalled], &[Good]),
        ("no state, b whole", [ZERO, ZERO], [HalfInstalled, None], &[Good]),
        ("torn state, b whole", [[0x5a; SECTOR], [0xff; SECTOR]], [NotAKernel, None], &[Good]),
        ("nothing loads", armed, [NoInitrd, HalfInstalled], &[Good]),
        ("read-only card, trial", armed, WHOLE, &[Refuses, Refuses, Good]),
        ("read-only card, committed", [committed(1, B), ZERO], WHOLE, &[Refuses]),
    ];
    let mut starts = 0;
    for (name, copies, faults, cards) in cases {
        agree(name, *copies, *faults, cards)?;
        starts += cards.len();
    }
    eprintln!("{} cases, {starts} starts of U-Boot", cases.len());
    Ok(())
}

/// Where the boot state's few dozen bytes are torn: nothing written, inside the checksum, behind it,
/// inside each variable, all written.
const CUTS: [usize; 8] = [0, 2, 4, 9, 16, 25, 40, SECTOR];

#[test]
fn a_write_that_is_cut_anywhere_starts_what_the_model_says() -> Result<()> {
    use Slot::{A, B};
    // Old copies, the copy that is written, its new content: first the agent's writes.
    let agent: [(&str, BootStateCopies, usize, [u8; SECTOR]); 3] = [
        ("arming", [committed(1, A), ZERO], 1, on_trial(2, A, B, 1)),
        ("committing", [on_trial(3, A, B, 0), on_trial(2, A, B, 1)], 1, committed(4, B)),
        ("rolling back", [on_trial(2, B, A, 1), on_trial(3, B, A, 0)], 0, committed(4, B)),
    ];
    let mut writes: Vec<_> = agent.map(|(n, c, i, new)| (n, c, WHOLE, i, new)).to_vec();
    // Then the script's own: counting a try, and giving up a trial that does not load.
    let counting = [committed(4, A), on_trial(5, A, B, 2)];
    for (name, faults) in [("counting", WHOLE), ("giving up", [Fault::None, Fault::NoKernel])] {
        let run = script::run(
            &counting,
            |slot| faults[usize::from(slot == B)] == Fault::None,
            WriteBehavior::Good,
        );
        let (index, new) = *run.writes.last().context("the script writes")?;
        let mut before = counting;
        if let [(first, counted), _] = run.writes.as_slice() {
            before[*first] = *counted;
        }
        writes.push((name, before, faults, index, new));
    }
    let mut points = 0;
    for (name, copies, faults, index, new) in &writes {
        for cut in CUTS {
            let mut copies = *copies;
            copies[*index] = torn(&copies[*index], new, cut);
            agree(&format!("{name}, cut after {cut}"), copies, *faults, &[WriteBehavior::Good])?;
            points += 1;
        }
    }
    eprintln!("{points} cut points");
    assert!(points >= 30, "only {points} cut points");
    Ok(())
}
