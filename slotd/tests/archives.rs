//! Hostile archives and bundles, passed to the real program with 48 MiB of address space and 10 s of processor
//! time: each is refused with its code, and leaves nothing behind. And valid backups are restored.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Plan, Robot, answer};
use slotd::data::archive::{self, ArchiveLimits};
use slotd::files::DirectFileChanges;
use tar::EntryType as Kind;

/// KiB of address space: memory use is then below 48 MiB, however it is measured.
const ADDRESS_SPACE: u32 = 48 << 10;

/// Seconds of processor time.
const SECONDS: u32 = 10;

const MANY: u32 = 1_000_000;

/// More entries than an archive may have.
const TOO_MANY: u32 = (1 << 17) + 1000;

/// More than the memory limit: 128 MiB.
const HUGE: u64 = 128 << 20;

/// Runs the program within these limits.
fn bounded(robot: &Robot, args: &[&str]) -> Output {
    let limits = format!("ulimit -v {ADDRESS_SPACE}; ulimit -t {SECONDS}; exec \"$@\"");
    Command::new("sh")
        .args(["-c", &limits, "sh", env!("CARGO_BIN_EXE_slotd"), "--format", "json", "--root"])
        .arg(robot.path(""))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// A header with this name in its field, even if invalid.
fn header(name: &str, kind: Kind, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    header
}

type Out<'a> = &'a mut dyn Write;

fn entry(out: Out<'_>, name: &str, kind: Kind, content: &[u8]) -> io::Result<()> {
    out.write_all(header(name, kind, content.len() as u64).as_bytes())?;
    out.write_all(content)?;
    out.write_all(&vec![0; content.len().next_multiple_of(512) - content.len()])
}

/// An entry of one byte, repeated very often.
fn endless(out: Out<'_>, kind: Kind) -> io::Result<()> {
    out.write_all(header("././@LongLink", kind, HUGE).as_bytes())?;
    let written = io::copy(&mut io::repeat(b'a').take(HUGE), out)?;
    assert_eq!(written, HUGE);
    entry(out, "home/x", Kind::Regular, b"x")
}

/// A tar, and the code that it is refused with as a backup.
type Case = (&'static str, &'static str, fn(Out<'_>) -> io::Result<()>);

const CASES: &[Case] = &[
    ("a long name", "bad-archive", |out| endless(out, Kind::GNULongName)),
    ("a long link", "bad-archive", |out| endless(out, Kind::GNULongLink)),
    ("pax", "bad-archive", |out| endless(out, Kind::XHeader)),
    ("pax for all", "bad-archive", |out| endless(out, Kind::XGlobalHeader)),
    ("a chain of pax", "bad-archive", |out| {
        (0..MANY).try_for_each(|_| entry(out, "x", Kind::XHeader, b"9 path=x\n"))
    }),
    ("a chain of long names", "bad-archive", |out| {
        (0..MANY).try_for_each(|_| entry(out, "././@LongLink", Kind::GNULongName, b"home/x\0"))
    }),
    ("a sparse map", "bad-archive", |out| {
        let mut first = header("home/x", Kind::GNUSparse, 0);
        first.as_gnu_mut().unwrap().isextended[0] = 1;
        first.set_cksum();
        out.write_all(first.as_bytes())?;
        let mut more = [b'0'; 512];
        more[504] = 1;
        (0..MANY).try_for_each(|_| out.write_all(&more))
    }),
    ("a million empty files", "bad-archive", |out| {
        (0..MANY).try_for_each(|n| entry(out, &format!("home/{n}"), Kind::Regular, b""))
    }),
    ("too many directories", "bad-archive", |out| {
        (0..TOO_MANY).try_for_each(|n| entry(out, &format!("home/{n}"), Kind::Directory, b""))
    }),
    ("a million times one directory", "bad-archive", |out| {
        (0..MANY).try_for_each(|_| entry(out, "home", Kind::Directory, b""))
    }),
    ("too many long links", "bad-archive", |out| {
        (0..TOO_MANY).try_for_each(|n| {
            entry(out, "././@LongLink", Kind::GNULongLink, &[b'a'; 4000])?;
            entry(out, &format!("home/{n}"), Kind::Symlink, b"")
        })
    }),
    ("a deep path", "bad-archive", |out| {
        entry(out, "././@LongLink", Kind::GNULongName, "a/".repeat(500).as_bytes())?;
        entry(out, "home/x", Kind::Regular, b"x")
    }),
    ("deep links", "bad-archive", |out| {
        for n in 0..TOO_MANY {
            let mut link = header(&format!("home/{n}"), Kind::Symlink, 0);
            link.set_link_name(format!("{}", n + 1)).unwrap();
            link.set_cksum();
            out.write_all(link.as_bytes())?;
        }
        Ok(())
    }),
    ("through a link", "bad-archive", |out| {
        let mut link = header("home/x", Kind::Symlink, 0);
        link.set_link_name("..").unwrap();
        link.set_cksum();
        out.write_all(link.as_bytes())?;
        entry(out, "home/x/y", Kind::Regular, b"x")
    }),
    ("a directory with content", "bad-archive", |out| {
        out.write_all(header("home", Kind::Directory, 1 << 40).as_bytes())?;
        io::copy(&mut io::repeat(0).take(HUGE), out).map(drop)
    }),
    ("a file without an end", "no-space", |out| {
        out.write_all(header("home/x", Kind::Regular, i64::MAX as u64).as_bytes())
    }),
    ("something after the end", "bad-archive", |out| {
        entry(out, "home/x", Kind::Regular, b"x")?;
        io::copy(&mut io::repeat(0).take(HUGE), out).map(drop)
    }),
    ("a name at the end", "bad-archive", |out| {
        entry(out, "././@LongLink", Kind::GNULongName, b"home/x\0")
    }),
    ("the API's directory is a link", "bad-archive", |out| {
        let mut link = header("apps", Kind::Symlink, 0);
        link.set_link_name("slotd").unwrap();
        link.set_cksum();
        out.write_all(link.as_bytes())
    }),
];

fn write(path: &Path, case: &Case, packed: bool) {
    let file = io::BufWriter::new(fs::File::create(path).unwrap());
    if packed {
        let mut out = zstd::Encoder::new(file, 1).unwrap();
        case.2(&mut out).unwrap();
        out.write_all(&[0; 1024]).unwrap();
        out.finish().unwrap().flush().unwrap();
    } else {
        let mut out = file;
        case.2(&mut out).unwrap();
        out.write_all(&[0; 1024]).unwrap();
        out.flush().unwrap();
    }
}

fn names(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    names
}

fn refused(output: &Output, what: &str) -> String {
    assert!(output.status.code().is_some_and(|code| code > 1), "{what}: {output:?}");
    answer(output)["refused"]["code"].as_str().unwrap().to_owned()
}

fn why(output: &Output) -> String {
    answer(output)["refused"]["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_hostile_archive_is_refused_within_bounds() {
    let robot = Plan { in_memory: true, ..Plan::default() }.make();
    robot.file("data/home/robot/mine", "mine");
    robot.run(&["log"]);
    let file = robot.path("hostile");
    for case in CASES {
        write(&file, case, true);
        let begun = std::time::Instant::now();
        let output = bounded(&robot, &["restore", "--no-restart", file.to_str().unwrap()]);
        println!("{}: {:.1} s", case.0, begun.elapsed().as_secs_f32());
        assert_eq!(refused(&output, case.0), case.1, "{}: {output:?}", case.0);
        // For its length, not because memory ran out.
        if case.0.starts_with("a long ") {
            assert!(why(&output).contains("a name must be 1 to "), "{}: {output:?}", case.0);
        }
        let left = names(&robot.path("data"));
        assert_eq!(left, [robot.path("data/home"), robot.path("data/slotd")], "{}", case.0);
        assert!(!robot.path("data/slotd/pending.json").exists(), "{}", case.0);
    }
    // A window as large as the format allows: nothing of the tar is read.
    let mut frame = zstd::Encoder::new(fs::File::create(&file).unwrap(), 1).unwrap();
    frame.window_log(27).unwrap();
    io::copy(&mut io::repeat(0).take(256 << 20), &mut frame).unwrap();
    frame.finish().unwrap();
    let output = bounded(&robot, &["restore", "--no-restart", file.to_str().unwrap()]);
    assert_eq!(refused(&output, "a window"), "bad-archive", "{output:?}");
    assert!(why(&output).contains("requires too much memory"), "{output:?}");
}

#[test]
fn a_hostile_bundle_is_refused_within_bounds() {
    let robot = Plan { in_memory: true, ..Plan::default() }.make();
    let file = robot.path("hostile");
    for case in CASES {
        write(&file, case, false);
        let output = bounded(&robot, &["verify", file.to_str().unwrap()]);
        let code = refused(&output, case.0);
        let known = ["irregular-member", "unexpected-member", "bad-header", "bad-length"];
        assert!(known.contains(&code.as_str()), "{}: {code}", case.0);
    }
    // And a valid one is verified within the same limits.
    fs::write(&file, common::bundle_of(&common::new_system(robot.size, 1))).unwrap();
    let output = bounded(&robot, &["verify", file.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
}

/// Everything that may be packed is restored: long names and links, modes that refuse their own content, empty
/// and unusual files, and archives of older agents, which the library's own writer made.
#[test]
fn what_is_packed_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let put = |path: &str, mode: u32| {
        let path = data.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, path.to_str().unwrap().repeat(3000)).unwrap();
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    let long = format!("home/{}/{}", "n".repeat(200), "m".repeat(200));
    let deep = format!("home/{}x", "d/".repeat(60));
    for (path, mode) in [(long.as_str(), 0o600), (&deep, 0o4755), ("home/ab/x", 0o644), ("a", 0)] {
        put(path, mode);
    }
    fs::write(data.join("home/empty"), "").unwrap();
    symlink("t".repeat(3000), data.join("home/link")).unwrap();
    symlink("short", data.join("home/ab/link")).unwrap();
    fs::set_permissions(data.join("home/ab"), PermissionsExt::from_mode(0o555)).unwrap();
    let names = archive::backup_names(&data).unwrap();
    let mut ours = Vec::new();
    archive::pack(&data, &names, &mut ours, ArchiveLimits::BACKUP).unwrap();
    let mut old = tar::Builder::new(zstd::Encoder::new(Vec::new(), 3).unwrap());
    old.follow_symlinks(false);
    old.append_dir_all("home", data.join("home")).unwrap();
    old.append_path_with_name(data.join("a"), "a").unwrap();
    let old = old.into_inner().unwrap().finish().unwrap();
    for (number, bytes) in [ours, old].into_iter().enumerate() {
        let into = dir.path().join(format!("into-{number}"));
        fs::create_dir(&into).unwrap();
        archive::unpack(&DirectFileChanges, bytes.as_slice(), &into, ArchiveLimits::BACKUP)
            .unwrap();
        let arguments = ["-r".as_ref(), "--no-dereference".as_ref(), data.as_path(), &into];
        let same = Command::new("diff").args(arguments).output().unwrap();
        assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
        let mode = |path: &str| {
            fs::symlink_metadata(into.join(path)).unwrap().permissions().mode() & 0o7777
        };
        assert_eq!((mode("home/ab"), mode(&deep), mode("a")), (0o555, 0o4755, 0));
        // One bit anywhere is noticed, or changes nothing.
        if number == 0 {
            let mut rotten = bytes.clone();
            let at = rotten.len() / 2;
            rotten[at] ^= 1;
            let into = dir.path().join("rotten");
            fs::create_dir(&into).unwrap();
            archive::unpack(&DirectFileChanges, rotten.as_slice(), &into, ArchiveLimits::BACKUP)
                .unwrap_err();
        }
    }
}

#[test]
fn what_could_not_be_unpacked_is_not_packed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fs::create_dir_all(data.join("home").join("d/".repeat(70))).unwrap();
    let pack = |room| archive::pack(&data, &["home".into()], io::sink(), room);
    assert_eq!(pack(ArchiveLimits::BACKUP).unwrap_err().code, "no-archive");
    fs::remove_dir_all(data.join("home/d/d/d/d/d/d/d/d/d/d")).unwrap();
    let used = pack(ArchiveLimits::BACKUP).unwrap();
    assert_eq!(used, ArchiveLimits { bytes: 10 * 4096, entries: 10 });
    pack(used).unwrap();
    for less in
        [ArchiveLimits { bytes: used.bytes - 1, ..used }, ArchiveLimits { entries: 9, ..used }]
    {
        assert_eq!(pack(less).unwrap_err().code, "no-archive");
        let mut bytes = Vec::new();
        archive::pack(&data, &["home".into()], &mut bytes, used).unwrap();
        let into = dir.path().join("into");
        fs::create_dir(&into).unwrap();
        let refused =
            archive::unpack(&DirectFileChanges, bytes.as_slice(), &into, less).unwrap_err();
        assert_eq!(refused.code, "no-space");
        fs::remove_dir_all(into).unwrap();
    }
}

/// A backup by the program is readable only by its owner from the first byte on, with any umask.
#[test]
fn a_backup_is_for_root_only() {
    let robot = Plan::default().make();
    robot.file("data/home/robot/mine", "mine");
    let file = robot.path("own.tar.zst");
    fs::write(robot.path("own.tar.zst.partial"), "of another time").unwrap();
    let output = Command::new("sh")
        .args(["-c", "umask 0; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_slotd"), "--root"])
        .args([robot.path(""), "backup".into(), file.clone()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!robot.path("own.tar.zst.partial").exists());
}
