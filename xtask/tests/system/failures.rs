//! Errors of a build when the disk is full, the network is down or the mirror is empty. No partial file remains, and
//! the next build completes.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::support::{
    Folder, Xtask, built, cache_sharing, copy_workspace, files, nothing_partial, say,
};

const BOARD: &str = "qemu-arm64";
const BUILD: [&str; 4] = ["build-image", "--no-install", "--board", BOARD];

/// A copy of the workspace with a cache of its own.
struct Place {
    _folder: Folder,
    workspace: Utf8PathBuf,
    cache: Utf8PathBuf,
}

impl Place {
    fn new(shared: &[&str]) -> Result<Self> {
        let folder = Folder::new()?;
        let (workspace, cache) = (folder.at("workspace"), folder.at("cache"));
        copy_workspace(&workspace)?;
        cache_sharing(&cache, shared)?;
        Ok(Self { _folder: folder, workspace, cache })
    }

    fn tool(&self) -> Xtask {
        Xtask::new(&self.workspace).env("SLIPWAY_CACHE", &self.cache)
    }

    /// The sentence with which a build is refused; nothing has been made then.
    fn refused(&self, tool: &Xtask, more: &[&str]) -> Result<String> {
        let message = tool.run(&[&BUILD[..], more].concat())?.refused()?;
        ensure!(nothing_partial(&self.workspace)? == 0, "an image or a bundle was made");
        Ok(message)
    }

    fn lock(&self) -> Result<String> {
        let path = &built(BOARD)?.plan.rootfs.lock;
        let path = path.as_ref().context("the product has a package lock")?;
        Ok(fs::read_to_string(self.workspace.join(path))?)
    }
}

fn contains(message: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(message.contains(word), "the message does not say `{word}`:\n{message}");
    }
    Ok(())
}

/// Where the disk is full: while the root filesystem, the image and the bundle are written.
#[test]
fn the_disk_is_full() -> Result<()> {
    let built = built(BOARD)?;
    let made = ["tools", "downloads", "stages/base", "stages/root", "stages/api", "stages/agent"];
    let place = Place::new(&made)?;
    let dist = place.workspace.join("dist");
    let compose = place.cache.join("stages/compose");
    fs::create_dir_all(&dist)?;
    fs::create_dir_all(&compose)?;
    let full =
        |what: &str, dir: &Utf8Path, mebibytes: u64, words: &[&str]| -> Result<Vec<String>> {
            say(format!("while {what} is written"));
            let message =
                place.refused(&place.tool().small_disk(dir, mebibytes), &["--offline"])?;
            contains(&message, words)?;
            let left = message.lines().filter_map(|line| line.strip_prefix("left: "));
            let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
            Ok(left.map(name).collect())
        };
    let any = |left: &[String], end: &str| left.iter().any(|name| name.ends_with(end));
    let words = ["root.tar.partial", "No space left on device"];
    let left = full("the root filesystem", &compose, 64, &words)?;
    ensure!(!any(&left, "root.tar") && !any(&left, ".ext4") && !any(&left, ".json"), "{left:?}");

    let words = [".img", "the disk is full; the image needs up to ", "help: free some space there"];
    let left = full("the image", &dist, 64, &words)?;
    ensure!(!any(&left, ".img") && !any(&left, ".bundle"), "{left:?}");

    let image = fs::metadata(&built.image)?.blocks() * 512;
    let room = image + fs::metadata(&built.bundle)?.len() / 2;
    let words = [".bundle", "No space left on device", "the disk is full; free some space"];
    let left = full("the bundle", &dist, room >> 20, &words)?;
    ensure!(any(&left, ".img") && !any(&left, ".bundle"), "{left:?}");

    say("the next build completes");
    place.tool().build(BOARD, &["--offline"])?;
    ensure!(nothing_partial(&place.workspace)? == 2, "an image and a bundle were expected");
    Ok(())
}

#[test]
fn there_is_no_network() -> Result<()> {
    let place = Place::new(&[])?;
    let lock = place.lock()?;
    say("a mirror that refuses connections");
    let message = place.refused(&place.tool().without_network(), &[])?;
    contains(&message, &["fetching ", "giving up after 4 attempts", "help: check the network"])?;
    say("offline, with an empty cache");
    let message = place.refused(&place.tool(), &["--offline"])?;
    contains(&message, &["offline, but ", " downloads are not in ", "help: run once without"])?;
    let first = lock.lines().find_map(|line| line.strip_prefix("name = ")).context("a package")?;
    contains(&message, &[first.trim_matches('"')])?;
    ensure!(place.lock()? == lock, "the package lock was rewritten");
    let stored = files(&place.cache)?;
    let stored: Vec<_> = stored.iter().filter(|p| p.as_str().contains("/downloads/")).collect();
    let whole = stored.iter().filter(|path| !path.as_str().ends_with(".partial")).count();
    ensure!(whole == 0, "in the store: {stored:?}");
    Ok(())
}

#[test]
fn there_is_no_index_of_wheels() -> Result<()> {
    built(BOARD)?;
    let place = Place::new(&["tools", "stages/base", "stages/root"])?;
    say("an index that refuses connections");
    let message = place.refused(&place.tool().without_network(), &[])?;
    contains(&message, &["downloading the wheels that the lock names", "pip"])?;
    say("offline");
    let message = place.refused(&place.tool(), &["--offline"])?;
    contains(&message, &["wheels are not in the cache", ".whl", "help: build once without"])
}

/// Answers every request with 404, until the test ends.
fn empty_mirror() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening")?;
    let address = format!("http://{}", listener.local_addr()?);
    let answer = |stream: std::net::TcpStream| -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 2 {
            line.clear();
        }
        let head = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        (&stream).write_all(head.as_bytes())
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || drop(answer(stream)));
        }
    });
    Ok(address)
}

/// That a plain build replaces just what has vanished is in `tests/debian.rs`, on a mirror of real
/// packages.
#[test]
fn the_mirror_has_nothing() -> Result<()> {
    let place = Place::new(&[])?;
    let lock = place.lock()?;
    let mirror = empty_mirror()?;
    let tool = place
        .tool()
        .env("SLIPWAY_DEBIAN_MIRROR", &mirror)
        .env("SLIPWAY_DEBIAN_SECURITY_MIRROR", &mirror);
    say("a plain build wants to replace what has vanished, and finds no index");
    let message = place.refused(&tool, &[])?;
    contains(&message, &["fetching the package indexes", &mirror, "404"])?;
    say("--locked refuses");
    let message = place.refused(&tool, &["--locked"])?;
    contains(&message, &["the mirror no longer has ", "help: build without --locked"])?;
    ensure!(place.lock()? == lock, "the package lock was rewritten");
    Ok(())
}

/// The chain from the boot ROM on is walked on the finished image, before that gets its name.
#[test]
fn a_model_would_not_start() -> Result<()> {
    built("pi3")?;
    let folder = Folder::new()?;
    let workspace = folder.at("workspace");
    copy_workspace(&workspace)?;
    let config = workspace.join("board/pi3/config.txt.j2");
    let text = fs::read_to_string(&config)?;
    let changed = format!("{text}# A smaller share for the GPU\ngpu_mem=16\n");
    let line = changed.lines().count();
    fs::write(&config, changed)?;
    let build = ["build-image", "--no-install", "--offline", "--board", "pi3"];
    let message = Xtask::new(&workspace).run(&build)?.refused()?;
    let place = format!("board/pi3/config.txt.j2:{line}");
    let models = ["raspberrypi,3-model-b", "raspberrypi,3-model-a-plus"];
    contains(&message, &[&place, "gpu_mem=16", "start_cd.elf", "help: ", models[0], models[1]])?;
    ensure!(nothing_partial(&workspace)? == 0, "an image or a bundle was made");
    Ok(())
}

/// Units are compared with the composed system: an overlay adds a unit whose program is not in the image.
#[test]
fn a_unit_starts_a_program_that_is_missing() -> Result<()> {
    built(BOARD)?;
    let folder = Folder::new()?;
    let workspace = folder.at("workspace");
    copy_workspace(&workspace)?;
    let units = "overlays/dev/usr/lib/systemd/system";
    fs::create_dir_all(workspace.join(units))?;
    let unit = format!("{units}/pipette.service");
    let text =
        "[Service]\nExecStart=/usr/bin/pipette --home\n\n[Install]\nWantedBy=multi-user.target\n";
    fs::write(workspace.join(&unit), text)?;
    let message = Xtask::new(&workspace).run(&[&BUILD[..], &["--offline"]].concat())?.refused()?;
    let place = format!("{unit}:2: `/usr/bin/pipette` is missing");
    contains(&message, &["this image does not contain", &place, "help: add the package"])?;
    ensure!(nothing_partial(&workspace)? == 0, "an image or a bundle was made");
    Ok(())
}
