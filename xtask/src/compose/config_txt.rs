//! Checks that the files which `config.txt` tells the firmware to load exist, for each model of the
//! board: only the lines that apply to that model, as `bootmodel` reads them.
//!
//! F: documentation of `config.txt`: boot.adoc (`kernel`, `initramfs`, `ramfsfile`, `cmdline`, `armstub`, `start_file`,
//! `fixup_file`, `os_prefix`, `overlay_prefix`), device-tree.adoc (`device_tree`, `dtoverlay`), what_is_config_txt.adoc
//! (`include`).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, anyhow};
use bootmodel::chain::BootFacts;
use bootmodel::chain::config::{self, ConfigFilters, ConfigSetting};

/// The file.
const NAME: &str = "config.txt";
/// With this file among the overlays, the firmware maps old names of overlays to new ones, and
/// ignores some.
const OVERLAY_MAP: &str = "overlay_map.dtb";

/// Texts of the boot partitions and the names of all their files, by role.
pub struct BootPartitionFiles<'a> {
    /// Role and name, content.
    pub texts: &'a BTreeMap<(String, String), Vec<u8>>,
    /// Role and name.
    pub names: &'a [(String, String)],
}

impl BootPartitionFiles<'_> {
    /// FAT ignores case.
    fn has(&self, role: &str, name: &str) -> bool {
        let name = name.trim_start_matches('/');
        self.names.iter().any(|(r, n)| r == role && n.eq_ignore_ascii_case(name))
    }

    fn text(&self, role: &str, name: &str) -> Option<&[u8]> {
        let fits = |(r, n): &(String, String)| r == role && n.eq_ignore_ascii_case(name);
        let found = self.texts.iter().find(|(key, _)| fits(key));
        found.map(|(_, text)| text.as_slice())
    }
}

/// Adds the files that are named but do not exist.
///
/// # Errors
/// When the facts about models cannot be read.
pub fn check_named_files(
    compatible: &[String],
    partitions: &BootPartitionFiles<'_>,
    missing: &mut Vec<String>,
) -> Result<()> {
    let facts = BootFacts::known().map_err(|reason| anyhow!("bootmodel/facts: {reason}"))?;
    let models: Vec<_> = compatible.iter().filter_map(|name| facts.model(name)).collect();
    let mut found = BTreeSet::new();
    for ((role, name), text) in partitions.texts {
        if name != NAME {
            continue;
        }
        let read = |name: &str| partitions.text(role, name);
        let settings = |filters: ConfigFilters<'_>| {
            let (mut found, refused) = config::read_with_includes(text, filters, &read);
            // Missing included files are reported as well.
            found.extend(refused.into_iter().map(|(setting, _)| setting));
            found
        };
        let mut look = |settings: &[ConfigSetting], first: &[ConfigSetting]| {
            for (key, file) in named_files(settings, first) {
                // The line with this value, or with its beginning: a prefix may come from another
                // line.
                let says = |setting: &&ConfigSetting| {
                    setting.key == key
                        && file.contains(
                            setting.value.split([',', ':']).next().unwrap_or_default().trim(),
                        )
                };
                let line = settings.iter().chain(first).find(says);
                let place = line.map_or(NAME.to_owned(), |setting| {
                    format!("{}:{}", setting.file.as_deref().unwrap_or(NAME), setting.line)
                });
                let mapped = key == "dtoverlay" && {
                    let dir = file.rsplit_once('/').map_or("", |(dir, _)| dir);
                    partitions.has(role, &format!("{dir}/{OVERLAY_MAP}"))
                };
                if !partitions.has(role, &file) && !mapped {
                    found.insert(format!(
                        "{place} in the partition {role} names {file} (`{key}`), which does not \
                         exist\n    \
                         help: add the file to `firmware` or `boot-files` of the board, or remove \
                         the line from {NAME}'s template"
                    ));
                }
            }
        };
        for tryboot in [false, true] {
            let filters = |models| ConfigFilters { models, tryboot: Some(tryboot), sections: true };
            for (model, soc) in &models {
                let settings = settings(filters(Some(&model.filters)));
                // bootcode.bin of the Pi 3 selects the firmware before any section applies.
                let all = ConfigFilters { models: None, tryboot: None, sections: false };
                let first = match soc.generation {
                    3 => config::read_settings(text, all),
                    _ => settings.clone(),
                };
                look(&settings, &first);
            }
            if models.is_empty() {
                let settings = settings(filters(None));
                look(&settings, &settings);
            }
        }
    }
    missing.extend(found);
    Ok(())
}

/// Keys and the files that they name. For most keys the last line applies; `first` are the lines
/// that apply when the firmware itself is selected.
fn named_files(settings: &[ConfigSetting], first: &[ConfigSetting]) -> Vec<(&'static str, String)> {
    let last = |key: &str| {
        let value = config::last_value(settings, key).map(|setting| setting.value.as_str());
        value.filter(|value| !value.is_empty())
    };
    let mut files = Vec::new();
    let prefix = last("os_prefix").unwrap_or_default();
    for key in ["kernel", "initramfs", "ramfsfile", "cmdline", "device_tree"] {
        // Several files may be joined to one initrd.
        let names = last(key).into_iter().flat_map(|value| value.split(','));
        files.extend(names.map(|name| (key, format!("{prefix}{}", name.trim()))));
    }
    files.extend(last("armstub").map(|name| ("armstub", name.to_owned())));
    for key in ["start_file", "fixup_file"] {
        let value = config::last_value(first, key).map(|setting| setting.value.clone());
        files.extend(value.filter(|value| !value.is_empty()).map(|value| (key, value)));
    }
    for setting in settings {
        match setting.key.as_str() {
            "include" => files.push(("include", setting.value.clone())),
            "dtoverlay" => {
                let name = setting.value.split([',', ':']).next().unwrap_or_default().trim();
                let dir = last("overlay_prefix").unwrap_or("overlays/");
                // An empty value ends the parameters of the previous overlay.
                if !name.is_empty() {
                    files.push(("dtoverlay", format!("{prefix}{dir}{name}.dtbo")));
                }
            }
            _ => {}
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    const PI3: &str = "raspberrypi,3-model-b";
    const PI4: &str = "raspberrypi,4-model-b";

    /// The files that are missing on a board for these models, with these additional files.
    fn missing(compatible: &[&str], text: &str, files: &[&str]) -> Vec<String> {
        let key = |name: &str| ("boot".to_owned(), name.to_owned());
        let texts = BTreeMap::from([
            (key("config.txt"), text.as_bytes().to_vec()),
            (key("more.txt"), b"[all]\ninitramfs more.img followkernel\n".to_vec()),
        ]);
        let mut names: Vec<_> = texts.keys().cloned().collect();
        names.extend(files.iter().map(|name| key(name)));
        let compatible: Vec<String> = compatible.iter().map(|name| (*name).to_owned()).collect();
        let mut missing = Vec::new();
        check_named_files(
            &compatible,
            &BootPartitionFiles { texts: &texts, names: &names },
            &mut missing,
        )
        .expect("facts");
        let file = |message: &String| {
            let rest = message.split_once(" names ").expect("a file").1;
            rest.split_once(" (").expect("a key").0.to_owned()
        };
        let mut files: Vec<String> = missing.iter().map(file).collect();
        files.sort();
        files
    }

    #[test]
    fn only_lines_of_the_boards_models_count() {
        let text = "kernel=u-boot.bin\n[pi02]\nkernel=zero.bin\n[pi4]\nkernel=four.bin\n[all]\narm_64bit=1\n";
        let there = ["u-boot.bin"];
        assert_eq!(missing(&[PI3], text, &there), [""; 0]);
        assert_eq!(missing(&[PI3, PI4], text, &there), ["four.bin"]);
        assert_eq!(missing(&[PI4], text, &there), ["four.bin"]);
        // An unknown model: only the lines for all models.
        assert_eq!(missing(&["acme,board"], text, &[]), ["u-boot.bin"]);
        assert_eq!(missing(&[PI4], "[tryboot]\nkernel=trial.bin\n", &[]), ["trial.bin"]);
        // FAT ignores case, and the last line applies.
        assert_eq!(missing(&[PI3], "kernel=none\nkernel=U-BOOT.BIN\n", &there), [""; 0]);
    }

    #[test]
    fn every_key_that_names_a_file_is_looked_at() {
        for (line, file) in [
            ("kernel=a.bin", "a.bin"),
            ("initramfs a.img followkernel", "a.img"),
            ("initramfs more.txt,a.img followkernel", "a.img"),
            ("ramfsfile=a.img", "a.img"),
            ("cmdline=a.txt", "a.txt"),
            ("device_tree=a.dtb", "a.dtb"),
            ("os_prefix=slot/\nkernel=a.bin", "slot/a.bin"),
            ("armstub=a.bin", "a.bin"),
            ("start_file=a.elf", "a.elf"),
            ("fixup_file=a.dat", "a.dat"),
            ("include a.txt", "a.txt"),
            ("dtoverlay=disable-bt", "overlays/disable-bt.dtbo"),
            ("dtoverlay=w1-gpio,gpiopin=4", "overlays/w1-gpio.dtbo"),
            ("overlay_prefix=mine/\ndtoverlay=a", "mine/a.dtbo"),
        ] {
            assert_eq!(missing(&[PI4], line, &[]), [file], "{line}");
            assert_eq!(missing(&[PI4], line, &[file]), [""; 0], "{line}");
            assert_eq!(missing(&[PI4], &format!("[none]\n{line}"), &[]), [""; 0], "{line}");
        }
        // Names that the firmware may map to other names, and lines without names.
        assert_eq!(missing(&[PI4], "dtoverlay=old", &["overlays/overlay_map.dtb"]), [""; 0]);
        assert_eq!(missing(&[PI4], "dtoverlay=\ndevice_tree=\n", &[]), [""; 0]);
        // bootcode.bin reads no sections; the EEPROM, which does, selects start4.elf.
        let section = "[pi4]\nstart_file=a.elf\nfixup_file=a.dat\n";
        assert_eq!(missing(&[PI3], section, &[]), ["a.dat", "a.elf"]);
    }

    #[test]
    fn what_is_included_counts_where_it_is_included() {
        assert_eq!(missing(&[PI4], "include more.txt\n", &[]), ["more.img"]);
        // The section of the included file also applies after the include; in a section that does
        // not apply, nothing is included.
        assert_eq!(
            missing(&[PI4], "[pi4]\ninclude more.txt\nkernel=a.bin\n", &[]),
            ["a.bin", "more.img"]
        );
        assert_eq!(missing(&[PI4], "[none]\ninclude more.txt\nkernel=a.bin\n", &[]), [""; 0]);
        assert_eq!(
            missing(&[PI4], "include config.txt\nkernel=a.bin\n", &["a.bin"]),
            ["config.txt"; 0]
        );
    }
}
