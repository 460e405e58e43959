//! Wheels that tests write, their locks, a base for them, and installing them.
#![allow(dead_code)]

use std::io::{Cursor, Write as _};
use std::process::Command;
use std::sync::OnceLock;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::artifact::hash_bytes;
use xtask::cache::Cache;
use xtask::wheel::archive::digest_text;
use xtask::wheel::base::BaseSource;
use xtask::wheel::target::WheelName;
use xtask::wheel::{
    BasePython, CheckedWheel, InstallRequest, InstallTarget, InstalledWheels, LockedWheel,
    WheelLock, WheelTarget, fetch_wheels, install_wheels,
};

pub fn target() -> WheelTarget {
    WheelTarget {
        python: "3.11".parse().unwrap(),
        implementation: "cp".into(),
        arch: "aarch64".into(),
        libc: "glibc 2.36".parse().unwrap(),
    }
}

/// A wheel to be written: good until a test breaks it.
#[derive(Clone)]
pub struct Draft {
    pub file: String,
    pub info: String,
    /// Path, content, mode; RECORD is made from them.
    pub members: Vec<(String, String, u32)>,
    /// Changes RECORD's text.
    pub record: fn(String) -> String,
    /// Changes the finished archive's bytes.
    pub bytes: fn(Vec<u8>) -> Vec<u8>,
}

impl Draft {
    pub fn new(name: &str, headers: &str) -> Self {
        let info = format!("{name}-1.0.dist-info");
        let text = |path: &str, text: &str| (path.to_owned(), text.to_owned(), 0o644);
        Self {
            file: format!("{name}-1.0-py3-none-any.whl"),
            members: vec![
                text(&format!("{name}/__init__.py"), "__version__ = '1.0'\n"),
                text(
                    &format!("{info}/METADATA"),
                    &format!("Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{headers}\n"),
                ),
                text(
                    &format!("{info}/WHEEL"),
                    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                ),
            ],
            info,
            record: |text| text,
            bytes: |bytes| bytes,
        }
    }

    pub fn with(mut self, path: &str, content: &str, mode: u32) -> Self {
        self.members.push((path.to_owned(), content.to_owned(), mode));
        self
    }

    pub fn edit(mut self, end: &str, from: &str, to: &str) -> Self {
        for (path, content, _) in &mut self.members {
            if path.ends_with(end) {
                assert!(content.contains(from), "{path} has no {from}");
                *content = content.replace(from, to);
            }
        }
        self
    }

    pub fn record(mut self, change: fn(String) -> String) -> Self {
        self.record = change;
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        let mut record = String::new();
        for (path, content, mode) in &self.members {
            let options = zip::write::SimpleFileOptions::default().unix_permissions(*mode);
            if *mode & 0o170_000 == 0o120_000 {
                writer.add_symlink(path, content, options).unwrap();
            } else {
                writer.start_file(path, options).unwrap();
                writer.write_all(content.as_bytes()).unwrap();
            }
            let digest = digest_text(content.as_bytes());
            let quoted = if path.contains(',') { format!("\"{path}\"") } else { path.clone() };
            record.push_str(&format!("{quoted},{digest},{}\n", content.len()));
        }
        let path = format!("{}/RECORD", self.info);
        record.push_str(&format!("{path},,\n"));
        writer.start_file(&path, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all((self.record)(record).as_bytes()).unwrap();
        (self.bytes)(writer.finish().unwrap().into_inner())
    }

    pub fn read(&self) -> anyhow::Result<CheckedWheel> {
        CheckedWheel::read(&self.build(), &self.file, None)
    }
}

/// Changes every occurrence of a member's name in an archive; names have equal lengths.
pub fn rename(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut at = 0;
    while at + from.len() <= bytes.len() {
        if bytes[at..].starts_with(from) {
            bytes[at..at + from.len()].copy_from_slice(to);
        }
        at += 1;
    }
    bytes
}

pub fn message<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("it was accepted"),
        Err(error) => format!("{error:#}"),
    }
}

/// A directory with an unpacked arm64 Debian with Python, made once for all tests.
pub fn arm64_root() -> &'static Utf8Path {
    static ROOT: OnceLock<Utf8PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = Utf8Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-arm64");
        if !root.exists() {
            let partial = Utf8PathBuf::from(format!("{root}.{}", std::process::id()));
            let status = Command::new("mmdebstrap")
                .args([
                    "--quiet",
                    "--arch=arm64",
                    "--variant=extract",
                    "bookworm",
                    partial.as_str(),
                ])
                .args(["--include=python3,libpython3.11-stdlib,libc6"])
                .status()
                .unwrap();
            assert!(status.success(), "mmdebstrap failed");
            std::fs::rename(&partial, &root).unwrap();
        }
        root
    })
}

pub fn unpack(tar: &Utf8Path, to: &Utf8Path) {
    std::fs::create_dir_all(to).unwrap();
    let status =
        Command::new("tar").args(["-xf", tar.as_str(), "-C", to.as_str()]).status().unwrap();
    assert!(status.success());
}

/// Puts drafts into a cache and locks them; `foo` is what is asked for.
pub fn locked(drafts: &[Draft], cache: &Utf8Path) -> WheelLock {
    let wheels = drafts.iter().map(|draft| {
        let bytes = draft.build();
        let sha256 = hash_bytes(&bytes);
        let folder = cache.join("downloads/sha256");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(&sha256), &bytes).unwrap();
        LockedWheel {
            name: WheelName::parse(&draft.file).unwrap().name,
            version: "1.0".into(),
            file: draft.file.clone(),
            size: bytes.len() as u64,
            sha256,
            requires_python: None,
            needed_by: vec![],
        }
    });
    WheelLock::new("foo==1.0", target(), wheels.collect())
}

pub fn install_into(
    lock: &WheelLock,
    cache: &Utf8Path,
    out: &Utf8Path,
) -> anyhow::Result<InstalledWheels> {
    let wheels = fetch_wheels(lock, &Cache::in_dir(cache.to_owned()), true)?;
    let base = BasePython::read(BaseSource::Root(arm64_root().to_owned()))?;
    let target = InstallTarget::for_base(&base, true);
    let request = InstallRequest {
        lock,
        wheels: &wheels,
        base: &base,
        target: &target,
        cache,
        epoch: 1_700_000_000,
        out,
        log: None,
    };
    install_wheels(&request)
}
