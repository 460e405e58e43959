use camino::{Utf8Path, Utf8PathBuf};
use uuid::Uuid;
use xtask::ext4::*;
#[test]
fn trial() {
    let r = Utf8PathBuf::from("/tmp/disk-e2fs/root");
    let tool = Mke2fs {
        program: r.join("sbin/mke2fs"),
        libraries: vec![r.join("lib/x86_64-linux-gnu"), r.join("usr/lib/x86_64-linux-gnu")],
    };
    let t = std::time::Instant::now();
    let req = Ext4Request {
        tar: Some(Utf8Path::new("/tmp/slipway-bench/root.tar")),
        size: 1 << 30,
        label: "root",
        uuid: Uuid::from_u128(1),
        hash_seed: Uuid::from_u128(2),
        epoch: 1700000000,
        journal: false,
        grows_to: None,
        size_key: "partitions.root.size in board/x/board.toml",
    };
    println!(
        "{:?} {:?}",
        make(&tool, &req, Utf8Path::new("/tmp/slipway-bench/disk-root.ext4")),
        t.elapsed()
    );
    println!(
        "{:?} {:?}",
        make(&tool, &req, Utf8Path::new("/tmp/slipway-bench/disk-root2.ext4")),
        t.elapsed()
    );
    let small = Ext4Request { size: 700 << 20, ..req.clone() };
    println!("{:?}", make(&tool, &small, Utf8Path::new("/tmp/slipway-bench/disk-root3.ext4")));
    let small = Ext4Request { size: 800 << 20, ..req.clone() };
    println!("{:?}", make(&tool, &small, Utf8Path::new("/tmp/slipway-bench/disk-root3.ext4")));
    let data = Ext4Request {
        tar: None,
        size: 64 << 20,
        journal: true,
        grows_to: Some(1 << 40),
        label: "data",
        ..req
    };
    println!("{:?}", make(&tool, &data, Utf8Path::new("/tmp/slipway-bench/disk-data.ext4")));
}
