//! Root filesystem engines. Each returns the same value, a [`BaseSystem`]; the later stages
//! (compose, disk, update, report) do not depend on the engine.

pub mod buildroot;
pub mod debian;
pub mod glob;
pub mod initrd;
pub mod kernel;
pub mod parts;
pub mod tree;

use serde::{Deserialize, Serialize};

use crate::artifact::Artifact;

/// The result of an engine: a pruned root, and all boot files of the boards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BaseSystem {
    /// The engine that built it: `debian` or `buildroot`.
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
    /// The output of `uname -r`.
    pub kernel_release: String,
    /// The kernel's `config-*` (for lints; `CONFIG_RD_ZSTD=y` and the like).
    pub kernel_config: Artifact,
    /// Device trees that the board requests.
    pub dtbs: Vec<NamedFile>,
    /// What the initrd builder needs from the engine.
    pub initrd_parts: InitrdParts,
    /// Firmware files that the board requests.
    pub firmware: Vec<NamedFile>,
    /// The board's second-stage bootloader (`u-boot.bin`), if any.
    pub bootloader: Option<Artifact>,
    /// The interpreter that wheels are installed for.
    pub python: RootPython,
    /// Every package in the root and every unpacked package.
    pub packages: Vec<BasePackage>,
    /// Version of the C library, as in `2.36` (wheels' `manylinux` tags are checked against it).
    pub glibc: String,
}

impl BaseSystem {
    /// Every file that the value refers to.
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

/// A file with its logical path, for example `broadcom/bcm2837-rpi-3-b.dtb`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedFile {
    /// Relative path, with `/`.
    pub path: String,
    /// The file.
    pub file: Artifact,
}

/// The parts of the initrd other than its script.
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
pub struct RootPython {
    /// Full version, as in `3.11.2`.
    pub version: String,
    /// Major and minor, as in `3.11`.
    pub short: String,
    /// The directory for wheels, absolute in the target.
    pub site_packages: String,
    /// The directory for their console scripts, absolute in the target.
    pub scripts: String,
    /// Distributions (with metadata) that the base already contains.
    pub distributions: Vec<PythonDistribution>,
}

/// A Python distribution.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PythonDistribution {
    /// Name as its metadata has it.
    pub name: String,
    /// Version as its metadata has it.
    pub version: String,
}

/// The role of a package in the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PackageRole {
    /// Unpacked only: the kernel, firmware, bootloader, busybox.
    Extra,
    /// Unpacked on the build machine; never part of an image.
    Host,
    /// Installed in the root.
    Root,
}

/// One package of the base, for the SBOM, the budget and the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BasePackage {
    /// Binary package name.
    pub name: String,
    /// Version.
    pub version: String,
    /// Architecture (`arm64`, `all`).
    pub arch: String,
    /// Installed, or only unpacked.
    pub role: PackageRole,
    /// Source package that it was built from.
    pub source: String,
    /// Version of the source package.
    pub source_version: String,
    /// The product's additional archive that it is from; `None` for Debian's own.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub archive: Option<String>,
    /// Section, as in `libs`.
    pub section: String,
    /// The size of its files in the pruned root in bytes (0 for packages that were only unpacked).
    pub installed_bytes: u64,
    /// Length of the package file in bytes.
    pub download_bytes: u64,
    /// SHA-256 of the package file.
    pub sha256: String,
    /// Upstream's page, where the package names one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub homepage: Option<String>,
    /// Licences in a machine-readable `copyright` file, sorted; empty for other forms of the file.
    pub licences: Vec<String>,
    /// Whether the distribution marks it as essential.
    pub essential: bool,
    /// Name in the CVE dictionary (CPE 2.3), if the engine knows it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cpe: Option<String>,
    /// Packages of this list that it needs, if the engine knows them.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub needs: Vec<String>,
}
