#[test]
fn bench() {
    let rows = xtask::bench::disk::run(
        "/tmp/slipway-bench/root.ext4".into(),
        "/tmp/disk-work/bench".into(),
        3,
    )
    .unwrap();
    println!("{}", xtask::bench::disk::table(&rows));
}
