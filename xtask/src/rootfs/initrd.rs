//! The initrd: busybox, one script, and the modules that the root's storage needs, in load order.
//! Created without the target's tools, and identical for identical inputs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use cpio::newc;

use super::kernel::{self, ModuleIndex};
use super::tree::RootTree;
use crate::artifact::{Artifact, write_atomically};

/// Level for either compression: the archive is small and is read by every boot.
const ZSTD_LEVEL: i32 = 19;

/// The compression that the kernel must support.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitrdCompression {
    /// Every kernel.
    Gzip,
    /// Kernels with `CONFIG_RD_ZSTD=y`.
    Zstd,
}

impl InitrdCompression {
    /// The best compression that a kernel's configuration supports.
    pub fn for_kernel(config: &str) -> Self {
        if config.lines().any(|line| line == "CONFIG_RD_ZSTD=y") { Self::Zstd } else { Self::Gzip }
    }
}

/// The inputs of an initrd.
#[derive(Debug)]
pub struct InitrdRequest<'a> {
    /// Statically linked busybox for the target; installed as `bin/busybox` with `bin/sh`.
    pub busybox: &'a Utf8Path,
    /// The script that becomes `/init`.
    pub init: &'a [u8],
    /// Modules by name (`virtio_blk`, `sdhci-iproc`); built-in ones are accepted and skipped.
    pub modules: &'a [String],
    /// The engine's tar of modules.
    pub modules_archive: &'a Utf8Path,
    /// The output of `uname -r`.
    pub kernel_release: &'a str,
    /// Time of every file, seconds since 1970.
    pub epoch: u64,
    /// Files to add: absolute or relative path, mode, content.
    pub extra: &'a [(String, u32, Vec<u8>)],
    /// How to compress.
    pub compression: InitrdCompression,
}

/// Builds the initrd. `etc/modules` lists the modules' paths, one per line, in load order: the
/// init script runs `insmod` on each.
///
/// # Errors
/// When a module does not exist for this kernel (with the nearest names), or files are unreadable.
pub fn build_initrd(request: &InitrdRequest<'_>, out: &Utf8Path) -> Result<Artifact> {
    let files = collect_nodes(request).context("building the initrd")?;
    write_atomically(out, |writer| {
        let time = u32::try_from(request.epoch).context("the epoch is after 2106")?;
        match request.compression {
            InitrdCompression::Gzip => {
                let level = flate2::Compression::best();
                let gzip = flate2::GzBuilder::new().mtime(0).write(writer, level);
                write_archive(gzip, &files, time)?.finish()?;
            }
            InitrdCompression::Zstd => {
                let zstd = zstd::Encoder::new(writer, ZSTD_LEVEL)?;
                write_archive(zstd, &files, time)?.finish()?;
            }
        }
        Ok(())
    })?;
    Artifact::from_file(out)
}

enum Node {
    Folder,
    File(u32, Vec<u8>),
    Symlink(String),
    Device(u32, u32, u32),
}

fn collect_nodes(request: &InitrdRequest<'_>) -> Result<BTreeMap<String, Node>> {
    let tree = RootTree::from_tar(request.modules_archive)?;
    let text = |name: &str| -> Result<String> {
        let bytes = tree.bytes(name)?.with_context(|| format!("the modules lack {name}"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let index = ModuleIndex::new(&text("modules.dep")?, &text("modules.builtin")?);
    let order = index.load_order(request.modules)?;
    let mut nodes = BTreeMap::new();
    let mut list = String::new();
    for module in order {
        let bytes = tree.bytes(&module)?.with_context(|| format!("the modules lack {module}"))?;
        // Plain: the archive is compressed as a whole, and neither busybox nor the kernel needs
        // support for compressed modules.
        let (module, bytes) = kernel::unpack_module(&module, bytes)?;
        let path = format!("lib/modules/{}/{module}", request.kernel_release);
        list.push_str(&format!("/{path}\n"));
        nodes.insert(path, Node::File(0o644, bytes));
    }
    let busybox =
        fs::read(request.busybox).with_context(|| format!("reading {}", request.busybox))?;
    nodes.insert("bin/busybox".into(), Node::File(0o755, busybox));
    nodes.insert("bin/sh".into(), Node::Symlink("busybox".into()));
    nodes.insert("etc/modules".into(), Node::File(0o644, list.into_bytes()));
    nodes.insert("init".into(), Node::File(0o755, request.init.to_vec()));
    // The kernel opens /dev/console before /init can mount anything.
    nodes.insert("dev/console".into(), Node::Device(0o600, 5, 1));
    nodes.insert("dev/null".into(), Node::Device(0o666, 1, 3));
    for dir in ["proc", "sys", "run", "mnt", "tmp"] {
        nodes.insert(dir.into(), Node::Folder);
    }
    for (path, mode, bytes) in request.extra {
        let path = path.trim_start_matches('/').to_owned();
        if path.split('/').any(|part| part.is_empty() || part == "..") {
            bail!("'{path}' is not a path within the initrd");
        }
        nodes.insert(path, Node::File(*mode, bytes.clone()));
    }
    let parents: BTreeSet<String> = nodes
        .keys()
        .flat_map(|path| path.match_indices('/').map(|(i, _)| path[..i].to_owned()))
        .collect();
    for parent in parents {
        nodes.entry(parent).or_insert(Node::Folder);
    }
    Ok(nodes)
}

fn write_archive<W: Write>(mut out: W, nodes: &BTreeMap<String, Node>, time: u32) -> Result<W> {
    // BTreeMap order puts `lib` before `lib/modules`: directories come before their contents.
    for (number, (path, node)) in nodes.iter().enumerate() {
        let empty: &[u8] = &[];
        let (mode, data) = match node {
            Node::Folder => (0o040_755, empty),
            Node::File(mode, bytes) => (0o100_000 | mode, bytes.as_slice()),
            Node::Symlink(target) => (0o120_777, target.as_bytes()),
            Node::Device(mode, ..) => (0o020_000 | mode, empty),
        };
        let mut builder = newc::Builder::new(path)
            .ino(u32::try_from(number + 1).context("too many files")?)
            .nlink(1)
            .uid(0)
            .gid(0)
            .mtime(time)
            .mode(mode);
        if let Node::Device(_, major, minor) = node {
            builder = builder.rdev_major(*major).rdev_minor(*minor);
        }
        let size = u32::try_from(data.len()).with_context(|| format!("{path} is too large"))?;
        let mut writer = builder.write(out, size);
        writer.write_all(data).with_context(|| format!("writing {path}"))?;
        out = writer.finish().with_context(|| format!("writing {path}"))?;
    }
    newc::trailer(out).context("finishing the archive")
}
