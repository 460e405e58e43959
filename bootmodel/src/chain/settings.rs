//! Stage 4, `config.txt`: characters that every release reads, and keys that the shipped program knows.
//!
//! Sources: documentation of `config.txt` ("file format": 98 characters; `initramfs` is the one key without `=`);
//! keys: a program holds each key that it reads as a string of its own, checked in start.elf, start4.elf and
//! bootcode.bin of 26 August 2022.

use std::collections::BTreeSet;

use super::config::{MOST_BYTES, parse_section, parse_setting};
use super::{Boot, CardLocation, Run, facts};

/// A comment that says why a key may be unknown: `# may be unknown: KEY: reason`.
const EXCUSE: &str = "# may be unknown:";

/// Whether a program reads this key: the program contains it as a string, alone or followed by blanks.
pub(super) fn reads_key(program: &[u8], key: &str) -> bool {
    possible_keys(program).contains(key.as_bytes())
}

/// All strings in a program that may be keys: lower-case letters, digits and similar, alone or followed by blanks.
fn possible_keys(program: &[u8]) -> BTreeSet<&[u8]> {
    let part = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let mut found = BTreeSet::new();
    let mut start = 0;
    for (at, byte) in program.iter().enumerate() {
        // Section names have other characters too: pi3+, board-type.
        if part(byte) || b"+-".contains(byte) {
            continue;
        }
        if matches!(byte, 0 | b' ') {
            let word = &program[start..at];
            let bare = word.iter().rposition(|byte| !part(byte)).map_or(0, |other| other + 1);
            found.extend([word, &word[bare..]].into_iter().filter(|word| word.len() <= LONGEST));
        }
        start = at + 1;
    }
    found.remove(&b""[..]);
    found
}

/// The longest key: `%64s` in start.elf.
const LONGEST: usize = 64;

pub(super) fn check(run: &mut Run<'_>, boot: &Boot<'_>) {
    let number = boot.volume.number;
    let text = boot.volume.file(boot.config).unwrap_or_default();
    let at = |line: usize| CardLocation::line(number, boot.config, line);
    let limit = run.facts.releases.line_limit;
    if text.len() > MOST_BYTES {
        run.stop(
            "config-size",
            CardLocation::file(number, boot.config),
            format!("the file has {} bytes, but only {MOST_BYTES} are checked", text.len()),
            "shorten the line".to_owned(),
        );
    }
    let text = text.get(..MOST_BYTES).unwrap_or(text);
    if let Some((include, reason)) = boot.refused.clone() {
        run.stop(
            "config-include",
            boot.at(&include),
            format!("`include {}` is not followed: {reason}", include.value),
            "copy its lines into this file".to_owned(),
        );
    }
    let mut last_section = None;
    for (line, bytes) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let text = String::from_utf8_lossy(bytes);
        let text = text.trim();
        let comment = text.starts_with('#');
        if bytes.contains(&b'\r') {
            run.stop(
                "config-bytes",
                at(line),
                "the line ends in CR LF".to_owned(),
                "end lines with LF only".to_owned(),
            );
        }
        let control = |byte: &u8| byte.is_ascii_control() && !b"\t\r".contains(byte);
        if bytes.contains(&0) || !comment && (!bytes.is_ascii() || bytes.iter().any(control)) {
            let help = "use only ASCII characters".to_owned();
            run.stop(
                "config-bytes",
                at(line),
                "the line has characters that are not printable ASCII".to_owned(),
                help,
            );
        }
        if bytes.len() > limit && !comment {
            run.stop(
                "config-line",
                at(line),
                format!(
                    "the line has {} characters, but the firmware reads only {limit}",
                    bytes.len()
                ),
                "shorten the line".to_owned(),
            );
        }
        if let Some(name) = parse_section(text) {
            last_section = Some((line, name.to_owned()));
        } else if let Some(found) = parse_setting(line, text)
            && found.key == "initramfs"
            && found.assigned
        {
            run.stop(
                "config-initramfs",
                at(line),
                "`initramfs` is the only key without `=`: the firmware ignores this line"
                    .to_owned(),
                format!("write `initramfs {} followkernel`", found.value),
            );
        }
    }
    if let Some((line, name)) = last_section.filter(|(_, name)| name != "all") {
        run.degrade(
            "config-all",
            at(line),
            format!(
                "the file ends in the section [{name}]: lines that are appended apply only in that section"
            ),
            "end the file with [all]".to_owned(),
        );
    }
    check_keys(run, boot, text);
    check_overlays(run, boot);
    for setting in boot.settings.iter().filter(|setting| setting.key == "initramfs") {
        let file = boot.os_file(&setting.value);
        if boot.volume.file(&file).is_none_or(<[u8]>::is_empty) {
            run.stop(
                "initrd-missing",
                boot.at(setting),
                format!("the firmware loads {file}, which does not exist"),
                "add a boot file with `source = \"initrd\"` and that path".to_owned(),
            );
        }
    }
    if let Some(wanted) = run.model.usb_setting.clone()
        && !boot.settings.iter().any(|s| format!("{}={}", s.key, s.value) == wanted)
    {
        let message = format!("without {wanted} the USB ports of this model do not work");
        let help = format!(
            "add a section [{}] with {wanted}",
            run.model.filters.last().cloned().unwrap_or_default()
        );
        run.degrade("config-usb", CardLocation::file(number, boot.config), message, help);
    }
}

/// In which mode, and at which address, the firmware starts the kernel or U-Boot. `uboot` is U-Boot, which runs only
/// at the address it was linked for (CONFIG_TEXT_BASE).
pub(super) fn check_mode(run: &mut Run<'_>, boot: &Boot<'_>, kernel: &str, uboot: Option<&[u8]>) {
    let plain = kernel.rsplit('/').next().unwrap_or_default();
    // A known file name decides the mode.
    let known = run.soc.kernel.iter().any(|name| name == plain);
    let wanted = boot.value("arm_64bit").map_or(run.soc.starts_64bit, |value| value != "0");
    if !(wanted || known) {
        run.stop(
            "config-mode",
            boot.place("arm_64bit"),
            format!("without arm_64bit=1 the {} starts {kernel} in 32-bit mode", run.soc.name),
            "arm_64bit=1".to_owned(),
        );
    }
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => facts::parse_number(digits),
        None => text.parse().ok(),
    };
    let address = boot.value("kernel_address").map(number);
    let own = run.soc.u_boot_address.0;
    if boot.is_on("kernel_old") {
        run.stop(
            "config-address",
            boot.place("kernel_old"),
            format!(
                "{kernel} is loaded to address 0, where neither a 64-bit kernel nor U-Boot runs"
            ),
            "delete the line".to_owned(),
        );
    } else if uboot.is_some() && address.is_some_and(|address| address != Some(own)) {
        run.stop(
            "config-address",
            boot.place("kernel_address"),
            format!("U-Boot is loaded to this address, but was linked for {own:#x}"),
            "delete the line".to_owned(),
        );
    }
}

/// Keys and sections that the shipped program does not know.
fn check_keys(run: &mut Run<'_>, boot: &Boot<'_>, text: &[u8]) {
    // A file without a date is not firmware, which is already reported.
    let (Some(program), Some(day)) = (boot.program, &boot.date) else { return };
    let loader = run.soc.first_stage.as_deref().and_then(|name| boot.volume.file(name));
    let mut in_programs = possible_keys(program);
    in_programs.extend(loader.map(possible_keys).into_iter().flatten());
    let text = String::from_utf8_lossy(text);
    let excused: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix(EXCUSE)?.split(':').next())
        .map(str::trim)
        .collect();
    let known = run.facts.releases.known_key.iter().flat_map(|known| &known.keys);
    let known: Vec<&String> = known.collect();
    let mut unknown = Vec::new();
    let mut seen = BTreeSet::new();
    for setting in &boot.settings {
        // `hdmi_mode:1` is the same key for the second port (conditional.adoc, "The [HDMI:*] filter").
        let key = setting.key.split(':').next().unwrap_or_default().to_owned();
        let here = in_programs.contains(key.as_bytes());
        if !(here || known.contains(&&key) || excused.contains(&key.as_str())) {
            unknown.push((boot.at(setting), "config-key", key, "the line does nothing"));
        }
    }
    let at = |line: usize| CardLocation::line(boot.volume.number, boot.config, line);
    for (line, text) in (1..).zip(text.lines()) {
        // [gpio4=1], [EDID=…] and serial numbers are filters of other kinds.
        let name = parse_section(text.trim())
            .filter(|name| !name.contains('=') && !name.starts_with("0x"));
        let Some(name) = name.filter(|name| !excused.contains(name) && !name.contains(':')) else {
            continue;
        };
        let small = name.to_ascii_lowercase();
        let marked = format!("[{small}]");
        if in_programs.contains(small.as_bytes()) || !seen.insert(small) {
            continue;
        }
        if super::find_bytes(program, marked.as_bytes()).is_none() {
            let so = "the lines below it apply always or never";
            unknown.push((at(line), "config-section", format!("[{name}]"), so));
        }
    }
    for (place, rule, name, so) in unknown {
        let bare = name.trim_matches(['[', ']']).to_owned();
        run.stop(
            rule,
            place,
            format!("the shipped firmware of {day} does not know `{name}`: {so}"),
            format!("correct or delete it; if nothing depends on it, add the line `{EXCUSE} {bare}: why`"),
        );
    }
}

/// Overlays that are named must exist, and must reach the kernel.
fn check_overlays(run: &mut Run<'_>, boot: &Boot<'_>) {
    let prefix = boot.value("overlay_prefix").unwrap_or("overlays/").to_owned();
    let kernel = super::names::kernel_name(run, boot);
    let uboot = boot.volume.file(&kernel).is_some_and(super::uboot::is_uboot);
    // The overlays of all systems, unless the prefix has its own directory with a README (documentation, `overlay_prefix`).
    let own = boot.volume.file(&boot.os_file(&format!("{prefix}README"))).is_some();
    let slots_tree = uboot && super::uboot::takes_a_tree(boot);
    for setting in &boot.settings {
        let place = boot.at(setting);
        match setting.key.as_str() {
            "dtoverlay" | "dtparam" if slots_tree && !setting.value.is_empty() => run.stop(
                "overlay-lost",
                place,
                format!(
                    "`{}` changes the firmware's device tree, but the kernel gets its slot's device tree",
                    setting.key
                ),
                "make the change in the slot's device tree".to_owned(),
            ),
            "dtoverlay" if !setting.value.is_empty() => {
                let name = setting.value.split(',').next().unwrap_or_default();
                let file = format!("{prefix}{name}.dtbo");
                let file = if own { boot.os_file(&file) } else { file };
                if boot.volume.file(&file).is_none() {
                    run.stop(
                        "overlay-missing",
                        place,
                        format!("the firmware loads {file}, which does not exist"),
                        "add the overlay to `firmware` in board.toml, or delete the line"
                            .to_owned(),
                    );
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reads_key;

    #[test]
    fn a_key_is_a_string_of_its_own() {
        let program = b"\0gpu_mem_256\0remote_gpu_mem\0initramfs %64s %i\0arm_64bit\0";
        assert!(reads_key(program, "arm_64bit") && reads_key(program, "initramfs"));
        assert!(
            !reads_key(program, "gpu_mem")
                && !reads_key(program, "arm_64")
                && !reads_key(program, "64bit")
        );
    }
}
