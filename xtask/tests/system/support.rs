//! Shared by the system tests: the builds, copies of the workspace, and the tool as a user starts it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use xtask::artifact::hash_file;
use xtask::build::qemu_files;
use xtask::cache::Cache;
use xtask::config;
use xtask::exec;
use xtask::facts;
use xtask::plan::{self, Plan};
use xtask::progress::format_duration;
use xtask::qemu::{MachineFiles, QemuSession};
use xtask::workspace::dist_dir;

pub use crate::program::tool;
pub use crate::workspace::root;

/// An address that refuses every connection: nothing listens on the discard port.
pub const NOBODY: &str = "http://127.0.0.1:9";

/// Prints the progress of this test: others run in parallel.
pub fn say(text: impl AsRef<str>) {
    let thread = std::thread::current();
    eprintln!("{}: {}", thread.name().unwrap_or("system"), text.as_ref());
}

/// A directory on the disk of `target/`, removed with the value.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Result<Self> {
        static SWEPT: OnceLock<Result<(), String>> = OnceLock::new();
        let dir = Utf8Path::new(env!("CARGO_TARGET_TMPDIR"));
        fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
        let swept = SWEPT.get_or_init(|| sweep(dir).map_err(|error| format!("{error:#}")));
        swept.clone().map_err(|error| anyhow!("removing what earlier tests left: {error}"))?;
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let folder = tempfile::Builder::new().prefix(&prefix).tempdir_in(dir)?;
        Ok(Self(folder))
    }

    pub fn at(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.0.path()).expect("UTF-8").join(name)
    }
}

/// How the directories' names begin; the process follows.
const PREFIX: &str = "system-";

/// Removes the directories of processes that are gone: those that were killed left gigabytes, and
/// what all tests of a run share stays to its end.
fn sweep(dir: &Utf8Path) -> Result<()> {
    for entry in dir.read_dir_utf8()? {
        let entry = entry?;
        let owner = entry.file_name().strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|id| !Utf8Path::new("/proc").join(id).exists()) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// One call of the tool.
#[derive(Clone)]
pub struct Xtask {
    dir: Utf8PathBuf,
    environment: Vec<(String, String)>,
    umask: &'static str,
    small_disk: Option<(Utf8PathBuf, u64)>,
}

/// How a call ended and what it said.
pub struct CommandOutput {
    pub status: ExitStatus,
    pub out: String,
    pub errors: String,
}

impl CommandOutput {
    /// The standard output of a call that succeeded.
    pub fn good(self) -> Result<String> {
        ensure!(self.status.success(), "the command failed ({}):\n{}", self.status, self.errors);
        Ok(self.out)
    }

    /// The error of a call that failed as it should: with a message, not with a panic or a signal.
    pub fn refused(self) -> Result<String> {
        ensure!(self.status.code() == Some(1), "expected exit status 1, found {}", self.status);
        let start = self.errors.find("error: ").context("it printed no `error: `")?;
        Ok(self.errors[start..].to_owned())
    }
}

impl Xtask {
    /// The tool, started in a workspace.
    pub fn new(dir: &Utf8Path) -> Self {
        Self { dir: dir.to_owned(), environment: Vec::new(), umask: "022", small_disk: None }
    }

    pub fn env(mut self, name: &str, value: impl AsRef<str>) -> Self {
        self.environment.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    pub fn umask(mut self, umask: &'static str) -> Self {
        self.umask = umask;
        self
    }

    /// No registry, mirror or index can be reached.
    pub fn without_network(self) -> Self {
        let mut this = self.env("PIP_RETRIES", "0").env("PIP_INDEX_URL", NOBODY);
        for name in ["SLIPWAY_DEBIAN_MIRROR", "SLIPWAY_DEBIAN_SECURITY_MIRROR"] {
            this = this.env(name, NOBODY);
        }
        this
    }

    /// Puts an empty disk of this many MiB on a directory, for this call only. Its files at the end
    /// are listed on standard error, since they disappear with the call.
    pub fn small_disk(mut self, dir: &Utf8Path, mebibytes: u64) -> Self {
        self.small_disk = Some((dir.to_owned(), mebibytes));
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut script = format!("umask {}; ", self.umask);
        let mut command = match &self.small_disk {
            None => {
                script.push_str("exec \"$0\" \"$@\"");
                Command::new("sh")
            }
            Some((dir, mebibytes)) => {
                script.push_str(&format!(
                    "mount -t tmpfs -o size={mebibytes}m none '{dir}' || exit 99; \"$0\" \"$@\"; \
                     code=$?; find '{dir}' -type f -printf 'left: %p\\n' >&2; exit $code"
                ));
                let mut command = Command::new(exec::find_program("unshare").expect("unshare"));
                // Root mounts by itself, and in a chroot it may not make user namespaces.
                if !rustix::process::geteuid().is_root() {
                    command.args(["--user", "--map-root-user"]);
                }
                command.args(["--mount", "sh"]);
                command
            }
        };
        command.args(["-c", &script, env!("CARGO_BIN_EXE_xtask")]).args(arguments);
        command.current_dir(&self.dir).stdin(Stdio::null());
        // What others have built proves nothing.
        command.env_remove("SLIPWAY_SHARED_CACHE");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts it in a process group of its own, silent, to be killed.
    pub fn start(&self, arguments: &[&str]) -> Result<Child> {
        let mut command = self.command(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        command.spawn().context("starting the tool")
    }

    /// Runs it to the end; its standard error appears as it comes.
    pub fn run(&self, arguments: &[&str]) -> Result<CommandOutput> {
        let started = Instant::now();
        say(format!("$ xtask {}   (in {})", arguments.join(" "), self.dir));
        let mut command = self.command(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut out = child.stdout.take().context("standard output")?;
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut out, &mut text).map(|_| text)
        });
        let mut errors = String::new();
        for line in BufReader::new(child.stderr.take().context("standard error")?).lines() {
            let line = line?;
            say(&line);
            errors.push_str(&line);
            errors.push('\n');
        }
        let out = reader.join().map_err(|_| anyhow!("reading the output"))??;
        let status = child.wait()?;
        say(format!("{status} after {}", format_duration(started.elapsed())));
        Ok(CommandOutput { status, out, errors })
    }

    /// Builds for a board and returns the report.
    pub fn build(&self, board: &str, more: &[&str]) -> Result<Value> {
        let arguments = ["build-image", "--no-install", "--format", "json", "--board", board];
        let out = self.run(&[&arguments[..], more].concat())?.good()?;
        serde_json::from_str(&out).context("reading the report from standard output")
    }
}

/// Waits for the shell of the console's login, and keeps from then on what the kernel and systemd say out of the
/// midst of a command's output: the login does not wait for the last unit on a busy machine.
pub fn logs_in(
    session: &mut QemuSession,
    hostname: &str,
    timeout: Duration,
    command: Duration,
) -> Result<()> {
    session.expect(&format!("{hostname} login: root (automatic login)"), timeout)?;
    session.expect(&format!("root@{hostname}:"), timeout)?;
    // systemd(1): with this signal it shows no more status messages on the console.
    let (code, printed) = session.run("dmesg --console-off && kill -s RTMIN+21 1", command)?;
    ensure!(code == 0, "the console stays loud: {printed}");
    Ok(())
}

/// What a build made.
pub struct Built {
    pub plan: Plan,
    pub dist: Utf8PathBuf,
    pub image: Utf8PathBuf,
    pub bundle: Utf8PathBuf,
    pub qemu: Option<MachineFiles>,
}

/// The build of a board in this workspace, made on the first request. Concurrent requests for the
/// same board wait for it.
pub fn built(board: &str) -> Result<&'static Built> {
    built_of(None, board)
}

/// The same of a product that is not the default one.
pub fn built_of(product: Option<&str>, board: &str) -> Result<&'static Built> {
    type Build = Arc<OnceLock<Result<&'static Built, String>>>;
    static BUILDS: Mutex<BTreeMap<String, Build>> = Mutex::new(BTreeMap::new());
    let what = format!("{} for {board}", product.unwrap_or("the default product"));
    let mut builds = BUILDS.lock().unwrap_or_else(PoisonError::into_inner);
    let build = Arc::clone(builds.entry(what.clone()).or_default());
    drop(builds);
    let result = build.get_or_init(|| {
        say(format!("the build of {what} that the tests share"));
        let more: Vec<&str> = product.into_iter().flat_map(|name| ["--product", name]).collect();
        let built = Xtask::new(&root()).build(board, &more);
        let built = built.and_then(|_| results_of(&root(), product, board));
        built.map(|built| &*Box::leak(Box::new(built))).map_err(|e| format!("{e:#}"))
    });
    result.clone().map_err(|error| anyhow!("building {what}: {error}"))
}

/// A build of the firmware's boot flow, in a copy of the workspace: the board pi4 with Debian's kernel, which the board
/// refuses since no robot with it could try a slot. Card and bundle are what they are with any kernel.
pub fn built_for_the_firmware() -> Result<&'static Built> {
    static BUILT: Mutex<Option<Result<&'static Built, String>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || -> Result<&'static Built> {
        let folder = Box::leak(Box::new(Folder::new()?));
        let copy = folder.at("workspace");
        copy_workspace(&copy)?;
        let edit = |path: &str, find: &str, put: &str| -> Result<()> {
            let text = fs::read_to_string(copy.join(path))?;
            anyhow::ensure!(text.contains(find), "{path} has no {find}");
            Ok(fs::write(copy.join(path), text.replace(find, put))?)
        };
        let kernels = "kernels = [\"linux-image-rpi-v8\", \"linux-image-rpi-2711\"]\n";
        edit("board/pi4/board.toml", kernels, "")?;
        // Debian's kernel and firmware would start no Pi 4 in this flow, and a build refuses such a card: it is one for a
        // machine that nothing is known of.
        let models = "compatible = [\"raspberrypi,4-model-b\", \"raspberrypi,400\", \"raspberrypi,4-compute-module\"]";
        edit("board/pi4/board.toml", models, "compatible = [\"example,tryboot\"]")?;
        edit("configs/robot-dev.toml", "\"pi4-uboot\"", "\"pi4-uboot\", \"pi4\"")?;
        Xtask::new(&copy).build("pi4", &[])?;
        Ok(&*Box::leak(Box::new(results(&copy, "pi4")?)))
    };
    let result = built.get_or_insert_with(|| make().map_err(|error| format!("{error:#}")));
    result.clone().map_err(|error| anyhow!("building for the firmware's flow: {error}"))
}

/// What a build of the default product made in a workspace.
pub fn results(workspace: &Utf8Path, board: &str) -> Result<Built> {
    results_of(workspace, None, board)
}

/// The same of a product that is not the default one.
pub fn results_of(workspace: &Utf8Path, product: Option<&str>, board: &str) -> Result<Built> {
    let config = config::load(workspace, product, Some(board))?;
    let plan = plan::resolve(&config, &facts::collect(workspace)?)?;
    let dist = dist_dir(workspace, &plan);
    let stem = dist.join(plan.stem());
    let (image, bundle) = (format!("{stem}.img").into(), format!("{stem}.bundle").into());
    let qemu = qemu_files(&dist, &plan);
    Ok(Built { plan, dist, image, bundle, qemu })
}

impl Built {
    /// The same results in another workspace.
    pub fn within(&self, workspace: &Utf8Path) -> Result<[Utf8PathBuf; 4]> {
        let there = |path: &Utf8Path| -> Result<Utf8PathBuf> {
            Ok(workspace.join(path.strip_prefix(root())?))
        };
        let map = Utf8PathBuf::from(format!("{}.bmap", self.image));
        let sbom = self.dist.join("sbom.cdx.json");
        Ok([there(&self.image)?, there(&map)?, there(&self.bundle)?, there(&sbom)?])
    }
}

/// Copies this workspace as it is, uncommitted changes included.
pub fn copy_workspace(to: &Utf8Path) -> Result<()> {
    let root = root();
    let git = |dir: &Utf8Path| tool("git").args(["-C", dir.as_str()]);
    tool("git").args(["clone", "--quiet", root.as_str(), to.as_str()]).run()?;
    // A checkout of a tag or of CI has no branch that a clone would take.
    let commit = git(&root).args(["rev-parse", "HEAD"]).read()?;
    git(to).args(["checkout", "--quiet", "--detach", commit.trim()]).run()?;
    let list = ["ls-files", "-z", "--modified", "--others", "--deleted", "--exclude-standard"];
    let changed = git(&root).args(list).read()?;
    for name in changed.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (root.join(name), to.join(name));
        match fs::symlink_metadata(&from) {
            Err(_) if to.symlink_metadata().is_ok() => fs::remove_file(&to)?,
            Err(_) => {}
            Ok(_) => {
                fs::create_dir_all(to.parent().context("a parent")?)?;
                tool("cp").args(["--no-dereference", "--preserve=mode"]).arg(from).arg(to).run()?;
            }
        }
    }
    Ok(())
}

/// A cache of its own that shares the named parts with the machine's; what those hold stays there.
pub fn cache_sharing(dir: &Utf8Path, parts: &[&str]) -> Result<()> {
    let shared = Cache::locate()?.root;
    for part in parts {
        let (from, to) = (shared.join(part), dir.join(part));
        fs::create_dir_all(&from)?;
        fs::create_dir_all(to.parent().context("a parent")?)?;
        std::os::unix::fs::symlink(&from, &to).with_context(|| format!("linking {to}"))?;
    }
    Ok(())
}

/// The names of the stages of a report, and whether each was kept.
pub fn stages(report: &Value) -> Result<Vec<(String, bool)>> {
    let list = report["stages"].as_array().context("the report has no stages")?;
    list.iter()
        .map(|stage| {
            let name = stage["name"].as_str().context("a stage has no name")?;
            Ok((name.to_owned(), stage["cached"].as_bool().context("a stage has no `cached`")?))
        })
        .collect()
}

/// Every file below a directory with its length and SHA-256, but for what `run --local` keeps and
/// the consoles' logs: other tests write them meanwhile.
pub fn snapshot(dir: &Utf8Path) -> Result<BTreeMap<Utf8PathBuf, (u64, String)>> {
    let mut found = BTreeMap::new();
    let others = ["local", "log"].map(|name| dir.join(name));
    let ours = |path: &Utf8PathBuf| !others.iter().any(|other| path.starts_with(other));
    for path in files(dir)?.into_iter().filter(ours) {
        found.insert(path.strip_prefix(dir)?.to_owned(), hash_file(&path)?);
    }
    Ok(found)
}

/// Every file below a directory; none when there is no directory.
pub fn files(dir: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        if !folder.exists() {
            continue;
        }
        for entry in folder.read_dir_utf8()? {
            let path = entry?.into_path();
            if path.symlink_metadata()?.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}

/// Checks that every file with a final name is complete. Returns the number of images and bundles.
pub fn nothing_partial(workspace: &Utf8Path) -> Result<usize> {
    let mut whole = 0;
    for path in files(&workspace.join("dist"))? {
        match path.extension() {
            Some("img" | "bundle") => {
                let printed = Xtask::new(workspace).run(&["verify", path.as_str()])?;
                printed.good().with_context(|| format!("{path} is partial"))?;
                whole += 1;
            }
            Some("json") => {
                let text = fs::read_to_string(&path)?;
                serde_json::from_str::<Value>(&text)
                    .with_context(|| format!("{path} is partial"))?;
            }
            Some("html" | "txt" | "log" | "partial" | "bmap") | None => {}
            Some(_) if path.as_str().contains("/rendered/") => {}
            Some("bin" | "dtb") if path.as_str().contains("/qemu/") => {}
            Some(_) => bail!("an unexpected file: {path}"),
        }
    }
    Ok(whole)
}

/// `cmp` of two files; says where they differ.
pub fn same(one: &Utf8Path, other: &Utf8Path) -> Result<()> {
    tool("cmp").arg(one).arg(other).run()
}
