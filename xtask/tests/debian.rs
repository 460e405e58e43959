//! The Debian engine against a small archive of real packages on a server of our own: solving,
//! signatures, downloads that break off, vanished versions, further archives. And trees
//! and initrds as other tools read them. Needs apt, dpkg-deb, gpg, cpio, tar, zstd.

use crate::common::archive;
use crate::common::root;

use std::fs;

use anyhow::{Context, Result, ensure};
use archive::{Fault, Server, index, new_key, sign};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::artifact::{hash_bytes, hash_file};
use xtask::exec::Tool;
use xtask::fetch::{Download, DownloadOutcome, Downloader};
use xtask::rootfs::PackageRole;
use xtask::rootfs::debian::{
    AptMirrors, AptSourceMirror, AptSourceSpec, ArchiveName, DebianSpec, DownloadedPackages,
    LockPolicy, LockedPackage, PackagesLock, fetch_lock, lock_packages,
};
use xtask::rootfs::initrd::{self, InitrdCompression, InitrdRequest};
use xtask::rootfs::tree::RootTree;

/// What a machine with an old e2fsprogs unpacks to make file systems, and where it comes from.
const HOST_TOOLS: [&str; 4] = ["e2fsprogs", "libcom-err2", "libext2fs2", "libss2"];
const HOST_LIBRARIES: [&str; 4] = ["libarchive13", "libicu72", "libnettle8", "libxml2"];

/// A signed archive of tiny packages, and the machine's side of it.
struct World {
    dir: tempfile::TempDir,
    server: Server,
    mirrors: AptMirrors,
}

impl World {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let root = Utf8Path::from_path(dir.path()).context("path")?.to_owned();
        new_key(&root, "debian", "keys.gpg")?;
        let keyring = root.join("keys.gpg");
        let server = Server::start(&root)?;
        let mirrors = AptMirrors {
            archive: format!("{}/debian", server.address),
            security: format!("{}/security", server.address),
            keyring,
            sources: Vec::new(),
        };
        let world = Self { dir, server, mirrors };
        for (name, version, more) in [
            ("base", "1", "Essential: yes"),
            ("lib", "1.0+x~1", "Depends: base"),
            ("app", "1", "Depends: lib"),
            ("firmware", "1", "Depends: nothing-that-exists"),
        ] {
            world.package(name, version, more)?;
        }
        world.publish()?;
        Ok(world)
    }

    fn root(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.dir.path().to_owned()).expect("UTF-8")
    }

    fn package(&self, name: &str, version: &str, more: &str) -> Result<()> {
        self.package_in("debian", name, version, more)
    }

    /// What other archives have of the same name and version has other bytes, and as many.
    fn package_in(&self, folder: &str, name: &str, version: &str, more: &str) -> Result<()> {
        let tree = self.root().join(format!("tree/{folder}/{name}-{version}"));
        fs::create_dir_all(tree.join("DEBIAN"))?;
        fs::create_dir_all(tree.join("usr/share"))?;
        // Not compressible, so that the file has a length worth cutting.
        let noise: String =
            (0..500).map(|i| hash_bytes(format!("{folder}{name}{i}").as_bytes())).collect();
        fs::write(tree.join("usr/share").join(name), noise)?;
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: arm64\nMaintainer: T <t@t>\n\
             {more}\nDescription: test\n"
        );
        fs::write(tree.join("DEBIAN/control"), control)?;
        let pool = self.root().join(folder).join("pool/main").join(name);
        fs::create_dir_all(&pool)?;
        let deb = pool.join(format!("{name}_{version}_arm64.deb"));
        Tool::new("dpkg-deb").args(["--root-owner-group", "-b"]).arg(&tree).arg(&deb).run()
    }

    /// Writes indexes and signatures for the packages in the pool; also for the release of the host
    /// tools, which differs from the image's.
    fn publish(&self) -> Result<()> {
        self.sign("debian", "test", "debian", &self.index("debian")?)?;
        self.sign("debian", "test-updates", "debian", "")?;
        self.sign("security", "test-security", "debian", "")?;
        let listed = |names: &[&str]| -> String {
            let stanza = |name: &&str| {
                let hash = hash_bytes(name.as_bytes());
                format!(
                    "Package: {name}\nVersion: 1\nArchitecture: all\n\
                     Filename: pool/main/host/{name}_1_all.deb\nSize: 1\nSHA256: {hash}\n\n"
                )
            };
            names.iter().map(stanza).collect()
        };
        self.sign("debian", "bookworm", "debian", &listed(&HOST_LIBRARIES))?;
        self.sign("debian", "bookworm-updates", "debian", "")?;
        self.sign("debian", "bookworm-backports", "debian", &listed(&HOST_TOOLS))?;
        self.sign("security", "bookworm-security", "debian", "")
    }

    fn index(&self, folder: &str) -> Result<String> {
        index(&self.root().join(folder), "main")
    }

    fn sign(&self, folder: &str, suite: &str, key: &str, text: &str) -> Result<()> {
        let both = ["arm64", "amd64"].map(|arch| ("main", arch, text));
        sign(&self.root(), folder, suite, key, &both)
    }

    /// An archive of another vendor in the directory of that name: some packages with Debian's
    /// names, and a kernel.
    fn vendor(&mut self, folder: &str, firmware: &str) -> Result<()> {
        let file = format!("{folder}.asc");
        new_key(&self.root(), folder, &file)?;
        for (name, version, more) in [
            // The same in all that apt compares, with other bytes.
            ("app", "1", "Depends: lib"),
            ("lib", "9", "Depends: base"),
            ("base", "9", "Essential: yes"),
            ("extra-essential", "1", "Essential: yes"),
            ("firmware", firmware, "Depends: nothing-that-exists"),
            (
                "linux-image-acme",
                "6.1",
                "Depends: linux-image-6.1-acme (= 6.1), nothing-that-exists",
            ),
            ("linux-image-6.1-acme", "6.1", "Depends: nothing-that-exists"),
        ] {
            self.package_in(folder, name, version, more)?;
        }
        self.sign(folder, "stable", folder, &self.index(folder)?)?;
        let address = format!("{}/{folder}/", self.server.address);
        self.mirrors.sources.push(
            AptSourceMirror::new(folder, &address, self.root().join(file)).expect("an address"),
        );
        Ok(())
    }

    fn lock(&self) -> Result<PackagesLock> {
        self.lock_of(&spec())
    }

    fn lock_of(&self, spec: &DebianSpec) -> Result<PackagesLock> {
        lock_packages(spec, &self.mirrors, &self.root().join("cache"))
    }

    fn fetch(&self, lock: &PackagesLock, policy: LockPolicy) -> Result<DownloadedPackages> {
        let cache = self.root().join("cache");
        fetch_lock(lock, &Downloader::new(&cache, false)?, Some(&self.mirrors), policy, &cache)
    }
}

fn spec() -> DebianSpec {
    DebianSpec {
        suite: "test".into(),
        components: vec!["main".into()],
        arch: "arm64".into(),
        packages: vec!["app".into()],
        extra: vec!["firmware".into()],
        sources: Vec::new(),
    }
}

/// A request with further archives, each with what may come from it.
fn spec_with(sources: &[(&str, &[&str])]) -> DebianSpec {
    let source = |(name, packages): &(&str, &[&str])| AptSourceSpec {
        name: (*name).to_owned(),
        suite: "stable".into(),
        components: vec!["main".into()],
        packages: packages.iter().map(|p| (*p).to_owned()).collect(),
    };
    DebianSpec { sources: sources.iter().map(source).collect(), ..spec() }
}

/// Name, version and archive of what a lock has for the image.
fn chosen(lock: &PackagesLock) -> Vec<(&str, &str, String)> {
    let shown = |p: &ArchiveName| String::from(p.clone());
    let image = lock.package.iter().filter(|p| p.role != PackageRole::Host);
    image.map(|p| (p.name.as_str(), p.version.as_str(), shown(&p.archive))).collect()
}

#[test]
fn a_lock_has_what_apt_chose_and_no_address() -> Result<()> {
    let world = World::new()?;
    let lock = world.lock()?;
    let text = lock.to_text()?;
    let named: Vec<_> = lock.package.iter().map(|p| (p.role, p.name.as_str())).collect();
    let root = |name| (PackageRole::Root, name);
    // The host's tools are the same whatever the image is made of.
    let mut host = [HOST_TOOLS, HOST_LIBRARIES].concat();
    host.sort_unstable();
    let mut expected = vec![(PackageRole::Extra, "firmware")];
    expected.extend(host.into_iter().map(|name| (PackageRole::Host, name)));
    expected.extend([root("app"), root("base"), root("lib")]);
    assert_eq!(named, expected);
    ensure!(!text.contains("127.0.0.1") && !text.contains("http"), "{text}");
    // Only the time that it was made may differ.
    let again = PackagesLock { epoch: lock.epoch, ..world.lock()? };
    assert_eq!(text, again.to_text()?);
    assert_eq!(PackagesLock::parse(&text, "a.lock".into())?, lock);
    lock.check_request(&spec(), "shop")?;
    let other = DebianSpec { packages: vec!["other".into()], ..spec() };
    let error = lock.check_request(&other, "shop").unwrap_err().to_string();
    assert!(error.contains("not in it: package other; only in it: package app"), "{error}");
    assert!(error.ends_with("\nhelp: cargo xtask lock --product shop --only packages"), "{error}");
    Ok(())
}

#[test]
fn malformed_locks_are_refused_by_name() -> Result<()> {
    let text = World::new()?.lock()?.to_text()?;
    let hash = text.split("sha256 = \"").nth(1).context("hash")?[..64].to_owned();
    // What the file has then, and the line that must be named with the message.
    for (from, to, line, message) in [
        ("\"pool/main/app/", "\"pool/../app/", "filename = \"pool/../app", "is not a path below"),
        (hash.as_str(), "ABC", "sha256 = \"ABC\"", "'ABC' is not a SHA-256 in lower-case hex"),
        ("name = \"lib\"", "name = \"app\"", "name = \"app\"", "app (arm64) is listed twice"),
        (
            "archive = \"debian\"",
            "archive = \"acme\"",
            "archive = \"acme\"",
            "'acme', but the request",
        ),
        ("size = ", "sise = ", "sise = ", "unknown field `sise`"),
        ("epoch = ", "epoch = x", "epoch = x", ""),
    ] {
        let text = text.replace(from, to);
        let error = format!("{:#}", PackagesLock::parse(&text, "a.lock".into()).unwrap_err());
        assert!(error.contains(message), "{error}");
        let lines = text.lines().enumerate().filter(|(_, text)| text.starts_with(line));
        let places = lines.map(|(n, text)| format!("a.lock:{}: {{}}\n  | {text}", n + 1));
        let named = |place: &String| {
            let (at, text) = place.split_once("{}").unwrap();
            error.split("a.lock:").any(|one| {
                let one = format!("a.lock:{one}");
                one.starts_with(at) && one.contains(text)
            })
        };
        assert!(places.clone().count() > 0 && places.clone().any(|p| named(&p)), "{line}: {error}");
    }
    let error = |text: &str| PackagesLock::parse(text, "a.lock".into()).unwrap_err().to_string();
    let other = error(&text.replace("version = 1\n", "version = 2\n"));
    assert!(
        other.contains("a.lock: the lock has format 2, but this tool reads format 1"),
        "{other}"
    );
    assert!(error("\n").starts_with("a.lock is empty"), "{}", error("\n"));
    // All at once: each package's archive.
    let all = error(&text.replace("archive = \"debian\"", "archive = \"acme\""));
    assert_eq!(
        all.matches("but the request has no such source").count(),
        text.matches("[[package]]").count()
    );
    Ok(())
}

#[test]
fn an_archive_with_another_signature_is_refused() -> Result<()> {
    let world = World::new()?;
    let release = world.root().join("debian/dists/test/InRelease");
    let text = fs::read_to_string(&release)?.replace("Date: Sat, 01", "Date: Sun, 02");
    fs::write(&release, text)?;
    let error = format!("{:#}", world.lock().unwrap_err());
    assert!(error.contains("fetching the package indexes") && error.contains("BADSIG"), "{error}");
    Ok(())
}

#[test]
fn a_vanished_version_is_replaced_alone_or_refused() -> Result<()> {
    let world = World::new()?;
    let old = world.lock()?;
    // `lib` is superseded and gone; `app` too, but the mirror still has the locked file.
    fs::remove_file(world.root().join("debian/pool/main/lib/lib_1.0+x~1_arm64.deb"))?;
    world.package("lib", "2", "Depends: base")?;
    world.package("app", "2", "Depends: lib")?;
    world.publish()?;
    let error = format!("{:#}", world.fetch(&old, LockPolicy::Locked).unwrap_err());
    assert!(error.contains("no longer has 1 of the locked packages: lib 1.0+x~1"), "{error}");
    assert!(error.contains("help: build without --locked"), "{error}");
    let fetched = world.fetch(&old, LockPolicy::Replace)?;
    let replaced: Vec<_> =
        fetched.replaced.iter().map(|r| (r.name.as_str(), r.new.as_deref())).collect();
    assert_eq!(replaced, [("lib", Some("2"))]);
    let app = fetched.lock.package.iter().find(|p| p.name == "app").context("app")?;
    assert_eq!(app.version, "1");
    assert_eq!(world.fetch(&fetched.lock, LockPolicy::Locked)?.replaced, []);
    Ok(())
}

#[test]
fn broken_downloads_are_resumed_and_wrong_ones_refused() -> Result<()> {
    let world = World::new()?;
    let lock = world.lock()?;
    let path = "/debian/pool/main/app/app_1_arm64.deb";
    world.server.fault(path, Fault::Truncate, 1);
    world.server.fault("/debian/pool/main/base/base_1_arm64.deb", Fault::Busy, 1);
    world.fetch(&lock, LockPolicy::Locked)?;
    let log = world.server.log();
    let resumed = log.iter().any(|l| l.starts_with(path) && !l.ends_with("from 0"));
    assert!(resumed, "{log:?}");

    let other = world.root().join("other");
    let offline = Downloader::new(&other, true)?;
    let error =
        fetch_lock(&lock, &offline, None, LockPolicy::Locked, &other).unwrap_err().to_string();
    assert!(error.contains("4 of 4 downloads") && error.contains("lib 1.0+x~1"), "{error}");

    let deb = world.root().join("debian/pool/main/app/app_1_arm64.deb");
    let mut bytes = fs::read(&deb)?;
    bytes[100] ^= 1;
    fs::write(&deb, bytes)?;
    let downloader = Downloader::new(&other, false)?;
    let result = fetch_lock(&lock, &downloader, Some(&world.mirrors), LockPolicy::Replace, &other);
    let error = format!("{:#}", result.unwrap_err());
    assert!(error.contains("fetching app 1") && error.contains("sent other bytes"), "{error}");
    let hash = &lock.package.iter().find(|p| p.name == "app").context("app")?.sha256;
    for entry in other.join("downloads/sha256").read_dir_utf8()? {
        assert!(!entry?.file_name().starts_with(hash.as_str()), "a wrong file was kept");
    }
    Ok(())
}

#[test]
fn only_listed_packages_come_from_a_further_archive() -> Result<()> {
    let mut world = World::new()?;
    // Debian's firmware is newer, and loses all the same.
    world.vendor("vendor", "0.5")?;
    let mut spec = spec_with(&[("vendor", &["app", "firmware", "linux-image-*"])]);
    spec.extra.push("linux-image-acme".into());
    let lock = world.lock_of(&spec)?;
    let (debian, vendor) = (|| "debian".to_owned(), || "vendor".to_owned());
    let expected = [
        ("firmware", "0.5", vendor()),
        ("linux-image-6.1-acme", "6.1", vendor()),
        ("app", "1", vendor()),
        ("base", "1", debian()),
        ("lib", "1.0+x~1", debian()),
    ];
    assert_eq!(chosen(&lock), expected);
    let text = lock.to_text()?;
    ensure!(!text.contains("127.0.0.1") && !text.contains("http"), "{text}");
    assert_eq!(PackagesLock::parse(&text, "a.lock".into())?, lock);
    lock.check_request(&spec, "shop")?;
    let error =
        lock.check_request(&spec_with(&[("vendor", &["app"])]), "shop").unwrap_err().to_string();
    assert!(error.contains("only in it: extra package linux-image-acme, source vendor: package"));

    // Each file is its own archive's, although apt takes both `app` for the same.
    let fetched = world.fetch(&lock, LockPolicy::Locked)?;
    for deb in &fetched.debs {
        let LockedPackage { archive, filename, sha256, .. } = &deb.package;
        let folder = world.root().join(String::from(archive.clone()));
        assert_eq!(hash_file(&folder.join(filename))?.1, *sha256, "{filename}");
    }
    let cache = world.root().join("cache");
    let offline =
        fetch_lock(&lock, &Downloader::new(&cache, true)?, None, LockPolicy::Locked, &cache)?;
    assert_eq!(offline.debs, fetched.debs);

    // The same archive without its list: nothing of it.
    let plain = world.lock()?;
    ensure!(plain.package.iter().all(|p| p.archive == ArchiveName::Debian), "{:?}", chosen(&plain));
    Ok(())
}

#[test]
fn the_newest_of_two_further_archives_counts_and_of_equals_the_first_named() -> Result<()> {
    let mut world = World::new()?;
    world.vendor("vendor", "0.5")?;
    world.vendor("other", "0.6")?;
    let listed: &[&str] = &["app", "firmware"];
    for (first, second) in [("vendor", "other"), ("other", "vendor")] {
        let lock = world.lock_of(&spec_with(&[(first, listed), (second, listed)]))?;
        let of = |name: &str| lock.package.iter().find(|p| p.name == name).context("locked");
        assert_eq!(of("firmware")?.archive, ArchiveName::Source("other".into()));
        assert_eq!(of("app")?.archive, ArchiveName::Source(first.into()));
        let file = world.root().join(first).join(&of("app")?.filename);
        assert_eq!(of("app")?.sha256, hash_file(&file)?.1);
    }
    Ok(())
}

#[test]
fn a_further_archive_counts_only_with_its_own_key() -> Result<()> {
    let mut world = World::new()?;
    world.vendor("vendor", "0.5")?;
    let spec = spec_with(&[("vendor", &["app"])]);
    let (debian, vendor) = (world.mirrors.keyring.clone(), world.mirrors.sources[0].key.clone());
    let mut refused = |change: &dyn Fn(&mut AptMirrors), words: &[&str]| {
        let mirrors = world.mirrors.clone();
        change(&mut world.mirrors);
        let error = format!("{:#}", world.lock_of(&spec).unwrap_err());
        // The server of these tests cannot continue with an index that apt has rejected.
        fs::create_dir_all(world.root().join("cache/apt")).expect("there");
        fs::remove_dir_all(world.root().join("cache/apt")).expect("removed");
        for word in words {
            assert!(error.contains(word), "{word} is not in: {error}");
        }
        world.mirrors = mirrors;
    };
    // Debian's key does not sign other archives, and other keys do not sign Debian's.
    let asking = "reading the source vendor";
    refused(&|m| m.sources[0].key.clone_from(&debian), &[asking, "NO_PUBKEY", "key"]);
    refused(&|m| m.keyring.clone_from(&vendor), &["fetching the package indexes", "NO_PUBKEY"]);
    refused(&|m| m.sources[0].key = "no/such.asc".into(), &["no/such.asc", "OpenPGP public key"]);
    refused(&|m| m.sources[0].address = "http://127.0.0.1:9/x".into(), &[asking, "127.0.0.1:9"]);
    refused(&|m| m.sources.clear(), &["refers to the source vendor"]);
    Ok(())
}

#[test]
fn a_package_that_a_further_archive_lacks_or_drops() -> Result<()> {
    let mut world = World::new()?;
    world.vendor("vendor", "0.5")?;
    let error = world.lock_of(&spec_with(&[("vendor", &["app", "ap", "kernel-*"])]));
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("vendor (stable main) has no package ap, kernel-*"), "{error}");

    let spec = spec_with(&[("vendor", &["app", "firmware"])]);
    let old = world.lock_of(&spec)?;
    // Superseded, as in an archive that keeps nothing; `app` has a newer version, but its file is still there.
    fs::remove_file(world.root().join("vendor/pool/main/firmware/firmware_0.5_arm64.deb"))?;
    world.package_in("vendor", "firmware", "0.7", "Depends: nothing-that-exists")?;
    world.package_in("vendor", "app", "2", "Depends: lib")?;
    world.sign("vendor", "stable", "vendor", &world.index("vendor")?)?;
    let error = format!("{:#}", world.fetch(&old, LockPolicy::Locked).unwrap_err());
    assert!(error.contains("no longer has 1 of the locked packages: firmware 0.5"), "{error}");
    let fetched = world.fetch(&old, LockPolicy::Replace)?;
    let replaced: Vec<_> =
        fetched.replaced.iter().map(|r| (r.name.as_str(), r.new.as_deref())).collect();
    assert_eq!(replaced, [("firmware", Some("0.7"))]);
    let same = |p: &&LockedPackage| p.name != "firmware";
    let (before, after) = (old.package.iter().filter(same), fetched.lock.package.iter());
    ensure!(before.eq(after.filter(same)), "{:?}", chosen(&fetched.lock));
    assert_eq!(chosen(&fetched.lock)[0], ("firmware", "0.7", "vendor".to_owned()));
    Ok(())
}

/// Locks of before there were further archives.
#[test]
fn a_lock_without_further_archives_is_written_as_ever() -> Result<()> {
    let text = fs::read_to_string(root().join("configs/robot-dev.packages.lock"))?;
    assert_eq!(PackagesLock::parse(&text, "a.lock".into())?.to_text()?, text);
    Ok(())
}

#[test]
fn a_damaged_file_in_the_store_is_fetched_again() -> Result<()> {
    let world = World::new()?;
    let (size, sha256) = hash_file(&world.root().join("keys.gpg"))?;
    let url = format!("{}/keys.gpg", world.server.address);
    let wanted = Download { name: "keys".into(), url, size: Some(size), sha256 };
    let downloader = Downloader::new(&world.root().join("cache"), false)?;
    fs::write(downloader.path_of(&wanted.sha256), "damaged")?;
    let outcomes = downloader.fetch("test", "files", std::slice::from_ref(&wanted))?;
    assert!(matches!(outcomes.as_slice(), [DownloadOutcome::Ready(a)] if a.size == size));
    assert_eq!(hash_file(&downloader.path_of(&wanted.sha256))?, (size, wanted.sha256));
    Ok(())
}

#[test]
fn cpio_reads_an_initrd_with_its_modules_in_load_order() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = Utf8Path::from_path(dir.path()).context("path")?;
    fs::create_dir_all(root.join("m/kernel"))?;
    fs::write(root.join("m/modules.dep"), "kernel/a.ko: kernel/b-c.ko.xz\nkernel/b-c.ko.xz:\n")?;
    fs::write(root.join("m/modules.builtin"), "kernel/loop.ko\n")?;
    for name in ["m/kernel/a.ko", "m/kernel/b-c.ko", "busybox"] {
        fs::write(root.join(name), name)?;
    }
    // As Linux packs them (scripts/Makefile.modinst).
    let packs = ["--check=crc32", "--lzma2=dict=1MiB", "-f"];
    Tool::new("xz").args(packs).arg(root.join("m/kernel/b-c.ko")).run()?;
    Tool::new("tar")
        .arg("-C")
        .arg(root.join("m"))
        .arg("-cf")
        .arg(root.join("m.tar"))
        .arg(".")
        .run()?;
    let modules = ["a", "loop"].map(str::to_owned);
    let busybox = root.join("busybox");
    let archive = root.join("m.tar");
    let build = |compression| {
        let request = InitrdRequest {
            busybox: &busybox,
            init: b"#!/bin/sh\n",
            modules: &modules,
            modules_archive: &archive,
            kernel_release: "6.1",
            epoch: 1_600_000_000,
            extra: &[],
            compression,
        };
        initrd::build_initrd(&request, &root.join("initrd"))
    };
    for (compression, tool) in
        [(InitrdCompression::Zstd, "zstd"), (InitrdCompression::Gzip, "gzip")]
    {
        let first = build(compression)?;
        assert_eq!(first, build(compression)?);
        let plain = Tool::new(tool).arg("-dc").arg(&first.path).env("LC_ALL", "C");
        fs::write(
            root.join("plain"),
            plain.stream(|out| {
                let mut bytes = Vec::new();
                std::io::copy(out, &mut bytes)?;
                Ok(bytes)
            })?,
        )?;
        let list =
            Tool::new("cpio").args(["-t", "--quiet", "-F"]).arg(root.join("plain")).read()?;
        for path in ["init", "dev/console", "bin/busybox", "lib/modules/6.1/kernel/b-c.ko"] {
            assert!(list.lines().any(|line| line == path), "{path} is not in {list}");
        }
        let order = Tool::new("cpio")
            .args(["-i", "--quiet", "--to-stdout", "-F"])
            .arg(root.join("plain"))
            .arg("etc/modules")
            .read()?;
        assert_eq!(order, "/lib/modules/6.1/kernel/b-c.ko\n/lib/modules/6.1/kernel/a.ko\n");
        let module = Tool::new("cpio")
            .args(["-i", "--quiet", "--to-stdout", "-F"])
            .arg(root.join("plain"))
            .arg("lib/modules/6.1/kernel/b-c.ko")
            .read()?;
        assert_eq!(module, "m/kernel/b-c.ko");
    }
    Ok(())
}

#[test]
fn gnu_tar_reads_a_rewritten_tree_with_links_and_long_names() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let root = Utf8Path::from_path(dir.path()).context("path")?;
    let long = format!("t/{}/{}", "d".repeat(90), "f".repeat(90));
    fs::create_dir_all(root.join(&long))?;
    fs::write(root.join("t/z"), "linked")?;
    fs::hard_link(root.join("t/z"), root.join("t/y"))?;
    std::os::unix::fs::symlink("z", root.join("t/s"))?;
    Tool::new("tar")
        .arg("-C")
        .arg(root.join("t"))
        .arg("-cf")
        .arg(root.join("in.tar"))
        .args(["z", "y", "s"])
        .arg(&long[2..])
        .run()?;
    let tree = RootTree::from_tar(&root.join("in.tar"))?;
    let mut bytes = Vec::new();
    tree.write(5, &mut bytes)?;
    fs::write(root.join("out.tar"), bytes)?;
    let list = Tool::new("tar").env("TZ", "UTC").arg("-tvf").arg(root.join("out.tar")).read()?;
    assert!(list.contains(" y\n") && list.contains(" z link to y\n"), "{list}");
    assert!(list.contains(" s -> z\n") && list.contains(&long[2..]), "{list}");
    assert!(list.lines().all(|line| line.contains("1970-01-01 00:00")), "{list}");
    Ok(())
}
