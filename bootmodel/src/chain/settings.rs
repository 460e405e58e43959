//! Stage 4, `config.txt`: bytes that every release reads, keys that the shipped program knows.
//!
//! Sources: documentation of `config.txt` ("file format": 98 characters; `initramfs` is the one key without `=`);
//! keys: a program holds each key that it reads as a string of its own, checked in start.elf, start4.elf and
//! bootcode.bin of 26 August 2022.

use super::config::{section, setting};
use super::{Boot, Place, Run};

/// A comment that says why a key may be unknown: `# may be unknown: KEY: reason`.
const EXCUSE: &str = "# may be unknown:";

/// Whether a program reads this key: it is in there as a string, alone or with blanks behind it.
pub(super) fn knows(program: &[u8], key: &str) -> bool {
    let word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let mut from = 0;
    while let Some(at) = super::find(program.get(from..).unwrap_or_default(), key.as_bytes()) {
        let start = from + at;
        let before = start.checked_sub(1).and_then(|before| program.get(before));
        let after = program.get(start + key.len());
        if !before.is_some_and(word) && matches!(after, Some(0 | b' ')) {
            return true;
        }
        from = start + 1;
    }
    false
}

pub(super) fn check(run: &mut Run<'_>, boot: &Boot<'_>) {
    let number = boot.volume.number;
    let text = boot.volume.file(boot.config).unwrap_or_default();
    let at = |line: usize| Place::line(number, boot.config, line);
    let limit = run.facts.releases.line_limit;
    let mut last_section = None;
    for (line, bytes) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let shown = String::from_utf8_lossy(bytes);
        let shown = shown.trim();
        let comment = shown.starts_with('#');
        if bytes.contains(&b'\r') {
            run.stop(
                "config-bytes",
                at(line),
                "it ends in CR LF".to_owned(),
                "end lines in LF alone".to_owned(),
            );
        }
        if !bytes.is_ascii() && !comment {
            let help = "spell it in ASCII".to_owned();
            run.stop(
                "config-bytes",
                at(line),
                "it has other characters than ASCII".to_owned(),
                help,
            );
        }
        if bytes.len() > limit && !comment {
            run.stop(
                "config-line",
                at(line),
                format!("it has {} characters, the firmware reads {limit}", bytes.len()),
                "shorten it".to_owned(),
            );
        }
        if let Some(name) = section(shown) {
            last_section = Some((line, name.to_owned()));
        } else if let Some(found) = setting(line, shown)
            && found.key == "initramfs"
            && found.assigned
        {
            run.stop(
                "config-initramfs",
                at(line),
                "`initramfs` is the one key without `=`: the firmware does not read this"
                    .to_owned(),
                format!("initramfs {} followkernel", found.value),
            );
        }
    }
    if let Some((line, name)) = last_section.filter(|(_, name)| name != "all") {
        run.degrade(
            "config-all",
            at(line),
            format!(
                "the file ends in the section [{name}]: what somebody appends counts only there"
            ),
            "end it in [all]".to_owned(),
        );
    }
    keys(run, boot, text);
    overlays(run, boot);
    for setting in boot.settings.iter().filter(|setting| setting.key == "initramfs") {
        let file = boot.os_file(&setting.value);
        if boot.volume.file(&file).is_none_or(<[u8]>::is_empty) {
            run.stop(
                "initrd-missing",
                at(setting.line),
                format!("the firmware loads {file}, which is not there"),
                "a boot file with `source = \"initrd\"` and that path".to_owned(),
            );
        }
    }
    if let Some(wanted) = run.model.usb_setting.clone()
        && !boot.settings.iter().any(|s| format!("{}={}", s.key, s.value) == wanted)
    {
        let message = format!("without {wanted} its USB sockets are dead");
        let help = format!(
            "a section [{}] with {wanted}",
            run.model.filters.last().cloned().unwrap_or_default()
        );
        run.degrade("config-usb", Place::file(number, boot.config), message, help);
    }
}

/// Keys and sections that the shipped program does not know.
fn keys(run: &mut Run<'_>, boot: &Boot<'_>, text: &[u8]) {
    // What has no date is no firmware, which is said already.
    let (Some(program), Some(day)) = (boot.program, &boot.date) else { return };
    let loader = run.soc.first_stage.as_deref().and_then(|name| boot.volume.file(name));
    let text = String::from_utf8_lossy(text);
    let excused: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix(EXCUSE)?.split(':').next())
        .map(str::trim)
        .collect();
    let known = run.facts.releases.known_key.iter().flat_map(|known| &known.keys);
    let known: Vec<&String> = known.collect();
    let mut unknown = Vec::new();
    for setting in &boot.settings {
        let key = &setting.key;
        let here = knows(program, key) || loader.is_some_and(|loader| knows(loader, key));
        if !(here || known.contains(&key) || excused.contains(&key.as_str())) {
            unknown.push((setting.line, "config-key", key.clone(), "the line does nothing"));
        }
    }
    for (line, text) in (1..).zip(text.lines()) {
        // [gpio4=1], [EDID=…] and serial numbers are of other kinds.
        let name =
            section(text.trim()).filter(|name| !name.contains('=') && !name.starts_with("0x"));
        let Some(name) = name.filter(|name| !excused.contains(name)) else { continue };
        if !knows(program, name) && super::find(program, format!("[{name}]").as_bytes()).is_none() {
            let so = "what stands below counts always or never";
            unknown.push((line, "config-section", format!("[{name}]"), so));
        }
    }
    for (line, rule, name, so) in unknown {
        let bare = name.trim_matches(['[', ']']).to_owned();
        run.stop(
            rule,
            Place::line(boot.volume.number, boot.config, line),
            format!("the shipped firmware of {day} does not know `{name}`: {so}"),
            format!("correct or delete it; if nothing depends on it, `{EXCUSE} {bare}: why` in a line of its own"),
        );
    }
}

/// Overlays that are asked for must be there, and must reach the kernel.
fn overlays(run: &mut Run<'_>, boot: &Boot<'_>) {
    let prefix = boot.value("overlay_prefix").unwrap_or("overlays/").to_owned();
    let kernel = boot.os_file(boot.value("kernel").unwrap_or(&run.soc.kernel));
    let uboot = boot.volume.file(&kernel).is_some_and(super::uboot::is_uboot);
    for setting in &boot.settings {
        let place = Place::line(boot.volume.number, boot.config, setting.line);
        match setting.key.as_str() {
            "dtoverlay" | "dtparam" if uboot && !setting.value.is_empty() => run.stop(
                "overlay-lost",
                place,
                format!(
                    "`{}` changes the firmware's device tree, but the kernel gets its slot's",
                    setting.key
                ),
                "bring the change into the slot's device tree".to_owned(),
            ),
            "dtoverlay" if !setting.value.is_empty() => {
                let name = setting.value.split(',').next().unwrap_or_default();
                let file = boot.os_file(&format!("{prefix}{name}.dtbo"));
                if boot.volume.file(&file).is_none() {
                    run.stop(
                        "overlay-missing",
                        place,
                        format!("the firmware loads {file}, which is not there"),
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
    use super::knows;

    #[test]
    fn a_key_is_a_string_of_its_own() {
        let program = b"\0gpu_mem_256\0remote_gpu_mem\0initramfs %64s %i\0arm_64bit\0";
        assert!(knows(program, "arm_64bit") && knows(program, "initramfs"));
        assert!(
            !knows(program, "gpu_mem") && !knows(program, "arm_64") && !knows(program, "64bit")
        );
    }
}
