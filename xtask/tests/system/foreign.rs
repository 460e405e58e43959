//! Foreign tools read the real images and bundles, for every kind of partition table; and `verify`
//! notices a single flipped byte.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use xtask::disk::{Filesystem, PlacedPartition, bmap};

use crate::support::{Built, Folder, Xtask, built, built_for_the_firmware, root, same, say, tool};

const PIECE: usize = 4 << 20;

/// A partition's bytes as a file of their own; zeros become holes.
pub fn extract(image: &Utf8Path, placed: &PlacedPartition, out: &Utf8Path) -> Result<()> {
    let (from, to) = (File::open(image)?, File::create(out)?);
    to.set_len(placed.size)?;
    let mut buffer = vec![0; PIECE];
    let mut done = 0;
    while done < placed.size {
        let n = PIECE.min((placed.size - done) as usize);
        let piece = buffer.get_mut(..n).context("a piece")?;
        from.read_exact_at(piece, placed.offset + done)
            .with_context(|| format!("reading {} of {image}", placed.name))?;
        if piece.iter().any(|byte| *byte != 0) {
            to.write_all_at(piece, done)?;
        }
        done += n as u64;
    }
    Ok(())
}

fn tables(built: &Built) -> Result<()> {
    let image = built.image.as_str();
    tool("sfdisk").args(["--verify", image]).run()?;
    if built.plan.disk.table.has_gpt() {
        let printed = tool("sgdisk").args(["-v", image]).read()?;
        ensure!(printed.contains("No problems found"), "sgdisk: {printed}");
    }
    let listed = tool("sfdisk").args(["--json", image]).read()?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let found = listed["partitiontable"]["partitions"].as_array().context("no partitions")?;
    // What it lists besides: the extended partition around the logical ones.
    let found: Vec<_> = found.iter().filter(|partition| partition["type"] != "f").collect();
    ensure!(found.len() == built.plan.disk.partitions.len(), "sfdisk lists {}", found.len());
    for (placed, found) in built.plan.disk.partitions.iter().zip(found) {
        let (start, size) = (found["start"].as_u64(), found["size"].as_u64());
        let expected = (Some(placed.first_sector), Some(placed.sectors));
        ensure!((start, size) == expected, "{}: {start:?}, {size:?}", placed.name);
    }
    Ok(())
}

fn filesystems(built: &Built, folder: &Folder) -> Result<()> {
    let out = folder.at("partition");
    for placed in &built.plan.disk.partitions {
        let name = &placed.name;
        extract(&built.image, placed, &out)?;
        match placed.filesystem {
            Filesystem::Vfat => {
                let printed = tool("fsck.fat").args(["-nv", out.as_str()]).read();
                printed.with_context(|| format!("fsck.fat of {name}"))?;
                // In place as well, at its offset, as a person would look.
                let at = format!("{}@@{}", built.image, placed.offset);
                let printed = tool("mdir").args(["-b", "-i", &at, "::"]).read()?;
                for file in built.plan.boot_files.iter().filter(|f| f.partition == *name) {
                    let there = file.path == "." || printed.contains(&format!("::/{}", file.path));
                    ensure!(there, "{name} has no {}: {printed}", file.path);
                }
            }
            Filesystem::Ext4 => {
                let done = tool("e2fsck").args(["-fn", out.as_str()]).run();
                done.with_context(|| format!("e2fsck of {name}"))?;
            }
            Filesystem::Raw => {}
        }
        if name.starts_with("root-") {
            let look = |what: &str| tool("debugfs").args(["-R", what, out.as_str()]).read();
            let printed = look("stat /usr/lib/slipway/device.toml")?;
            ensure!(
                printed.contains("Type: regular") && printed.contains("Mode:  0644"),
                "{printed}"
            );
            let printed = look("cat /usr/lib/slipway/device.toml")?;
            let board = format!("board = \"{}\"", built.plan.board.name);
            ensure!(printed.contains(&board), "{name} is not for this board: {printed}");
        }
    }
    let slot = |name: &str| built.plan.disk.partition(name).context("a slot");
    let other = folder.at("other");
    extract(&built.image, slot("root-a")?, &out)?;
    extract(&built.image, slot("root-b")?, &other)?;
    same(&out, &other).context("the slots differ")
}

/// Writes the image to a file that is full of something else; what is mapped must be there then.
fn block_map(built: &Built, folder: &Folder) -> Result<()> {
    let map = bmap::BlockMap::read(&bmap::path_for(&built.image))?;
    let card = folder.at("card");
    let noise = vec![0xa5; PIECE];
    let file = File::create(&card)?;
    file.set_len(map.image_size)?;
    // The noise is where it matters most: at the ends of the disk and of each partition.
    let partitions = built.plan.disk.partitions.iter();
    let starts = partitions.flat_map(|p| [p.offset, p.end() - PIECE as u64]);
    for offset in starts.chain([0, map.image_size - PIECE as u64]) {
        file.write_all_at(&noise, offset)?;
    }
    let map_path = bmap::path_for(&built.image);
    let from = ["copy", "--bmap", map_path.as_str(), built.image.as_str(), card.as_str()];
    tool("bmaptool").args(from).run()?;
    let image = File::open(&built.image)?;
    let (mut wanted, mut copied) = (vec![0; PIECE], vec![0; PIECE]);
    for range in &map.ranges {
        let (mut at, end) = (range.first * map.block_size, (range.last + 1) * map.block_size);
        while at < end {
            let n = PIECE.min((end - at) as usize);
            image.read_exact_at(&mut wanted[..n], at)?;
            File::open(&card)?.read_exact_at(&mut copied[..n], at)?;
            ensure!(wanted[..n] == copied[..n], "the {n} bytes at {at} differ on the card");
            at += n as u64;
        }
    }
    // The card's tables are the image's, whatever was there before.
    tool("sfdisk").args(["--verify", card.as_str()]).run()?;
    let data = built.plan.disk.partition("data").context("data")?;
    let out = folder.at("partition");
    extract(&card, data, &out)?;
    tool("e2fsck").args(["-fn", out.as_str()]).run().context("e2fsck of data on the card")?;
    fs::remove_file(&card).context("removing the card")
}

fn bundle(built: &Built, folder: &Folder) -> Result<()> {
    let dir = folder.at("bundle");
    fs::create_dir_all(&dir)?;
    let bundle = built.bundle.as_str();
    // What the firmware reads comes first, where slots have such a partition of their own.
    let roles = [("boot", "boot-a"), ("root", "root-a")];
    let roles: Vec<_> = roles
        .into_iter()
        .filter_map(|(role, slot)| Some((role, built.plan.disk.partition(slot)?)))
        .collect();
    let list = tool("tar").args(["-tf", bundle]).read()?;
    let members: Vec<&str> = list.lines().collect();
    let mut expected = vec!["manifest.json".to_owned(), "manifest.json.minisig".to_owned()];
    for (role, _) in &roles {
        expected.extend([format!("system/{role}.index"), format!("system/{role}.zst")]);
    }
    ensure!(members == expected, "the bundle has {members:?}, expected {expected:?}");
    tool("tar").args(["-xf", bundle, "-C", dir.as_str()]).run()?;

    let keys = Xtask::new(&root()).run(&["keys", "list", "--format", "json"])?.good()?;
    let keys: serde_json::Value = serde_json::from_str(&keys)?;
    let public =
        keys["keys"][0]["public-file"].as_str().context("the key list names no public key")?;
    let manifest = dir.join("manifest.json");
    tool("minisign").args(["-V", "-m", manifest.as_str(), "-p", public]).run()?;

    let (slot, payload) = (folder.at("partition"), folder.at("payload"));
    for (role, placed) in roles {
        let frames = dir.join(format!("system/{role}.zst"));
        tool("zstd").args(["-q", "-t", frames.as_str()]).run()?;
        extract(&built.image, placed, &slot)?;
        let unpack = ["-q", "-f", "-d", "--sparse", frames.as_str(), "-o", payload.as_str()];
        tool("zstd").args(unpack).run()?;
        same(&payload, &slot)
            .with_context(|| format!("{role} is not what {} holds", placed.name))?;
    }
    Ok(())
}

/// `verify` takes both, and refuses each with one byte flipped.
fn verify(built: &Built, folder: &Folder) -> Result<()> {
    let verify = |path: &Utf8Path| Xtask::new(&root()).run(&["verify", path.as_str()]);
    verify(&built.image)?.good()?;
    verify(&built.bundle)?.good()?;
    let copy = folder.at("flipped.img");
    let sparse = |from: &Utf8Path, to: &Utf8Path| {
        tool("cp").args(["--sparse=always", from.as_str(), to.as_str()]).run()
    };
    sparse(&built.image, &copy)?;
    fs::copy(bmap::path_for(&built.image), bmap::path_for(&copy))?;
    let slot = built.plan.disk.partition("root-b").context("root-b")?;
    // The second byte of the superblock's magic number, and a byte of the partition table.
    for offset in [slot.offset + 1081, 446 + 8] {
        let restore = flip(&copy, offset)?;
        verify(&copy)?.refused().with_context(|| format!("the byte {offset} of the image"))?;
        restore()?;
    }
    verify(&copy)?.good()?;
    let copy = folder.at("flipped.bundle");
    fs::copy(&built.bundle, &copy)?;
    let size = fs::metadata(&copy)?.len();
    // In the manifest, in the frames, in the zeros at the end.
    for offset in [600, size / 2, size - 1] {
        let restore = flip(&copy, offset)?;
        verify(&copy)?.refused().with_context(|| format!("the byte {offset} of the bundle"))?;
        restore()?;
    }
    verify(&copy)?.good()?;
    Ok(())
}

fn flip(path: &Utf8Path, offset: u64) -> Result<impl FnOnce() -> Result<()>> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 1], offset)?;
    Ok(move || Ok(file.write_all_at(&byte, offset)?))
}

fn accepted(built: &Built) -> Result<()> {
    let folder = Folder::new()?;
    let board = &built.plan.board.name;
    say(format!("{board}: tables of {}", built.plan.disk.table.name()));
    tables(built)?;
    say("filesystems");
    filesystems(built, &folder)?;
    say("block map");
    block_map(built, &folder)?;
    say("bundle");
    bundle(built, &folder)
}

#[test]
fn foreign_tools_accept_gpt() -> Result<()> {
    accepted(built("qemu-arm64")?)?;
    let built = built("qemu-arm64")?;
    verify(built, &Folder::new()?)?;
    inspected(built)
}

#[test]
fn foreign_tools_accept_mbr() -> Result<()> {
    accepted(built("pi3")?)
}

#[test]
fn foreign_tools_accept_logical_partitions() -> Result<()> {
    accepted(built_for_the_firmware()?)
}

/// `inspect` of each kind of file: readable text, and JSON for programs.
fn inspected(built: &Built) -> Result<()> {
    let folder = Folder::new()?;
    let slot = folder.at("slot.ext4");
    extract(&built.image, built.plan.disk.partition("root-a").context("root-a")?, &slot)?;
    let look = |path: &Utf8Path| -> Result<serde_json::Value> {
        let tool = Xtask::new(&root());
        let text = tool.run(&["inspect", path.as_str()])?.good()?;
        ensure!(text.lines().count() > 3, "{text}");
        let json = tool.run(&["inspect", path.as_str(), "--format", "json"])?.good()?;
        serde_json::from_str(&json).context("reading the output of inspect")
    };
    let image = look(&built.image)?;
    let count = |value: &serde_json::Value| value.as_array().map(Vec::len);
    let partitions = &image["tables"]["partitions"];
    ensure!(count(partitions) == Some(built.plan.disk.partitions.len()), "{partitions}");
    ensure!(count(&image["slots"]) == Some(2), "{}", image["slots"]);
    ensure!(count(&image["boot-states"]) == Some(built.plan.disk.states.len()), "boot states");
    let bundle = look(&built.bundle)?;
    ensure!(bundle["manifest"]["product"] == built.plan.product.name.as_str(), "{bundle}");
    ensure!(count(&bundle["signed-by"]) == Some(1), "{}", bundle["signed-by"]);
    let slot = look(&slot)?;
    ensure!(slot["packages"]["systemd"].is_string(), "no systemd in {}", slot["packages"]);
    ensure!(slot["files"]["/usr/lib/slipway/device.toml"].is_object(), "no device.toml");
    Ok(())
}
