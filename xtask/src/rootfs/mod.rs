//! Root filesystem engines. Each yields the same value, a [`BaseSystem`]; what comes after an engine
//! (compose, disk, update, report) never asks which one it was.

pub mod buildroot;
pub mod debian;
pub mod glob;
pub mod initrd;
pub mod kernel;
pub mod parts;
pub mod tree;

use serde::{Deserialize, Serialize};

use crate::artifact::Artifact;

/// What an engine yields: a pruned root, and beside it all that boards boot from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BaseSystem {
    /// The engine that made it: `debian` or `buildroot`.
    pub engine: String,
    /// Tar of the root: sorted, numeric owners, one modification time at most the epoch; kernel
    /// modules under `usr/lib/modules`, nothing under `boot`.
    pub rootfs: Artifact,
    /// Sum of the lengths of the regular files in `rootfs`, in bytes.
    pub rootfs_bytes: u64,
    /// The kernel image, gzip-compressed (U-Boot's `booti` unpacks it to `kernel_comp_addr_r`).
    pub kernel: Artifact,
    /// Length of the kernel image after decompression, in bytes.
    pub kernel_unpacked_bytes: u64,
    /// What `uname -r` will say.
    pub kernel_release: String,
    /// The kernel's `config-*` (for lints; `CONFIG_RD_ZSTD=y` and the like).
    pub kernel_config: Artifact,
    /// Device trees that the board asked for.
    pub dtbs: Vec<NamedFile>,
    /// What the initrd builder needs from the engine.
    pub initrd_parts: InitrdParts,
    /// Firmware files that the board asked for.
    pub firmware: Vec<NamedFile>,
    /// The board's second-stage bootloader (`u-boot.bin`), where it has one.
    pub bootloader: Option<Artifact>,
    /// The interpreter that wheels are installed for.
    pub python: Python,
    /// Every package in the root and every package that something was unpacked from.
    pub packages: Vec<Package>,
    /// Version of the C library, as in `2.36` (wheels' `manylinux` tags are checked against it).
    pub glibc: String,
}

impl BaseSystem {
    /// Every file that the value names.
    pub fn files(&self) -> Vec<camino::Utf8PathBuf> {
        let parts = &self.initrd_parts;
        [&self.rootfs, &self.kernel, &self.kernel_config, &parts.busybox, &parts.modules]
            .into_iter()
            .chain(self.dtbs.iter().chain(&self.firmware).map(|named| &named.file))
            .chain(&self.bootloader)
            .map(|artifact| artifact.path.clone())
            .collect()
    }
}

/// A file with the path that it is known by, for example `broadcom/bcm2837-rpi-3-b.dtb`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFile {
    /// Relative path, with `/`.
    pub path: String,
    /// The file.
    pub file: Artifact,
}

/// What the initrd is made of, apart from its script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InitrdParts {
    /// A statically linked busybox for the target.
    pub busybox: Artifact,
    /// Tar of the kernel modules that the board keeps, with `modules.dep` and the other indexes;
    /// paths are relative to `lib/modules/<release>`.
    pub modules: Artifact,
}

/// The Python interpreter in the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Python {
    /// Full version, as in `3.11.2`.
    pub version: String,
    /// Major and minor, as in `3.11`.
    pub short: String,
    /// Where wheels go, absolute in the target.
    pub site_packages: String,
    /// Where their console scripts go, absolute in the target.
    pub scripts: String,
    /// Distributions (with metadata) that the base already has.
    pub distributions: Vec<Distribution>,
}

/// A Python distribution.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Distribution {
    /// Name as its metadata has it.
    pub name: String,
    /// Version as its metadata has it.
    pub version: String,
}

/// How a package takes part in the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Unpacked only: the kernel, firmware, bootloader, busybox.
    Extra,
    /// Unpacked on the machine that builds; never part of an image.
    Host,
    /// Installed in the root.
    Root,
}

/// One package of the base, for the SBOM, the budget and the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Package {
    /// Binary package name.
    pub name: String,
    /// Version.
    pub version: String,
    /// Architecture (`arm64`, `all`).
    pub arch: String,
    /// Installed, or only unpacked.
    pub role: Role,
    /// Source package that it was built from.
    pub source: String,
    /// Version of the source package.
    pub source_version: String,
    /// The product's further archive that it is from; none for Debian's own.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub archive: Option<String>,
    /// Section, as in `libs`.
    pub section: String,
    /// Bytes that its files take in the pruned root (0 for what was only unpacked).
    pub installed_bytes: u64,
    /// Length of the package file in bytes.
    pub download_bytes: u64,
    /// SHA-256 of the package file.
    pub sha256: String,
    /// Upstream's page, where the package names one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub homepage: Option<String>,
    /// Licences that a machine-readable `copyright` file names, sorted; empty when it is prose.
    pub licences: Vec<String>,
    /// Whether the distribution calls it essential.
    pub essential: bool,
    /// Name in the CVE dictionary (CPE 2.3), where the engine knows it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpe: Option<String>,
    /// Packages of this list that it needs, where the engine knows them.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub needs: Vec<String>,
}
