//! A cold start in a fresh Debian: the first card image and all tests, compared with the time to
//! create that Debian, in one run. Measures the README's two commands, with everything that they
//! download and install.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use xtask::artifact::free_space;
use xtask::exec::{Tool, cargo_home};
use xtask::git;
use xtask::progress::{self, say};
use xtask::rootfs::debian::AptMirrors;

/// The packages that the README requires before its first command, and Debian's keyring.
const PACKAGES: &str = "build-essential,ca-certificates,git";
/// This machine's settings for mirrors, registries and indexes.
const SETTINGS: [&str; 6] = [
    "etc/apt",
    "etc/hosts",
    "etc/pip.conf",
    "etc/resolv.conf",
    "etc/ssl/certs",
    "usr/local/share/ca-certificates",
];
/// Makes a directory the root of a mount namespace, and runs a command there with a separate
/// environment: after chroot(2) it could not create user namespaces.
const ENTER: &str = r#"set -eu
root=$1 home=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mkdir -p old
pivot_root . old
umount -l /old
cd "$home/slipway"
exec env -i HOME="$home" PATH="/opt/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin" TERM=dumb LANG=C.UTF-8 CARGO_TERM_COLOR=never "$@"
"#;

/// One line of the table.
pub struct ColdRow {
    /// The command.
    what: String,
    /// How long it took.
    took: Duration,
    /// The maximum disk space that it used at any time, in bytes.
    disk: u64,
}

/// Measures once, in a directory that must not exist. The tests take most of the time.
///
/// # Errors
/// When the user is not root; when Debian cannot be created; when one of the commands fails.
pub fn run(workspace: &Utf8Path, dir: &Utf8Path) -> Result<Vec<ColdRow>> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the benchmark `cold` mounts a separate Debian, which needs root\nhelp: run it as root"
    );
    fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    let root = dir.join("root");
    let mirrors = AptMirrors::from_host()?;
    let debian = measure("a Debian with a C compiler (mmdebstrap)", dir, || {
        let tool = Tool::new("mmdebstrap").args(["--variant=minbase", "--mode=root"]);
        let tool = tool.arg(format!("--include={PACKAGES}")).args(["bookworm", root.as_str()]);
        tool.arg(&mirrors.archive).log(&dir.join("mmdebstrap.log")).run()
    })?;
    prepare(workspace, &root)?;
    let mut rows = vec![debian];
    for command in ["build-image", "test"] {
        say("bench", format!("cargo xtask {command}, cold"));
        let words = ["--mount", "--pid", "--fork", "--kill-child", "--", "sh", "-c", ENTER, "sh"];
        rows.push(measure(&format!("cargo xtask {command}"), dir, || {
            let tool = Tool::new("unshare").with_network().args(words);
            tool.args([root.as_str(), "/root", "cargo", "xtask", command]).run_on_terminal()
        })?);
    }
    Ok(rows)
}

/// Copies a clone of the commit, this machine's Rust and its settings for mirrors and registries.
fn prepare(workspace: &Utf8Path, root: &Utf8Path) -> Result<()> {
    let sysroot = Tool::new("rustc").args(["--print", "sysroot"]).read()?;
    copy_tree(Utf8Path::new(sysroot.trim()), &root.join("opt/rust"))?;
    for path in SETTINGS {
        let (from, to) = (Utf8Path::new("/").join(path), root.join(path));
        if from.exists() {
            if to.is_dir() {
                fs::remove_dir_all(&to).with_context(|| format!("removing {to}"))?;
            }
            copy_tree(&from, &to)?;
        }
    }
    let home = cargo_home()?;
    let settings = Utf8PathBuf::from(home).join("config.toml");
    if settings.is_file() {
        copy_tree(&settings, &root.join("root/.cargo/config.toml"))?;
    }
    let clone = root.join("root/slipway");
    git::git_without_repository()
        .args(["clone", "--quiet", "--no-local", workspace.as_str(), clone.as_str()])
        .run()
}

fn copy_tree(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let parent = to.parent().context("a path below the root")?;
    fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
    Tool::new("cp").args(["-a", "--no-target-directory"]).arg(from).arg(to).run()
}

/// Measures the time and the disk space of an action.
fn measure(what: &str, dir: &Utf8Path, run: impl FnOnce() -> Result<()>) -> Result<ColdRow> {
    let before = free_space(dir)?;
    let done = AtomicBool::new(false);
    let started = Instant::now();
    let (result, least) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut least = before;
            while !done.load(Ordering::Relaxed) {
                least = free_space(dir).map_or(least, |free| least.min(free));
                std::thread::sleep(Duration::from_millis(500));
            }
            least
        });
        let result = run();
        done.store(true, Ordering::Relaxed);
        (result, watcher.join().unwrap_or(before))
    });
    result.with_context(|| what.to_owned())?;
    say("bench", format!("{what}: {}", progress::format_duration(started.elapsed())));
    Ok(ColdRow { what: what.to_owned(), took: started.elapsed(), disk: before - least })
}

/// The rows as a readable table; the first is the reference.
pub fn table(rows: &[ColdRow]) -> String {
    let floor = rows.first().map_or(1.0, |row| row.took.as_secs_f64());
    let mut text =
        String::from("                                              seconds   ratio  disk\n");
    for row in rows {
        let seconds = row.took.as_secs_f64();
        let (ratio, disk) = (seconds / floor, progress::format_bytes(row.disk));
        text.push_str(&format!("{:<44} {seconds:>8.0} {ratio:>6.1}x  {disk}\n", row.what));
    }
    text
}
