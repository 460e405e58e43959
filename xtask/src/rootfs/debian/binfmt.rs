//! Makes sure that this machine can run the target's programs, for maintainer scripts. Tests it by
//! running one; if that fails, registers qemu with the kernel as root, or tells the user which
//! command to run.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use crate::exec::{self, Tool};

/// The kernel's directory for interpreters of foreign binaries.
const BINFMT: &str = "/proc/sys/fs/binfmt_misc";

/// From qemu's own table (`/usr/lib/binfmt.d/qemu-aarch64.conf`): an ELF file, 64 bits,
/// little-endian, of type 2 or 3, for machine 0xb7. Flags: P keeps argv[0], O opens the binary, F
/// opens the interpreter now, so that a root without it can use it.
const REGISTER: &str = concat!(
    r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00",
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff",
);

/// A complete program for arm64 that exits with 0: an ELF header, one program header, and
/// `mov x0, #0; mov x8, #93; svc #0`.
fn probe_program() -> Vec<u8> {
    let mut elf = Vec::with_capacity(132);
    elf.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 0xb7, 0, 1, 0, 0, 0]);
    let base: u64 = 0x40_0000;
    let code: [u32; 3] = [0xd280_0000, 0xd280_0ba8, 0xd400_0001];
    for word in [base + 120, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0; 4]);
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, base, base, 132, 132, 0x1000_u64] {
        elf.extend(word.to_le_bytes());
    }
    code.iter().for_each(|word| elf.extend(word.to_le_bytes()));
    elf
}

/// Makes sure that programs for `arch` (Debian's name) run, also in a root that has no qemu. Tried in `work`.
///
/// # Errors
/// When they do not run and this process cannot change that; names the command that does.
pub fn ensure_runs(arch: &str, work: &Utf8Path) -> Result<()> {
    let native = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    if arch == native {
        return Ok(());
    }
    if arch != "arm64" {
        bail!("packages for {arch} cannot be configured on {native}: only arm64 is supported");
    }
    if runs_probe(work)? {
        return check_fixed();
    }
    let help = "help: sudo apt-get install qemu-user-static binfmt-support";
    let Some(qemu) =
        exec::find_program("qemu-aarch64-static").or_else(|| exec::find_program("qemu-aarch64"))
    else {
        bail!("this machine cannot run arm64 programs: qemu-user-static is missing\n{help}");
    };
    if !rustix::process::geteuid().is_root() {
        bail!("this machine cannot run arm64 programs: qemu is not registered\n{help}");
    }
    register_qemu(&qemu, work).with_context(|| format!("registering {qemu} for arm64\n{help}"))?;
    if !runs_probe(work)? {
        bail!("{qemu} is registered, but arm64 programs still do not run\n{help}");
    }
    Ok(())
}

fn runs_probe(work: &Utf8Path) -> Result<bool> {
    let path = work.join("probe-arm64");
    fs::write(&path, probe_program()).with_context(|| format!("writing {path}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("writing {path}"))?;
    let ran = Tool::new(&path).run().is_ok();
    fs::remove_file(&path).with_context(|| format!("removing {path}"))?;
    Ok(ran)
}

/// Without flag F the kernel looks for the interpreter in the new root, where it does not exist.
fn check_fixed() -> Result<()> {
    let entry = Utf8Path::new(BINFMT).join("qemu-aarch64");
    let Ok(text) = fs::read_to_string(&entry) else { return Ok(()) };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags: ")).unwrap_or_default();
    if flags.contains('F') {
        return Ok(());
    }
    bail!(
        "{entry} has the flags '{flags}', but without F arm64 programs do not run in a new root\n\
         help: sudo apt-get install --reinstall qemu-user-static"
    )
}

fn register_qemu(qemu: &Utf8Path, work: &Utf8Path) -> Result<()> {
    let line = format!("{REGISTER}:{qemu}:POF");
    let standard = Utf8PathBuf::from(BINFMT);
    if standard.join("register").exists() {
        return write_entry(&standard, &line);
    }
    // A container may forbid this mount point; the kernel has the same table at every mount point.
    let own = work.join("binfmt");
    fs::create_dir_all(&own).with_context(|| format!("creating {own}"))?;
    let mount =
        |at: &Utf8Path| Tool::new("mount").args(["-t", "binfmt_misc", "binfmt_misc"]).arg(at).run();
    if mount(&standard).is_ok() {
        return write_entry(&standard, &line);
    }
    mount(&own)?;
    let written = write_entry(&own, &line);
    Tool::new("umount").arg(&own).run()?;
    written
}

fn write_entry(table: &Utf8Path, line: &str) -> Result<()> {
    let path = table.join("register");
    fs::write(&path, line).with_context(|| format!("writing {path}"))
}
