use camino::{Utf8Path, Utf8PathBuf};
use uuid::Uuid;
use xtask::disk::*;
#[test]
fn trial() {
    const MIB: u64 = 1 << 20;
    let part = |name: &str, size: u64, filesystem| PartitionRequest {
        name: name.into(),
        size: size * MIB,
        start: None,
        filesystem,
        bootable: name == "boot",
        in_mbr: name == "boot",
    };
    for table in [TableKind::Gpt, TableKind::Mbr, TableKind::Hybrid] {
        let layout = place(&DiskRequest {
            table,
            size: 4096 * MIB,
            first_partition: 4 * MIB,
            alignment: MIB,
            states: vec![MIB, 2 * MIB],
            partitions: vec![
                part("boot", 64, Filesystem::Vfat),
                part("root-a", 1024, Filesystem::Ext4),
                part("root-b", 1024, Filesystem::Ext4),
                part("data", 64, Filesystem::Ext4),
            ],
        })
        .unwrap();
        let root = Content::Image("/tmp/slipway-bench/root.ext4".into());
        let p =
            |n, content| PartitionSpec { guid: Uuid::from_u128(n), content, size_key: "x".into() };
        let spec = DiskSpec {
            layout,
            disk_guid: Uuid::from_u128(99),
            mbr_signature: 0x12345678,
            epoch: 1700000000,
            states: vec![b"seq=1".to_vec()],
            partitions: vec![
                p(
                    1,
                    Content::Fat {
                        label: "boot".into(),
                        volume_id: 0xdeadbeef,
                        files: vec![
                            FatFile {
                                path: "config.txt".into(),
                                source: Source::Bytes(b"hello".to_vec()),
                            },
                            FatFile {
                                path: "overlays/a long name.dtbo".into(),
                                source: Source::Bytes(vec![7; 100_000]),
                            },
                            FatFile {
                                path: "start.elf".into(),
                                source: Source::Bytes(vec![8; 30_000_000]),
                            },
                        ],
                    },
                ),
                p(2, root.clone()),
                p(3, root),
                p(4, Content::Image("/tmp/disk-work/disk-data.ext4".into())),
            ],
        };
        let t = std::time::Instant::now();
        let out = Utf8PathBuf::from(format!("/tmp/disk-work/{}.img", table.name()));
        println!("{:?} {:?}", assemble(&spec, &out), t.elapsed());
        let t = std::time::Instant::now();
        println!(
            "{:?} {:?}",
            bmap::check(&out, &bmap::path_for(&out)).map(|m| m.ranges.len()),
            t.elapsed()
        );
    }
}
