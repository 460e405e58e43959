//! The hardware report, for comparison with docs/reference/hardware.md: read from the kernel's files, without changing anything. It
//! contains no serial number, address, key or password, so that it can be sent to other people.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::Serialize;

use crate::root::RootDir;

/// The files. A `*` matches any name in its directory. Entries by the firmware and U-Boot in the device tree:
/// bootloader documentation of Raspberry Pi, "device tree: chosen/bootloader"; U-Boot, `boot/fdt_support.c`. The
/// kernel's files for a card and a watchdog: Documentation/ABI/testing/sysfs-bus-mmc, sysfs-class-watchdog.
const FILES: [&str; 44] = [
    "proc/device-tree/model",
    "proc/device-tree/compatible",
    "proc/device-tree/system/linux,revision",
    "proc/device-tree/memory*/reg",
    "proc/device-tree/chosen/bootloader/*",
    "proc/device-tree/chosen/u-boot,version",
    "proc/device-tree/chosen/stdout-path",
    "proc/device-tree/chosen/os_prefix",
    "proc/device-tree/chosen/overlay_prefix",
    "proc/device-tree/chosen/user-warnings",
    "proc/version",
    "proc/cmdline",
    "proc/consoles",
    "proc/uptime",
    "sys/class/watchdog/*/identity",
    "sys/class/watchdog/*/state",
    "sys/class/watchdog/*/status",
    "sys/class/watchdog/*/bootstatus",
    "sys/class/watchdog/*/nowayout",
    "sys/class/watchdog/*/timeout",
    "sys/class/watchdog/*/timeleft",
    "sys/class/watchdog/*/min_timeout",
    "sys/class/watchdog/*/max_timeout",
    "sys/module/watchdog/parameters/open_timeout",
    "sys/block/mmcblk*/size",
    "sys/block/mmcblk*/queue/logical_block_size",
    "sys/block/mmcblk*/queue/discard_granularity",
    "sys/block/mmcblk*/queue/write_cache",
    "sys/block/mmcblk*/device/type",
    "sys/block/mmcblk*/device/name",
    "sys/block/mmcblk*/device/manfid",
    "sys/block/mmcblk*/device/oemid",
    "sys/block/mmcblk*/device/date",
    "sys/block/mmcblk*/device/fwrev",
    "sys/block/mmcblk*/device/hwrev",
    "sys/block/mmcblk*/device/erase_size",
    "sys/block/mmcblk*/device/preferred_erase_size",
    "sys/block/mmcblk*/mmcblk*p*/start",
    "sys/block/mmcblk*/mmcblk*p*/size",
    "sys/class/thermal/*/temp",
    "sys/class/rfkill/*/hard",
    "sys/class/rfkill/*/soft",
    "sys/class/rfkill/*/type",
    "sys/devices/system/cpu/cpufreq/*/scaling_cur_freq",
];

/// The lines of the kernel's log about a start: how long its steps took, and which firmware, card and watchdog there
/// are.
const WORDS: [&str; 12] = [
    "Linux version",
    "Machine model",
    "Attached to firmware",
    "Run /init",
    "slipway-init",
    "systemd 2",
    "watchdog",
    "mmc",
    "brcmfmac",
    "psci",
    "under-voltage",
    "Under-voltage",
];

/// Maximum bytes read from a file.
const MOST_BYTES: u64 = 4096;

/// Maximum number of files that a pattern may match, and of log lines that are kept.
const MOST: usize = 200;

/// Bytes of a record of `/dev/kmsg` (CONSOLE_EXT_LOG_MAX, Linux' include/linux/printk.h).
const RECORD: usize = 8192;

/// The report of a board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BoardReport {
    /// File contents by path; missing files are left out.
    pub files: BTreeMap<String, String>,
    /// The kernel's log lines, each with the seconds since its start.
    pub log: Vec<String>,
}

/// Collects the report of the board that this runs on.
pub fn collect(root: &RootDir) -> BoardReport {
    let mut files = BTreeMap::new();
    for pattern in FILES {
        for path in find_matching(root, pattern) {
            let Some(bytes) = read(&root.path(&path)) else { continue };
            files.insert(format!("/{}", path.display()), format_value(&path, &bytes));
        }
    }
    // The command line may have secrets that a user has added.
    if let Some(line) = files.get_mut("/proc/cmdline") {
        *line = without_secrets(line);
    }
    BoardReport { files, log: read_kernel_log(&root.path("dev/kmsg")) }
}

impl BoardReport {
    /// Human-readable: one line each.
    pub fn lines(&self) -> String {
        let files = self.files.iter().map(|(path, value)| format!("{path}: {value}"));
        files.chain(self.log.iter().cloned()).collect::<Vec<_>>().join("\n")
    }
}

/// The files that a pattern matches.
fn find_matching(root: &RootDir, pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.split('/') {
        let mut next = Vec::new();
        for folder in &found {
            if !part.contains('*') {
                next.push(folder.join(part));
                continue;
            }
            let listing = fs::read_dir(root.path(folder)).into_iter().flatten().flatten();
            let mut names: Vec<String> = listing
                .filter_map(|entry| entry.file_name().into_string().ok())
                .filter(|name| matches_pattern(part, name))
                .collect();
            names.sort();
            next.extend(names.iter().map(|name| folder.join(name)));
        }
        next.truncate(MOST);
        found = next;
    }
    found
}

/// Whether a name matches a pattern with `*`.
fn matches_pattern(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.is_empty()
}

fn read(path: &Path) -> Option<Vec<u8>> {
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// A value in human-readable form: text, a list of texts, a number of the device tree (big endian), or bytes.
fn format_value(path: &Path, bytes: &[u8]) -> String {
    if !path.starts_with("proc/device-tree") {
        return printable(String::from_utf8_lossy(bytes).trim());
    }
    let is_text = |byte: &u8| *byte == 0 || (b' '..=b'~').contains(byte) || *byte == b'\n';
    if let [first, .., 0] = bytes
        && *first != 0
        && bytes.iter().all(is_text)
    {
        let list: Vec<_> = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty()).collect();
        let list: Vec<_> = list.into_iter().map(String::from_utf8_lossy).collect();
        return printable(&list.join(", "));
    }
    match bytes.try_into().map(u32::from_be_bytes) {
        Ok(number) => format!("{number} ({number:#x})"),
        Err(_) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Kernel arguments whose values are shown: those that start a board. Any other argument may have a password
/// (`systemd.set_credential`), an address (`ip`) or a serial number (`smsc95xx.macaddr`).
const ARGUMENTS: [&str; 21] = [
    "8250.nr_uarts",
    "cfg80211.ieee80211_regdom",
    "cgroup_disable",
    "cgroup_enable",
    "coherent_pool",
    "console",
    "earlycon",
    "init",
    "loglevel",
    "maxcpus",
    "mem",
    "panic",
    "pcie_aspm",
    "rdinit",
    "root",
    "rootfstype",
    "rootwait",
    "slipway.deadline",
    "slipway.slot",
    "slipway.trial",
    "slipway.tryboot",
];

/// Prefixes of further such names.
const BEGINNINGS: [&str; 3] = ["systemd.watchdog", "vc_mem.", "watchdog."];

/// The kernel's arguments, with all values left out except those in [`ARGUMENTS`]. Quoted text belongs to the word
/// that contains it (Linux, lib/cmdline.c, next_arg).
fn without_secrets(line: &str) -> String {
    let mut quoted = false;
    let words = line.split(|c: char| {
        quoted ^= c == '"';
        c.is_whitespace() && !quoted
    });
    let words = words.filter(|word| !word.is_empty()).map(|word| match word.split_once('=') {
        Some((name, value)) => {
            let known = ARGUMENTS.contains(&name)
                || BEGINNINGS.iter().any(|beginning| name.starts_with(beginning));
            // A root on the network has an address.
            let plain =
                !value.contains('"') && !value.contains("//") && value.matches('.').count() < 3;
            if known && plain { word.to_owned() } else { format!("{name}=(left out)") }
        }
        None => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A line of the kernel's log without the values of kernel arguments and without hardware addresses.
fn redact_line(text: &str) -> String {
    let text = match text.split_once("command line: ") {
        Some((before, line)) => format!("{before}command line: {}", without_secrets(line)),
        None => text.to_owned(),
    };
    let is_address = |word: &str| {
        let bare = word.trim_matches(|c: char| !c.is_ascii_hexdigit());
        let parts: Vec<&str> = bare.split([':', '-']).collect();
        let pair = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        parts.len() == 6 && parts.iter().all(pair)
    };
    let serial = |word: &str| word.to_ascii_lowercase().contains("serialnumber");
    let mut hidden = false;
    let words = text.split(' ').map(|word| {
        let hide = hidden || is_address(word);
        hidden = serial(word) && word.ends_with([':', '=']);
        if hide { "(left out)" } else { word }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The relevant lines of the kernel's log. Each read of `/dev/kmsg` is one record (Documentation/ABI/testing/dev-kmsg):
/// `level,number,microseconds,flags;text`, followed by separate lines about the device.
fn read_kernel_log(path: &Path) -> Vec<String> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let Ok(mut file) = OpenOptions::new().read(true).custom_flags(flags).open(path) else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    let mut record = vec![0; RECORD];
    while lines.len() < MOST {
        let length = match file.read(&mut record) {
            Ok(0) => break,
            Ok(length) => length,
            // A record was overwritten before it was read; continue with the next one.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {
                continue;
            }
            Err(_) => break,
        };
        let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default()).into_owned();
        for line in text.lines() {
            let Some((head, text)) = line.split_once(';') else { continue };
            let micros = head.split(',').nth(2).and_then(|field| field.parse::<u64>().ok());
            let Some(micros) = micros.filter(|_| WORDS.iter().any(|word| text.contains(word)))
            else {
                continue;
            };
            let (seconds, rest) = (micros / 1_000_000, micros % 1_000_000);
            lines.push(format!("{seconds}.{rest:06} {}", printable(&redact_line(text))));
        }
    }
    lines
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may fail by panicking")]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn planted(files: &[(&str, &[u8])]) -> (tempfile::TempDir, RootDir) {
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let root = RootDir::new(dir.path());
        (dir, root)
    }

    #[test]
    fn a_board_s_own_words_are_read_and_no_number_of_its_own() {
        let (_dir, root) = planted(&[
            ("proc/device-tree/model", b"Raspberry Pi 3 Model B Rev 1.2\0"),
            ("proc/device-tree/serial-number", b"00000000deadbeef\0"),
            ("proc/device-tree/compatible", b"raspberrypi,3-model-b\0brcm,bcm2837\0"),
            ("proc/device-tree/system/linux,revision", &[0x00, 0xa0, 0x20, 0x82]),
            ("proc/device-tree/memory@0/reg", &[0; 8]),
            ("proc/device-tree/chosen/bootloader/build-timestamp", &0x637f_0000_u32.to_be_bytes()),
            ("proc/cmdline", b"root=x smsc95xx.macaddr=B8:27:EB:00:00:01 quiet wifi.psk=abc\n"),
            ("sys/class/watchdog/watchdog0/timeout", b"15\n"),
            ("sys/class/watchdog/watchdog1/timeout", b"60\n"),
            ("sys/block/mmcblk0/device/cid", b"035344534c3634478003\n"),
            ("sys/block/mmcblk0/device/serial", b"0x12345678\n"),
            ("sys/block/mmcblk0/device/preferred_erase_size", b"4194304\n"),
            ("sys/block/mmcblk0/mmcblk0p1/start", b"81920\n"),
            (
                "dev/kmsg",
                b"6,1,0,-;Booting Linux\n6,2,1250,-;raspberrypi-firmware soc:firmware: Attached to firmware from \
                  2022-08-26\n SUBSYSTEM=platform\n5,3,4200000,-;Run /init as init process\n",
            ),
        ]);
        let report = collect(&root);
        let files: Vec<(&str, &str)> =
            report.files.iter().map(|(path, value)| (path.as_str(), value.as_str())).collect();
        assert_eq!(
            files,
            [
                ("/proc/cmdline", "root=x smsc95xx.macaddr=(left out) quiet wifi.psk=(left out)"),
                ("/proc/device-tree/chosen/bootloader/build-timestamp", "1669267456 (0x637f0000)"),
                ("/proc/device-tree/compatible", "raspberrypi,3-model-b, brcm,bcm2837"),
                ("/proc/device-tree/memory@0/reg", "0000000000000000"),
                ("/proc/device-tree/model", "Raspberry Pi 3 Model B Rev 1.2"),
                ("/proc/device-tree/system/linux,revision", "10494082 (0xa02082)"),
                ("/sys/block/mmcblk0/device/preferred_erase_size", "4194304"),
                ("/sys/block/mmcblk0/mmcblk0p1/start", "81920"),
                ("/sys/class/watchdog/watchdog0/timeout", "15"),
                ("/sys/class/watchdog/watchdog1/timeout", "60"),
            ]
        );
        assert_eq!(
            report.log,
            [
                "0.001250 raspberrypi-firmware soc:firmware: Attached to firmware from 2022-08-26",
                "4.200000 Run /init as init process",
            ]
        );
    }

    #[test]
    fn no_argument_of_an_unknown_name_is_told() {
        for (line, expected) in [
            (
                "systemd.set_credential=passwd.hashed-password.root:$6$x ip=10.0.0.5::10.0.0.1",
                "systemd.set_credential=(left out) ip=(left out)",
            ),
            ("a.pass=\"two words\" quiet", "a.pass=(left out) quiet"),
            ("\"a.pass=two words\" quiet", "\"a.pass=(left out) quiet"),
            ("root=PARTUUID=1-02 rootwait panic=10", "root=PARTUUID=1-02 rootwait panic=10"),
            ("rootpw=x", "rootpw=(left out)"),
            ("root=nbd:10.0.0.1:/x nfsroot=10.0.0.1:/x", "root=(left out) nfsroot=(left out)"),
            ("watchdog.open_timeout=120 console=tty0", "watchdog.open_timeout=120 console=tty0"),
        ] {
            assert_eq!(without_secrets(line), expected, "{line}");
        }
    }

    #[test]
    fn the_log_repeats_no_argument_and_no_address() {
        for (text, expected) in [
            (
                "Kernel command line: watchdog.open_timeout=120 wifi.psk=abc",
                "Kernel command line: watchdog.open_timeout=120 wifi.psk=(left out)",
            ),
            ("brcmfmac: address b8:27:eb:00:00:01, ok", "brcmfmac: address (left out) ok"),
            ("mmc: usb SerialNumber: 0123456789", "mmc: usb SerialNumber: (left out)"),
            ("mmc0: new card at address aaaa", "mmc0: new card at address aaaa"),
            ("brcmfmac: mmc1:0001:1: firmware a=b", "brcmfmac: mmc1:0001:1: firmware a=b"),
        ] {
            assert_eq!(redact_line(text), expected, "{text}");
        }
    }

    #[test]
    fn hostile_files_are_bounded_and_drive_no_terminal() {
        let (_dir, root) = planted(&[
            ("proc/device-tree/model", &[b'x'; 100_000]),
            ("proc/version", b"Linux \x1b[2J version\n"),
            ("sys/class/watchdog/w/timeout/folder", b""),
        ]);
        let report = collect(&root);
        assert!(report.files["/proc/device-tree/model"].len() <= 2 * MOST_BYTES as usize);
        assert_eq!(report.files["/proc/version"], "Linux  [2J version");
        assert_eq!(report.files.len(), 2);
        assert!(report.log.is_empty());
    }

    #[test]
    fn names_fit_patterns() {
        for (pattern, name, expected) in [
            ("mmcblk*", "mmcblk0", true),
            ("mmcblk*p*", "mmcblk0p12", true),
            ("mmcblk*p*", "mmcblk0", false),
            ("memory*", "memory@0", true),
            ("*", "anything", true),
            ("a*b", "ab", true),
            ("a*b", "ac", false),
        ] {
            assert_eq!(matches_pattern(pattern, name), expected, "{pattern} {name}");
        }
    }
}
