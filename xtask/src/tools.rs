//! The programs that building and testing need, each with its Debian package. All missing programs
//! are listed at once, before any work, and installed on request.

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::exec::{Tool, find_program};
use crate::program;
use crate::progress::{say, warn};

/// The purpose of a tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToolPurpose {
    /// `build-image` and `lock`.
    Build,
    /// The engine `debian`.
    Debian,
    /// The engine `buildroot`.
    Buildroot,
    /// `run`, and the tests that boot an image.
    Run,
    /// `run --local`, and its tests.
    Local,
    /// `test`: independent tools that read our files.
    Test,
    /// `test --all`.
    TestAll,
    /// `push`.
    Push,
    /// `flash` to a device.
    Flash,
    /// `bench`: the tools for comparison.
    Bench,
}

/// One requirement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ToolRequirement {
    /// The program, or a file if it is not a program.
    pub program: &'static str,
    /// The Debian package.
    pub package: &'static str,
    /// What it is used for.
    pub why: &'static str,
    /// Its purpose.
    pub purpose: ToolPurpose,
}

const fn requirement(
    purpose: ToolPurpose,
    program: &'static str,
    package: &'static str,
    why: &'static str,
) -> ToolRequirement {
    ToolRequirement { program, package, why, purpose }
}

/// Everything, in the order in which it is listed.
const REQUIREMENTS: &[ToolRequirement] = &[
    requirement(ToolPurpose::Build, "git", "git", "names the commit that is built"),
    requirement(ToolPurpose::Debian, "apt-get", "apt", "resolves the package lock"),
    requirement(ToolPurpose::Debian, "dpkg-deb", "dpkg", "unpacks packages"),
    requirement(ToolPurpose::Debian, "mmdebstrap", "mmdebstrap", "makes the Debian base system"),
    requirement(
        ToolPurpose::Debian,
        "arch-test",
        "arch-test",
        "lets mmdebstrap check foreign binaries",
    ),
    requirement(
        ToolPurpose::Build,
        "qemu-aarch64-static",
        "qemu-user-static",
        "runs the base system's maintainer scripts and its Python",
    ),
    requirement(
        ToolPurpose::Debian,
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
        "checks the archive's signatures",
    ),
    requirement(ToolPurpose::Debian, "gpgv", "gpgv", "checks the archive's signatures"),
    requirement(ToolPurpose::Debian, "depmod", "kmod", "lists the kernel modules' dependencies"),
    requirement(ToolPurpose::Build, "mkimage", "u-boot-tools", "wraps the boot script for U-Boot"),
    // Links the agent's static binary, and includes that architecture's C library.
    requirement(
        ToolPurpose::Build,
        "@cross-gcc",
        "gcc-aarch64-linux-gnu",
        "links the robot's agent",
    ),
    requirement(
        ToolPurpose::Build,
        "@cross-libc",
        "libc6-dev-arm64-cross",
        "is linked into the robot's agent",
    ),
    requirement(ToolPurpose::Build, "python3", "python3", "runs pip"),
    requirement(ToolPurpose::Build, "@pip", "python3-pip", "resolves and downloads the API wheels"),
    requirement(ToolPurpose::Debian, "unshare", "util-linux", "makes the base system without root"),
    requirement(ToolPurpose::Debian, "@newuidmap", "uidmap", "makes the base system without root"),
    requirement(
        ToolPurpose::Build,
        "/etc/ssl/certs/ca-certificates.crt",
        "ca-certificates",
        "lets pip check its index",
    ),
    requirement(ToolPurpose::Buildroot, "make", "make", "runs Buildroot"),
    requirement(ToolPurpose::Buildroot, "gcc", "gcc", "builds Buildroot's own tools"),
    requirement(ToolPurpose::Buildroot, "g++", "g++", "builds Buildroot's own tools"),
    requirement(ToolPurpose::Buildroot, "perl", "perl", "runs packages' configure scripts"),
    requirement(ToolPurpose::Buildroot, "patch", "patch", "applies Buildroot's patches"),
    requirement(ToolPurpose::Buildroot, "tar", "tar", "unpacks sources"),
    requirement(ToolPurpose::Buildroot, "bzip2", "bzip2", "unpacks sources"),
    requirement(ToolPurpose::Buildroot, "xz", "xz-utils", "unpacks sources"),
    requirement(ToolPurpose::Buildroot, "unzip", "unzip", "unpacks sources"),
    requirement(ToolPurpose::Buildroot, "cpio", "cpio", "packs archives"),
    requirement(ToolPurpose::Buildroot, "rsync", "rsync", "joins the packages' directories"),
    requirement(ToolPurpose::Buildroot, "bc", "bc", "builds the kernel"),
    requirement(ToolPurpose::Buildroot, "file", "file", "inspects built programs"),
    requirement(ToolPurpose::Buildroot, "wget", "wget", "downloads sources"),
    requirement(ToolPurpose::Buildroot, "flock", "util-linux", "downloads each source once"),
    requirement(ToolPurpose::Buildroot, "which", "debianutils", "lets Buildroot find its tools"),
    requirement(ToolPurpose::Buildroot, "@curses", "libncurses-dev", "shows menuconfig"),
    requirement(
        ToolPurpose::Buildroot,
        "@flake8",
        "python3-flake8",
        "serves Buildroot's check-package",
    ),
    requirement(
        ToolPurpose::Buildroot,
        "@magic",
        "python3-magic",
        "serves Buildroot's check-package",
    ),
    requirement(ToolPurpose::Run, "qemu-system-aarch64", "qemu-system-arm", "boots the image"),
    requirement(
        ToolPurpose::Run,
        "qemu-img",
        "qemu-utils",
        "keeps the image unchanged while it runs",
    ),
    requirement(ToolPurpose::Run, "dtc", "device-tree-compiler", "changes a device tree for QEMU"),
    requirement(ToolPurpose::Run, "setpriv", "util-linux", "ends a machine with what drives it"),
    requirement(ToolPurpose::Local, "unshare", "util-linux", "makes namespaces for a local system"),
    requirement(ToolPurpose::Local, "ip", "iproute2", "starts the network in them"),
    requirement(ToolPurpose::Test, "sfdisk", "fdisk", "reads our partition tables"),
    requirement(ToolPurpose::Test, "strace", "strace", "kills the agent at any of its changes"),
    requirement(ToolPurpose::Test, "sgdisk", "gdisk", "reads our partition tables"),
    requirement(ToolPurpose::Test, "fsck.fat", "dosfstools", "reads our FAT"),
    requirement(ToolPurpose::Test, "mdir", "mtools", "reads our FAT"),
    requirement(ToolPurpose::Test, "e2fsck", "e2fsprogs", "reads our ext4"),
    requirement(ToolPurpose::Test, "bmaptool", "bmap-tools", "reads our block map"),
    requirement(ToolPurpose::Test, "zstd", "zstd", "reads our frames"),
    requirement(ToolPurpose::Test, "minisign", "minisign", "checks our signatures"),
    requirement(ToolPurpose::Run, "qemu-io", "qemu-utils", "writes a boot state into a card"),
    requirement(
        ToolPurpose::Test,
        "aarch64-linux-gnu-gcc",
        "gcc-aarch64-linux-gnu",
        "makes the kernels that try the boot script",
    ),
    requirement(ToolPurpose::Test, "cpio", "cpio", "reads our initrd"),
    requirement(ToolPurpose::Test, "xz", "xz-utils", "packs the images that are flashed"),
    requirement(ToolPurpose::Test, "losetup", "mount", "attaches the devices that are flashed"),
    requirement(ToolPurpose::Test, "addpart", "util-linux", "gives them partitions"),
    requirement(ToolPurpose::Test, "gpg", "gnupg", "signs the tests' own archive"),
    requirement(ToolPurpose::Test, "sshd", "openssh-server", "replaces a robot's sshd"),
    requirement(ToolPurpose::Test, "systemd-analyze", "systemd", "reads our units"),
    requirement(ToolPurpose::Test, "shellcheck", "shellcheck", "checks our shell scripts"),
    requirement(
        ToolPurpose::Test,
        "sftp",
        "openssh-client",
        "publishes releases to a store on a host",
    ),
    requirement(
        ToolPurpose::Test,
        "nginx",
        "nginx-light",
        "serves a store to readers, and as on a robot",
    ),
    requirement(ToolPurpose::Test, "busybox", "busybox-static", "runs the initrd's script"),
    requirement(ToolPurpose::Test, "openssl", "openssl", "makes certificates of web servers"),
    requirement(ToolPurpose::Test, "curl", "curl", "reads a store"),
    requirement(ToolPurpose::Test, "jq", "jq", "reads a store's files"),
    requirement(ToolPurpose::Push, "ssh", "openssh-client", "reaches robots"),
    requirement(ToolPurpose::Flash, "lsblk", "util-linux", "lists disks and what uses them"),
    requirement(ToolPurpose::TestAll, "chromium", "chromium", "renders the report"),
    requirement(
        ToolPurpose::TestAll,
        "@venv",
        "python3-venv",
        "contains the validator of our bill of materials",
    ),
    requirement(ToolPurpose::Bench, "genimage", "genimage", "assembles images"),
    requirement(ToolPurpose::Bench, "rauc", "rauc", "makes bundles"),
    requirement(ToolPurpose::Bench, "mksquashfs", "squashfs-tools", "serves rauc"),
    requirement(ToolPurpose::Bench, "zip", "zip", "packs"),
    requirement(ToolPurpose::Bench, "swupdate", "swupdate", "installs bundles"),
];

/// Whether this machine has the robot's architecture.
const ARM64: bool = cfg!(target_arch = "aarch64");
/// The static C library for the robot.
const CROSS_LIBC: &str = "/usr/aarch64-linux-gnu/lib/libc.a";

impl ToolRequirement {
    fn is_met(&self) -> bool {
        match self.program {
            "@pip" => python_with_pip().is_some(),
            "@flake8" => python_has("flake8"),
            "@magic" => python_has("magic"),
            "@curses" => std::path::Path::new("/usr/include/ncurses.h").exists(),
            "@venv" => Tool::new("python3").args(["-c", "import ensurepip"]).read().is_ok(),
            // Root does not need a range of subordinate ids.
            "@newuidmap" => {
                rustix::process::getuid().is_root() || find_program("newuidmap").is_some()
            }
            // An arm64 machine uses its own linker.
            "@cross-gcc" => ARM64 || find_program("aarch64-linux-gnu-gcc").is_some(),
            "@cross-libc" => ARM64 || std::path::Path::new(CROSS_LIBC).exists(),
            path if path.starts_with('/') => std::path::Path::new(path).exists(),
            program => find_program(program).is_some(),
        }
    }
}

/// The distribution's own Python, even if another environment is active.
const DISTRIBUTIONS_PYTHON: &str = "/usr/bin/python3";

/// A Python with pip: the one on the path, else the distribution's. The one on the path may be from
/// `uv venv` or `python3 -m venv --without-pip`, which has no pip.
pub fn python_with_pip() -> Option<&'static str> {
    let has = |python: &&str| Tool::new(python).args(["-m", "pip", "--version"]).read().is_ok();
    ["python3", DISTRIBUTIONS_PYTHON].into_iter().find(has)
}

/// Whether the distribution's own Python has a module: Buildroot's scripts use this one.
fn python_has(module: &str) -> bool {
    let code = format!("import {module}");
    Tool::new(DISTRIBUTIONS_PYTHON).args(["-c", &code]).read().is_ok()
}

/// Everything that is needed for these purposes.
pub fn requirements_for(
    purposes: &[ToolPurpose],
) -> impl Iterator<Item = &'static ToolRequirement> {
    REQUIREMENTS.iter().filter(|r| purposes.contains(&r.purpose))
}

/// What this machine lacks for these purposes.
pub fn missing_tools(purposes: &[ToolPurpose]) -> Vec<ToolRequirement> {
    requirements_for(purposes).filter(|r| !r.is_met()).cloned().collect()
}

/// Makes sure that nothing is missing: installs it, or prints how.
///
/// # Errors
/// When a missing tool may not be or cannot be installed.
pub fn require_tools(purposes: &[ToolPurpose], install: bool) -> Result<()> {
    let lacking = missing_tools(purposes);
    if lacking.is_empty() {
        return Ok(());
    }
    if !install || program::is_standalone() || find_program("apt-get").is_none() {
        bail!("{}", describe_missing(&lacking));
    }
    self::install_packages(&lacking)?;
    let still = missing_tools(purposes);
    if still.is_empty() { Ok(()) } else { bail!("after installing: {}", describe_missing(&still)) }
}

/// The missing tools in human-readable form.
pub fn describe_missing(lacking: &[ToolRequirement]) -> String {
    let mut text = String::from("this machine lacks:");
    for r in lacking {
        let name = r.program.trim_start_matches('@');
        text.push_str(&format!("\n  {name:<22} {:<22} {}", r.package, r.why));
    }
    let debian = packages_of(lacking);
    text.push_str(&if program::is_standalone() {
        let fedora: Vec<_> = debian.iter().map(|package| on_fedora(package)).collect();
        format!(
            "\nhelp: sudo apt-get install {} (Debian, Ubuntu), or: sudo dnf install {} (Fedora)",
            debian.join(" "),
            fedora.join(" ")
        )
    } else {
        format!(
            "\nhelp: cargo xtask doctor --install, or: sudo apt-get install {}",
            debian.join(" ")
        )
    });
    text
}

/// Fedora's name of a package that [`program::STANDALONE`] may need.
fn on_fedora(package: &'static str) -> &'static str {
    if package == "openssh-client" { "openssh-clients" } else { package }
}

fn packages_of(lacking: &[ToolRequirement]) -> Vec<&'static str> {
    let mut packages: Vec<_> = lacking.iter().map(|r| r.package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Installs the packages of what is missing, as root or through sudo.
///
/// # Errors
/// When apt cannot install them.
pub fn install_packages(lacking: &[ToolRequirement]) -> Result<()> {
    let packages = packages_of(lacking);
    say("setup", format!("installing {}", packages.join(" ")));
    let update = || apt_get(&["update", "--quiet"]).run();
    // Never remove the user's packages for this.
    let options = ["--yes", "--quiet", "--no-install-recommends", "--no-remove"];
    let simulated = apt_get(&["install", "--simulate"]).args(options).args(&packages).read();
    // A fresh machine has no package lists, and old lists contain packages that no longer exist.
    update().context("refreshing the package lists")?;
    let step = crate::progress::ProgressStep::new(
        "setup",
        "apt-get",
        0,
        crate::progress::ProgressUnit::Items,
    );
    if simulated.is_ok() {
        return apt_get(&["install"])
            .args(options)
            .args(&packages)
            .run_lines(|line| step.note(line))
            .context("installing tools");
    }
    // If parts of QEMU were installed from backports, the rest must come from there, too.
    let backports = Backports::prepare().context("checking backports for the packages")?;
    warn("the packages conflict with this release; installing them from its backports");
    apt_get(&["update", "--quiet"]).args(&backports.options).run()?;
    apt_get(&["install"])
        .args(&backports.options)
        .args(["-t", &backports.suite])
        .args(options)
        .args(&packages)
        .run_lines(|line| step.note(line))
        .context("installing tools")
}

fn apt_get(arguments: &[&str]) -> Tool {
    let tool = if rustix::process::getuid().is_root() {
        Tool::new("apt-get")
    } else {
        Tool::new("sudo").args(["--preserve-env=DEBIAN_FRONTEND", "apt-get"])
    };
    tool.env("DEBIAN_FRONTEND", "noninteractive").args(arguments)
}

/// The host's own sources plus its backports, in a separate sources list: the machine's
/// configuration is not changed.
struct Backports {
    suite: String,
    options: Vec<String>,
    _dir: tempfile::TempDir,
}

impl Backports {
    fn prepare() -> Result<Self> {
        let release = std::fs::read_to_string("/etc/os-release").context("reading os-release")?;
        let codename = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .context("this is not a Debian release with backports")?;
        let suite = format!("{codename}-backports");
        let targets = Tool::new("apt-get")
            .args(["indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"])
            .read()?;
        let uri = targets
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(_, release)| *release == codename)
            .map(|(uri, _)| uri)
            .with_context(|| format!("the machine's apt sources do not contain {codename}"))?;
        let dir = tempfile::tempdir().context("making a directory")?;
        let list = dir.path().join("backports.list");
        let lists = dir.path().join("lists");
        std::fs::create_dir(&lists).context("making a directory")?;
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let line = |suite: &str| format!("deb [signed-by={keyring}] {uri} {suite} main\n");
        std::fs::write(&list, line(codename) + &line(&suite)).context("writing a sources list")?;
        let options = vec![
            "-o".to_owned(),
            format!("Dir::Etc::SourceList={}", list.display()),
            "-o".to_owned(),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "-o".to_owned(),
            format!("Dir::State::Lists={}", lists.display()),
        ];
        Ok(Self { suite, options, _dir: dir })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_names_each_program_with_its_package() {
        let lacking = vec![
            requirement(ToolPurpose::Test, "sgdisk", "gdisk", "reads our partition tables"),
            requirement(ToolPurpose::Test, "@pip", "python3-pip", "resolves wheels"),
        ];
        let text = describe_missing(&lacking);
        assert!(text.contains("sgdisk") && text.contains("gdisk"), "{text}");
        assert!(text.ends_with("sudo apt-get install gdisk python3-pip"), "{text}");
    }
}
