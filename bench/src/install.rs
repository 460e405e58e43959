//! Installing a bundle into a slot, with every block verified, compared with `zstd -dc | dd`,
//! `swupdate` and `fwup` on the same target; then our peak memory for payloads of several sizes,
//! and the written bytes of an update that changes one block in a hundred. Every contender is a
//! separate process.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use bundle::{BLOCK_SIZE, CompressionLevel};
use camino::{Utf8Path, Utf8PathBuf};
use contract::answer::InstalledSystem;
use xtask::exec::{self, Tool};
use xtask::keys::KeyDirectory;
use xtask::progress;

use crate::measure::{Call, MIB, Measurement, SIZES, cut_payload, measure, median, pack_payload};

/// The measurements of one contender for a full install.
pub struct InstallRow {
    /// The command, shortened.
    name: String,
    /// Median seconds until everything is on the disk.
    seconds: f64,
    /// Median seconds of reading it back from the disk, if the contender does that.
    read_back: Option<f64>,
    /// Peak resident memory in bytes, the largest of all turns.
    peak: u64,
}

/// An install of a payload by Slipway.
pub struct PayloadInstall {
    /// The description of the install.
    name: String,
    /// Bytes of the payload.
    size: u64,
    /// Bytes written to the slot.
    written: u64,
    /// Seconds until everything was on the disk.
    seconds: f64,
    /// Seconds of reading it back.
    read_back: f64,
    /// Peak resident memory in bytes.
    peak: u64,
}

/// All results.
pub struct InstallResults {
    /// Full installs of all contenders; the first is the reference.
    full: Vec<InstallRow>,
    /// Installs by Slipway.
    sized: Vec<PayloadInstall>,
}

/// Measures with `turns` turns for each contender, in a directory on the disk to be measured.
///
/// # Errors
/// When a contender fails. `swupdate` and `fwup` are skipped when they are not installed.
pub fn run(payload: &Utf8Path, folder: &Utf8Path, turns: usize) -> Result<InstallResults> {
    let bench = InstallBench::new(folder)?;
    Ok(InstallResults {
        full: bench.measure_full(payload, turns)?,
        sized: bench.measure_sized(payload)?,
    })
}

/// The results as readable tables.
pub fn table(results: &InstallResults) -> String {
    use std::fmt::Write as _;
    let mut out =
        format!("{:<20} {:>9} {:>6}  {:>9}  {:>9}\n", "", "time", "ratio", "read back", "memory");
    let base = results.full.first().map_or(1.0, |row| row.seconds);
    for row in &results.full {
        let back = row.read_back.map_or(String::new(), |seconds| format!("{seconds:.2} s"));
        writeln!(
            out,
            "{:<20} {:>7.2} s {:>5.2}x  {back:>9}  {:>5.1} MiB",
            row.name,
            row.seconds,
            row.seconds / base,
            row.peak as f64 / MIB as f64
        )
        .expect("writing to a String cannot fail");
    }
    writeln!(
        out,
        "\n{:<34} {:>9} {:>9} {:>7}  {:>9}  {:>9}",
        "slotd", "written", "of slot", "time", "read back", "memory"
    )
    .expect("writing to a String cannot fail");
    for row in &results.sized {
        writeln!(
            out,
            "{:<34} {:>9} {:>7.2} % {:>5.2} s  {:>7.2} s  {:>5.1} MiB",
            row.name,
            progress::format_bytes(row.written),
            row.written as f64 * 100.0 / row.size as f64,
            row.seconds,
            row.read_back,
            row.peak as f64 / MIB as f64
        )
        .expect("writing to a String cannot fail");
    }
    out
}

struct InstallBench {
    folder: Utf8PathBuf,
    slotd: Utf8PathBuf,
}

impl InstallBench {
    fn new(folder: &Utf8Path) -> Result<Self> {
        progress::say("bench", "building the agent as it ships");
        Tool::cargo().args(["build", "--quiet", "--release", "--package", "slotd"]).run()?;
        let metadata = Tool::cargo()
            .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
            .read()?;
        let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
        let target = metadata["target_directory"].as_str().context("cargo names no directory")?;
        let slotd = Utf8Path::new(target).join("release/slotd");
        Ok(Self { folder: folder.to_owned(), slotd })
    }

    /// A bundle of one payload.
    fn pack(&self, payload: &Utf8Path, name: &str) -> Result<Utf8PathBuf> {
        let out = self.folder.join(name);
        pack_payload(payload, CompressionLevel::Fast, &self.folder.join("keys-of-bundles"), &out)?;
        Ok(out)
    }

    /// A simulated robot on files: slot a runs, slot b is `target`, of `size` bytes.
    fn simulate_robot(&self, target: &Utf8Path, size: u64) -> Result<Utf8PathBuf> {
        let root = self.folder.join("fake-root");
        if root.exists() {
            std::fs::remove_dir_all(&root).with_context(|| format!("removing {root}"))?;
        }
        let write = |path: &str, content: &str| -> Result<()> {
            let path = root.join(path);
            let parent = path.parent().context("a path below the robot's root")?;
            std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
            std::fs::write(&path, content).with_context(|| format!("writing {path}"))
        };
        let sectors = size / 512;
        write(
            "usr/lib/slipway/device.toml",
            &format!(
                "product = \"bench\"\nversion = \"1.0.0\"\nkind = \"development\"\nboard = \"bench\"\n\
                 boot-flow = \"uboot\"\ncompatible = [\"bench\"]\n[boot-state]\nsectors = [8, 16]\n[partitions]\n\
                 root-a = {{ number = 1, start-sector = 8192, sectors = {sectors} }}\n\
                 root-b = {{ number = 2, start-sector = 99999, sectors = {sectors} }}\n"
            ),
        )?;
        write("proc/device-tree/compatible", "bench\0")?;
        write("proc/self/mountinfo", "1 0 179:1 / / ro - ext4 /dev/disk1 ro\n")?;
        for (number, start) in [(1, 8192), (2, 99999)] {
            let folder = format!("sys/devices/disk/disk{number}");
            write(&format!("{folder}/partition"), &format!("{number}\n"))?;
            write(&format!("{folder}/start"), &format!("{start}\n"))?;
            write(&format!("{folder}/size"), &format!("{sectors}\n"))?;
        }
        write("sys/dev/block/.keep", "")?;
        std::os::unix::fs::symlink("../../devices/disk/disk1", root.join("sys/dev/block/179:1"))?;
        write("dev/disk1", "")?;
        write("dev/disk", "")?;
        File::options().write(true).open(root.join("dev/disk"))?.set_len(MIB)?;
        std::os::unix::fs::symlink(target.canonicalize_utf8()?, root.join("dev/disk2"))?;
        let keys = KeyDirectory::open(&self.folder.join("keys-of-bundles"))?;
        write("usr/lib/slipway/keyset.json", &serde_json::to_string(keys.set())?)?;
        Ok(root)
    }

    fn install(&self, robot: &Utf8Path, bundle: &Utf8Path) -> Call {
        // In one process, whose memory is measured.
        let install = ["install", "--foreground", bundle.as_str()];
        let args = [&["--format", "json", "--root", robot.as_str()], &install[..]].concat();
        Call::new(self.slotd.as_str(), &args)
    }

    fn measure_full(&self, payload: &Utf8Path, turns: usize) -> Result<Vec<InstallRow>> {
        let size = std::fs::metadata(payload).with_context(|| format!("reading {payload}"))?.len();
        let bundle = self.pack(payload, "full.bundle")?;
        let (target, old) = (self.folder.join("target.img"), self.folder.join("old.img"));
        another_system(payload, &old)?;
        let packed = self.folder.join("payload.zst");
        Tool::new("zstd")
            .args(["-q", "-f", "-T0", "-3", payload.as_str(), "-o", packed.as_str()])
            .run()?;
        let pipe =
            format!("zstd -dc {packed} | dd of={target} bs=1M conv=notrunc,fsync status=none");
        let mut contenders =
            vec![("zstd -dc | dd", Some(Call::new("sh", &["-c", &pipe]))), ("slotd install", None)];
        if exec::find_program("swupdate").is_some() {
            contenders.push(("swupdate", Some(self.swupdate(&packed, &target)?)));
        }
        if exec::find_program("fwup").is_some() {
            contenders.push(("fwup -a", Some(self.fwup(payload, &target)?)));
        }
        let mut rows: Vec<(Vec<f64>, Vec<f64>, u64)> = vec![Default::default(); contenders.len()];
        for turn in 0..turns {
            for ((name, call), row) in contenders.iter().zip(&mut rows) {
                progress::say("bench", format!("turn {} of {turns}: {name}", turn + 1));
                // Every turn starts with the same blocks allocated, which contain another system.
                Tool::new("cp").args(["--sparse=never", old.as_str(), target.as_str()]).run()?;
                let call = match call {
                    Some(call) => call.clone(),
                    None => self.install(&self.simulate_robot(&target, size)?, &bundle),
                };
                let Measurement { seconds, peak, output } = measure(name, &call)?;
                row.2 = row.2.max(peak);
                match serde_json::from_str::<InstalledSystem>(&output) {
                    Ok(outcome) => {
                        let back = outcome.read_back_ms as f64 / 1000.0;
                        row.0.push(seconds - back);
                        row.1.push(back);
                    }
                    Err(_) => row.0.push(seconds),
                }
                require_equal(payload, &target).with_context(|| format!("after {name}"))?;
            }
        }
        let named = contenders.iter().zip(rows);
        Ok(named
            .map(|((name, _), (seconds, back, peak))| InstallRow {
                name: (*name).to_owned(),
                seconds: median(seconds).unwrap_or_default(),
                read_back: median(back),
                peak,
            })
            .collect())
    }

    fn measure_sized(&self, payload: &Utf8Path) -> Result<Vec<PayloadInstall>> {
        let mut rows = Vec::new();
        let (part, target) = (self.folder.join("part.img"), self.folder.join("target.img"));
        for mib in SIZES {
            cut_payload(payload, &part, mib * MIB)?;
            another_system(&part, &target)?;
            rows.push(self.measure_one(format!("full, {mib} MiB"), &part, &target)?);
        }
        let size = std::fs::metadata(payload)?.len();
        let changed = self.folder.join("changed.img");
        Tool::new("cp").args(["--sparse=always", payload.as_str(), changed.as_str()]).run()?;
        change_blocks(&changed, size)?;
        Tool::new("cp").args(["--sparse=never", payload.as_str(), target.as_str()]).run()?;
        rows.push(self.measure_one("1 % of the blocks changed".to_owned(), &changed, &target)?);
        rows.push(self.measure_one("the same again".to_owned(), &changed, &target)?);
        Ok(rows)
    }

    fn measure_one(
        &self,
        name: String,
        payload: &Utf8Path,
        target: &Utf8Path,
    ) -> Result<PayloadInstall> {
        progress::say("bench", name.clone());
        let size = std::fs::metadata(payload)?.len();
        let bundle = self.pack(payload, "sized.bundle")?;
        let call = self.install(&self.simulate_robot(target, size)?, &bundle);
        let Measurement { seconds, peak, output } = measure(&name, &call)?;
        require_equal(payload, target)?;
        let outcome: InstalledSystem =
            serde_json::from_str(&output).with_context(|| format!("reading `{output}`"))?;
        let read_back = outcome.read_back_ms as f64 / 1000.0;
        ensure!(outcome.write_ms > 0, "the agent reported a time of zero");
        Ok(PayloadInstall {
            name,
            size,
            written: outcome.written,
            seconds: seconds - read_back,
            read_back,
            peak,
        })
    }

    /// A signed update of the raw image, as in swupdate's manual.
    fn swupdate(&self, packed: &Utf8Path, target: &Utf8Path) -> Result<Call> {
        let folder = self.folder.join("swupdate");
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {folder}"))?;
        let (key, certificate) = (folder.join("key.pem"), folder.join("certificate.pem"));
        Tool::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"])
            .args(["-addext", "extendedKeyUsage=emailProtection"])
            .args(["-keyout", key.as_str(), "-out", certificate.as_str()])
            .run()?;
        std::fs::copy(packed, folder.join("root.zst")).context("copying the payload")?;
        let hash = Tool::new("sha256sum").arg(packed.as_str()).read()?;
        let hash = hash.split(' ').next().unwrap_or_default();
        let description = format!(
            "software = {{ version = \"1.0\"; hardware-compatibility = [\"1.0\"]; images: ( {{ filename = \"root.zst\"; \
             device = \"{target}\"; type = \"raw\"; compressed = \"zstd\"; installed-directly = true; sha256 = \"{hash}\"; }} ); }}\n"
        );
        std::fs::write(folder.join("sw-description"), description)?;
        Tool::new("openssl")
            .args(["cms", "-sign", "-binary", "-nosmimecap", "-outform", "DER"])
            .args(["-signer", certificate.as_str(), "-inkey", key.as_str()])
            .args(["-in", folder.join("sw-description").as_str()])
            .args(["-out", folder.join("sw-description.sig").as_str()])
            .run()?;
        let script = "printf 'sw-description\\nsw-description.sig\\nroot.zst\\n' | cpio -o -H crc -F update.swu";
        Tool::new("sh").args(["-c", script]).current_dir(&folder).run()?;
        std::fs::write(folder.join("hwrevision"), "bench 1.0\n")?;
        let update = folder.join("update.swu");
        let args = ["-k", certificate.as_str(), "-H", "bench:1.0", "-i", update.as_str()];
        Ok(Call::new("swupdate", &args))
    }

    fn fwup(&self, payload: &Utf8Path, target: &Utf8Path) -> Result<Call> {
        let (conf, firmware) = (self.folder.join("fwup.conf"), self.folder.join("update.fw"));
        let text = format!(
            "file-resource root.img {{ host-path = \"{payload}\" }}\n\
             task complete {{ on-resource root.img {{ raw_write(0) }} }}\n"
        );
        std::fs::write(&conf, text)?;
        Tool::new("fwup").args(["-c", "-f", conf.as_str(), "-o", firmware.as_str()]).run()?;
        let args = ["-a", "-q", "-i", firmware.as_str(), "-d", target.as_str(), "-t", "complete"];
        Ok(Call::new("fwup", &args))
    }
}

/// A system of the same shape with other contents: nonzero blocks of the payload become noise.
fn another_system(payload: &Utf8Path, out: &Utf8Path) -> Result<()> {
    Tool::new("cp").args(["--sparse=never", payload.as_str(), out.as_str()]).run()?;
    let (from, to) = (File::open(payload)?, OpenOptions::new().write(true).open(out)?);
    let mut noise = Noise(1);
    let mut block = vec![0; BLOCK_SIZE];
    for at in (0..from.metadata()?.len()).step_by(BLOCK_SIZE) {
        from.read_exact_at(&mut block, at)?;
        if block.iter().any(|byte| *byte != 0) {
            noise.fill(&mut block);
            to.write_all_at(&block, at)?;
        }
    }
    to.sync_all().with_context(|| format!("writing {out}"))
}

/// One block in a hundred becomes noise.
fn change_blocks(path: &Utf8Path, size: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let (mut noise, mut block) = (Noise(2), vec![0; BLOCK_SIZE]);
    let blocks = size / BLOCK_SIZE as u64;
    for hundred in 0..blocks / 100 {
        noise.fill(&mut block);
        let at = hundred * 100 + noise.next() % 100;
        file.write_all_at(&block, at * BLOCK_SIZE as u64)?;
    }
    file.sync_all().with_context(|| format!("writing {path}"))
}

/// Marsaglia's xorshift: bytes that do not compress, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

fn require_equal(expected: &Utf8Path, found: &Utf8Path) -> Result<()> {
    let size = std::fs::metadata(expected)?.len().to_string();
    Tool::new("cmp").args(["-n", &size, expected.as_str(), found.as_str()]).run()
}
