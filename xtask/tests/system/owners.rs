//! Who owns what in a finished image: a base system brings programs, and configuration only as its packages have it.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::rootfs::glob;

use crate::support::{Built, Folder, built, say, tool};

/// What installing the base's packages makes in `/etc`, and no package lists. Nothing here is of a product.
const MADE_BY_INSTALLING: [&str; 18] = [
    "etc/.resolv.conf.systemd-resolved.bak",
    "etc/alternatives/*",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    "etc/dpkg/origins/default",
    "etc/{environment,inputrc,ld.so.cache,modules,mtab,networks,nsswitch.conf,profile,shells}",
    "etc/hosts.{allow,deny}",
    "etc/pam.d/common-*",
    "etc/python3/debian_config",
    "etc/rc?.d/*",
    "etc/runit/runsvdir/default/*",
    "etc/security/opasswd",
    "etc/ssh/sshd_config",
    "etc/sub{gid,uid}",
    // Links that enable the packages' own units.
    "etc/systemd/system/*.wants/*",
    "etc/systemd/system/dbus-*.service",
    "etc/systemd/system/sshd.service",
    // The users table: the base's accounts and the product's.
    "etc/{passwd,group,shadow}",
    "etc/gshadow",
];

/// What the build itself adds.
const MADE_BY_COMPOSE: [&str; 2] = ["usr/lib/slipway/*", "etc/ssh/authorized_keys.d/*"];

/// Copies parts of slot a out of the image.
fn unpack(built: &Built, folder: &Utf8Path) -> Result<()> {
    let slot = built.plan.disk.partition("root-a").context("there is a slot a")?;
    let image = format!("{}?offset={}", built.image, slot.offset);
    for (from, to) in [("/etc", ""), ("/var/lib/dpkg", "var/lib"), ("/usr/lib/slipway", "usr/lib")]
    {
        let into = folder.join(to);
        fs::create_dir_all(&into).with_context(|| format!("making {into}"))?;
        // It changes owners where it may, and says so where it may not.
        tool("debugfs").args(["-R", &format!("rdump {from} {into}"), &image]).run()?;
    }
    Ok(())
}

/// Files and links below a directory, without it.
fn list(folder: &Utf8Path, name: &Utf8Path, found: &mut BTreeSet<Utf8PathBuf>) -> Result<()> {
    for entry in folder.join(name).read_dir_utf8().with_context(|| format!("reading {name}"))? {
        let entry = entry?;
        let path = name.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            list(folder, &path, found)?;
        } else {
            found.insert(path);
        }
    }
    Ok(())
}

#[test]
fn the_base_owns_no_product_configuration() -> Result<()> {
    let built = built("qemu-arm64")?;
    let folder = Folder::new()?;
    let root = folder.at("root");
    unpack(built, &root)?;
    let mut found = BTreeSet::new();
    for name in ["etc", "usr/lib/slipway"] {
        list(&root, Utf8Path::new(name), &mut found)?;
    }
    let mut packaged = BTreeSet::new();
    for entry in root.join("var/lib/dpkg/info").read_dir_utf8()? {
        let entry = entry?;
        if entry.path().extension() == Some("list") {
            let text = fs::read_to_string(entry.path())?;
            packaged
                .extend(text.lines().map(|line| Utf8PathBuf::from(line.trim_start_matches('/'))));
        }
    }
    let overlay: BTreeSet<&str> = built.plan.overlay.iter().map(|f| f.target.as_str()).collect();
    let (installing, compose) =
        (glob::compile_globs(&MADE_BY_INSTALLING)?, glob::compile_globs(&MADE_BY_COMPOSE)?);
    let of_overlay = found.iter().filter(|path| overlay.contains(path.as_str())).count();
    let of_packages = found.iter().filter(|path| packaged.contains(*path)).count();
    say(format!(
        "{} files in /etc and /usr/lib/slipway: {of_overlay} of overlays, {of_packages} of packages",
        found.len()
    ));
    ensure!(of_overlay > 20 && of_packages > 20, "the listing is not one of an image");
    let nobodys: Vec<&Utf8PathBuf> = found
        .iter()
        .filter(|path| !overlay.contains(path.as_str()) && !packaged.contains(*path))
        .filter(|path| !installing.is_match(path) && !compose.is_match(path))
        .collect();
    ensure!(nobodys.is_empty(), "neither of an overlay nor of a package: {nobodys:?}");
    let base: Vec<_> = packaged.iter().filter(|path| path.starts_with("usr/lib/slipway")).collect();
    ensure!(base.is_empty(), "the base has what overlays should bring: {base:?}");

    // What the base's packages have configured is as they brought it, as dpkg itself sees it.
    let dpkg =
        tool("dpkg").args([format!("--root={root}").as_str(), "--verify"]).into_command().output();
    let verified = String::from_utf8(dpkg.context("running dpkg")?.stdout)?;
    let changed: Vec<&str> = verified
        .lines()
        .filter(|line| !line.starts_with("missing"))
        .filter_map(|line| line.rsplit_once(" /").map(|(_, path)| path))
        .collect();
    let unexpected: Vec<_> = changed.iter().filter(|path| !overlay.contains(**path)).collect();
    ensure!(unexpected.is_empty(), "changed, and not by an overlay: {unexpected:?}");
    // Were dpkg to check nothing, the list above would be empty, too: the overlay's /etc/issue is a changed file.
    ensure!(changed.contains(&"etc/issue"), "dpkg has compared nothing: {verified}");
    Ok(())
}
