//! One invalid input for every rule of the layout, with its message; and the placement of
//! partitions.

use super::*;

const MIB: u64 = 1 << 20;

/// A table, the change that makes the valid disk invalid, and the only finding.
type Case = (TableKind, fn(&mut DiskRequest), &'static str);

fn partition(name: &str, size: u64, filesystem: Filesystem) -> PartitionRequest {
    PartitionRequest {
        name: name.to_owned(),
        size,
        start: None,
        filesystem,
        bootable: false,
        in_mbr: name == "boot",
    }
}

fn disk(table: TableKind) -> DiskRequest {
    DiskRequest {
        table,
        size: 1024 * MIB,
        first_partition: 4 * MIB,
        alignment: MIB,
        states: vec![MIB, 2 * MIB],
        trust: vec![3 * MIB, 3 * MIB + 64 * 1024],
        partitions: vec![
            partition("boot", 64 * MIB, Filesystem::Vfat),
            partition("root-a", 256 * MIB, Filesystem::Ext4),
            partition("root-b", 256 * MIB, Filesystem::Ext4),
            partition("data", 64 * MIB, Filesystem::Ext4),
        ],
    }
}

/// The findings for a disk that `change` has made invalid.
fn findings(table: TableKind, change: impl FnOnce(&mut DiskRequest)) -> Vec<String> {
    let mut request = disk(table);
    change(&mut request);
    lay_out_disk(&request).expect_err("the bad disk was accepted")
}

#[test]
fn places_partitions_one_after_the_other() {
    for table in [TableKind::Mbr, TableKind::Gpt, TableKind::Hybrid] {
        let layout = lay_out_disk(&disk(table)).expect("a good disk");
        let offsets: Vec<u64> = layout.partitions.iter().map(|p| p.offset / MIB).collect();
        assert_eq!(offsets, [4, 68, 324, 580]);
        assert_eq!(layout.partitions[0].first_sector, 8192);
        assert_eq!(layout.partitions[3].number, 4);
        assert_eq!(layout.states[0], StateSector { offset: MIB, sector: 2048 });
        let listed = layout.partitions.iter().filter(|p| p.in_mbr).count();
        assert_eq!(listed, [4, 0, 1][table as usize]);
        let json = serde_json::to_string(&layout).expect("serialising");
        assert_eq!(serde_json::from_str::<DiskLayout>(&json).expect("parsing"), layout);
    }
}

#[test]
fn a_fixed_start_leaves_a_gap() {
    let mut request = disk(TableKind::Gpt);
    request.partitions[1].start = Some(100 * MIB);
    let layout = lay_out_disk(&request).expect("a good disk");
    assert_eq!(layout.partition("root-a").map(|p| p.offset), Some(100 * MIB));
    assert_eq!(layout.partition("root-b").map(|p| p.offset), Some(356 * MIB));
}

#[test]
fn overlap_names_both() {
    let found = findings(TableKind::Gpt, |d| {
        d.partitions[1] = partition("boot-b", 64 * MIB, Filesystem::Vfat);
        d.partitions[2].name = "root-a".to_owned();
        d.partitions[2].start = Some(100 * MIB);
    });
    assert_eq!(found, ["`boot-b` (64 MiB at 68 MiB) overlaps `root-a` (starts at 100 MiB)"]);
}

#[test]
fn disk_order_is_kept() {
    let found = findings(TableKind::Gpt, |d| {
        d.partitions[0].start = Some(700 * MIB);
        d.partitions[1].start = Some(8 * MIB);
    });
    assert_eq!(
        found,
        [
            "`root-a` (256 MiB at 8 MiB) is listed after `boot` (starts at 700 MiB) but is before it: \
          list partitions in their order on the disk"
        ]
    );
}

#[test]
fn everything_is_reported_at_once() {
    let found = findings(TableKind::Mbr, |d| {
        d.partitions[0].size = 0;
        d.partitions[3].size = 2048 * MIB;
    });
    assert_eq!(
        found,
        ["`boot` has size zero", "`data` (2 GiB at 516 MiB) does not fit the disk (1 GiB)",]
    );
}

#[test]
fn each_rule_has_its_message() {
    use TableKind::{Gpt, Hybrid, Mbr};
    let cases: Vec<Case> = vec![
        (Gpt, |d| d.alignment = 512, "the alignment is 512 B, it must be a multiple of 4 KiB"),
        (Gpt, |d| d.size += 512, "the disk is 1073742336 B, it must be a multiple of 4 KiB"),
        (Gpt, |d| d.partitions.clear(), "the disk has no partition"),
        (Gpt, |d| d.partitions[1].size = 0, "`root-a` has size zero"),
        (
            Gpt,
            |d| d.partitions[3].size = 1536,
            "`data` has a size of 1536 B, it must be a multiple of 4 KiB",
        ),
        (
            Gpt,
            |d| d.partitions[0].size = 2 * MIB,
            "`boot` has a size of 2 MiB, a vfat partition needs at least 4 MiB",
        ),
        (
            Gpt,
            |d| d.partitions[3].size = u64::MAX - 4095,
            "`data` ends beyond what 64 bits can count",
        ),
        (
            Gpt,
            |d| d.partitions[1].start = Some(100 * MIB + 4096),
            "`root-a` starts at 102404 KiB, which is not a multiple of the alignment 1 MiB",
        ),
        (
            Gpt,
            |d| {
                d.partitions[0].start = Some(3 * MIB);
                d.trust.clear();
            },
            "`boot` starts at 3 MiB, before the first partition may start (4 MiB)",
        ),
        (
            Gpt,
            |d| d.partitions[2].name = "root-a".to_owned(),
            "partitions 2 and 3 are both named `root-a`",
        ),
        (Gpt, |d| d.partitions[2].name.clear(), "partition 3 has no name"),
        (
            Gpt,
            |d| d.partitions[2].name = "r".repeat(37),
            "the name `rrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrr` has 37 characters, a GPT entry holds 36",
        ),
        (
            Mbr,
            |d| {
                let more = (0..11).map(|n| partition(&format!("p{n}"), MIB, Filesystem::Raw));
                d.partitions.extend(more);
            },
            "an mbr table holds 14 partitions here, the disk has 15: use table = \"gpt\"",
        ),
        (
            Mbr,
            |d| {
                d.size = 4 << 40;
                d.partitions[3].size = 2 << 40;
            },
            "`data` ends at 2097732 MiB, an mbr table reaches 2 TiB: use table = \"gpt\"",
        ),
        (
            Gpt,
            |d| {
                d.alignment = 4096;
                d.partitions =
                    (0..129).map(|n| partition(&format!("p{n}"), 4096, Filesystem::Raw)).collect();
            },
            "a gpt holds 128 partitions, the disk has 129",
        ),
        (
            Hybrid,
            |d| d.partitions[0].in_mbr = false,
            "a hybrid table lists no partition in its MBR: set in-mbr = true for the boot \
             partition, or use table = \"gpt\"",
        ),
        (
            Hybrid,
            |d| d.partitions.iter_mut().for_each(|p| p.in_mbr = true),
            "a hybrid table has room for 3 partitions in its MBR, 4 are marked in-mbr",
        ),
        (
            Hybrid,
            |d| {
                let mut more = partition("more", 4 * MIB, Filesystem::Raw);
                more.in_mbr = true;
                d.partitions.push(more);
            },
            "`more` is partition 5, only the first 4 can be in the MBR of a hybrid table",
        ),
        (
            Hybrid,
            |d| {
                d.size = 4 << 40;
                d.partitions[3].size = 2 << 40;
                d.partitions[3].in_mbr = true;
            },
            "`data` ends at 2097732 MiB, the MBR of a hybrid table reaches 2 TiB",
        ),
        (
            Gpt,
            |d| d.partitions[3].size = 444 * MIB,
            "`data` (444 MiB at 580 MiB) overlaps the backup GPT in the last 16896 B of the 1 GiB disk",
        ),
        (
            Mbr,
            |d| d.partitions[3].size = 445 * MIB,
            "`data` (445 MiB at 580 MiB) does not fit the disk (1 GiB)",
        ),
        (
            Gpt,
            |d| {
                d.first_partition = 4096;
                d.alignment = 4096;
                d.states.clear();
                d.trust.clear();
            },
            "the first partition may start at 4 KiB, but the gpt table takes the first 17 KiB",
        ),
        (
            Gpt,
            |d| d.states[0] = MIB + 512,
            "boot-state copy 1 (at 1049088 B) is not at a multiple of 4 KiB",
        ),
        (
            Gpt,
            |d| d.states[0] = 16384,
            "boot-state copy 1 (at 16 KiB) is inside the gpt table (the first 17 KiB)",
        ),
        (
            Mbr,
            |d| d.states[1] = 5 * MIB,
            "boot-state copy 2 (at 5 MiB) is inside `boot` (64 MiB at 4 MiB)",
        ),
        (
            Mbr,
            |d| d.states[1] = 1000 * MIB,
            "boot-state copy 2 (at 1000 MiB) is after the first partition's start (4 MiB)",
        ),
        (
            Mbr,
            |d| d.states[1] = MIB,
            "boot-state copy 1 (at 1 MiB) and boot-state copy 2 (at 1 MiB) overlap",
        ),
        (
            Mbr,
            |d| d.trust[0] = MIB - 60 * 1024,
            "boot-state copy 1 (at 1 MiB) and trust copy 1 (at 964 KiB) overlap",
        ),
        (
            Gpt,
            |d| d.trust[1] = 3 * MIB + 60 * 1024,
            "trust copy 1 (at 3 MiB) and trust copy 2 (at 3132 KiB) overlap",
        ),
        (
            Gpt,
            |d| d.trust[1] = 4 * MIB - 4096,
            "trust copy 2 (at 4092 KiB) is inside `boot` (64 MiB at 4 MiB)",
        ),
    ];
    for (table, change, expected) in cases {
        assert_eq!(findings(table, change), [expected]);
    }
}

#[test]
fn the_fourth_of_five_partitions_of_an_mbr_is_logical() {
    let mut request = disk(TableKind::Mbr);
    request.partitions.push(partition("more", 4 * MIB, Filesystem::Raw));
    let layout = lay_out_disk(&request).expect("a good disk");
    let numbers: Vec<u32> = layout.partitions.iter().map(|p| p.number).collect();
    assert_eq!(numbers, [1, 2, 3, 5, 6]);
    // Each record is one unit of alignment before its partition, and that unit contains nothing
    // else.
    let records: Vec<_> = layout.partitions.iter().map(|p| p.record).collect();
    let before = |n: usize| Some(layout.partitions[n].offset - request.alignment);
    assert_eq!(records, [None, None, None, before(3), before(4)]);
    assert_eq!(records[3], Some(layout.partitions[2].end()));
    let (first, size) = layout.extended().expect("an extended partition");
    assert_eq!((Some(first), first + size), (records[3], layout.partitions[4].end()));
}
