//! Creates an ext4 image from a tar, without root and with the same bytes on every run, with
//! `mke2fs` of e2fsprogs 1.47.1 or newer: the first version that reads a tar and uses
//! `SOURCE_DATE_EPOCH` for every time.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use uuid::Uuid;

use crate::artifact;
use crate::disk::{Ext4Usage, read_usage};
use crate::exec::Tool;
use crate::progress;

/// Bytes in a block: the size of the kernel's pages, the card's blocks and the bundle's blocks.
const BLOCK: u64 = 4096;
/// Bytes in an inode: space for times after 2038 and for small attributes.
const INODE: u32 = 256;
/// One inode for this many bytes: Debian's default for volumes of 512 MiB or more.
const BYTES_PER_INODE: u64 = 16_384;
/// Free inodes in addition to those of the content.
const SPARE_INODES: u64 = 1024;
/// The oldest supported e2fsprogs.
const OLDEST: (u32, u32, u32) = (1, 47, 1);
/// The complete list of features, independent of `mke2fs.conf`. Excluded on purpose: `64bit` (only
/// needed from 16 TiB on), and `orphan_file` and `metadata_csum_seed`, which U-Boot 2023.01 and
/// Linux before 5.15 do not support. U-Boot ignores the checksums of `metadata_csum`, Linux uses
/// them.
const FEATURES: [&str; 11] = [
    "none",
    "ext_attr",
    "dir_index",
    "filetype",
    "extent",
    "flex_bg",
    "sparse_super",
    "large_file",
    "huge_file",
    "dir_nlink",
    "extra_isize",
];

/// An installed or unpacked e2fsprogs.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Mke2fs {
    /// The program.
    pub program: Utf8PathBuf,
    /// The directories of its libraries (libext2fs, libcom_err, libarchive); empty when they are
    /// installed.
    pub libraries: Vec<Utf8PathBuf>,
}

impl Mke2fs {
    /// A call of the program without arguments, independent of the host's configuration. Other
    /// programs of the same package (`e2fsck`, `debugfs`) are in the same directory.
    pub fn tool(&self, program: &Utf8Path) -> Tool {
        let tool = Tool::new(program)
            .env("MKE2FS_CONFIG", "/dev/null")
            .env("MKE2FS_SYNC", "0")
            .env("LC_ALL", "C")
            .env_remove("MKE2FS_DEVICE_SECTSIZE")
            .env_remove("MKE2FS_DEVICE_PHYS_SECTSIZE");
        if self.libraries.is_empty() {
            return tool;
        }
        let dirs: Vec<&str> = self.libraries.iter().map(|dir| dir.as_str()).collect();
        tool.env("LD_LIBRARY_PATH", dirs.join(":"))
    }

    /// The version, if it is supported.
    ///
    /// # Errors
    /// When the program cannot be run or is older than 1.47.1.
    pub fn version(&self) -> Result<String> {
        let mut version = None;
        self.tool(&self.program).arg("-V").run_lines(|line| {
            if let Some(rest) = line.strip_prefix("mke2fs ") {
                version = rest.split_whitespace().next().map(str::to_owned);
            }
        })?;
        let Some(version) = version else { bail!("{} does not print its version", self.program) };
        let mut numbers = version.split('.').map(|n| n.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        let found = (next(), next(), next());
        ensure!(
            found >= OLDEST,
            "{} is version {version}, expected 1.47.1 or newer\n\
             help: older versions cannot read a tar and use times of the host; Debian 12 has a \
             newer e2fsprogs in its backports",
            self.program
        );
        Ok(version)
    }
}

/// An ext4 image to create.
#[derive(Debug, Clone)]
pub struct Ext4Request<'a> {
    /// Its content, with owners, modes and times; `None` creates an empty one.
    pub tar: Option<&'a Utf8Path>,
    /// Bytes of the image, a multiple of 4 KiB.
    pub size: u64,
    /// The label, at most 16 bytes.
    pub label: &'a str,
    /// The volume's UUID.
    pub uuid: Uuid,
    /// The seed of the directories' hashes.
    pub hash_seed: Uuid,
    /// Seconds since 1970: the time of everything without a time in the tar.
    pub epoch: u64,
    /// With a journal. A slot is never written while it is mounted and needs no journal; `data`
    /// does.
    pub journal: bool,
    /// The maximum size to which it can grow while it is mounted, in bytes, for a volume that grows
    /// on first boot; `None` for a fixed size.
    pub grows_to: Option<u64>,
    /// The key of the size, for messages: `partitions.root.size in board/<board>/board.toml`.
    pub size_key: &'a str,
}

/// The content of a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TarContent {
    /// Bytes of its files, each in whole blocks.
    bytes: u64,
    /// Files, directories, links, devices.
    entries: u64,
}

/// Creates the image.
///
/// # Errors
/// When the tool is too old or fails, or the content does not fit; the message names both sizes. No
/// file has the image's name then.
pub fn make_image(tool: &Mke2fs, request: &Ext4Request<'_>, out: &Utf8Path) -> Result<Ext4Usage> {
    let temporary = artifact::partial_path(out);
    let attempt = || -> Result<Ext4Usage> {
        check_request(request)?;
        tool.version()?;
        if let Some(parent) = out.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
        }
        remove(&temporary)?;
        let content = request.tar.map(content_of).transpose()?;
        if let Some(content) = content
            && content.bytes > request.size
        {
            return Err(too_large(request, content));
        }
        if let Err(error) = run_mke2fs(tool, request, content, &temporary) {
            let text = format!("{error:#}");
            let full = ["Could not allocate", "No free space", "No space left on device"];
            return Err(match content {
                Some(content)
                    if full.iter().any(|f| text.contains(f)) && !disk_full(&temporary) =>
                {
                    too_large(request, content)
                }
                _ => error,
            });
        }
        let usage = read_usage(&temporary)?;
        File::open(&temporary)
            .and_then(|file| file.sync_data())
            .with_context(|| format!("writing {temporary}"))?;
        std::fs::rename(&temporary, out).with_context(|| format!("renaming {temporary}"))?;
        Ok(usage)
    };
    attempt().with_context(|| format!("making the filesystem {out}")).inspect_err(|_| {
        // Best effort: the first error is the one to report.
        drop(remove(&temporary));
    })
}

fn check_request(request: &Ext4Request<'_>) -> Result<()> {
    let (size, label) = (request.size, request.label);
    ensure!(
        size > 0 && size.is_multiple_of(BLOCK),
        "the size is {size} bytes, expected a multiple of 4096"
    );
    ensure!(label.len() <= 16, "the label `{label}` has {} bytes, the maximum is 16", label.len());
    Ok(())
}

fn run_mke2fs(
    tool: &Mke2fs,
    request: &Ext4Request<'_>,
    content: Option<TarContent>,
    out: &Utf8Path,
) -> Result<()> {
    let mut features = FEATURES.join(",");
    features.push_str(",metadata_csum");
    let mut extended = vec![
        format!("hash_seed={}", request.hash_seed),
        // Inode tables and journal are fully initialised, so that no old data of the card is
        // visible and the kernel has no background work.
        "lazy_itable_init=0".to_owned(),
        "lazy_journal_init=0".to_owned(),
        "root_owner=0:0".to_owned(),
        "nodiscard".to_owned(),
    ];
    if request.journal {
        features.push_str(",has_journal");
    }
    if let Some(largest) = request.grows_to.filter(|largest| *largest > request.size) {
        features.push_str(",resize_inode");
        extended.push(format!("resize={}", largest / BLOCK));
    }
    let needed = content.map_or(0, |c| c.entries) + SPARE_INODES;
    let inodes = needed.max(request.size / BYTES_PER_INODE);
    let mut call = tool
        .tool(&tool.program)
        .env("SOURCE_DATE_EPOCH", request.epoch.to_string())
        // mke2fs interprets 0 as "now".
        .env("E2FSPROGS_FAKE_TIME", request.epoch.max(1).to_string())
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-e", "remount-ro"])
        .args(["-b", &BLOCK.to_string(), "-I", &INODE.to_string(), "-N", &inodes.to_string()])
        .args(["-L", request.label, "-U", &request.uuid.to_string()])
        .args(["-O", &features, "-E", &extended.join(",")]);
    if let Some(tar) = request.tar {
        call = call.args(["-d", tar.as_str()]);
    }
    call.arg(out).arg((request.size / BLOCK).to_string()).run()
}

fn too_large(request: &Ext4Request<'_>, content: TarContent) -> anyhow::Error {
    anyhow::anyhow!(
        "the content ({} in {} entries) does not fit {}\nhelp: raise {}, or remove some content",
        progress::format_bytes(content.bytes),
        content.entries,
        progress::format_bytes(request.size),
        request.size_key
    )
}

/// Whether the host's disk was full.
fn disk_full(path: &Utf8Path) -> bool {
    let dir = path.parent().filter(|p| !p.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    rustix::fs::statvfs(dir.as_std_path()).is_ok_and(|s| s.f_bavail < 256)
}

fn content_of(path: &Utf8Path) -> Result<TarContent> {
    let context = || format!("reading {path}");
    let mut archive = tar::Archive::new(File::open(path).with_context(context)?);
    let mut content = TarContent { bytes: 0, entries: 0 };
    for entry in archive.entries_with_seek().with_context(context)? {
        let entry = entry.with_context(context)?;
        // An additional name of a file needs neither an inode nor blocks.
        if entry.header().entry_type() == tar::EntryType::Link {
            continue;
        }
        content.entries += 1;
        content.bytes += entry.size().next_multiple_of(BLOCK);
    }
    Ok(content)
}

fn remove(path: &Utf8Path) -> Result<()> {
    artifact::none_if_missing(std::fs::remove_file(path))
        .with_context(|| format!("removing {path}"))?;
    Ok(())
}
