//! Which program of a root filesystem a command starts, and which package provides a missing one.

use super::shell;
use crate::rootfs::tree::{RootEntry, RootTree};

/// systemd searches these directories for a name without a directory (systemd.service(5),
/// `systemd-path search-binaries-default`), and gives them to its services as `PATH`.
const SEARCHED: [&str; 4] = ["usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin"];

/// Directories whose content is not in the image: what is there may exist on the robot.
const ELSEWHERE: [&str; 10] =
    ["data", "dev", "home", "media", "mnt", "proc", "run", "sys", "tmp", "var"];

/// The builtins that dash and busybox's ash have in common (dash(1); busybox, shell/ash.c, `builtintab`).
const BUILTINS: &str = ". : [ alias bg break cd chdir command continue echo eval exec exit export \
    false fg getopts hash jobs kill local printf pwd read readonly return set shift test times trap \
    true type ulimit umask unalias unset wait";

/// The builtins that only ash has.
const BUILTINS_OF_ASH: &str = "help let source";

/// The builtins that only bash has (bash(1), also as `sh`).
const BUILTINS_OF_BASH: &str = "builtin caller compgen complete compopt declare dirs disown enable \
    help history let logout mapfile popd pushd readarray shopt source suspend typeset";

/// Applets of busybox that scripts use. The option of an applet is its name in capitals.
const APPLETS: &str = "arping awk basename base64 bc blkdiscard blkid blockdev bunzip2 bzip2 cat \
    chattr chgrp chmod chown chroot chrt cksum clear cmp comm cp cpio crc32 cut date dc dd devmem df \
    diff dirname dmesg dos2unix du echo ed egrep env expand expr factor fallocate false fdisk fgrep \
    find findfs flock fold free fsck fsfreeze fstrim fsync fuser getopt grep groups gunzip gzip halt \
    hd head hexdump hostid hostname hwclock i2cdetect i2cdump i2cget i2cset id ifconfig insmod \
    install ionice iostat ip kill killall less link ln logger logname losetup ls lsattr lsmod lsof \
    lspci lsusb md5sum mesg microcom mkdir mkfifo mknod mkswap mktemp modinfo modprobe more mount \
    mountpoint mv nc netstat nice nl nohup nproc nsenter nslookup od partprobe paste patch pgrep \
    pidof ping pkill pmap poweroff printenv printf ps pwd readlink realpath reboot renice reset \
    resize rev rfkill rm rmdir rmmod route rtcwake script sed seq setpriv setserial setsid sha1sum \
    sha256sum sha512sum shred shuf sleep sort split stat strings stty su sum swapoff swapon sync tac \
    tail tar taskset tee telnet test tftp time timeout top touch tr traceroute tree true truncate \
    tsort tty udhcpc umount uname uniq unlink unshare unxz unzip uptime usleep uuencode vi watch wc \
    wget which who whoami xargs xxd xz yes zcat";

/// Programs of other packages of Buildroot, with the symbol that selects each.
const PACKAGES: [(&str, &str); 23] = [
    ("agetty", "BR2_PACKAGE_UTIL_LINUX_AGETTY"),
    ("bash", "BR2_PACKAGE_BASH"),
    ("busctl", "BR2_PACKAGE_SYSTEMD"),
    ("curl", "BR2_PACKAGE_LIBCURL_CURL"),
    ("dbus-send", "BR2_PACKAGE_DBUS"),
    ("e2fsck", "BR2_PACKAGE_E2FSPROGS_FSCK"),
    ("ethtool", "BR2_PACKAGE_ETHTOOL"),
    ("gpioset", "BR2_PACKAGE_LIBGPIOD_TOOLS"),
    ("iw", "BR2_PACKAGE_IW"),
    ("jq", "BR2_PACKAGE_JQ"),
    ("login", "BR2_PACKAGE_UTIL_LINUX_LOGIN"),
    ("lsblk", "BR2_PACKAGE_UTIL_LINUX_BINARIES"),
    ("nginx", "BR2_PACKAGE_NGINX"),
    ("openssl", "BR2_PACKAGE_LIBOPENSSL_BIN"),
    ("python3", "BR2_PACKAGE_PYTHON3"),
    ("resize2fs", "BR2_PACKAGE_E2FSPROGS_RESIZE2FS"),
    ("rsync", "BR2_PACKAGE_RSYNC"),
    ("socat", "BR2_PACKAGE_SOCAT"),
    ("sqlite3", "BR2_PACKAGE_SQLITE"),
    ("ssh-keygen", "BR2_PACKAGE_OPENSSH_KEY_UTILS"),
    ("sshd", "BR2_PACKAGE_OPENSSH_SERVER"),
    ("strace", "BR2_PACKAGE_STRACE"),
    ("wpa_supplicant", "BR2_PACKAGE_WPA_SUPPLICANT"),
];

/// The options of busybox and the symbols of Buildroot that messages name; a test compares them
/// with the pinned tree.
pub fn named_symbols() -> (Vec<String>, Vec<&'static str>) {
    let options = APPLETS.split_whitespace().map(applet_option).collect();
    (options, PACKAGES.iter().map(|(_, symbol)| *symbol).collect())
}

fn applet_option(name: &str) -> String {
    format!("CONFIG_{}", name.to_uppercase())
}

/// Finds the file that starts when a program is started by this name.
pub(super) fn find_program<'a>(tree: &'a RootTree, program: &str) -> Option<&'a RootEntry> {
    let found = match program.strip_prefix('/') {
        Some(path) => tree.resolve(path),
        None => SEARCHED.iter().find_map(|dir| tree.resolve(&format!("{dir}/{program}"))),
    };
    found.map(|(_, entry)| entry)
}

/// Whether a path leads to a directory whose content is not in the image.
pub(super) fn is_elsewhere(program: &str) -> bool {
    let first = program.strip_prefix('/').and_then(|path| path.split('/').next());
    first.is_some_and(|first| ELSEWHERE.contains(&first))
}

/// The file name of the system's shell.
fn shell_name(tree: &RootTree) -> &str {
    tree.resolve("bin/sh").map_or("", |(path, _)| file_name(path))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Whether busybox is the system's shell: then the engine is `buildroot`, and busybox has most of
/// the commands.
fn has_busybox(tree: &RootTree) -> bool {
    shell_name(tree) == "busybox"
}

/// The message for a missing program, with the package or the option that provides it.
pub(super) fn missing_program(tree: &RootTree, program: &str) -> String {
    const FRAGMENT: &str = "external/busybox/busybox.fragment";
    const SELECT: &str = "external/package/slipway-base/Config.in";
    let name = file_name(program);
    let package = PACKAGES.iter().find(|(known, _)| *known == name).map(|(_, symbol)| symbol);
    let applet = APPLETS.split_whitespace().any(|known| known == name);
    let help = if !has_busybox(tree) {
        "add the package or the overlay file that contains it".to_owned()
    } else if let Some(symbol) = package {
        format!("select {symbol} in {SELECT}, or add it to a fragment")
    } else if applet {
        format!("add `{}=y` to {FRAGMENT}", applet_option(name))
    } else {
        format!("select the Buildroot package that installs it in {SELECT}, or add an overlay file")
    };
    format!("`{program}` is missing\nhelp: {help}")
}

/// The missing commands of a script for `/bin/sh`: the number of each line, and a message. `first`
/// is the number of the script's first line; it may do without the programs of `optional`.
pub(super) fn find_missing_commands(
    tree: &RootTree,
    text: &str,
    first: usize,
    optional: &[&str],
) -> Vec<(usize, String)> {
    let Some(script) = shell::read_script(text) else { return Vec::new() };
    let own = match shell_name(tree) {
        "busybox" => BUILTINS_OF_ASH,
        "bash" => BUILTINS_OF_BASH,
        _ => "",
    };
    let is_builtin =
        |name: &str| BUILTINS.split_whitespace().chain(own.split_whitespace()).any(|b| b == name);
    // What is looked for by its path may be started by its name, and the other way round.
    let is_optional = |name: &str| {
        let looked_for = script.optional.iter().map(String::as_str).chain(optional.iter().copied());
        looked_for.map(file_name).any(|found| found == file_name(name))
    };
    let mut found: Vec<(usize, String)> = Vec::new();
    for command in &script.commands {
        let name = command.name.as_str();
        let known = match name.strip_prefix('/') {
            Some(_) => is_elsewhere(name),
            // Relative to the current directory, which is not known.
            None if name.contains('/') || name.is_empty() => true,
            None => script.redefines_names || is_builtin(name),
        };
        if known || is_optional(name) || find_program(tree, name).is_some() {
            continue;
        }
        let message = missing_program(tree, name)
            + &format!(", or test for it with `command -v {name}` if the script works without it");
        // Each command is reported once, with its first line.
        if !found.iter().any(|(_, known)| *known == message) {
            found.push((first + command.line - 1, message));
        }
    }
    found
}

/// Whether the first line of a file makes `/bin/sh` its interpreter.
pub(super) fn is_shell_script(text: &str) -> bool {
    let Some(line) = text.lines().next().and_then(|line| line.strip_prefix("#!")) else {
        return false;
    };
    let interpreter = line.split_whitespace().next().unwrap_or_default();
    ["/bin/sh", "/usr/bin/sh"].contains(&interpreter)
}
