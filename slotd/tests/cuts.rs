//! Power cuts at every write, hostile bundles and failing cards, on a card that records every write.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::Cursor;

use bundle::bootstate::{BootState, Slot, find_newest};
use bundle::{SeekableInput, StreamInput};
use common::bundles::{TestKey, mixed, noise, parts};
use common::card::{Card, Content, ERASE, Moment, Op, Part, Place, Sectors, after_cut, starts};
use common::{Plan, Robot, SECTORS, bundle_of, new_system, old_system, system};
use slotd::Refusal;
use slotd::boot::{BootControl, BootStatus, Uboot};
use slotd::device::{RobotDevice, other_slot};
use slotd::events::EventLog;
use slotd::install::{InstallOptions, InstalledSystem};
use slotd::machine::RobotContext;
use slotd::update::install;

const SIZE: u64 = 2 << 20;
/// Partitions of slots with separate boot files and root.
const BOOT: &str = "boot-a = { number = 4, start-sector = 200000, sectors = 512 }\n\
                    boot-b = { number = 5, start-sector = 300000, sectors = 512 }\n";

/// A robot whose slots and boot state are on a card in memory, and whose `data` is a directory.
struct Bench {
    robot: Robot,
    card: Card,
    running: Slot,
}

impl Bench {
    fn new(content: Content, running: Slot) -> Self {
        // Its own slots are not used.
        let partitions = if content[Place::BootA as usize].is_empty() { "" } else { BOOT };
        let plan = Plan { size: 8192, running, in_memory: true, partitions, ..Plan::default() };
        let robot = plan.make();
        let card = Card::new(content, Some(robot.path("data/slotd/journal.json")));
        Self { robot, card, running }
    }

    fn install(&self, bundle: &[u8], options: &InstallOptions) -> Result<InstalledSystem, Refusal> {
        let flow = Uboot::new(self.card.part(Place::Gap), SECTORS, self.running);
        self.install_with(&flow, bundle, options)
    }

    fn install_with(
        &self,
        flow: &dyn BootControl,
        bundle: &[u8],
        options: &InstallOptions,
    ) -> Result<InstalledSystem, Refusal> {
        let root = self.robot.root();
        let device = RobotDevice::read(&root).unwrap();
        let events = EventLog::new(&root);
        let machine = RobotContext {
            root: &root,
            about: &device.about,
            running: self.running,
            flow,
            slots: &self.card,
            files: &slotd::files::DirectFileChanges,
            events: &events,
        };
        let installed = install(&machine, SeekableInput(Cursor::new(bundle)), options, &|_| {})?;
        Ok(installed.system().expect("it is a system"))
    }
}

fn gap(state: BootState) -> Vec<u8> {
    let mut gap = vec![0; 16384];
    gap[SECTORS[0] as usize * 512..][..512].copy_from_slice(&state.encode());
    gap
}

fn fresh() -> Content {
    let slots = [Slot::A, Slot::B].map(|slot| old_system(slot, SIZE));
    let [a, b] = slots;
    [gap(BootState::first()), a, b, Vec::new(), Vec::new()]
}

fn place(slot: Slot) -> usize {
    if slot == Slot::A { Place::A as usize } else { Place::B as usize }
}

fn boot_state(content: &Content) -> BootState {
    let copies = SECTORS.map(|sector| &content[0][sector as usize * 512..][..512]);
    find_newest(copies).expect("one copy of the boot state is always whole").1
}

/// The sector with a file system's magic number: ext4's third, if the first is empty; else FAT's first.
/// Without it nothing mistakes the slot for a system.
fn head(image: &[u8]) -> std::ops::Range<usize> {
    if image[..512].iter().all(|byte| *byte == 0) { 1024..1536 } else { 0..512 }
}

/// What must hold whenever the power fails while `old` runs and `new` is being installed.
fn check(content: &Content, before: &Content, running: Slot, new: &[u8], what: &str) {
    let idle = other_slot(running);
    assert!(content[place(running)] == before[place(running)], "{what}: the running slot changed");
    let state = boot_state(content);
    assert_eq!(state.active, running, "{what}");
    if state.trial.is_some() && state.tries > 0 {
        assert_eq!(state.trial, Some(idle), "{what}");
        let slot = &content[place(idle)];
        assert!(slot[..new.len()] == *new, "{what}: on trial, but not complete");
    }
}

/// The boot script starts the other slot when the committed one does not load: that must be a complete system
/// or none. A card that destroys data around a torn write may leave anything there: then the robot is protected
/// only because the running slot stays committed and intact.
fn looks_whole(content: &Content, before: &Content, idle: Slot, new: &[u8], what: &str) {
    let slot = &content[place(idle)];
    let old = &before[place(idle)];
    if slot[head(new)] == new[head(new)] {
        assert!(slot[..new.len()] == *new, "{what}: it looks new and is not whole");
    } else if slot[head(old)] == old[head(old)] {
        assert!(slot == old, "{what}: it looks old and is not whole");
    }
}

/// Variants of what a cut leaves: everything, no unflushed write, the last write torn at its middle from either
/// side, only the last, all but the last, and random selections.
const VARIANTS: u64 = 16;

/// This many more, in which torn writes to a slot destroy data around them.
const DESTROYING: u64 = 4;

fn luck(variant: u64, cut: usize) -> impl FnMut(Moment) -> Sectors {
    let mut random = noise(1 << 12, variant << 32 | cut as u64).into_iter();
    move |moment: Moment| match (variant, moment.last) {
        (0, _) | (2 | 3, false) | (5, false) => Sectors::All,
        (1, _) | (4, false) | (5, true) => Sectors::None,
        (4, true) => Sectors::All,
        // Not the boot state: its two copies are in one erase block, and no order of writes can help.
        (VARIANTS.., _) if moment.place != Place::Gap => {
            let byte = usize::from(random.next().unwrap_or(0));
            if !moment.last && byte % 4 != 0 {
                return Sectors::All;
            }
            Sectors::Around(byte * moment.sectors / 255, variant << 32 | cut as u64)
        }
        (2, true) => Sectors::First(moment.sectors / 2),
        (3, true) => Sectors::From(moment.sectors / 2),
        _ => {
            let byte = usize::from(random.next().unwrap_or(0));
            match byte % 4 {
                0 => Sectors::All,
                1 => Sectors::None,
                2 => Sectors::First(byte * moment.sectors / 256),
                _ => Sectors::From(byte * moment.sectors / 256),
            }
        }
    }
}

/// A new system that shares most blocks with the idle slot, so that there are many writes.
fn scattered(old: &[u8]) -> Vec<u8> {
    let mut new = old.to_vec();
    for block in (0..new.len() / 4096).step_by(2) {
        new[block * 4096..][..4096].copy_from_slice(&noise(4096, 500 + block as u64));
    }
    new
}

#[test]
fn at_every_cut_a_complete_system_is_chosen() {
    let (mut cuts, mut resumed, mut repaired) = (0, 0, 0);
    let (full, fat) = (new_system(SIZE, 21), new_system(SIZE, 20));
    let few = scattered(&old_system(Slot::B, SIZE));
    for (running, new) in [(Slot::A, &full), (Slot::A, &few), (Slot::B, &fat)] {
        let mut before = fresh();
        before[0] = gap(BootState { active: running, ..BootState::first() });
        let bundle = bundle_of(new);
        let bench = Bench::new(before.clone(), running);
        bench.install(&bundle, &InstallOptions::default()).unwrap();
        let ops = bench.card.ops();
        assert_eq!(bench.card.written()[place(running)], 0);
        assert!(ops.len() > 10, "{} operations", ops.len());
        done_is_durable(&bench, new);
        for cut in 0..=ops.len() {
            for variant in 0..VARIANTS + DESTROYING {
                let starts = starts(&before, ERASE);
                let content = after_cut(&before, &ops, cut, starts, luck(variant, cut));
                let what = format!("cut {cut} of {}, variant {variant}", ops.len());
                check(&content, &before, running, new, &what);
                if variant < VARIANTS {
                    looks_whole(&content, &before, other_slot(running), new, &what);
                }
                cuts += 1;
                // Some of them resume, with the journal of that moment.
                let armed = boot_state(&content).trial.is_some();
                if armed || !(cut * 7 + variant as usize).is_multiple_of(61) {
                    continue;
                }
                let again = Bench::new(content, running);
                let last = cut.checked_sub(1).and_then(|at| ops[at].1.as_ref());
                if let Some(journal) = last {
                    again.robot.file("data/slotd/journal.json", journal);
                }
                let outcome = again.install(&bundle, &InstallOptions::default());
                let destroyed = variant >= VARIANTS;
                let outcome = match outcome {
                    // Durable data that was destroyed is found at the end, and then repaired.
                    Err(refusal) if destroyed && refusal.code == "read-back" => {
                        repaired += 1;
                        again.install(&bundle, &InstallOptions::default()).unwrap()
                    }
                    outcome => outcome.unwrap(),
                };
                assert!(destroyed || outcome.resumed == last.is_some());
                let ended = again.card.content();
                assert!(
                    ended[place(other_slot(running))] == *new,
                    "{what}: resumed to another slot"
                );
                assert_eq!(boot_state(&ended).trial, Some(other_slot(running)), "{what}");
                resumed += 1;
            }
        }
    }
    println!("{cuts} cut points, {resumed} of them resumed, {repaired} of these in two goes");
    assert!(cuts > 5000 && resumed > 50, "{cuts} cut points, {resumed} resumed");
}

/// Everything that `install` reports as done survives a power cut at that moment.
fn done_is_durable(bench: &Bench, new: &[u8]) {
    let (content, idle) = (bench.card.content(), other_slot(bench.running));
    assert_eq!(boot_state(&content).trial, Some(idle), "the trial is not durable");
    assert!(content[place(idle)][..new.len()] == *new, "the slot is not durable");
}

/// A slot that begins in the last erase block of the other one would destroy the running slot: the model detects
/// this, so that the test above is meaningful.
#[test]
fn slots_that_share_an_erase_block_are_lost_together() {
    let before = fresh();
    let bench = Bench::new(before.clone(), Slot::A);
    bench.install(&bundle_of(&new_system(SIZE, 21)), &InstallOptions::default()).unwrap();
    let (ops, running) = (bench.card.ops(), Place::A as usize);
    let lost = |alignment| {
        let starts = starts(&before, alignment);
        (0..=ops.len()).any(|cut| {
            let content = after_cut(&before, &ops, cut, starts, luck(VARIANTS, cut));
            content[running] != before[running]
        })
    };
    assert!(lost(1 << 20) && !lost(ERASE));
}

/// Slots of two partitions: the boot files are written first and are not a system without their root.
#[test]
fn at_every_cut_boot_files_and_root_belong_together() {
    const BOOT_SIZE: u64 = 256 << 10;
    let old_boot = |seed| {
        let mut boot = new_system(BOOT_SIZE, seed);
        // A FAT may fill its volume to the end.
        boot[BOOT_SIZE as usize - 512..].fill(seed as u8);
        boot
    };
    let mut cuts = 0;
    let (boot, root) = (old_boot(30), new_system(SIZE, 31));
    let few = scattered(&old_system(Slot::B, SIZE));
    let same_boot = old_boot(50);
    for (boot, root) in [(&boot, &root), (&boot, &few), (&same_boot, &root)] {
        let mut before = fresh();
        before[Place::BootA as usize] = old_boot(45);
        before[Place::BootB as usize] = old_boot(50);
        let mut parts = parts(&[boot, root], 2);
        for (payload, role) in
            parts.manifest.components[0].payloads.iter_mut().zip(["boot", "root"])
        {
            payload.role = role.to_owned();
        }
        let bundle = parts.write(&[TestKey::new(1)]);
        let bench = Bench::new(before.clone(), Slot::A);
        bench.install(&bundle, &InstallOptions::default()).unwrap();
        let ops = bench.card.ops();
        assert!(ops.len() > 15, "{} operations", ops.len());
        done_is_durable(&bench, root);
        for cut in 0..=ops.len() {
            for variant in 0..VARIANTS + DESTROYING {
                let starts = starts(&before, ERASE);
                let content = after_cut(&before, &ops, cut, starts, luck(variant, cut));
                let what = format!("cut {cut} of {}, variant {variant}", ops.len());
                check(&content, &before, Slot::A, root, &what);
                cuts += 1;
                assert!(content[Place::BootA as usize] == before[Place::BootA as usize], "{what}");
                let [held_root, held_boot] = [Place::B, Place::BootB].map(|p| &content[p as usize]);
                let [old_root, old_boot] = [Place::B, Place::BootB].map(|p| &before[p as usize]);
                let looks = |held: &[u8], like: &[u8]| held[head(like)] == like[head(like)];
                if boot_state(&content).trial.is_some() {
                    assert!(held_boot == boot && held_root == root, "{what}: half on trial");
                }
                if variant >= VARIANTS {
                    continue;
                }
                looks_whole(&content, &before, Slot::B, root, &what);
                if looks(held_root, root) {
                    assert!(held_boot == boot, "{what}: a new root beside other boot files");
                }
                if looks(held_root, old_root) && looks(held_boot, old_boot) {
                    assert!(held_boot == old_boot, "{what}: the old boot files are not whole");
                }
                if (cut * 7 + variant as usize).is_multiple_of(97)
                    && boot_state(&content).trial.is_none()
                {
                    let again = Bench::new(content, Slot::A);
                    if let Some(journal) = cut.checked_sub(1).and_then(|at| ops[at].1.as_ref()) {
                        again.robot.file("data/slotd/journal.json", journal);
                    }
                    again.install(&bundle, &InstallOptions::default()).unwrap();
                    let ended = again.card.content();
                    assert!(ended[Place::B as usize] == *root, "{what}: resumed");
                    assert!(ended[Place::BootB as usize] == *boot, "{what}: resumed");
                }
            }
        }
    }
    println!("{cuts} cut points");
    assert!(cuts > 5000, "{cuts} cut points");
}

#[test]
fn a_journal_never_says_more_than_the_card_holds() {
    let size = 40 << 20;
    let new = new_system(size, 28);
    let before: Content = [
        gap(BootState::first()),
        old_system(Slot::A, 8192),
        noise(size as usize, 29),
        Vec::new(),
        Vec::new(),
    ];
    let bundle = bundle_of(&new);
    let bench = Bench::new(before.clone(), Slot::A);
    bench.install(&bundle, &InstallOptions::default()).unwrap();
    let ops = bench.card.ops();
    let journal = |at: usize| String::from_utf8(ops[at].1.clone().unwrap_or_default()).unwrap();
    let noted = (0..ops.len()).find(|at| journal(*at).contains("\"frames\": 2"));
    let noted = noted.expect("a checkpoint after 32 MiB");
    for cut in [noted, noted + 1, noted + 4, noted - 1, noted - 5] {
        for variant in [0, 1, 7] {
            let starts = starts(&before, ERASE);
            let content = after_cut(&before, &ops, cut, starts, luck(variant, cut));
            looks_whole(&content, &before, Slot::B, &new, &format!("cut {cut}, variant {variant}"));
            check(&content, &before, Slot::A, &new, &format!("cut {cut}, variant {variant}"));
            let again = Bench::new(content, Slot::A);
            // The journal on the disk may be that of the last operation, or of the one before.
            again.robot.file("data/slotd/journal.json", journal(cut));
            let outcome = again.install(&bundle, &InstallOptions::default()).unwrap();
            assert!(outcome.resumed && again.card.content()[2] == new);
            if journal(cut).contains("\"frames\": 2") {
                assert!(outcome.written < 20 << 20, "{}", outcome.written);
            }
        }
    }
}

#[test]
fn the_first_block_goes_first_and_comes_last() {
    let before = fresh();
    let new = new_system(SIZE, 22);
    let bench = Bench::new(before, Slot::A);
    bench.install(&bundle_of(&new), &InstallOptions::default()).unwrap();
    let ops: Vec<Op> = bench.card.ops().into_iter().map(|(op, _)| op).collect();
    // Without the superblock, then without anything.
    let [
        Op::Write(Place::B, 0, first),
        Op::Flush(Place::B),
        Op::Write(Place::B, 0, second),
        Op::Flush(Place::B),
        ..,
    ] = &ops[..]
    else {
        panic!("{:?}", ops[0])
    };
    assert_eq!(first[1024..1536], [0; 512]);
    assert_eq!(first[1536..], old_system(Slot::B, SIZE)[1536..4096]);
    assert!(second.iter().all(|byte| *byte == 0) && second.len() == 4096);
    let writes: Vec<&Op> = ops.iter().filter(|op| matches!(op, Op::Write(..))).collect();
    let [
        ..,
        Op::Write(Place::B, 0, most),
        Op::Write(Place::B, 0, last),
        Op::Write(Place::Gap, _, state),
    ] = &writes[..]
    else {
        panic!("the first block and the boot state are not the last writes")
    };
    assert_eq!((&last[..], state.len()), (&new[..4096], 512));
    assert_eq!((&most[1024..1536], &most[1536..]), (&[0; 512][..], &new[1536..4096]));
    // In order, large and aligned: no write crosses a multiple of 1 MiB.
    let mut end = 0;
    for op in &writes[2..writes.len() - 3] {
        let Op::Write(_, offset, bytes) = op else { continue };
        assert_eq!(offset >> 20, (offset + bytes.len() as u64 - 1) >> 20);
        // Free space is zeroed after it has been read.
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        assert!(*offset >= end && offset % 4096 == 0);
        end = offset + bytes.len() as u64;
    }
}

#[test]
fn a_card_that_does_not_keep_what_is_written_is_noticed() {
    let new = new_system(SIZE, 23);
    for at in [4096, 100_000, SIZE / 2 + 7, 1030, 4095] {
        let bench = Bench::new(fresh(), Slot::A);
        bench.card.break_byte(at);
        let refusal = bench.install(&bundle_of(&new), &InstallOptions::default()).unwrap_err();
        assert_eq!(refusal.code, "read-back", "{at}: {refusal}");
        let content = bench.card.content();
        assert_eq!(boot_state(&content).trial, None);
        if at >= 4096 {
            assert!(content[2][..4096].iter().all(|byte| *byte == 0), "it looks like a system");
        }
        // The next install writes only the wrong blocks.
        bench.card.repair();
        let outcome = bench.install(&bundle_of(&new), &InstallOptions::default()).unwrap();
        assert!(outcome.written <= 5 * 4096, "{at}: {}", outcome.written);
        assert!(bench.card.content()[2] == new);
    }
}

#[test]
fn a_boot_state_that_does_not_take_is_refused() {
    use slotd::boot::BootControl;
    let card = Card::new(fresh(), None);
    card.lose(Place::Gap);
    let flow = Uboot::new(card.part(Place::Gap), SECTORS, Slot::A);
    assert_eq!(flow.arm_trial(Slot::B).unwrap_err().code, "boot-state");
}

/// Every damaged or forged bundle is refused: no panic, nothing armed, and no byte written outside of the
/// idle slot. Returns the number of bytes that were written to the slot before.
fn harmless(bundle: &[u8], what: &str) -> u64 {
    let bench = Bench::new(fresh(), Slot::A);
    let options = InstallOptions { use_running_slot: true, ..InstallOptions::default() };
    let refusal = bench.install(bundle, &options).expect_err(what);
    let known = slotd::refusal::CODES.iter().any(|(code, _, _)| *code == refusal.code);
    assert!(known, "{what}: {refusal:?}");
    let [gap, a, b, boot_a, boot_b] = bench.card.written();
    assert_eq!([gap, a, boot_a, boot_b], [0; 4], "{what}: written outside of the idle slot");
    let content = bench.card.content();
    let untouched = content[2] == old_system(Slot::B, SIZE);
    assert!(untouched || content[2][..4096].iter().all(|b| *b == 0), "{what}: half a system");
    b
}

/// Signs an index that was changed after it was built.
fn with_index(content: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut parts = system(content);
    change(&mut parts.payloads[0].0);
    let hash = bundle::index::sha256(&parts.payloads[0].0);
    let record = &mut parts.manifest.components[0].payloads[0].index;
    record.size = parts.payloads[0].0.len() as u64;
    record.sha256 = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.write(&[TestKey::new(1)])
}

#[test]
fn signed_absurdities_do_no_harm() {
    let content = new_system(SIZE, 24);
    // A size beyond the partition: by a little, by 64 GiB; the index agrees.
    for size in [SIZE + 1, 64 << 30] {
        let mut parts = system(&content);
        parts.manifest.components[0].payloads[0].size = size;
        assert_eq!(harmless(&parts.write(&[TestKey::new(1)]), "a large size"), 0);
    }
    let put = |at: usize, value: &'static [u8]| {
        with_index(&content, move |index| index[at..at + value.len()].copy_from_slice(value))
    };
    // Of the index: payload's size, number of frames, of pieces, of hashes; of the first frame: number
    // of blocks, stored length.
    for (at, what) in [
        (8, "size"),
        (24, "frames"),
        (28, "pieces"),
        (32, "hashes"),
        (36, "blocks"),
        (40, "stored"),
    ] {
        for value in [&[0xff, 0xff, 0xff, 0xff][..], &[0, 0, 0, 0], &[1, 0, 0, 0], &[0, 0, 0, 0x80]]
        {
            let mut same = false;
            let bundle = with_index(&content, |index| {
                same = index[at..at + 4] == *value;
                index[at..at + 4].copy_from_slice(value);
            });
            if same {
                continue;
            }
            assert_eq!(harmless(&bundle, what), 0, "{what} {value:?}");
        }
    }
    // A frame that claims fewer blocks than it decompresses to, with correct sums: it would write too far.
    let short = with_index(&content[..8192 + 4096 * 30], |_| {});
    assert!(short.len() > 4096);
    let mut swapped = system(&content);
    let other = system(&new_system(SIZE, 25));
    swapped.payloads[0].1 = other.payloads[0].1.clone();
    swapped.manifest.components[0].payloads[0].data.size = swapped.payloads[0].1.len() as u64;
    harmless(&swapped.write(&[TestKey::new(1)]), "another payload's frames");
    // A content hash that no blocks have: no assembled or read frame can pass.
    let at = 36 + 8;
    assert!(harmless(&put(at, &[0; 32]), "a content hash") > 0);
    // A block hash that no block has.
    let last = with_index(&content, |index| *index.last_mut().unwrap() ^= 1);
    harmless(&last, "a block hash");
}

#[test]
fn content_from_the_running_slot_is_proven_by_full_hashes() {
    // The index names, by 96 bits each, blocks that the running slot has, in an order with a different
    // content hash: by the short hashes alone it would be accepted.
    let running = new_system(SIZE, 26);
    let mut bundle = system(&running);
    bundle.payloads[0].0[36 + 8] ^= 1;
    let hash = bundle::index::sha256(&bundle.payloads[0].0);
    bundle.manifest.components[0].payloads[0].index.sha256 =
        hash.iter().map(|byte| format!("{byte:02x}")).collect();
    let bytes = bundle.write(&[TestKey::new(1)]);
    let mut content = fresh();
    content[1] = running;
    let bench = Bench::new(content, Slot::A);
    let options = InstallOptions { use_running_slot: true, ..InstallOptions::default() };
    let refusal = bench.install(&bytes, &options).unwrap_err();
    assert_eq!(refusal.code, "wrong-hash", "{refusal}");
    assert_eq!(boot_state(&bench.card.content()).trial, None);
}

#[test]
fn truncated_and_flipped_bundles_do_no_harm() {
    let bundle = bundle_of(&mixed(300_000));
    for cut in (0..bundle.len()).step_by(997) {
        harmless(&bundle[..cut], &format!("cut at {cut}"));
    }
    for round in 0..400_u64 {
        let luck = u64::from_le_bytes(noise(8, 7000 + round)[..8].try_into().unwrap());
        let mut flipped = bundle.clone();
        let bit = (luck % (bundle.len() as u64 * 8)) as usize;
        flipped[bit / 8] ^= 1 << (bit % 8);
        harmless(&flipped, &format!("bit {bit}"));
    }
    let mut longer = bundle;
    longer.push(0);
    harmless(&longer, "a byte too many");
}

#[test]
fn a_pipe_is_read_to_its_end_even_if_nothing_is_needed_of_it() {
    let new = new_system(SIZE, 27);
    let mut content = fresh();
    content[2] = new.clone();
    let bench = Bench::new(content, Slot::A);
    let bundle = bundle_of(&new);
    let root = bench.robot.root();
    let device = RobotDevice::read(&root).unwrap();
    let flow = Uboot::new(bench.card.part(Place::Gap), SECTORS, Slot::A);
    let events = EventLog::new(&root);
    let machine = RobotContext {
        root: &root,
        about: &device.about,
        running: Slot::A,
        flow: &flow,
        slots: &bench.card,
        files: &slotd::files::DirectFileChanges,
        events: &events,
    };
    let cut = &bundle[..bundle.len() - 600];
    let refusal =
        install(&machine, StreamInput(cut), &InstallOptions::default(), &|_| {}).unwrap_err();
    assert_eq!(refusal.code, "truncated");
    let outcome =
        install(&machine, StreamInput(&bundle[..]), &InstallOptions::default(), &|_| {}).unwrap();
    let outcome = outcome.system().unwrap();
    assert_eq!(outcome.written, 0);
}

/// A robot that could not roll back a bad update.
struct NotReady(Uboot<Part>);

impl BootControl for NotReady {
    fn ready(&self) -> Result<(), Refusal> {
        Err(Refusal::new("old-eeprom", "it could not come back", "update the EEPROM"))
    }

    fn status(&self) -> Result<BootStatus, Refusal> {
        self.0.status()
    }

    fn arm_trial(&self, slot: Slot) -> Result<(), Refusal> {
        self.0.arm_trial(slot)
    }

    fn commit(&self) -> Result<(), Refusal> {
        self.0.commit()
    }

    fn roll_back(&self) -> Result<(), Refusal> {
        self.0.roll_back()
    }
}

#[test]
fn nothing_is_written_on_a_robot_that_could_not_come_back() {
    let bench = Bench::new(fresh(), Slot::A);
    let flow = NotReady(Uboot::new(bench.card.part(Place::Gap), SECTORS, Slot::A));
    let bundle = bundle_of(&new_system(SIZE, 27));
    let refusal = bench.install_with(&flow, &bundle, &InstallOptions::default()).unwrap_err();
    assert_eq!(refusal.code, "old-eeprom");
    assert!(bench.card.ops().is_empty(), "{} writes", bench.card.ops().len());
}
