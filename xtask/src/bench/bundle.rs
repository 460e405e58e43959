//! Packing a bundle, compared with `zstd -T0` at the same levels, `rauc bundle` and `zip`. Each
//! contender is a separate process, so that the kernel measures its peak memory.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bundle::{BuildKind, CompressionLevel, Version};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use super::install::{SIZES, cut_payload};
use crate::exec;
use crate::keys::KeyDirectory;
use crate::progress;
use crate::update::{self, ComponentRequest, PackRequest, PayloadRequest};

/// The first argument of a child that packs one bundle; the command line passes it to [`run_child`].
pub const CHILD: &str = "bench-bundle-child";

/// The measurements of one contender.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BundleRow {
    /// The command, shortened.
    pub name: String,
    /// The contender that it is compared with; itself for a reference.
    pub yardstick: String,
    /// Median seconds.
    pub seconds: f64,
    /// Bytes of the result.
    pub bytes: u64,
    /// Peak resident memory in bytes, the largest of all runs.
    pub peak: u64,
}

/// A contender: its command, and the file that it creates.
struct Contender {
    name: String,
    yardstick: String,
    program: String,
    args: Vec<String>,
    result: Utf8PathBuf,
}

/// The request.
#[derive(Debug, Clone)]
pub struct BundleBenchSettings {
    /// The payload, a plain (perhaps sparse) file.
    pub payload: Utf8PathBuf,
    /// A directory for results, which are removed afterwards.
    pub scratch: Utf8PathBuf,
    /// Runs of each contender, at least 3.
    pub runs: usize,
    /// Also the slow level and `zstd -19`, which take minutes each; they run once.
    pub slow: bool,
}

/// Runs all contenders, in turn within each round, and returns medians.
///
/// # Errors
/// When a contender fails. `rauc` and `zip` are skipped when they are not installed.
pub fn run(settings: &BundleBenchSettings) -> Result<Vec<BundleRow>> {
    std::fs::create_dir_all(&settings.scratch)
        .with_context(|| format!("creating {}", settings.scratch))?;
    let mut rows = Vec::new();
    let runs = settings.runs.max(3);
    for (contenders, runs) in [
        (quick_contenders(settings)?, runs),
        (sized_contenders(settings)?, runs),
        (slow_contenders(settings)?, 1),
    ] {
        let mut times = vec![Vec::new(); contenders.len()];
        let mut peaks = vec![0; contenders.len()];
        let mut sizes = vec![0; contenders.len()];
        for round in 0..runs {
            for (at, contender) in contenders.iter().enumerate() {
                progress::say(
                    "bench",
                    format!("round {} of {runs}: {}", round + 1, contender.name),
                );
                let (time, peak) = measure_contender(contender)?;
                times[at].push(time);
                peaks[at] = peak.max(peaks[at]);
                sizes[at] = std::fs::metadata(&contender.result)
                    .with_context(|| format!("reading {}", contender.result))?
                    .len();
                std::fs::remove_file(&contender.result)
                    .with_context(|| format!("removing {}", contender.result))?;
            }
        }
        for (at, contender) in contenders.into_iter().enumerate() {
            times[at].sort();
            rows.push(BundleRow {
                name: contender.name,
                yardstick: contender.yardstick,
                seconds: times[at][runs / 2].as_secs_f64(),
                bytes: sizes[at],
                peak: peaks[at],
            });
        }
    }
    Ok(rows)
}

/// The rows as a table, each with its ratios to its reference.
pub fn table(rows: &[BundleRow]) -> String {
    use std::fmt::Write as _;
    let mut out = format!(
        "{:<21} {:>9} {:>6}  {:>10} {:>7}  {:>9}\n",
        "", "time", "ratio", "size", "ratio", "memory"
    );
    for row in rows {
        let base = rows.iter().find(|other| other.name == row.yardstick).unwrap_or(row);
        writeln!(
            out,
            "{:<21} {:>7.2} s {:>5.2}x  {:>6.1} MiB {:>6.3}x  {:>5} MiB",
            row.name,
            row.seconds,
            row.seconds / base.seconds,
            row.bytes as f64 / f64::from(1 << 20),
            row.bytes as f64 / base.bytes as f64,
            row.peak >> 20,
        )
        .expect("writing to a String cannot fail");
    }
    out
}

fn slipway_contender(
    settings: &BundleBenchSettings,
    level: &str,
    yardstick: &str,
) -> Result<Contender> {
    let name = format!("slipway {level}");
    bundle_of(&settings.payload, settings, level, name, yardstick)
}

/// Slipway with payloads of several sizes: the time grows with the size, the memory does not.
fn sized_contenders(settings: &BundleBenchSettings) -> Result<Vec<Contender>> {
    let one = |mib: &u64| {
        let payload = settings.scratch.join(format!("payload-{mib}.img"));
        cut_payload(&settings.payload, &payload, mib << 20)?;
        let name = format!("slipway fast {mib} MiB");
        bundle_of(&payload, settings, "fast", name.clone(), &name)
    };
    SIZES.iter().map(one).collect()
}

fn bundle_of(
    payload: &Utf8Path,
    settings: &BundleBenchSettings,
    level: &str,
    name: String,
    yardstick: &str,
) -> Result<Contender> {
    let program = std::env::current_exe().context("finding this program")?;
    let program = Utf8PathBuf::try_from(program).context("finding this program")?;
    let result = settings.scratch.join(format!("ours-{level}.bundle"));
    let args = [CHILD, payload.as_str(), level, result.as_str()].map(str::to_owned);
    Ok(Contender {
        name,
        yardstick: yardstick.to_owned(),
        program: program.into_string(),
        args: args.to_vec(),
        result,
    })
}

fn other_contender(
    settings: &BundleBenchSettings,
    name: &str,
    yardstick: &str,
    result: &str,
    args: &[&str],
) -> Contender {
    let result = settings.scratch.join(result);
    let fill = |arg: &&str| match *arg {
        "IN" => settings.payload.to_string(),
        "OUT" => result.to_string(),
        other => other.to_owned(),
    };
    Contender {
        name: name.to_owned(),
        yardstick: yardstick.to_owned(),
        program: name.split(' ').next().unwrap_or(name).to_owned(),
        args: args.iter().map(fill).collect(),
        result,
    }
}

fn quick_contenders(settings: &BundleBenchSettings) -> Result<Vec<Contender>> {
    let zstd = |level: &str| {
        let name = format!("zstd -T0 -{level}");
        let level = format!("-{level}");
        let args = ["-q", "-f", "-T0", &level, "IN", "-o", "OUT"];
        other_contender(settings, &name, &name, "zstd.zst", &args)
    };
    let mut all = vec![
        zstd("3"),
        slipway_contender(settings, "fast", "zstd -T0 -3")?,
        zstd("9"),
        slipway_contender(settings, "release", "zstd -T0 -9")?,
    ];
    if exec::find_program("rauc").is_some() && exec::find_program("mksquashfs").is_some() {
        all.push(rauc_contender(settings)?);
    }
    if exec::find_program("zip").is_some() {
        let args = ["-q", "-j", "OUT", "IN"];
        all.push(other_contender(settings, "zip", "zstd -T0 -3", "payload.zip", &args));
    }
    Ok(all)
}

fn slow_contenders(settings: &BundleBenchSettings) -> Result<Vec<Contender>> {
    if !settings.slow {
        return Ok(Vec::new());
    }
    let name = "zstd -T0 -19";
    let args = ["-q", "-f", "-T0", "-19", "IN", "-o", "OUT"];
    let zstd = other_contender(settings, name, name, "zstd.zst", &args);
    Ok(vec![zstd, slipway_contender(settings, "slow", "zstd -T0 -19")?])
}

/// A verity bundle of the one payload, compressed with zstd, signed with a temporary certificate.
fn rauc_contender(settings: &BundleBenchSettings) -> Result<Contender> {
    let input = settings.scratch.join("rauc");
    std::fs::create_dir_all(&input).with_context(|| format!("creating {input}"))?;
    let (key, certificate) = (settings.scratch.join("rauc.key"), settings.scratch.join("rauc.crt"));
    exec::Tool::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"])
        .args(["-keyout", key.as_str(), "-out", certificate.as_str()])
        .run()?;
    let image = input.join("root.ext4");
    if image.exists() {
        std::fs::remove_file(&image).with_context(|| format!("removing {image}"))?;
    }
    let payload = settings.payload.canonicalize_utf8().context("finding the payload")?;
    if std::fs::hard_link(&payload, &image).is_err() {
        std::fs::copy(&payload, &image).with_context(|| format!("copying to {image}"))?;
    }
    let manifest = "[update]\ncompatible=bench\nversion=1\n\n[bundle]\nformat=verity\n\n[image.rootfs]\nfilename=root.ext4\n";
    let path = input.join("manifest.raucm");
    std::fs::write(&path, manifest).with_context(|| format!("writing {path}"))?;
    let (cert, key) = (format!("--cert={certificate}"), format!("--key={key}"));
    let args = [
        "--mksquashfs-args=-comp zstd -Xcompression-level 3",
        &cert,
        &key,
        "bundle",
        input.as_str(),
        "OUT",
    ];
    Ok(other_contender(settings, "rauc bundle", "zstd -T0 -3", "rauc.raucb", &args))
}

/// Runs a contender to its end. The data of earlier contenders is on the disk before it starts.
fn measure_contender(contender: &Contender) -> Result<(Duration, u64)> {
    rustix::fs::sync();
    let started = Instant::now();
    let child = exec::Tool::new(&contender.program)
        .args(&contender.args)
        .into_command()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {}", contender.name))?;
    let watcher = PeakWatcher::start(child.id());
    let output = child.wait_with_output().with_context(|| format!("running {}", contender.name))?;
    let time = started.elapsed();
    let peak = watcher.finish();
    ensure!(
        output.status.success(),
        "{} failed: {} (signal {:?})\n{}",
        contender.name,
        output.status,
        output.status.signal(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok((time, peak))
}

/// Watches the peak memory of a process and of its children (`rauc` works through `mksquashfs`):
/// the kernel keeps `VmHWM` itself, so polling it misses only the last moment.
pub(super) struct PeakWatcher {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl PeakWatcher {
    pub(super) fn start(pid: u32) -> Self {
        use std::sync::atomic::{AtomicBool, Ordering};
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut peak = 0;
            while !stopped.load(Ordering::Relaxed) {
                peak = peak.max(high_water(pid));
                std::thread::sleep(Duration::from_millis(10));
            }
            peak
        });
        Self { stop, thread }
    }

    pub(super) fn finish(self) -> u64 {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap_or(0)
    }
}

/// The sum of the peaks of a process and its direct children, in bytes.
fn high_water(pid: u32) -> u64 {
    let own = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = own.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let below: u64 =
        children.split_whitespace().filter_map(|c| c.parse().ok()).map(high_water).sum();
    kib.unwrap_or(0) * 1024 + below
}

/// The child's work: one bundle of one payload, signed with a temporary key.
///
/// # Errors
/// When the arguments are not those of [`run`], or packing fails.
pub fn run_child(args: &[String]) -> Result<()> {
    let [payload, level, out] = args else {
        bail!("expected a payload, a level and an output, found {} arguments", args.len())
    };
    let level = match level.as_str() {
        "fast" => CompressionLevel::Fast,
        "release" => CompressionLevel::Release,
        "slow" => CompressionLevel::Slow,
        other => bail!("expected the level fast, release or slow, found `{other}`"),
    };
    let dir = tempfile::tempdir().context("creating a temporary directory")?;
    let dir = Utf8Path::from_path(dir.path()).context("the temporary directory is not UTF-8")?;
    pack_payload(Utf8Path::new(payload), level, dir, Utf8Path::new(out))
}

/// A bundle of one payload, signed with the development key of a directory.
pub(super) fn pack_payload(
    payload: &Utf8Path,
    level: CompressionLevel,
    keys: &Utf8Path,
    out: &Utf8Path,
) -> Result<()> {
    let signer = KeyDirectory::open(keys)?.signer(BuildKind::Development)?;
    let version = Version::parse("1.0.0")?;
    let payloads = vec![PayloadRequest { role: "root".to_owned(), path: payload.to_owned() }];
    let request = PackRequest {
        product: "bench".to_owned(),
        version: version.clone(),
        kind: BuildKind::Development,
        boards: vec!["bench".to_owned()],
        minimum_version: version.clone(),
        key_epoch: None,
        epoch: 0,
        components: vec![ComponentRequest { name: "system".to_owned(), version, payloads }],
        level,
        workers: None,
        signers: &[signer],
    };
    update::pack_bundle(&request, out).map(|_| ())
}
