//! Packing a bundle, compared with `zstd -T0` at the same levels, `rauc bundle` and `zip`. Each
//! contender is a separate process, so that the kernel measures its peak memory.

use anyhow::{Context, Result};
use bundle::CompressionLevel;
use camino::{Utf8Path, Utf8PathBuf};
use xtask::build::BundleCompression;
use xtask::{exec, progress};

use crate::measure::{Call, MIB, SIZES, cut_payload, measure, median, pack_payload};

/// The measurements of one contender.
pub struct BundleRow {
    /// The command, shortened.
    name: String,
    /// The contender that it is compared with; itself for a reference.
    yardstick: String,
    /// Median seconds.
    seconds: f64,
    /// Bytes of the result.
    bytes: u64,
    /// Peak resident memory in bytes, the largest of all turns.
    peak: u64,
}

/// A contender: its command, and the file that it creates.
struct Contender {
    name: String,
    yardstick: String,
    call: Call,
    result: Utf8PathBuf,
}

/// Runs all contenders in turn, in a directory whose results are removed afterwards. `slow`: also the
/// slow level and `zstd -19`, which take minutes each; they run once.
///
/// # Errors
/// When a contender fails. `rauc` and `zip` are skipped when they are not installed.
pub fn run(
    payload: &Utf8Path,
    folder: &Utf8Path,
    turns: usize,
    slow: bool,
) -> Result<Vec<BundleRow>> {
    let bench = BundleBench { payload, folder };
    let slow = if slow { bench.slow_contenders()? } else { Vec::new() };
    let mut rows = Vec::new();
    for (contenders, turns) in
        [(bench.quick_contenders()?, turns), (bench.sized_contenders()?, turns), (slow, 1)]
    {
        let mut found = vec![(Vec::new(), 0, 0); contenders.len()];
        for turn in 0..turns {
            for (Contender { name, call, result, .. }, found) in contenders.iter().zip(&mut found) {
                progress::say("bench", format!("turn {} of {turns}: {name}", turn + 1));
                let measured = measure(name, call)?;
                found.0.push(measured.seconds);
                found.1 =
                    std::fs::metadata(result).with_context(|| format!("reading {result}"))?.len();
                found.2 = measured.peak.max(found.2);
                std::fs::remove_file(result).with_context(|| format!("removing {result}"))?;
            }
        }
        for (Contender { name, yardstick, .. }, (times, bytes, peak)) in
            contenders.into_iter().zip(found)
        {
            let seconds = median(times).context("no turn")?;
            rows.push(BundleRow { name, yardstick, seconds, bytes, peak });
        }
    }
    Ok(rows)
}

/// The rows as a table, each with its ratios to its reference.
pub fn table(rows: &[BundleRow]) -> String {
    let mut out = format!(
        "{:<21} {:>9} {:>6}  {:>10} {:>7}  {:>9}\n",
        "", "time", "ratio", "size", "ratio", "memory"
    );
    for row in rows {
        let base = rows.iter().find(|other| other.name == row.yardstick).unwrap_or(row);
        out.push_str(&format!(
            "{:<21} {:>7.2} s {:>5.2}x  {:>6.1} MiB {:>6.3}x  {:>5} MiB\n",
            row.name,
            row.seconds,
            row.seconds / base.seconds,
            row.bytes as f64 / MIB as f64,
            row.bytes as f64 / base.bytes as f64,
            row.peak / MIB,
        ));
    }
    out
}

struct BundleBench<'a> {
    /// A plain (perhaps sparse) file.
    payload: &'a Utf8Path,
    folder: &'a Utf8Path,
}

impl BundleBench<'_> {
    fn slipway(&self, level: &str, yardstick: &str) -> Result<Contender> {
        self.slipway_with(self.payload, level, format!("slipway {level}"), yardstick)
    }

    fn slipway_with(
        &self,
        payload: &Utf8Path,
        level: &str,
        name: String,
        yardstick: &str,
    ) -> Result<Contender> {
        let result = self.folder.join(format!("ours-{level}.bundle"));
        let call = Call::own(&["pack", payload.as_str(), level, result.as_str()])?;
        Ok(Contender { name, yardstick: yardstick.to_owned(), call, result })
    }

    fn other(&self, name: &str, yardstick: &str, result: &str, args: &[&str]) -> Contender {
        let result = self.folder.join(result);
        let fill = |arg: &&str| match *arg {
            "IN" => self.payload.to_string(),
            "OUT" => result.to_string(),
            other => other.to_owned(),
        };
        let args: Vec<String> = args.iter().map(fill).collect();
        let call = Call::new(name.split(' ').next().unwrap_or(name), &args);
        Contender { name: name.to_owned(), yardstick: yardstick.to_owned(), call, result }
    }

    fn zstd(&self, level: &str) -> Contender {
        let name = format!("zstd -T0 -{level}");
        let args = ["-q", "-f", "-T0", &format!("-{level}"), "IN", "-o", "OUT"];
        self.other(&name, &name, "zstd.zst", &args)
    }

    fn quick_contenders(&self) -> Result<Vec<Contender>> {
        let mut all = vec![
            self.zstd("3"),
            self.slipway("fast", "zstd -T0 -3")?,
            self.zstd("9"),
            self.slipway("release", "zstd -T0 -9")?,
        ];
        if exec::find_program("rauc").is_some() && exec::find_program("mksquashfs").is_some() {
            all.push(self.rauc()?);
        }
        if exec::find_program("zip").is_some() {
            let args = ["-q", "-j", "OUT", "IN"];
            all.push(self.other("zip", "zstd -T0 -3", "payload.zip", &args));
        }
        Ok(all)
    }

    /// Slipway with payloads of several sizes: the time grows with the size, the memory does not.
    fn sized_contenders(&self) -> Result<Vec<Contender>> {
        let one = |mib: &u64| {
            let payload = self.folder.join(format!("payload-{mib}.img"));
            cut_payload(self.payload, &payload, mib * MIB)?;
            let name = format!("slipway fast {mib} MiB");
            self.slipway_with(&payload, "fast", name.clone(), &name)
        };
        SIZES.iter().map(one).collect()
    }

    fn slow_contenders(&self) -> Result<Vec<Contender>> {
        Ok(vec![self.zstd("19"), self.slipway("slow", "zstd -T0 -19")?])
    }

    /// A verity bundle of the one payload, compressed with zstd, signed with a temporary certificate.
    fn rauc(&self) -> Result<Contender> {
        let input = self.folder.join("rauc");
        std::fs::create_dir_all(&input).with_context(|| format!("creating {input}"))?;
        let (key, certificate) = (self.folder.join("rauc.key"), self.folder.join("rauc.crt"));
        exec::Tool::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"])
            .args(["-keyout", key.as_str(), "-out", certificate.as_str()])
            .run()?;
        let image = input.join("root.ext4");
        let payload = self.payload.canonicalize_utf8().context("finding the payload")?;
        if std::fs::hard_link(&payload, &image).is_err() {
            std::fs::copy(&payload, &image).with_context(|| format!("copying to {image}"))?;
        }
        let manifest = "[update]\ncompatible=bench\nversion=1\n\n[bundle]\nformat=verity\n\n[image.rootfs]\nfilename=root.ext4\n";
        let path = input.join("manifest.raucm");
        std::fs::write(&path, manifest).with_context(|| format!("writing {path}"))?;
        let args = [
            "--mksquashfs-args=-comp zstd -Xcompression-level 3",
            &format!("--cert={certificate}"),
            &format!("--key={key}"),
            "bundle",
            input.as_str(),
            "OUT",
        ];
        Ok(self.other("rauc bundle", "zstd -T0 -3", "rauc.raucb", &args))
    }
}

/// The child's work: one bundle of one payload, signed with a temporary key.
pub fn pack(payload: &Utf8Path, level: BundleCompression, out: &Utf8Path) -> Result<()> {
    let level = match level {
        BundleCompression::Fast => CompressionLevel::Fast,
        BundleCompression::Release => CompressionLevel::Release,
        BundleCompression::Slow => CompressionLevel::Slow,
    };
    let dir = tempfile::tempdir().context("creating a temporary directory")?;
    let dir = Utf8Path::from_path(dir.path()).context("the temporary directory is not UTF-8")?;
    pack_payload(payload, level, dir, out)
}
