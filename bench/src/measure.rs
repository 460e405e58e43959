//! What the benchmarks have in common: a contender as a separate process with its time and its peak
//! memory, medians, and payloads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bundle::{BuildKind, CompressionLevel, Version};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::exec::Tool;
use xtask::keys::KeyDirectory;
use xtask::update::{self, ComponentRequest, PackRequest, PayloadRequest};

pub const MIB: u64 = 1 << 20;

/// Payload sizes that show how time and memory grow, in MiB.
pub const SIZES: [u64; 4] = [256, 512, 1024, 2048];

/// A program with its arguments.
#[derive(Clone)]
pub struct Call {
    program: String,
    args: Vec<String>,
}

impl Call {
    pub fn new<S: AsRef<str>>(program: &str, args: &[S]) -> Self {
        let args = args.iter().map(|arg| arg.as_ref().to_owned()).collect();
        Self { program: program.to_owned(), args }
    }

    /// This program as its own child.
    pub fn own(args: &[&str]) -> Result<Self> {
        let program =
            Utf8PathBuf::try_from(std::env::current_exe().context("finding this program")?)?;
        Ok(Self::new(program.as_str(), args))
    }
}

/// One run of a contender.
pub struct Measurement {
    pub seconds: f64,
    /// Peak resident memory in bytes.
    pub peak: u64,
    /// Its standard output.
    pub output: String,
}

/// Runs a contender to its end. The data of earlier contenders is on the disk before it starts.
pub fn measure(name: &str, call: &Call) -> Result<Measurement> {
    rustix::fs::sync();
    let started = Instant::now();
    let child = Tool::new(&call.program)
        .args(&call.args)
        .into_command()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {name}"))?;
    let watcher = PeakWatcher::start(child.id());
    let output = child.wait_with_output().with_context(|| format!("running {name}"))?;
    let seconds = started.elapsed().as_secs_f64();
    let peak = watcher.finish();
    ensure!(
        output.status.success(),
        "{name} failed: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(Measurement { seconds, peak, output })
}

/// Watches the peak memory of a process and of its children (`rauc` works through `mksquashfs`):
/// the kernel keeps `VmHWM` itself, so polling it misses only the last moment.
struct PeakWatcher {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl PeakWatcher {
    fn start(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
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

    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
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

pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The payload, cut to a size or repeated up to it; each repetition has different bytes.
pub fn cut_payload(payload: &Utf8Path, out: &Utf8Path, size: u64) -> Result<()> {
    let from = File::open(payload)?;
    let length = from.metadata()?.len();
    let to = File::create(out)?;
    to.set_len(size)?;
    let mut buffer = vec![0; MIB as usize];
    for at in (0..size).step_by(MIB as usize) {
        from.read_exact_at(&mut buffer, at % length)?;
        let turn = (at / length) as u8;
        if buffer.iter().any(|byte| *byte != 0) {
            for byte in buffer.iter_mut().filter(|byte| **byte != 0) {
                *byte = byte.wrapping_add(turn).max(1);
            }
            to.write_all_at(&buffer, at)?;
        }
    }
    to.sync_all().with_context(|| format!("writing {out}"))
}

/// A bundle of one payload, signed with the development key of a directory.
pub fn pack_payload(
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
