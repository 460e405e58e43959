//! Foreign tools read what the disk stage writes: tables, FAT volumes, ext4 images and block maps.
//! `SLIPWAY_BLESS=1` rewrites the golden tables.

use crate::common::{partition, root, tool};
use crate::flash_support::Folder;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use bundle::bootstate::{BootState, Slot};
use camino::{Utf8Path, Utf8PathBuf};
use uuid::Uuid;
use xtask::cache::Cache;
use xtask::disk::{
    DiskImage, DiskRequest, DiskSpec, FatFile, FileSource, Filesystem, PartitionContent,
    PartitionRequest, PartitionSpec, TableKind, assemble, assemble_checked, bmap, compress,
    lay_out_disk, read, sum_image,
};
use xtask::exec::Tool;
use xtask::ext4::{self, Ext4Request, Mke2fs};
use xtask::fetch::Downloader;
use xtask::rootfs::debian::{AptMirrors, PackagesLock, host_e2fs};

const MIB: u64 = 1 << 20;
const EPOCH: u64 = 1_700_000_000;
const TABLES: [TableKind; 3] = [TableKind::Mbr, TableKind::Gpt, TableKind::Hybrid];

/// The `mke2fs` that builds use: the machine's own when it is new enough, else the one that the
/// package lock names, fetched once into the machine's cache.
pub fn mke2fs() -> Mke2fs {
    static TOOL: OnceLock<Mke2fs> = OnceLock::new();
    let find = || -> anyhow::Result<Mke2fs> {
        let lock = PackagesLock::load(&root().join("configs/robot-dev.packages.lock"))?;
        let cache = Cache::locate()?.root;
        let downloader = Downloader::new(&cache, false)?;
        // Files in the cache need no mirror.
        let mirrors = AptMirrors::from_host().ok();
        host_e2fs(&lock, &downloader, mirrors.as_ref(), &cache)
    };
    TOOL.get_or_init(|| find().expect("an mke2fs that reads tars")).clone()
}

/// A tar with an owner, a mode, a long file, a hole and a link.
fn rootfs_tar(path: &Utf8Path) {
    let mut tar = tar::Builder::new(File::create(path).expect("creating a tar"));
    let mut add = |name: &str, kind, mode, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(7);
        header.set_mtime(EPOCH);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, content).expect("adding to the tar");
    };
    let long: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.to_le_bytes()).take(5_000_001).collect();
    add("./etc/", tar::EntryType::Directory, 0o755, b"");
    add("./etc/hostname", tar::EntryType::Regular, 0o640, b"robot\n");
    add("./long", tar::EntryType::Regular, 0o4755, &long);
    add("./zeros", tar::EntryType::Regular, 0o644, &vec![0; 300_000]);
    tar.finish().expect("finishing the tar");
}

fn request(tar: Option<&Utf8Path>, size: u64) -> Ext4Request<'_> {
    Ext4Request {
        tar,
        size,
        label: if tar.is_some() { "root" } else { "data" },
        uuid: Uuid::from_u128(0x5107),
        hash_seed: Uuid::from_u128(0x5eed),
        epoch: EPOCH,
        journal: tar.is_none(),
        grows_to: tar.is_none().then_some(1 << 40),
        size_key: "partitions.root.size in board/test/board.toml",
    }
}

/// The filesystems that the images are made of.
fn filesystems(folder: &Folder) -> (Utf8PathBuf, Utf8PathBuf) {
    let (tar, root, data) = (folder.at("root.tar"), folder.at("root.ext4"), folder.at("data.ext4"));
    rootfs_tar(&tar);
    ext4::make_image(&mke2fs(), &request(Some(&tar), 24 * MIB), &root).expect("making root");
    ext4::make_image(&mke2fs(), &request(None, 16 * MIB), &data).expect("making data");
    (root, data)
}

fn disk_request(table: TableKind) -> DiskRequest {
    DiskRequest {
        table,
        size: 128 * MIB,
        first_partition: 4 * MIB,
        alignment: MIB,
        states: vec![MIB, 2 * MIB],
        trust: vec![3 * MIB],
        partitions: vec![
            partition("boot", 16, Filesystem::Vfat),
            partition("root-a", 24, Filesystem::Ext4),
            partition("root-b", 24, Filesystem::Ext4),
            partition("data", 20, Filesystem::Ext4),
        ],
    }
}

fn boot_files() -> Vec<FatFile> {
    let file = |path: &str, bytes: Vec<u8>| FatFile {
        path: path.to_owned(),
        source: FileSource::Bytes(bytes),
    };
    let mut files = vec![
        file("config.txt", b"arm_64bit=1\n".to_vec()),
        file("bootcode.bin", vec![0xbc; 52_481]),
        file("overlays/a rather long name.dtbo", vec![7; 1025]),
        file("overlays/deep/er/x", b"x".to_vec()),
        file("empty", Vec::new()),
    ];
    // Enough for a directory of several clusters.
    files.extend((0..120).map(|n| file(&format!("overlays/overlay-{n:03}.dtbo"), vec![n; 700])));
    files
}

/// The summed image at this path; nothing at an empty one.
fn filesystem(path: &Utf8Path) -> PartitionContent {
    if path == "" {
        PartitionContent::Empty
    } else {
        PartitionContent::Image(sum_image(path).expect("summing"))
    }
}

fn spec(table: TableKind, root: &Utf8Path, data: &Utf8Path) -> DiskSpec {
    let boot = PartitionContent::Fat {
        label: "boot".to_owned(),
        volume_id: 0xdead_beef,
        placed: true,
        files: boot_files(),
    };
    let contents = [boot, filesystem(root), filesystem(root), filesystem(data)];
    let partitions = contents.into_iter().zip(1u128..).map(|(content, n)| PartitionSpec {
        guid: Uuid::from_u128(n << 64 | 0xabc),
        content,
        size_key: format!("partitions.{n}.size in board/test/board.toml"),
    });
    DiskSpec {
        layout: lay_out_disk(&disk_request(table)).expect("a good layout"),
        disk_guid: Uuid::from_u128(0xd15c),
        mbr_signature: 0x0051_0b1a,
        epoch: EPOCH,
        states: vec![b"seq=1".to_vec()],
        partitions: partitions.collect(),
    }
}

/// One partition's bytes as a file of their own.
fn extract(image: &DiskImage, spec: &DiskSpec, name: &str, out: &Utf8Path) {
    let placed = spec.layout.partition(name).expect("a partition");
    let mut bytes = vec![0; placed.size as usize];
    let file = File::open(&image.path).expect("opening the image");
    file.read_exact_at(&mut bytes, placed.offset).expect("reading the image");
    fs::write(out, bytes).expect("writing the partition");
}

fn golden(name: &str, text: &str) {
    let path = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/disk").join(name);
    if std::env::var_os("SLIPWAY_BLESS").is_some() {
        fs::create_dir_all(path.parent().expect("a directory")).expect("creating the directory");
        fs::write(&path, text).expect("writing the golden file");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{path} differs; SLIPWAY_BLESS=1 rewrites it");
}

#[test]
fn foreign_tools_accept_every_table() {
    let folder = Folder::new();
    let (root, data) = filesystems(&folder);
    for table in TABLES {
        let spec = spec(table, &root, &data);
        let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
        let path = image.path.as_str();
        tool("sfdisk").args(["--verify", path]).run().expect("sfdisk --verify");
        if table.has_gpt() {
            let printed = tool("sgdisk").args(["-v", path]).read().expect("sgdisk -v");
            assert!(printed.contains("No problems found"), "{printed}");
        }
        let json = tool("sfdisk").args(["-J", path]).read().expect("sfdisk -J");
        let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        for (placed, found) in spec
            .layout
            .partitions
            .iter()
            .zip(json["partitiontable"]["partitions"].as_array().expect("a list"))
        {
            assert_eq!(found["start"], placed.first_sector, "{}", placed.name);
            assert_eq!(found["size"], placed.sectors, "{}", placed.name);
        }
        let mut text = tool("sfdisk").args(["-d", path]).read().expect("sfdisk -d");
        if table == TableKind::Hybrid {
            text.push_str("\n# the MBR beside it\n");
            text.push_str(
                &tool("sfdisk").args(["-d", "--label-nested", "dos", path]).read().expect("nested"),
            );
        }
        golden(&format!("{}.sfdisk", table.name()), &text.replace(path, "card.img"));

        let found = read::read_tables(&image.path).expect("reading back");
        assert_eq!(found.findings, [""; 0]);
        assert_eq!(found.table, table);
        assert_eq!(read::table_differences(&found, &spec.layout), [""; 0]);
        let states =
            read::read_boot_states(&image.path, &[MIB, 2 * MIB]).expect("reading the state");
        assert!(states[0].starts_with(b"seq=1\0") && states[1] == vec![0; 512]);
    }
}

#[test]
fn foreign_tools_accept_the_filesystems() {
    let folder = Folder::new();
    let (root, data) = filesystems(&folder);
    let spec = spec(TableKind::Hybrid, &root, &data);
    let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
    check_fat(&folder, &image, &spec, "FAT16");
    for slot in ["root-a", "root-b"] {
        let out = folder.at("slot");
        extract(&image, &spec, slot, &out);
        assert_eq!(fs::read(&out).expect("slot"), fs::read(&root).expect("root"), "{slot}");
        tool("e2fsck").args(["-fn", out.as_str()]).run().expect("e2fsck");
        let printed = tool("debugfs").args(["-R", "cat /etc/hostname", out.as_str()]).read();
        assert_eq!(printed.expect("debugfs"), "robot\n");
        let printed =
            tool("debugfs").args(["-R", "stat /long", out.as_str()]).read().expect("stat");
        assert!(printed.contains("Mode:  04755") && printed.contains("Size: 5000001"), "{printed}");
        assert!(printed.contains("User:  1000   Group:     7"), "{printed}");
    }
    let features = tool("dumpe2fs").args(["-h", root.as_str()]).read().expect("dumpe2fs");
    let features =
        features.lines().find(|l| l.starts_with("Filesystem features:")).expect("a line");
    for absent in ["64bit", "orphan_file", "metadata_csum_seed", "has_journal"] {
        assert!(!features.contains(absent), "{features}");
    }
    let out = folder.at("data");
    extract(&image, &spec, "data", &out);
    tool("e2fsck").args(["-fn", out.as_str()]).run().expect("e2fsck");
}

/// `fsck.fat`, `mdir` and `mtype` read the boot partition, and so does our reader.
fn check_fat(folder: &Folder, image: &DiskImage, spec: &DiskSpec, kind: &str) {
    let out = folder.at("boot.fat");
    extract(image, spec, "boot", &out);
    let printed = tool("fsck.fat").args(["-nv", out.as_str()]).read().expect("fsck.fat");
    let placed = spec.layout.partition("boot").expect("boot");
    assert!(printed.contains(&format!("{} hidden sectors", placed.first_sector)), "{printed}");
    let boot = fs::read(&out).expect("boot");
    let at = if kind == "FAT32" { 82 } else { 54 };
    assert_eq!(&boot[at..at + 5], kind.as_bytes());
    let printed = tool("mdir").args(["-/", "-i", out.as_str(), "::"]).read().expect("mdir");
    for expected in ["is BOOT", "DEAD-BEEF", "2023-11-14  22:13  a rather long name.dtbo"] {
        assert!(printed.contains(expected), "no {expected} in {printed}");
    }
    let config = tool("mtype").args(["-i", out.as_str(), "::config.txt"]).read().expect("mtype");
    assert_eq!(config, "arm_64bit=1\n");
    let listing = read::list_fat(&image.path, placed.offset, placed.size).expect("our listing");
    assert_eq!((listing.label.as_str(), listing.volume_id), ("BOOT", 0xdead_beef));
    let files = listing.entries.iter().filter(|e| !e.folder).count();
    assert_eq!(files, boot_files().len());
    let bytes =
        read::fat_file(&image.path, placed.offset, placed.size, "overlays/overlay-119.dtbo");
    assert_eq!(bytes.expect("our reading"), vec![119; 700]);
}

/// As boot ROMs want it: one or four sectors in a cluster, the kind that the count of clusters says and the type in the
/// table, and no count near the 65,525 at which readers differ.
#[test]
fn a_boot_partition_is_of_a_kind_that_every_reader_agrees_on() {
    let folder = Folder::new();
    // MiB, kind, type in the MBR, bytes of a cluster.
    let cases = [
        (16, "FAT16", "0e", 512),
        (30, "FAT16", "0e", 512),
        (36, "FAT16", "0e", 1024),
        (40, "FAT32", "0c", 512),
        (64, "FAT32", "0c", 512),
        (96, "FAT32", "0c", 512),
        (512, "FAT32", "0c", 512),
        (768, "FAT32", "0c", 2048),
    ];
    for (size, kind, byte, cluster) in cases {
        let mut request = disk_request(TableKind::Mbr);
        request.size = 1024 * MIB;
        request.partitions[0].size = size * MIB;
        let mut spec = spec(TableKind::Mbr, Utf8Path::new(""), Utf8Path::new(""));
        spec.layout = lay_out_disk(&request).expect("a good layout");
        spec.partitions[1..].iter_mut().for_each(|p| p.content = PartitionContent::Empty);
        let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
        check_fat(&folder, &image, &spec, kind);
        let found = read::read_tables(&image.path).expect("reading back");
        assert_eq!(found.partitions[0].kind, byte, "{size} MiB");
        let out = folder.at("boot.fat");
        let printed = tool("fsck.fat").args(["-nv", out.as_str()]).read().expect("fsck.fat");
        assert!(printed.contains(&format!("{cluster} bytes per cluster")), "{size} MiB: {printed}");
        let count = printed.split(" data clusters").next().and_then(|s| s.rsplit(' ').next());
        let count: u64 = count.and_then(|n| n.parse().ok()).unwrap_or_default();
        let apart = if kind == "FAT32" { 70_000..u64::MAX } else { 4_200..62_000 };
        assert!(apart.contains(&count), "{size} MiB: {count} clusters");
    }
}

/// Six partitions in an MBR: three primary, three logical, as sfdisk and the kernel's numbers have them.
#[test]
fn foreign_tools_accept_logical_partitions() {
    let folder = Folder::new();
    let mut request = disk_request(TableKind::Mbr);
    for (at, name) in [(1, "boot-a"), (2, "boot-b")] {
        let copy = PartitionRequest { name: name.to_owned(), ..request.partitions[0].clone() };
        request.partitions.insert(at, PartitionRequest { bootable: false, ..copy });
    }
    request.size = 256 * MIB;
    let mut spec = spec(TableKind::Mbr, Utf8Path::new(""), Utf8Path::new(""));
    spec.layout = lay_out_disk(&request).expect("a good layout");
    for n in 0..6 - spec.partitions.len() {
        let more =
            PartitionSpec { guid: Uuid::from_u128(n as u128 + 99), ..spec.partitions[1].clone() };
        spec.partitions.insert(1, more);
    }
    let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
    let path = image.path.as_str();
    tool("sfdisk").args(["--verify", path]).run().expect("sfdisk --verify");
    let text = tool("sfdisk").args(["-d", path]).read().expect("sfdisk -d");
    golden("logical.sfdisk", &text.replace(path, "card.img"));
    let json = tool("sfdisk").args(["-J", path]).read().expect("sfdisk -J");
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let listed = json["partitiontable"]["partitions"].as_array().expect("a list");
    assert_eq!(listed.len(), 7, "with the extended one");
    for placed in &spec.layout.partitions {
        let node = format!("{path}{}", placed.number);
        let found = listed.iter().find(|p| p["node"] == node.as_str()).expect(&node);
        assert_eq!(found["start"], placed.first_sector, "{}", placed.name);
        assert_eq!(found["size"], placed.sectors, "{}", placed.name);
    }
    let found = read::read_tables(&image.path).expect("reading back");
    assert_eq!(found.findings, [""; 0]);
    assert_eq!(read::table_differences(&found, &spec.layout), [""; 0]);
    // A record that is lost, and one that leads back.
    let (first, _) = spec.layout.extended().expect("an extended partition");
    let file = File::options().read(true).write(true).open(&image.path).expect("opening");
    file.write_all_at(&[0], first + 510).expect("damaging");
    let findings = read::read_tables(&image.path).expect("reading").findings;
    assert!(findings[0].contains("should contain the record of partition 5"), "{findings:?}");
    file.write_all_at(&[0x55], first + 510).expect("healing");
    file.write_all_at(&[0; 4], first + 446 + 16 + 8).expect("damaging");
    let findings = read::read_tables(&image.path).expect("reading").findings;
    assert!(findings.iter().any(|f| f.contains("has no end")), "{findings:?}");
}

#[test]
fn the_block_map_is_whole_and_bmaptool_takes_it() {
    let folder = Folder::new();
    let (root, data) = filesystems(&folder);
    let spec = spec(TableKind::Gpt, &root, &data);
    let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
    let map = bmap::check_image(&image.path, &image.bmap.path).expect("checking");
    assert_eq!(map.mapped_blocks() * 4096, image.mapped);

    // A card full of something else: all that matters must be overwritten.
    let card = folder.at("card");
    fs::write(&card, vec![0xa5; spec.layout.size as usize]).expect("writing the card");
    let (path, map_path) = (image.path.as_str(), image.bmap.path.as_str());
    tool("bmaptool")
        .args(["copy", "--bmap", map_path, path, card.as_str()])
        .run()
        .expect("bmaptool");
    let (wanted, copied) = (fs::read(path).expect("image"), fs::read(&card).expect("card"));
    for range in &map.ranges {
        let bytes = (range.first * 4096) as usize..((range.last + 1) * 4096) as usize;
        assert!(wanted[bytes.clone()] == copied[bytes.clone()], "{bytes:?} differ");
    }
    let tables = read::read_tables(&card).expect("reading the card");
    assert_eq!(tables.findings, [""; 0]);
    assert_eq!(read::read_boot_states(&card, &[MIB, 2 * MIB]).expect("states")[1], vec![0; 512]);
    let written = DiskImage { path: card, ..image.clone() };
    let slot = folder.at("slot");
    for name in ["root-a", "root-b", "data"] {
        extract(&written, &spec, name, &slot);
        tool("e2fsck").args(["-fn", slot.as_str()]).run().expect("e2fsck on the card");
    }
    check_fat(&folder, &written, &spec, "FAT16");

    let file = File::options().write(true).open(path).expect("opening");
    file.write_all_at(b"!", MIB + 100).expect("damaging");
    let error = bmap::check_image(&image.path, &image.bmap.path).expect_err("a damaged image");
    let expected = format!(
        "checking {path} against its block map: 1 of {} ranges are damaged\n  bytes 1048576 to 1052671",
        map.ranges.len()
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn two_runs_are_equal() {
    let (first, second) = (Folder::new(), Folder::new());
    for table in TABLES {
        let make = |folder: &Folder| {
            let (root, data) = filesystems(folder);
            let image = assemble(&spec(table, &root, &data), &folder.at("card.img"));
            let image = image.expect("assembling");
            (fs::read(&image.path).expect("image"), fs::read(&image.bmap.path).expect("map"))
        };
        let (one, two) = (make(&first), make(&second));
        assert!(one.0 == two.0, "the images differ");
        assert!(one.1 == two.1, "the block maps differ");
    }
}

#[test]
fn a_compressed_image_is_the_image() {
    let folder = Folder::new();
    let mut spec = spec(TableKind::Mbr, Utf8Path::new(""), Utf8Path::new(""));
    spec.partitions[1..].iter_mut().for_each(|p| p.content = PartitionContent::Empty);
    let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
    let packed = compress::compress_image(&image.path, 3).expect("compressing");
    tool("zstd").args(["-t", packed.path.as_str()]).run().expect("zstd -t");
    let unpacked = tool("zstd").args(["-dc", packed.path.as_str()]).read_bytes().expect("zstd -d");
    assert!(unpacked == fs::read(&image.path).expect("image"));
}

/// The message of a disk that `change` has made impossible; the older image stays as it was.
fn failure(folder: &Folder, change: impl FnOnce(&mut DiskSpec)) -> String {
    let mut bad = spec(TableKind::Gpt, Utf8Path::new(""), Utf8Path::new(""));
    bad.partitions[1..].iter_mut().for_each(|p| p.content = PartitionContent::Empty);
    change(&mut bad);
    let out = folder.at("bad.img");
    fs::write(&out, "an older image").expect("writing");
    let error = assemble(&bad, &out).expect_err("the bad disk was assembled");
    assert_eq!(fs::read_to_string(&out).expect("the older image"), "an older image");
    assert!(!bmap::path_for(&out).exists());
    assert!(!xtask::artifact::partial_path(&out).exists());
    format!("{error:#}").replace(out.as_str(), "OUT").replace(folder.at("").as_str(), "DIR/")
}

#[test]
fn what_is_refused_when_it_is_finished_gets_no_name() {
    let folder = Folder::new();
    let mut spec = spec(TableKind::Gpt, Utf8Path::new(""), Utf8Path::new(""));
    spec.partitions[1..].iter_mut().for_each(|p| p.content = PartitionContent::Empty);
    let out = folder.at("card.img");
    let (made, ()) = assemble_checked(&spec, &out, |_| Ok(())).expect("assembling");
    let (image, map) = (fs::read(&made.path).unwrap(), fs::read(&made.bmap.path).unwrap());
    let mut seen = 0;
    let refused = assemble_checked(&spec, &out, |image| -> anyhow::Result<()> {
        seen = fs::metadata(image)?.len();
        anyhow::bail!("no such board starts from it")
    });
    let error = format!("{:#}", refused.expect_err("it was refused"));
    assert_eq!(error, format!("assembling {out}: no such board starts from it"));
    assert_eq!(seen, spec.layout.size, "it was asked about the finished image");
    assert!(image == fs::read(&out).unwrap() && map == fs::read(&made.bmap.path).unwrap());
    assert!(!xtask::artifact::partial_path(&out).exists());
}

#[test]
fn each_rule_has_its_message() {
    let folder = Folder::new();
    let large = folder.at("large.img");
    File::create(&large).and_then(|f| f.set_len(25 * MIB)).expect("a large file");
    let add = |spec: &mut DiskSpec, path: &str, bytes: usize| {
        let PartitionContent::Fat { files, .. } = &mut spec.partitions[0].content else {
            panic!("no FAT")
        };
        files.push(FatFile { path: path.to_owned(), source: FileSource::Bytes(vec![1; bytes]) });
    };
    let fat = "assembling OUT: making the FAT volume of `boot`";
    assert_eq!(
        failure(&folder, |s| add(s, "big", 17 << 20)),
        format!(
            "{fat}: writing big: the file has 17 MiB, but `boot` (16 MiB) has only 16 MiB free\n\
             help: raise partitions.1.size in board/test/board.toml"
        )
    );
    assert_eq!(
        failure(&folder, |s| add(s, "Config.TXT", 1)),
        format!(
            "{fat}: writing Config.TXT: the volume already contains this name (FAT ignores case)"
        )
    );
    assert_eq!(
        failure(&folder, |s| add(s, "../x", 1)),
        format!("{fat}: writing ../x: `../x` is not a valid path in a volume")
    );
    assert_eq!(
        failure(&folder, |s| {
            let PartitionContent::Fat { label, .. } = &mut s.partitions[0].content else {
                panic!("no FAT")
            };
            *label = "twelve chars".to_owned();
        }),
        format!(
            "{fat}: the label `twelve chars` cannot be stored: a FAT label has 1 to 11 letters, digits, spaces, `-` or `_`"
        )
    );
    assert_eq!(
        failure(&folder, |s| s.partitions[1].content = filesystem(&large)),
        "assembling OUT: placing DIR/large.img in `root-a`: the image has 25 MiB, but the \
         partition has 24 MiB\n\
         help: raise partitions.2.size in board/test/board.toml"
    );
    let changing = folder.at("changing.img");
    fs::write(&changing, vec![1; 8192]).expect("writing");
    let summed = filesystem(&changing);
    fs::write(&changing, vec![1; 4096]).expect("writing");
    assert_eq!(
        failure(&folder, |s| s.partitions[1].content = summed.clone()),
        "assembling OUT: placing DIR/changing.img in `root-a`: the image has 4096 bytes, but had \
         8192 when its checksums were computed"
    );
    assert_eq!(
        failure(&folder, |s| s.states = vec![vec![1; 513]]),
        "assembling OUT: the boot state at sector 2048 has 513 bytes, but a sector has 512"
    );
    assert_eq!(
        failure(&folder, |s| s.states = vec![Vec::new(); 3]),
        "assembling OUT: the layout has 2 boot-state sectors, but contents are given for 3"
    );
    assert_eq!(
        failure(&folder, |s| s.partitions.truncate(3)),
        "assembling OUT: the layout has 4 partitions, but contents are given for 3"
    );
}

#[test]
fn each_ext4_rule_has_its_message() {
    let folder = Folder::new();
    let (tar, out) = (folder.at("root.tar"), folder.at("root.ext4"));
    rootfs_tar(&tar);
    let failure = |tool: &Mke2fs, request: &Ext4Request<'_>| {
        let error = ext4::make_image(tool, request, &out).expect_err("a bad request was taken");
        assert!(!out.exists() && !xtask::artifact::partial_path(&out).exists());
        format!("{error:#}").replace(folder.at("").as_str(), "DIR/")
    };
    let tool = mke2fs();
    let full =
        "making the filesystem DIR/root.ext4: the content (5.1 MiB in 4 entries) does not fit";
    let help = "help: raise partitions.root.size in board/test/board.toml, or remove some content";
    for size in [4, 5] {
        let small = request(Some(&tar), size * MIB);
        let shown = format!("{size}.0 MiB");
        assert_eq!(failure(&tool, &small), format!("{full} {shown}\n{help}"));
    }
    assert_eq!(
        failure(&tool, &request(Some(&tar), 24 * MIB + 1)),
        "making the filesystem DIR/root.ext4: the size is 25165825 bytes, expected a multiple of 4096"
    );
    let long = Ext4Request { label: "seventeen letters", ..request(Some(&tar), 24 * MIB) };
    assert_eq!(
        failure(&tool, &long),
        "making the filesystem DIR/root.ext4: the label `seventeen letters` has 17 bytes, the \
         maximum is 16"
    );
    let fake = folder.at("mke2fs");
    fs::write(&fake, "#!/bin/sh\necho 'mke2fs 1.47.0 (5-Feb-2023)' >&2\n").expect("writing");
    Tool::new("chmod").args(["+x", fake.as_str()]).run().expect("chmod");
    let old = Mke2fs { program: fake, libraries: Vec::new() };
    assert_eq!(
        failure(&old, &request(Some(&tar), 24 * MIB)),
        "making the filesystem DIR/root.ext4: DIR/mke2fs is version 1.47.0, expected 1.47.1 or newer\n\
         help: older versions cannot read a tar and use times of the host; Debian 12 has a newer \
         e2fsprogs \
         in its backports"
    );
}

#[test]
fn damage_is_found() {
    let folder = Folder::new();
    let mut spec = spec(TableKind::Hybrid, Utf8Path::new(""), Utf8Path::new(""));
    spec.partitions[1..].iter_mut().for_each(|p| p.content = PartitionContent::Empty);
    let image = assemble(&spec, &folder.at("card.img")).expect("assembling");
    let last = spec.layout.size - 512;
    let cases: [(u64, &[u8], &str); 6] = [
        (512 + 24, &[9], "the GPT at the start of the disk is damaged: CRC32"),
        (last + 24, &[9], "the backup GPT at the end of the disk is damaged: CRC32"),
        (1024 + 60, b"X", "the GPT at the start of the disk is damaged: its entries: partition"),
        (last - 16384 + 60, b"X", "the backup GPT at the end of the disk is damaged: its entries"),
        (446 + 8, &[1], "slot 1 of the hybrid MBR is not partition 1 of the GPT"),
        (446 + 48 + 8, &[2], "the protective record starts at sector 2, expected 1"),
    ];
    let file = File::options().read(true).write(true).open(&image.path).expect("opening");
    for (offset, bytes, expected) in cases {
        let mut before = vec![0; bytes.len()];
        file.read_exact_at(&mut before, offset).expect("reading");
        file.write_all_at(bytes, offset).expect("damaging");
        let findings = read::read_tables(&image.path).expect("reading").findings;
        assert!(findings.iter().any(|f| f.starts_with(expected)), "{expected}: {findings:?}");
        file.write_all_at(&before, offset).expect("healing");
    }
    assert_eq!(read::read_tables(&image.path).expect("reading").findings, [""; 0]);
    file.set_len(spec.layout.size + MIB).expect("growing");
    let findings = read::read_tables(&image.path).expect("reading").findings;
    let expected = "the backup GPT at the end of the disk is damaged: Invalid GPT Signature";
    assert!(findings[0].starts_with(expected), "{findings:?}");
}

/// Runs this program's `the_part_on_a_full_disk` in a mount namespace of its own, on a disk of 8 MiB.
#[test]
fn a_full_disk_leaves_nothing() {
    let folder = Folder::new();
    let this = std::env::current_exe().expect("this program");
    let script = "mount -t tmpfs -o size=8m none \"$SLIPWAY_FULL_DISK\" && exec \"$0\" --exact \
                  disk::the_part_on_a_full_disk --nocapture";
    // Root mounts by itself, and in a chroot it may not make user namespaces.
    let root = rustix::process::geteuid().is_root();
    let options: &[&str] =
        if root { &["--mount"] } else { &["--user", "--map-root-user", "--mount"] };
    let printed = tool("unshare")
        .args(options)
        .args(["sh", "-c", script])
        .arg(this.to_str().expect("UTF-8"))
        .env("SLIPWAY_FULL_DISK", folder.at("").as_str())
        .read()
        .expect("the part on a full disk");
    assert!(printed.contains("1 passed"), "{printed}");
}

/// The other half of `a_full_disk_leaves_nothing`, which names the disk.
#[test]
fn the_part_on_a_full_disk() {
    let Ok(disk) = std::env::var("SLIPWAY_FULL_DISK") else { return };
    let disk = Utf8PathBuf::from(disk);
    let mut spec = spec(TableKind::Gpt, Utf8Path::new(""), Utf8Path::new(""));
    spec.partitions[1..].iter_mut().for_each(|p| p.content = PartitionContent::Empty);
    let PartitionContent::Fat { files, .. } = &mut spec.partitions[0].content else {
        panic!("no FAT")
    };
    files.push(FatFile { path: "big".to_owned(), source: FileSource::Bytes(vec![1; 10 << 20]) });
    let error = assemble(&spec, &disk.join("card.img")).expect_err("more than the disk holds");
    let message = format!("{error:#}");
    assert!(message.contains("the disk is full; the image needs up to "), "{message}");
    assert!(message.contains("help: free some space there"), "{message}");
    let left: Vec<_> = fs::read_dir(&disk).expect("listing").collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Made by `mkenvimage -s 512` from the four lines: a foreign writer of the same format.
#[test]
fn a_foreign_boot_state_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    let made = folder.path().join("made");
    std::fs::write(&text, "active=b\nseq=1f\ntrial=a\ntries=3\n").unwrap();
    xtask::exec::Tool::new("mkenvimage")
        .args(["-s", "512", "-p", "0", "-o"])
        .arg(made.to_str().unwrap())
        .arg(text.to_str().unwrap())
        .run()
        .unwrap();
    let expected = BootState { sequence: 0x1f, active: Slot::B, trial: Some(Slot::A), tries: 3 };
    let sector = std::fs::read(&made).unwrap();
    assert_eq!(BootState::decode(&sector), Ok(expected));
    assert_eq!(sector, expected.encode());
}
