//! Growing the partition table, on a disk with a volatile cache: read back by standard tools, cut at every write
//! with unflushed writes lost or torn, on disks that drop writes, and with data around a torn write destroyed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/card.rs"]
mod card;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use card::{Card, Content, ERASE, Moment, Op, Place, Sectors, after_cut, starts};
use slotd::data::grow::grow;

const MIB: u64 = 1 << 20;

/// Start and size of the partitions before `data`, in sectors.
const BEFORE: [(u64, u64); 3] = [(2048, 2048), (4096, 2048), (6144, 2048)];

/// Start and size of `data` on the card that was flashed.
const DATA: (u64, u64) = (8192, 2048);

/// Bytes of the image, and of the card it was written to.
const IMAGE: u64 = 6 * MIB;
const CARD: u64 = 24 * MIB;

fn content(bytes: Vec<u8>) -> Content {
    [bytes, Vec::new(), Vec::new(), Vec::new(), Vec::new()]
}

fn sfdisk(image: &Path, script: &str) {
    let mut child = Command::new("sfdisk")
        .args(["-q", "--no-reread", "--no-tell-kernel"])
        .arg(image)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("this test needs sfdisk");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// A card with this kind of table, before it has grown.
fn fresh(label: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("card.img");
    File::create(&image).unwrap().set_len(IMAGE).unwrap();
    let dos = label == "dos";
    let kind = if dos { "e" } else { "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7" };
    let mut script = format!("label: {}\n", if dos { "dos" } else { "gpt" });
    for (start, size) in BEFORE.into_iter().chain([DATA]) {
        script.push_str(&format!("start={start}, size={size}, type={kind}\n"));
    }
    sfdisk(&image, &script);
    if label == "hybrid" {
        // The first partition in the MBR as well.
        let printed = Command::new("sgdisk").args(["-h", "1"]).arg(&image).output().unwrap();
        assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    }
    fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(CARD).unwrap();
    fs::read(image).unwrap()
}

/// A disk as a sparse file for standard tools.
struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new(bytes: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("card.img");
        let file = File::create(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        const ZEROS: [u8; 4096] = [0; 4096];
        for (number, block) in bytes.chunks(4096).enumerate() {
            if block != &ZEROS[..block.len()] {
                file.write_all_at(block, number as u64 * 4096).unwrap();
            }
        }
        Self { _dir: dir, path }
    }

    /// The partitions as a standard tool reads them: start and size of each.
    fn partitions(&self) -> Vec<(u64, u64)> {
        let printed = Command::new("sfdisk").arg("-J").arg(&self.path).output().unwrap();
        assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
        let printed: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
        let list = printed["partitiontable"]["partitions"].as_array().unwrap().clone();
        list.iter().map(|p| (p["start"].as_u64().unwrap(), p["size"].as_u64().unwrap())).collect()
    }

    /// Checks that standard tools report no problem.
    fn is_sound(&self, gpt: bool) {
        let verified = Command::new("sfdisk").arg("--verify").arg(&self.path).output().unwrap();
        assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
        if gpt {
            let printed = Command::new("sgdisk").arg("-v").arg(&self.path).output();
            let printed = printed.expect("this test needs sgdisk").stdout;
            let printed = String::from_utf8_lossy(&printed);
            assert!(printed.contains("No problems found"), "{printed}");
        }
    }
}

#[test]
fn what_has_grown_is_durable_and_as_foreign_tools_want_it() {
    for label in ["dos", "gpt", "hybrid"] {
        let before = fresh(label);
        let card = Card::new(content(before.clone()), None);
        let grown = grow(&card.part(Place::Gap), 4, DATA.0).unwrap();
        assert_eq!(grown.from, DATA.1);
        // The durable content, which a power cut leaves at this moment.
        let [after, ..] = card.content();
        let image = Image::new(&after);
        image.is_sound(label != "dos");
        let found = image.partitions();
        assert_eq!((&found[..3], found[3]), (&BEFORE[..], (DATA.0, grown.to)), "{label}");
        // Everything except the space for the backup table and the alignment.
        let end = (DATA.0 + grown.to) * 512;
        assert!(end <= CARD && end > CARD - 2 * MIB, "{label}: ends at {end}");
        if label == "hybrid" {
            assert_eq!(before[446..510], after[446..510], "the hybrid MBR has changed");
        }
        // Again: nothing to do, nothing written.
        let ops = card.ops().len();
        assert_eq!(grow(&card.part(Place::Gap), 4, DATA.0).unwrap().from, grown.to);
        assert_eq!(card.ops().len(), ops, "{label}");
    }
}

/// What a cut leaves of the unflushed writes, by number: each one complete or lost, and the last one torn
/// at each sector from the front and from the back. `None`: there are no more variants.
fn choice(variant: usize, ops: &[(Op, Option<Vec<u8>>)]) -> Option<Vec<Sectors>> {
    let flush = ops.iter().rposition(|(op, _)| matches!(op, Op::Flush(_)));
    let unflushed = &ops[flush.map_or(0, |at| at + 1)..];
    let Some((Op::Write(_, _, last), _)) = unflushed.last() else {
        return (variant == 0).then(Vec::new);
    };
    let subsets = 1usize << unflushed.len();
    let taken = |set: usize| {
        (0..unflushed.len())
            .map(move |n| if set >> n & 1 == 1 { Sectors::All } else { Sectors::None })
    };
    if variant < subsets {
        return Some(taken(variant).collect());
    }
    // With all of the other writes, and with none of them.
    let sectors = last.len() / 512;
    let torn = (variant - subsets) * if unflushed.len() == 1 { 2 } else { 1 };
    let how = match torn / 2 {
        n if n < sectors => Sectors::First(n),
        n if n < 2 * sectors => Sectors::From(n - sectors),
        _ => return None,
    };
    let mut choice: Vec<_> = taken(if torn.is_multiple_of(2) { subsets - 1 } else { 0 }).collect();
    *choice.last_mut()? = how;
    Some(choice)
}

#[test]
fn growth_cut_at_every_write_leaves_a_usable_table_and_goes_on() {
    let (mut points, mut looked_at) = (0, std::collections::BTreeSet::new());
    for label in ["dos", "gpt"] {
        let before = content(fresh(label));
        let card = Card::new(before.clone(), None);
        let wanted = grow(&card.part(Place::Gap), 4, DATA.0).unwrap();
        let ops = card.ops();
        for cut in 0..=ops.len() {
            for variant in 0.. {
                let Some(choice) = choice(variant, &ops[..cut]) else { break };
                points += 1;
                let mut choice = choice.into_iter();
                let luck = |_: Moment| choice.next().expect("one for each");
                let left = after_cut(&before, &ops, cut, starts(&before, ERASE), luck);
                // Most sectors of a table have no used entries: many cuts give the same result.
                let tables = [&left[0][..1 << 16], &left[0][left[0].len() - (1 << 16)..]].concat();
                if !looked_at.insert(tables) {
                    continue;
                }
                let what = format!("{label}: cut {cut} of {}, variant {variant}", ops.len());
                goes_on(left, wanted.to, label == "gpt", &what);
            }
        }
    }
    println!("{points} cut points, {} different contents", looked_at.len());
    assert!(points >= 140 && looked_at.len() >= 10, "{points} cut points, {}", looked_at.len());
}

/// There is a complete table, and growing again gives the same result as without a cut.
fn goes_on(left: Content, wanted: u64, gpt: bool, what: &str) {
    let found = Image::new(&left[0]).partitions();
    assert_eq!((&found[..3], found.len()), (&BEFORE[..], 4), "{what}");
    assert!(found[3].0 == DATA.0 && [DATA.1, wanted].contains(&found[3].1), "{what}: {found:?}");
    let card = Card::new(left, None);
    grow(&card.part(Place::Gap), 4, DATA.0).expect(what);
    let image = Image::new(&card.content()[0]);
    image.is_sound(gpt);
    assert_eq!(image.partitions()[3], (DATA.0, wanted), "{what}");
}

/// The backup at the card's end is written first, and the primary is far away from it. (The primary's erase
/// block also holds the MBR, of which there is no second copy.)
#[test]
fn a_backup_that_takes_its_surroundings_with_it_leaves_the_primary() {
    let before = content(fresh("gpt"));
    let card = Card::new(before.clone(), None);
    let wanted = grow(&card.part(Place::Gap), 4, DATA.0).unwrap();
    let ops = card.ops();
    let mut points = 0;
    for cut in 1..=ops.len() {
        let (Op::Write(_, offset, bytes), _) = &ops[cut - 1] else { continue };
        if *offset < ERASE {
            continue;
        }
        for seed in 0..8 {
            let luck = |_: Moment| Sectors::Around(bytes.len() / 512 * seed as usize / 7, seed);
            let left = after_cut(&before, &ops, cut, starts(&before, ERASE), luck);
            goes_on(left, wanted.to, true, &format!("cut {cut}, seed {seed}"));
            points += 1;
        }
    }
    assert_eq!(points, 16, "two writes of the backup");
}

#[test]
fn a_card_that_keeps_nothing_is_not_believed() {
    for label in ["dos", "gpt"] {
        let before = content(fresh(label));
        let card = Card::new(before.clone(), None);
        card.lose(Place::Gap);
        let why = grow(&card.part(Place::Gap), 4, DATA.0).unwrap_err().to_string();
        assert!(why.contains("differs from what was written"), "{label}: {why}");
    }
}

#[test]
fn a_strange_table_is_left_alone() {
    let good = fresh("gpt");
    let refused = |bytes: Vec<u8>, number, start| {
        let card = Card::new(content(bytes), None);
        let why = grow(&card.part(Place::Gap), number, start).unwrap_err().to_string();
        assert!(card.ops().is_empty(), "written: {why}");
        why
    };
    assert!(refused(good.clone(), 3, BEFORE[2].0).contains("another partition follows it"));
    assert!(refused(good.clone(), 4, DATA.0 + 8).contains("does not start where device.toml says"));
    assert!(refused(good.clone(), 0, DATA.0).contains("does not start"));
    assert!(refused(vec![0; 1 << 20], 1, 2048).contains("there is no MBR"));
    for number in [3, 4] {
        let start = if number == 3 { BEFORE[2].0 } else { DATA.0 + 8 };
        let expected = ["another partition follows it", "does not start where device.toml says"];
        let why = refused(fresh("dos"), number, start);
        assert!(why.contains(expected[number as usize - 3]), "{why}");
    }
    let mut broken = good;
    broken[512 + 20] ^= 1;
    assert!(refused(broken, 4, DATA.0).contains("damaged"));
}
