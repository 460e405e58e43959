//! Sources and mirrors: what the real tree needs, and files that are found by their hash.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::symlink;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::artifact::{hash_bytes, hash_file};
use xtask::exec::Tool;
use xtask::rootfs::buildroot::check;
use xtask::rootfs::buildroot::engine::{self, BuildrootRequest};
use xtask::rootfs::buildroot::info::{BuildrootInfo, FileHashes};
use xtask::rootfs::buildroot::make::{BuildrootSetup, BuildrootSite};
use xtask::rootfs::buildroot::mirror::{self, MirrorDefect};
use xtask::rootfs::buildroot::sources::{SourceFile, SourcePlace, list_sources, locate_sources};
use xtask::rootfs::buildroot::tree::BuildrootTree;

use super::{losses, plan_of, setup, tree};

fn folder(dir: &tempfile::TempDir) -> Utf8PathBuf {
    Utf8PathBuf::try_from(dir.path().to_owned()).expect("UTF-8")
}

fn write(path: &Utf8Path, content: &[u8]) {
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    std::fs::write(path, content).expect("written");
}

fn source(directory: &str, file: &str, content: &[u8]) -> SourceFile {
    SourceFile {
        directory: directory.to_owned(),
        file: file.to_owned(),
        hashes: FileHashes { sha256: Some(hash_bytes(content)), sha512: None },
        ..SourceFile::default()
    }
}

#[test]
fn each_source_of_the_robot_is_listed_once_with_all_that_is_known() {
    let Some(tree) = tree("each_source_of_the_robot_is_listed_once_with_all_that_is_known") else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let setup = setup(&tree, &output);
    let mut boards = Vec::new();
    for board in ["pi3", "qemu-arm64"] {
        let verdict = check::check_defconfig(&setup, &plan_of(board).defconfig, board);
        verdict.expect(board).require().expect(board);
        let info = BuildrootInfo::read(&setup, &BuildrootSite::default()).expect(board);
        boards.push((board.to_owned(), info));
    }
    let mut list = list_sources(&boards, &tree).expect("a list");
    let paths: BTreeSet<Utf8PathBuf> = list.iter().map(SourceFile::path).collect();
    assert_eq!(paths.len(), list.len(), "a file is listed twice");
    for (board, info) in &boards {
        for (name, entry) in info.packages() {
            for download in &entry.downloads {
                let path = Utf8Path::new(&entry.dl_dir).join(&download.source);
                let listed = list.iter().find(|source| source.path() == path).expect("listed");
                assert!(listed.packages.contains(name) && listed.boards.contains(board));
            }
        }
    }
    let lacking: Vec<&SourceFile> = list
        .iter()
        .filter(|s| s.hashes == FileHashes::default() || s.addresses.is_empty())
        .collect();
    assert!(lacking.is_empty(), "without a hash or an address: {lacking:#?}");
    let named = |file: &str| {
        list.iter().find(|s| s.file.starts_with(file)).unwrap_or_else(|| panic!("no {file}"))
    };
    let busybox = named("busybox-");
    assert_eq!(busybox.licences, BTreeSet::from(["GPL-2.0, bzip2-1.0.4".to_owned()]));
    assert!(busybox.addresses[0].ends_with(&busybox.file), "{busybox:#?}");
    assert_eq!(busybox.boards.len(), 2);
    // One file of a package for the target and of the same one for the host.
    let python = named("Python-");
    assert_eq!(python.packages, ["host-python3", "python3"].map(str::to_owned).into());
    assert!(list.iter().any(|s| s.boards.len() == 1), "the kernels of the boards differ");

    // The first is in `dl`, the second on the mirror, the third in the mirror's own directory.
    let (dl, mirror) = (setup.output.join("dl"), setup.output.join("mirror"));
    write(&dl.join(list[0].path()), b"four");
    write(&mirror.join(list[1].path()), b"three");
    write(&mirror.join(&list[2].file), b"two");
    locate_sources(&mut list, &dl, Some(&format!("file://{mirror}/"))).expect("located");
    let found: Vec<_> = list.iter().take(4).map(|s| (s.place, s.size)).collect();
    let on_mirror = |size| (Some(SourcePlace::Mirror), Some(size));
    assert_eq!(
        found,
        [(Some(SourcePlace::Downloads), Some(4)), on_mirror(5), on_mirror(3), (None, None)]
    );
    let json = serde_json::to_value(&list[3]).expect("JSON");
    assert!(json["size"].is_null() && json["place"].is_null(), "{json}");
    assert!(json["sha256"].is_string(), "{json}");
}

/// A web server that answers each path with a status, and the length of the file; 404 to others.
fn serve(answers: &'static [(&'static str, u16, u64)]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}/m", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut request = String::new();
            let mut reader = BufReader::new(stream.try_clone().expect("a reader"));
            reader.read_line(&mut request).expect("a request");
            let mut header = String::new();
            while reader.read_line(&mut header).expect("a header") > 2 {
                header.clear();
            }
            let path = request.split(' ').nth(1).expect("a path");
            let found = answers.iter().find(|(known, ..)| *known == path);
            let (status, length) = found.map_or((404, 0), |(_, status, length)| (*status, *length));
            let head = format!("HTTP/1.1 {status} x\r\nContent-Length: {length}\r\n");
            stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).expect("sent");
        }
    });
    address
}

#[test]
fn a_web_server_is_asked_for_each_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let dl = folder(&dir);
    let ask = |files: &[(&str, &str)], mirror: &str| {
        let mut list: Vec<SourceFile> = files.iter().map(|(d, f)| source(d, f, b"")).collect();
        locate_sources(&mut list, &dl, Some(mirror))?;
        anyhow::Ok(list.iter().map(|s| (s.place, s.size)).collect::<Vec<_>>())
    };
    let mirror = serve(&[
        ("/m/g/a%2Bb.tar.gz", 200, 7),
        ("/m/flat.patch", 200, 8),
        // As a bucket answers for what it does not have.
        ("/m/n/none", 403, 0),
        ("/m/broken/x", 500, 0),
    ]);
    let found = ask(&[("g", "a+b.tar.gz"), ("f", "flat.patch"), ("n", "none")], &mirror);
    let on_mirror = |size| (Some(SourcePlace::Mirror), Some(size));
    assert_eq!(found.expect("asked"), [on_mirror(7), on_mirror(8), (None, None)]);
    let error = ask(&[("broken", "x")], &format!("{mirror}/")).expect_err("a failure").to_string();
    assert!(error.contains("answers 500 for http://127.0.0.1:"), "{error}");
    assert!(error.contains("\nhelp: correct or unset SLIPWAY_BUILDROOT_MIRROR"), "{error}");
    // A server with a page for every question is refused; messages hide a login.
    let page = serve(&[("/m/slipway-asks-for-a-file-that-does-not-exist", 200, 9)]);
    let page = page.replace("http://", "http://me:secret@");
    let error = ask(&[("g", "a+b.tar.gz")], &page).expect_err("a page").to_string();
    assert!(error.contains("it answers every question alike"), "{error}");
    let closed = format!("{:#}", ask(&[], "http://me:secret@127.0.0.1:1/m").expect_err("closed"));
    assert!(closed.contains("asking the mirror for http://127.0.0.1:1/m"), "{closed}");
    assert!(!error.contains("secret") && !closed.contains("secret"), "{error}{closed}");
    let error = ask(&[], "file:///srv/nonexistent").expect_err("no directory").to_string();
    assert!(error.contains("/srv/nonexistent is not a directory\nhelp: "), "{error}");
    // Only Buildroot's own programs can reach it: a warning, and no file is found.
    let found = ask(&[("g", "a+b.tar.gz")], "scp://host.invalid/srv");
    assert_eq!(found.expect("not asked"), [(None, None)]);
}

/// Four packages whose versions, and hashes, are ours: their file names and contents.
const OWN: [(&str, &str, &[u8]); 4] = [
    ("arm-trusted-firmware", "arm-trusted-firmware-9.1.tar.gz", b"\x1f\x8bfirmware"),
    ("barebox", "barebox-9.2.0.tar.bz2", b"BZhbarebox"),
    ("linux", "linux-6.6.1.tar.xz", b"\xfd7zXZ\0kernel"),
    ("uboot", "u-boot-2099.01.tar.bz2", b"BZhloader"),
];

/// A configuration of the real tree that needs them; the list has only these four.
fn own_sources(setup: &BuildrootSetup) -> (BuildrootInfo, Vec<SourceFile>) {
    let patches = setup.output.join("patches");
    for (package, file, content) in OWN {
        let line = format!("sha256  {}  {file}\n", hash_bytes(content));
        write(&patches.join(package).join(format!("{package}.hash")), line.as_bytes());
    }
    let lost = losses(
        setup,
        &format!(
            "BR2_GLOBAL_PATCH_DIR=\"{patches}\"\n\
             BR2_LINUX_KERNEL=y\nBR2_LINUX_KERNEL_USE_ARCH_DEFAULT_CONFIG=y\n\
             BR2_LINUX_KERNEL_CUSTOM_VERSION=y\nBR2_LINUX_KERNEL_CUSTOM_VERSION_VALUE=\"6.6.1\"\n\
             BR2_TARGET_UBOOT=y\nBR2_TARGET_UBOOT_BUILD_SYSTEM_KCONFIG=y\nBR2_TARGET_UBOOT_BOARD_DEFCONFIG=\"qemu_arm64\"\n\
             BR2_TARGET_UBOOT_CUSTOM_VERSION=y\nBR2_TARGET_UBOOT_CUSTOM_VERSION_VALUE=\"2099.01\"\n\
             BR2_TARGET_BAREBOX=y\nBR2_TARGET_BAREBOX_BOARD_DEFCONFIG=\"multi_v8\"\n\
             BR2_TARGET_BAREBOX_CUSTOM_VERSION=y\n\
             BR2_TARGET_BAREBOX_CUSTOM_VERSION_VALUE=\"9.2.0\"\n\
             BR2_TARGET_ARM_TRUSTED_FIRMWARE=y\nBR2_TARGET_ARM_TRUSTED_FIRMWARE_PLATFORM=\"qemu\"\n\
             BR2_TARGET_ARM_TRUSTED_FIRMWARE_CUSTOM_TARBALL=y\n\
             BR2_TARGET_ARM_TRUSTED_FIRMWARE_CUSTOM_TARBALL_LOCATION=\
             \"https://host.invalid/arm-trusted-firmware-9.1.tar.gz\""
        ),
    );
    assert!(lost.is_empty(), "{lost:#?}");
    let info = BuildrootInfo::read(setup, &BuildrootSite::default()).expect("packages");
    let mut list =
        list_sources(&[("a board".to_owned(), info.clone())], &setup.tree).expect("a list");
    list.retain(|source| OWN.iter().any(|(_, file, _)| source.file == *file));
    let files: Vec<&str> = list.iter().map(|source| source.file.as_str()).collect();
    assert_eq!(files, OWN.map(|(_, file, _)| file));
    (info, list)
}

#[test]
fn a_mirror_of_files_under_other_names_serves_the_real_buildroot() {
    let Some(tree) = tree("a_mirror_of_files_under_other_names_serves_the_real_buildroot") else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let mut setup = setup(&tree, &output);
    setup.downloads = setup.output.join("dl");
    let (info, list) = own_sources(&setup);
    let (pool, to) = (setup.output.join("pool"), setup.output.join("mirror"));
    for (number, (_, _, content)) in OWN.iter().enumerate() {
        write(&pool.join(format!("main/p/{number}.orig")), content);
    }
    let wanted: Vec<&SourceFile> = list.iter().collect();
    let found = mirror::find_by_hash(&wanted, &[pool], &BTreeSet::new()).expect("searched");
    assert_eq!(found.len(), 4, "{found:#?}");
    for source in &list {
        mirror::copy_source(source, &found[&source.path()], &to).expect("copied");
    }
    mirror::write_index(&list, &to).expect("an index");
    assert_eq!(mirror::check_mirror(&list, &to).expect("checked"), []);

    // Buildroot itself takes all of them from there, and nothing else.
    let site = BuildrootSite {
        mirror: Some(format!("file://{to}")),
        offline: true,
        ..BuildrootSite::default()
    };
    let (plan, log) = (plan_of("qemu-arm64"), setup.output.join("make.log"));
    let tree = BuildrootTree {
        path: tree,
        commit: String::new(),
        changes: String::new(),
        changed: BTreeMap::new(),
    };
    let request = BuildrootRequest {
        plan: &plan,
        title: "a case",
        tree: &tree,
        setup: &setup,
        site: &site,
        log: &log,
        yes: true,
    };
    let packages: BTreeSet<String> = OWN.iter().map(|(name, ..)| (*name).to_owned()).collect();
    engine::download_available(&request, &info, &packages).expect("downloaded");
    assert!(mirror::list_lacking(&list, &setup.downloads).expect("compared").is_empty());

    // A file that the mirror lacks stops no other, and is named; also when it was here once.
    std::fs::remove_dir_all(&setup.downloads).expect("removed");
    std::fs::remove_file(to.join(list[1].path())).expect("removed");
    let error = engine::download_available(&request, &info, &packages).expect_err("one is missing");
    assert!(error.to_string().contains("barebox-9.2.0.tar.bz2"), "{error:#}");
    let lacking = mirror::list_lacking(&list, &setup.downloads).expect("compared");
    assert_eq!(lacking, [&list[1]]);
}

#[test]
fn the_command_names_what_is_wrong_with_a_mirror() {
    let Some(_tree) = tree("the_command_names_what_is_wrong_with_a_mirror") else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let mirror = folder(&dir);
    write(&mirror.join("patchelf/patchelf-0.13.tar.bz2"), b"BZhother");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["buildroot", "sources", "--product", "robot", "--board", "qemu-arm64"])
        .args(["--format", "json", "--check", mirror.as_str()])
        .current_dir(super::workspace::root())
        .output()
        .expect("it runs");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("sources are missing, damaged or misnamed\nhelp: "), "{printed}");
    let findings: Vec<serde_json::Value> =
        serde_json::from_slice(&output.stdout).expect("a list as JSON");
    let of = |kind: &str| findings.iter().filter(|f| f["kind"] == kind).collect::<Vec<_>>();
    let damaged = of("damaged");
    assert_eq!(damaged.len(), 1, "{damaged:?}");
    assert_eq!(damaged[0]["source"], "patchelf/patchelf-0.13.tar.bz2");
    assert!(of("missing").len() > 60, "{} missing", of("missing").len());
    assert_eq!(of("missing").len() + 1, findings.len());
}

#[test]
fn a_list_of_releases_takes_no_source_directory() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["buildroot", "sources", "--override", "linux=/src"])
        .current_dir(super::workspace::root())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("has the releases of all packages\nhelp: remove --override"), "{said}");
}

#[test]
fn each_defect_of_a_mirror_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let mirror = folder(&dir);
    let list = OWN.map(|(package, file, content)| source(package, file, content));
    let [missing, damaged, misnamed, whole] = &list;
    write(&mirror.join(damaged.path()), b"BZhbarebax");
    write(&mirror.join("linux/linux_6.6.1.orig.tar.xz"), OWN[2].2);
    write(&mirror.join(whole.path()), OWN[3].2);
    let findings = mirror::check_mirror(&list, &mirror).expect("checked");
    let shown: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            format!("missing   {}", missing.path()),
            format!("damaged   {mirror}/{}", damaged.path()),
            format!("misnamed  {mirror}/linux/linux_6.6.1.orig.tar.xz is {}", misnamed.path()),
        ]
    );
    // What is in the mirror's own directory is where Buildroot finds it, too.
    write(&mirror.join(&missing.file), OWN[0].2);
    let kinds: Vec<MirrorDefect> = mirror::check_mirror(&list, &mirror)
        .expect("checked")
        .iter()
        .map(|finding| finding.kind)
        .collect();
    assert_eq!(kinds, [MirrorDefect::Damaged, MirrorDefect::Misnamed]);
}

#[test]
fn a_search_by_hash_follows_no_link_and_reads_only_regular_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let (inside, outside) = (folder(&dir).join("in"), folder(&dir).join("out"));
    let (gz, patch) = (source("a", "a.tar.gz", b"\x1f\x8ba"), source("b", "b.patch", b"diff"));
    write(&outside.join("a.tar.gz"), b"\x1f\x8ba");
    write(&inside.join("deep/er/x"), b"diff");
    symlink(&outside, inside.join("linked")).expect("a link");
    symlink(outside.join("a.tar.gz"), inside.join("a.tar.gz")).expect("a link");
    // A pipe blocks a reader forever.
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        inside.join("pipe").as_std_path(),
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    )
    .expect("a pipe");
    let search = |wanted: &[&SourceFile], dirs: &[Utf8PathBuf]| {
        mirror::find_by_hash(wanted, dirs, &BTreeSet::new()).expect("searched")
    };
    let found = search(&[&gz, &patch], std::slice::from_ref(&inside));
    let files: Vec<_> = found.iter().map(|(to, file)| (to.as_str(), file.as_path())).collect();
    assert_eq!(files, [("b/b.patch", inside.join("deep/er/x").as_std_path())]);
    // The directory that was named may be a link itself.
    let found = search(&[&gz], &[inside.join("linked"), inside.clone()]);
    assert_eq!(found[&gz.path()], outside.join("a.tar.gz"));
    // A known size excludes every other one.
    let other = SourceFile { size: Some(9), ..patch.clone() };
    assert!(search(&[&other], &[inside]).is_empty());
    let gone = mirror::find_by_hash(&[&gz], &[outside.join("none")], &BTreeSet::new());
    assert!(gone.expect_err("no directory").to_string().contains("out/none"));
}

#[test]
fn an_archive_of_a_tag_is_made_from_a_clone() {
    let dir = tempfile::tempdir().expect("a directory");
    let (clone, to) = (folder(&dir).join("clone"), folder(&dir).join("to"));
    write(&clone.join("main.c"), b"int main;\n");
    let sh = |script: &str| {
        let words = ["-ec", script];
        Tool::new("sh").args(words).current_dir(&clone).read().expect(script).trim().to_owned()
    };
    sh("git init -q; git add .; git -c user.name=a -c user.email=a@a commit -q -m a; git tag v1.2");
    let sum = sh("git archive --format=tar --prefix=Tool-1.2/ v1.2 | gzip -n | sha256sum");
    let tool = SourceFile {
        addresses: [
            "https://backup.invalid/tool.tar.gz",
            "https://github.com/o/Tool/archive/v1.2/tool-1.2.tar.gz",
        ]
        .map(str::to_owned)
        .into(),
        hashes: FileHashes { sha256: sum.get(..64).map(str::to_owned), sha512: None },
        ..source("tool", "tool-1.2.tar.gz", b"")
    };
    let other = |tag: &str| SourceFile {
        addresses: vec![format!("https://github.com/o/other/archive/{tag}/other.tar.gz")],
        ..source("other", &format!("{tag}.tar.gz"), b"other")
    };
    let (same_tag, none, option) = (other("v1.2"), other("v9"), other("--output=x"));
    let lacking = [&same_tag, &tool, &none, &option];
    let made = mirror::pack_git(&lacking, &clone, &to).expect("packed");
    assert_eq!(made, ["tool/tool-1.2.tar.gz"]);
    assert_eq!(hash_file(&to.join(&made[0])).expect("a file").1, sum[..64]);
    assert!(!to.join("other").exists());
    // A directory that cannot be written is not a wrong hash.
    write(&to.join("file"), b"");
    let error = mirror::pack_git(&[&tool], &clone, &to.join("file")).expect_err("a file");
    assert!(format!("{error:#}").contains("creating "), "{error:#}");
    let error = mirror::pack_git(&lacking, &to, &to).expect_err("not a clone").to_string();
    assert!(error.contains("looking for a clone in"), "{error}");
}

#[test]
fn both_hashes_of_a_source_count_and_a_wrong_copy_leaves_nothing() {
    // printf abc | sha512sum
    let sum = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
               2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
    let dir = tempfile::tempdir().expect("a directory");
    let (pool, to) = (folder(&dir).join("pool"), folder(&dir).join("to"));
    write(&pool.join("x"), b"abc");
    let mut abc = source("a", "abc.patch", b"abc");
    abc.hashes.sha512 = Some(sum.to_owned());
    let only = SourceFile {
        hashes: FileHashes { sha256: None, sha512: Some(sum.to_owned()) },
        file: "only.patch".to_owned(),
        ..abc.clone()
    };
    let mut wrong = abc.clone();
    wrong.hashes.sha512 = Some(sum.replace("ddaf", "ddae"));
    wrong.file = "wrong.patch".to_owned();
    let unknown = SourceFile { hashes: FileHashes::default(), ..wrong.clone() };
    let wanted = [&abc, &only, &wrong, &unknown];
    let found = mirror::find_by_hash(&wanted, std::slice::from_ref(&pool), &BTreeSet::new())
        .expect("searched");
    assert_eq!(found.keys().collect::<Vec<_>>(), ["a/abc.patch", "a/only.patch"]);
    let error = mirror::copy_source(&wrong, pool.join("x").as_std_path(), &to).expect_err("wrong");
    assert!(format!("{error:#}").contains("does not have the content of a/wrong.patch"));
    assert_eq!(std::fs::read_dir(to.join("a")).expect("a directory").count(), 0);

    // The index has a line for each file, also where only SHA-512 is known, and keeps the lines of
    // other products' files.
    for source in [&abc, &only] {
        mirror::copy_source(source, pool.join("x").as_std_path(), &to).expect("copied");
    }
    write(&to.join("b/other"), b"other");
    let sum = hash_bytes(b"other");
    write(&pool.join("y"), b"other");
    let old = format!("{sum}  b/other\n{sum}  b/gone\n{sum}  ../pool/y\n{sum}  {pool}/y\n");
    let junk = b"no hash  b/other\n\xff  b/other\n";
    write(&to.join(mirror::INDEX), &[old.as_bytes(), junk].concat());
    let path = mirror::write_index(&[abc, only, wrong], &to).expect("an index");
    let index = std::fs::read_to_string(path).expect("an index");
    let expected = hash_bytes(b"abc");
    assert_eq!(
        index,
        format!("{expected}  a/abc.patch\n{expected}  a/only.patch\n{sum}  b/other\n")
    );
    for line in index.lines() {
        let (sum, file) = line.split_once("  ").expect("two words");
        assert_eq!(hash_file(&to.join(file)).expect("a file").1, sum);
    }
}
