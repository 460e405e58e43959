//! The filesystems of a robot, for process 1 of a local system: the root read-only, `data` on top
//! of it, memory filesystems, and only virtual devices.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, anyhow};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, StatVfsMountFlags, mkfifoat, openat2, statvfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};

use super::units::FstabMount;

/// Virtual devices, independent of the machine (null(4), random(4), tty(4)).
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];

/// Links that programs expect in `/dev` (proc(5)).
const LINKS: [(&str, &str); 4] = [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")];

/// The path of the kernel's log.
pub(super) const KERNEL_LOG: &str = "dev/kmsg";

/// A file that replaces the kernel's host name, which a user namespace may not write.
pub(super) const HOSTNAME: &str = "dev/hostname";

/// Resolves a path in the root; links on the way never lead out of the root.
pub(super) fn resolve_within(root: &Utf8Path, path: &Utf8Path) -> Result<OwnedFd> {
    let dir = File::open(root).with_context(|| format!("opening {root}"))?;
    let relative = path.strip_prefix("/").unwrap_or(path);
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat2(dir.as_fd(), relative.as_str(), flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .with_context(|| format!("resolving {path}"))
}

/// A path that refers to an open file.
pub(super) fn by_descriptor(fd: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Mounts everything that exists before the first service runs.
///
/// # Errors
/// What the kernel does not permit.
pub(super) fn mount_first(root: &Utf8Path, data: &Utf8Path, mounts: &[FstabMount]) -> Result<()> {
    mount_bind(root.as_str(), root.as_str()).with_context(|| format!("mounting {root}"))?;
    restrict_mount(root, MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID)?;
    let at = |path: &str| root.join(path);
    mount_tmpfs(&at("run"), "mode=0755,size=20%")?;
    mount_tmpfs(&at("dev"), "mode=0755,size=16M")?;
    mount_devices(&at("dev"))?;
    let flags = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID;
    mount("proc", at("proc").as_str(), "proc", flags, None).map_err(|error| {
        let help = match error {
            Errno::PERM => {
                "\nhelp: a container that hides parts of /proc forbids this: run it with \
                 --security-opt unmask=ALL, or outside of the container"
            }
            _ => "",
        };
        anyhow!("mounting /proc: {error}{help}")
    })?;
    mount_bind(data.as_str(), at("data").as_str()).with_context(|| format!("mounting {data}"))?;
    restrict_mount(&at("data"), MountFlags::NODEV | MountFlags::NOSUID)?;
    for entry in mounts.iter().filter(|entry| entry.after.is_none()) {
        mount_entry(root, entry)?;
    }
    let name = fs::read_to_string(at("etc/hostname")).context("reading /etc/hostname")?;
    fs::write(at(HOSTNAME), name).context("writing the host name")?;
    let (ours, kernels) = (at(HOSTNAME), at("proc/sys/kernel/hostname"));
    mount_bind(ours.as_str(), kernels.as_str()).context("mounting the host name")?;
    machine_id(root)
}

/// Mounts a directory of the host, read-only, where Python looks for the API first.
pub(super) fn mount_site(root: &Utf8Path, site: &Utf8Path) -> Result<()> {
    let at = root.join("data").join(super::SITE);
    mount_bind(site.as_str(), at.as_str()).with_context(|| format!("mounting {site}"))?;
    restrict_mount(&at, MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID)
}

/// Mounts an entry of fstab.
pub(super) fn mount_entry(root: &Utf8Path, entry: &FstabMount) -> Result<()> {
    let at = resolve_within(root, &entry.at)?;
    let place = Utf8PathBuf::from(by_descriptor(&at));
    match &entry.what {
        None => mount_tmpfs(&place, &entry.options),
        Some(what) => {
            let what = resolve_within(root, what)?;
            mount_bind(by_descriptor(&what), place.as_str()).context("binding")
        }
    }
    .with_context(|| format!("mounting {}", entry.at))
}

fn mount_tmpfs(at: &Utf8Path, options: &str) -> Result<()> {
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    let options = std::ffi::CString::new(options).context("options contain a zero byte")?;
    mount("tmpfs", at.as_str(), "tmpfs", flags, options.as_c_str())
        .with_context(|| format!("mounting memory at {at}"))
}

/// Adds flags to a mount. Existing flags must be kept: a user namespace may not remove them.
fn restrict_mount(at: &Utf8Path, more: MountFlags) -> Result<()> {
    let now =
        statvfs(at.as_str()).with_context(|| format!("reading the mount flags of {at}"))?.f_flag;
    let kept = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let kept = kept.into_iter().filter(|(is, _)| now.contains(*is)).map(|(_, flag)| flag);
    let flags = kept.fold(MountFlags::BIND | more, |flags, flag| flags | flag);
    mount_remount(at.as_str(), flags, c"").with_context(|| format!("restricting {at}"))
}

fn mount_devices(dev: &Utf8Path) -> Result<()> {
    for name in DEVICES {
        let (from, to) = (Utf8Path::new("/dev").join(name), dev.join(name));
        File::create(&to).with_context(|| format!("making {to}"))?;
        mount_bind(from.as_str(), to.as_str()).with_context(|| format!("mounting {from}"))?;
    }
    for (name, target) in LINKS {
        symlink(format!("/proc/self/fd{target}"), dev.join(name)).context("linking in /dev")?;
    }
    let shared = dev.join("shm");
    fs::create_dir(&shared).with_context(|| format!("making {shared}"))?;
    mount_tmpfs(&shared, "mode=1777,size=50%")?;
    mkfifoat(CWD, dev.join("kmsg").as_str(), Mode::from_raw_mode(0o600)).context("making kmsg")
}

/// Like the initrd and systemd on a robot: the id that is kept on `data`, else a new one.
fn machine_id(root: &Utf8Path) -> Result<()> {
    let kept = fs::read_to_string(root.join("data/identity/machine-id")).unwrap_or_default();
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let id = match kept.lines().next().filter(|id| id.len() == 32 && id.chars().all(hex)) {
        Some(id) => id.to_owned(),
        None => {
            let mut uuid = String::new();
            File::open("/proc/sys/kernel/random/uuid")
                .and_then(|mut file| file.read_to_string(&mut uuid))
                .context("reading a new id from the kernel")?;
            uuid.trim().replace('-', "")
        }
    };
    let file = root.join("run/machine-id");
    fs::write(&file, format!("{id}\n")).context("writing the machine id")?;
    mount_bind(file.as_str(), root.join("etc/machine-id").as_str())
        .context("mounting the machine id")
}
