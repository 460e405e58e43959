//! A card's bytes: tables of all kinds, with a FAT volume in them, read as the firmware does.

use std::io::{Cursor, Write};
use std::rc::Rc;

use bootmodel::chain::card::CardContent;
use bootmodel::firmware::ReadOnlyDisk;

const MIB: usize = 1 << 20;

struct Bytes(Vec<u8>);

impl ReadOnlyDisk for Bytes {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.as_slice().read_at(offset, buffer)
    }
}

fn record(disk: &mut [u8], sector: usize, slot: usize, kind: u8, first: usize, count: usize) {
    let at = sector * 512 + 446 + 16 * (slot - 1);
    disk[at + 4] = kind;
    disk[at + 8..at + 12].copy_from_slice(&(first as u32).to_le_bytes());
    disk[at + 12..at + 16].copy_from_slice(&(count as u32).to_le_bytes());
    disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

fn fat(disk: &mut [u8], at: usize, size: usize) {
    let mut volume = Cursor::new(vec![0; size]);
    let options =
        fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat16).bytes_per_cluster(512);
    fatfs::format_volume(&mut volume, options).expect("a volume");
    let files = fatfs::FileSystem::new(&mut volume, fatfs::FsOptions::new()).expect("a volume");
    files
        .root_dir()
        .create_file("config.txt")
        .expect("a file")
        .write_all(b"a=1\n")
        .expect("a file");
    drop(files);
    disk[at..at + size].copy_from_slice(&volume.into_inner());
}

#[test]
fn logical_partitions_are_numbered_from_5_on() {
    let mut disk = vec![0; 16 * MIB];
    let sectors = |mib: usize| mib * MIB / 512;
    record(&mut disk, 0, 1, 0x0e, sectors(1), sectors(4));
    record(&mut disk, 0, 4, 0x0f, sectors(6), sectors(10));
    record(&mut disk, sectors(6), 1, 0x83, 2048, 2048);
    record(&mut disk, sectors(6), 2, 0x05, sectors(4), 8192);
    record(&mut disk, sectors(10), 1, 0x83, 2048, 2048);
    fat(&mut disk, MIB, 4 * MIB);
    let error = CardContent::read(Rc::new(Bytes(disk.clone()))).expect_err("no slot");
    assert!(error.contains("no slot has a system"), "{error}");
    // The same table, through its reader.
    let (records, partitions) = CardContent::table_of(&Bytes(disk)).expect("a table");
    assert_eq!(records.len(), 4);
    let found: Vec<_> = partitions.iter().map(|(n, at)| (*n, *at as usize / MIB)).collect();
    assert_eq!(found, [(1, 1), (5, 7), (6, 11)]);
}

#[test]
fn damaged_cards_are_errors() {
    for (disk, part) in [
        (vec![0; 512], "no MBR"),
        (vec![0; 100], "cannot be read"),
        (
            {
                let mut disk = vec![0; 4096];
                record(&mut disk, 0, 1, 0xee, 1, 7);
                disk
            },
            "announces a GPT",
        ),
        (
            {
                let mut disk = vec![0; 4096];
                record(&mut disk, 0, 1, 0x0e, 100_000, 7);
                disk
            },
            "begins after the card's end",
        ),
        (
            {
                // A circular chain of logical partitions ends.
                let mut disk = vec![0; 4096];
                record(&mut disk, 0, 1, 0x0f, 1, 7);
                record(&mut disk, 1, 2, 0x05, 0, 7);
                disk
            },
            "no slot",
        ),
    ] {
        let error = CardContent::read(Rc::new(Bytes(disk))).expect_err(part);
        assert!(error.contains(part), "{error}");
    }
}
