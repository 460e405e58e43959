//! APIs alone, into a robot that runs: another version is served without a restart, one whose
//! server does not start is rolled back, and where `data` is not available, the running one is
//! kept.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bundle::{BuildKind, CompressionLevel, Version};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use xtask::artifact::hash_file;
use xtask::keys::{self, KeyDirectory};
use xtask::plan::Plan;
use xtask::qemu::QemuSession;
use xtask::update::{ComponentRequest, PackRequest, PayloadRequest, pack_bundle};

use crate::boot::{COMMAND, output};
use crate::services::{api_is_up, get};
use crate::support::{Folder, Xtask, copy_workspace, say, tool};

/// A real version besides the one that the product has locked.
const OTHER: &str = "10.0.0";
/// What an install and the change take, on a busy machine without hardware virtualisation.
const INSTALL: Duration = Duration::from_secs(900);

/// Bundles of APIs, and the product's own version.
pub struct Apis {
    own_version: String,
    /// The product's own API.
    own: Utf8PathBuf,
    /// [`OTHER`].
    other: Utf8PathBuf,
    /// [`OTHER`] with a package that cannot be imported.
    broken: Utf8PathBuf,
}

/// Builds the bundle of a workspace's API as a developer does.
fn component(workspace: &Utf8Path, board: &str) -> Result<Utf8PathBuf> {
    let words = ["build-image", "--component", "api", "--board", board, "--no-install"];
    let printed =
        Xtask::new(workspace).run(&[&words[..], &["--format", "json"]].concat())?.good()?;
    let made: Value =
        serde_json::from_str(&printed).with_context(|| format!("reading {printed}"))?;
    Ok(made["bundle"]["path"].as_str().with_context(|| format!("{made}"))?.into())
}

impl Apis {
    /// Makes them, `own` and `other` as a developer does.
    pub fn make(folder: &Folder, board: &str, plan: &Plan) -> Result<Self> {
        let (ours, theirs) = (folder.at("own-api"), folder.at("other-api"));
        copy_workspace(&ours)?;
        copy_workspace(&theirs)?;
        let api = plan.api.as_ref().context("the product has an API")?;
        let (name, own_version) = api.package.split_once("==").context("a pinned package")?;
        let product = theirs.join(format!("configs/{}.toml", plan.product.name));
        let text = fs::read_to_string(&product)?;
        let pinned = format!("package = \"{}\"", api.package);
        ensure!(text.contains(&pinned) && own_version != OTHER, "{product} pins another version");
        fs::write(&product, text.replacen(&pinned, &format!("package = \"{name}=={OTHER}\""), 1))?;
        Xtask::new(&theirs).run(&["lock", "--only", "wheels"])?.good()?;
        let other = component(&theirs, board)?;
        let broken = folder.at("broken.bundle");
        break_it(&other, name, plan, &folder.at("broken-api"), &broken)?;
        let own = component(&ours, board)?;
        Ok(Self { own_version: own_version.to_owned(), own, other, broken })
    }

    /// In the order in which [`changed_without_a_restart`] expects them.
    pub fn disks(&self) -> [&Utf8Path; 3] {
        [&self.other, &self.broken, &self.own]
    }
}

/// The same API with a package that ends Python when it is imported, signed like any other.
fn break_it(
    good: &Utf8Path,
    name: &str,
    plan: &Plan,
    folder: &Utf8Path,
    out: &Utf8Path,
) -> Result<()> {
    let tree = folder.join("tree");
    fs::create_dir_all(&tree)?;
    tool("tar").args(["-xf", good.as_str(), "-C", folder.as_str()]).run()?;
    for entry in folder.join("api").read_dir_utf8()? {
        let path = entry?.into_path();
        if path.extension() == Some("zst") {
            tool("zstd").args(["-q", "-d", "--rm", path.as_str()]).run()?;
        }
    }
    let payload = |role: &str| folder.join("api").join(role);
    tool("tar").args(["-xf", payload(name).as_str(), "-C", tree.as_str()]).run()?;
    let package = tree.join("site").join(name);
    for compiled in package.join("__pycache__").read_dir_utf8()? {
        let path = compiled?.into_path();
        if path.file_name().is_some_and(|name| name.starts_with("__init__.")) {
            fs::remove_file(path)?;
        }
    }
    fs::write(package.join("__init__.py"), "raise SystemExit('this version does not start')\n")?;
    let mut pack_tree = tool("tar").args(["-cf", payload(name).as_str(), "-C", tree.as_str()]);
    for entry in tree.read_dir_utf8()? {
        pack_tree = pack_tree.arg(entry?.file_name());
    }
    pack_tree.run()?;

    // What the lock says of a tree.
    let listed = tool("find").args([tree.as_str(), "-type", "f", "-printf", "%s\\n"]).read()?;
    let sizes: Vec<u64> = listed.lines().map(str::parse).collect::<Result<_, _>>()?;
    let lock_path = payload("component.json");
    let mut lock: Value = serde_json::from_str(&fs::read_to_string(&lock_path)?)?;
    let wheels = lock["wheels"].as_array_mut().context("the lock has no wheels")?;
    let wheel = wheels.iter_mut().find(|w| w["role"] == name).context("the lock has no wheel")?;
    for (key, value) in [
        ("tree", json!(hash_file(&payload(name))?.1)),
        ("size", json!(fs::metadata(payload(name))?.len())),
        ("files", json!(sizes.len())),
        ("bytes", json!(sizes.iter().sum::<u64>())),
    ] {
        let known = wheel.get_mut(key).with_context(|| format!("the lock has no {key}"))?;
        *known = value;
    }
    fs::write(&lock_path, serde_json::to_vec(&lock)?)?;

    // The lock comes first, then its wheels in its order.
    let wheels = lock["wheels"].as_array().into_iter().flatten();
    let roles = ["component.json"].into_iter().chain(wheels.filter_map(|w| w["role"].as_str()));
    let request = |role: &str| PayloadRequest { role: role.to_owned(), path: payload(role) };
    let request = PackRequest {
        product: plan.product.name.clone(),
        version: plan.product.version.clone(),
        kind: BuildKind::Development,
        boards: vec![plan.board.name.clone()],
        minimum_version: plan.update.minimum_version.clone(),
        key_epoch: None,
        epoch: plan.epoch,
        components: vec![ComponentRequest {
            name: "api".to_owned(),
            version: Version::parse(OTHER).context("a version")?,
            payloads: roles.map(request).collect(),
        }],
        level: CompressionLevel::Fast,
        workers: None,
        signers: &[KeyDirectory::open(&keys::key_directory()?)?.signer(BuildKind::Development)?],
    };
    pack_bundle(&request, out)?;
    Ok(())
}

/// What the agent answers, and its exit code.
fn slotd(session: &mut QemuSession, words: &str, time: Duration) -> Result<(i32, Value)> {
    let (code, printed) = session.run(&format!("slotd --format json {words} 2>/dev/null"), time)?;
    say(format!("slotd {words}: {code} {printed}"));
    let json = printed.find('{').and_then(|at| serde_json::from_str(&printed[at..]).ok());
    Ok((code, json.with_context(|| format!("slotd {words} printed `{printed}`"))?))
}

/// Which copy answers through the proxy: its version, and whether it is on `data`.
pub fn serves(session: &mut QemuSession, version: &str, on_data: bool) -> Result<()> {
    let (status, text) = get(session, "127.0.0.1", "/health")?;
    ensure!(status == 200, "/health answers {status}: {text}");
    let health: Value = serde_json::from_str(&text).with_context(|| format!("reading {text}"))?;
    ensure!(health["api_version"] == version, "expected {version}: {text}");
    let path = health["path"].as_str().unwrap_or_default();
    ensure!(path.starts_with("/data/apps/api/") == on_data, "another copy serves: {text}");
    // The agent says the same, and `/data/system` belongs to that copy.
    let (code, printed) = slotd(session, "status", COMMAND)?;
    let expected = if on_data { "installed" } else { "built-in" };
    ensure!(code == 0 && printed["api"]["serves"] == expected, "{}", printed["api"]);
    ensure!(printed["api"]["version"] == version, "{}", printed["api"]);
    let (code, printed) = slotd(session, "provision --check", COMMAND)?;
    ensure!(code == 0, "/data/system is of another copy: {printed}");
    Ok(())
}

/// Installs from a disk, and expects it to be done; how long nothing answered.
fn installs(session: &mut QemuSession, disk: &str) -> Result<(Value, Duration)> {
    let (code, printed) = slotd(session, &format!("install - </dev/{disk}"), INSTALL)?;
    ensure!(code == 0, "the API is refused: {printed}");
    let down = printed["down-ms"].as_u64().with_context(|| format!("no time in {printed}"))?;
    Ok((printed, Duration::from_millis(down)))
}

fn refuses(session: &mut QemuSession, disk: &str, code: &str) -> Result<()> {
    let (exit, printed) = slotd(session, &format!("install - </dev/{disk}"), INSTALL)?;
    ensure!(exit != 0 && printed["refused"]["code"] == code, "expected `{code}`: {exit} {printed}");
    Ok(())
}

/// On a robot that serves its own API, with [`Apis::disks`] at these devices: another version and back, one
/// that does not start, a full and a read-only `data`. The other version serves at the end. Nothing restarts.
pub fn changed_without_a_restart(
    session: &mut QemuSession,
    apis: &Apis,
    [other, broken, own]: [&str; 3],
) -> Result<()> {
    let boot = "cat /proc/sys/kernel/random/boot_id; sha256sum /usr/lib/slipway/base-id";
    let before = output(session, boot, COMMAND)?;
    serves_its_own(session, apis)?;

    let full = "fallocate -l $(($(stat -f -c '%a * %S' /data) - 30000000)) /data/full";
    output(session, full, COMMAND)?;
    refuses(session, other, "no-space")?;
    output(session, "rm /data/full && mount -o remount,bind,ro /data", COMMAND)?;
    refuses(session, other, "no-data")?;
    output(session, "mount -o remount,bind,rw /data", COMMAND)?;
    serves(session, &apis.own_version, false)?;

    let (_, first) = installs(session, other)?;
    serves(session, OTHER, true)?;
    let started = Instant::now();
    refuses(session, broken, "api-unhealthy")?;
    say(format!("one that does not start was rolled back after {:.0?}", started.elapsed()));
    serves(session, OTHER, true)?;
    let (printed, second) = installs(session, own)?;
    ensure!(printed["reused"].as_u64() > Some(15), "few wheels are taken over: {printed}");
    serves(session, &apis.own_version, true)?;
    say(format!("an API was away for {first:.1?} and {second:.1?}"));
    let (code, printed) = slotd(session, "roll-back --component api", INSTALL)?;
    ensure!(code == 0, "no way back: {printed}");
    serves(session, OTHER, true)?;
    let after = output(session, boot, COMMAND)?;
    ensure!(before == after, "the robot has restarted, or its base was touched: {before} {after}");
    Ok(())
}

/// Serves the product's own API, once the server is there.
pub fn serves_its_own(session: &mut QemuSession, apis: &Apis) -> Result<()> {
    // It is still importing its package when the console is there.
    api_is_up(session)?;
    serves(session, &apis.own_version, false)
}

/// After an update to a base for which [`OTHER`] is too old.
pub fn fell_back(session: &mut QemuSession, apis: &Apis) -> Result<()> {
    let (_, printed) = slotd(session, "status", COMMAND)?;
    let why = printed["api"]["why"].as_str().unwrap_or_default();
    ensure!(why.contains(OTHER), "the status does not say why: {}", printed["api"]);
    serves(session, &apis.own_version, false)
}
