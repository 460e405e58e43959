//! Parses what a boot loader passes to Linux: the device tree, the kernel, the initrd, and the drivers that are built
//! into the kernel.
//!
//! Sources: the header of an arm64 `Image` (Linux, Documentation/arch/arm64/booting.rst); `struct of_device_id`
//! (include/linux/mod_devicetable.h: 32 bytes of name, 32 of type, 128 of compatible); initrds (cpio newc).

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::card::CardSlot;
use super::fdt::DeviceTree;
use super::uboot::BootScript;
use super::{CardLocation, find_bytes};

/// The largest kernel or initrd that is unpacked: three times Debian's kernel.
const LARGEST: u64 = 128 << 20;
/// Maximum number of files in an initrd; and the size of the largest file that is kept, such as `/init`.
const MOST_FILES: usize = 65_536;
const LARGEST_KEPT: usize = 256 << 10;
/// The first bytes of a zstd file (RFC 8878, 3.1.1).
pub(super) const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Zeros before the `compatible` of a match that has neither name nor type.
const BEFORE: usize = 64;
/// Bytes of `compatible` in a match.
const COMPATIBLE: usize = 128;

/// A kernel with its device tree, initrd and modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemParts {
    /// The device tree that it gets.
    pub tree: DeviceTree,
    /// Its version, from its version string.
    pub version: String,
    /// Bytes of its file.
    pub packed: u64,
    /// Whether the file is packed.
    pub is_packed: bool,
    /// Bytes of the unpacked image.
    pub unpacked: u64,
    /// Bytes that it occupies in memory, including what is not in the file.
    pub in_memory: u64,
    /// Its required offset from a 2 MiB boundary.
    pub text_offset: u64,
    /// Bytes of the initrd's file.
    pub initrd_size: u64,
    /// Bytes of the tree's file.
    pub tree_size: u64,
    /// `compatible` strings that a built-in driver matches.
    pub built_in: BTreeSet<String>,
    /// Modules that are built in.
    pub built_in_modules: BTreeSet<String>,
    /// Small files of the initrd, such as its `/init`.
    pub initrd: BTreeMap<String, Vec<u8>>,
    /// Modules that the initrd loads, with the `compatible` strings of each.
    pub loaded: BTreeMap<String, BTreeSet<String>>,
    /// Which modules of the slot match a `compatible` string.
    pub modules: BTreeMap<String, String>,
}

/// A kernel on its way to `/init`.
pub struct BootSystem<'a> {
    /// Its parts, or why they cannot be read.
    pub parts: &'a Result<SystemParts, String>,
    /// Its command line.
    pub words: String,
    /// Where kernel, initrd, tree and command line come from.
    pub places: [CardLocation; 4],
    /// The slot.
    pub slot: &'a CardSlot,
    /// The script that starts it, with U-Boot.
    pub script: Option<&'a BootScript>,
}

/// The name of a module in a path: `kernel/drivers/mmc/host/sdhci-iproc.ko.xz` is `sdhci_iproc`.
pub fn module_name(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// Decompresses gzip and zstd, as used for kernels and initrds; returns anything else unchanged.
///
/// # Errors
/// When the data is damaged.
pub fn unpack(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let read = match bytes {
        [0x1f, 0x8b, ..] => {
            flate2::read::MultiGzDecoder::new(bytes).take(LARGEST + 1).read_to_end(&mut out)
        }
        bytes if bytes.starts_with(&ZSTD) => zstd::Decoder::new(bytes)
            .and_then(|decoder| decoder.take(LARGEST + 1).read_to_end(&mut out)),
        _ => return Ok(bytes.to_vec()),
    };
    read.map_err(|error| format!("cannot decompress: {error}"))?;
    if out.len() as u64 > LARGEST {
        return Err(format!("decompresses to more than {} MiB", LARGEST >> 20));
    }
    Ok(out)
}

impl SystemParts {
    /// Parses a system.
    ///
    /// # Errors
    /// Which file is missing or damaged.
    pub fn read(
        tree: Option<&[u8]>,
        kernel: Option<&[u8]>,
        initrd: Option<&[u8]>,
        slot: &CardSlot,
    ) -> Result<Self, String> {
        let tree = tree.ok_or("the device tree is missing")?;
        let kernel = kernel.ok_or("the kernel is missing")?;
        let initrd = initrd.ok_or("the initrd is missing")?;
        let image = unpack(kernel).map_err(|error| format!("the kernel: {error}"))?;
        let u64_at = |at: usize| {
            let eight = image.get(at..at + 8).and_then(|eight| eight.try_into().ok());
            u64::from_le_bytes(eight.unwrap_or_default())
        };
        // "ARM\x64" at 56.
        if image.get(56..60) != Some(b"ARM\x64") {
            return Err("the kernel is not an arm64 Image".to_owned());
        }
        let files =
            unpack_archive(&unpack(initrd).map_err(|error| format!("the initrd: {error}"))?)?;
        let text = |name: &str| {
            let found = slot.files.iter().filter(|(path, _)| path.ends_with(&format!("/{name}")));
            found.map(|(_, bytes)| String::from_utf8_lossy(bytes).into_owned()).collect::<String>()
        };
        let aliases: Vec<(String, String)> =
            text("modules.alias").lines().filter_map(parse_alias).collect();
        let mut built_in = compatible_strings(&image);
        for part in text("modules.builtin.modinfo").split('\0') {
            let alias = part.split_once(".alias=").map(|(_, alias)| alias);
            built_in.extend(alias.and_then(of_alias));
        }
        let mut of_module: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (compatible, module) in &aliases {
            of_module.entry(module).or_default().insert(compatible.clone());
        }
        let mut loaded = BTreeMap::new();
        let list = files.get("etc/modules").map(|list| String::from_utf8_lossy(list).into_owned());
        for path in list.unwrap_or_default().lines() {
            let name = module_name(path);
            if loaded.contains_key(&name) {
                continue;
            }
            let mut of = of_module.get(name.as_str()).cloned().unwrap_or_default();
            // From the module itself, unless it is compressed.
            let bytes = files.get(path.trim_start_matches('/')).map_or(&[][..], Vec::as_slice);
            for part in bytes.split(|byte| *byte == 0).filter(|part| part.starts_with(b"alias=of:"))
            {
                of.extend(of_alias(&String::from_utf8_lossy(&part[6..])));
            }
            if !bytes.is_empty() {
                loaded.insert(name, of);
            }
        }
        // The sizes in a header are limited so that sums cannot overflow.
        let u64_at = |at: usize| u64_at(at).min(1 << 48);
        let declared = u64_at(16);
        let mut files = files;
        files.retain(|_, bytes| bytes.len() <= LARGEST_KEPT);
        Ok(Self {
            tree: DeviceTree::read(tree).map_err(|error| format!("the device tree: {error}"))?,
            version: version(&image),
            packed: kernel.len() as u64,
            is_packed: image.len() != kernel.len(),
            unpacked: image.len() as u64,
            in_memory: declared.max(image.len() as u64),
            text_offset: u64_at(8),
            initrd_size: initrd.len() as u64,
            tree_size: tree.len() as u64,
            built_in,
            built_in_modules: text("modules.builtin").lines().map(module_name).collect(),
            initrd: files,
            loaded,
            modules: aliases.into_iter().collect(),
        })
    }
}

/// `alias of:N*T*Cbrcm,bcm2711-emmc2 sdhci_iproc`.
fn parse_alias(line: &str) -> Option<(String, String)> {
    let mut words = line.strip_prefix("alias ")?.split(' ');
    Some((of_alias(words.next()?)?, words.next()?.to_owned()))
}

/// The `compatible` of `of:N*T*Cbrcm,bcm2711-emmc2`, with or without `C*` behind it.
fn of_alias(alias: &str) -> Option<String> {
    let rest = alias.strip_prefix("of:N*T*C")?;
    Some(rest.strip_suffix("C*").unwrap_or(rest).to_owned()).filter(|name| !name.is_empty())
}

/// Every `compatible` of a match table: preceded by zeros and padded with zeros.
fn compatible_strings(image: &[u8]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let (mut at, mut zeros) = (0, 0);
    while let Some(byte) = image.get(at) {
        if *byte == 0 {
            (at, zeros) = (at + 1, zeros + 1);
            continue;
        }
        let field = image.get(at..at + COMPATIBLE).filter(|_| zeros >= BEFORE).unwrap_or_default();
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(0);
        let (text, rest) = field.split_at(end);
        let good = text.iter().all(|byte| byte.is_ascii_alphanumeric() || b",.-_+".contains(byte));
        if end > 2 && good && rest.iter().all(|byte| *byte == 0) {
            found.insert(String::from_utf8_lossy(text).into_owned());
        }
        (at, zeros) = (at + 1, 0);
    }
    found
}

fn version(image: &[u8]) -> String {
    let from = find_bytes(image, b"Linux version ").map_or(image.len(), |at| at + 14);
    let rest = image.get(from..).unwrap_or_default();
    let end = rest.iter().position(|byte| *byte <= b' ').unwrap_or(0);
    String::from_utf8_lossy(&rest[..end]).into_owned()
}

fn unpack_archive(bytes: &[u8]) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let in_context = |error: std::io::Error| format!("the initrd's archive: {error}");
    let mut files = BTreeMap::new();
    let mut rest = bytes;
    loop {
        let mut reader = cpio::newc::Reader::new(rest).map_err(in_context)?;
        if reader.entry().is_trailer() {
            return Ok(files);
        }
        if files.len() >= MOST_FILES {
            return Err(format!("the initrd's archive has more than {MOST_FILES} files"));
        }
        let name = reader.entry().name().trim_start_matches('/').to_owned();
        let mut content = Vec::new();
        reader.read_to_end(&mut content).map_err(in_context)?;
        files.insert(name, content);
        rest = reader.finish().map_err(in_context)?;
    }
}
