//! Stage 3, the EEPROM of the Raspberry Pi 4 and 5: `autoboot.txt`, the partition, and what `start4.elf` makes of it.
//!
//! Sources: autoboot.adoc and bootflow-eeprom.adoc; sections since 18 October 2022 (firmware-2711/release-notes.md), an
//! older EEPROM takes the last `boot_partition` of the file (usr-ein/TriMixxx, pi-qemu, T0); `start4.elf` opens the
//! table again, and with a GPT takes another partition before March 2025 (raspberrypi/rpi-eeprom#668); a partition
//! with `start4.elf` beside autoboot.txt may end the search (T6); os_check (firmware-2712/release-notes.md, 2025-03-27).

use super::card::FatVolume;
use super::config::{self, ConfigFilters};
use super::rom::second_stage;
use super::{Boot, CardLocation, Run};

const AUTOBOOT: &str = "autoboot.txt";
/// The file that the boot ROM looks for on the card before it reads the EEPROM (bootflow-eeprom.adoc, "First stage bootloader").
const RECOVERY: &str = "recovery.bin";

/// The partition that autoboot.txt names for this kind of start and this EEPROM release.
fn named_partition(text: &[u8], tryboot: bool, sections: bool) -> Option<u32> {
    let filters = ConfigFilters { models: None, tryboot: Some(tryboot), sections };
    let settings = config::read_settings(text, filters);
    config::last_value(&settings, "boot_partition")?.value.parse().ok()
}

/// Each partition that the EEPROM starts: the one of a normal start and the one of a trial.
pub(super) fn find_boots<'a>(run: &mut Run<'a>) -> Vec<Boot<'a>> {
    let Some(first) = run.card.volumes.iter().min_by_key(|volume| volume.offset) else {
        run.stop(
            "no-fat",
            CardLocation::card(),
            "the EEPROM finds no FAT volume".to_owned(),
            "define a partition with the role `boot` in board.toml".to_owned(),
        );
        return Vec::new();
    };
    if first.file(RECOVERY).is_some() {
        run.stop(
            "rom-recovery",
            CardLocation::file(first.number, RECOVERY),
            "the boot ROM runs recovery.bin instead of the EEPROM's program: it rewrites the EEPROM and starts no system".to_owned(),
            "do not put recovery.bin on the card".to_owned(),
        );
    }
    let Some(text) = first.file(AUTOBOOT) else {
        // One partition for all starts, as in the boot flow `uboot`.
        run.step("EEPROM", format!("partition {}, which has no {AUTOBOOT}", first.number));
        return check_partition(run, first, false).into_iter().collect();
    };
    check_autoboot(run, first, text);
    let mut boots: Vec<Boot<'a>> = Vec::new();
    for tryboot in [false, true] {
        let kind = if tryboot { "a trial" } else { "a start" };
        let Some(number) = named_partition(text, tryboot, true) else {
            run.stop(
                "autoboot-partition",
                CardLocation::file(first.number, AUTOBOOT),
                format!("no boot_partition for {kind}"),
                "set boot_partition; for a trial, below [tryboot]".to_owned(),
            );
            continue;
        };
        let Some(volume) = run.card.volume(number) else {
            run.stop(
                "autoboot-partition",
                CardLocation::file(first.number, AUTOBOOT),
                format!("{kind} uses partition {number}, which is not a FAT volume"),
                "name a partition with the role boot-a or boot-b".to_owned(),
            );
            continue;
        };
        if tryboot && named_partition(text, false, true) == Some(number) {
            run.stop(
                "autoboot-partition",
                CardLocation::file(first.number, AUTOBOOT),
                format!("{kind} uses partition {number}, like every other start: the other slot is never tried"),
                "name the partition of the other slot below [tryboot]".to_owned(),
            );
        }
        run.step(
            "EEPROM",
            format!("{AUTOBOOT} of partition {}: {kind} uses partition {number}", first.number),
        );
        boots.extend(check_partition(run, volume, tryboot));
    }
    boots
}

fn check_autoboot(run: &mut Run<'_>, first: &FatVolume, text: &[u8]) {
    let releases = &run.facts.releases;
    let place = || CardLocation::file(first.number, AUTOBOOT);
    if text.len() > releases.autoboot_limit {
        run.stop(
            "autoboot-length",
            place(),
            format!(
                "the file has {} bytes, but the firmware reads only {}",
                text.len(),
                releases.autoboot_limit
            ),
            "shorten the file".to_owned(),
        );
    }
    for tryboot in [false, true] {
        let filters = ConfigFilters { models: None, tryboot: Some(tryboot), sections: true };
        let settings = config::read_settings(text, filters);
        if config::last_value(&settings, "tryboot_a_b").is_none_or(|set| set.value != "1") {
            run.stop(
                "autoboot-a-b",
                place(),
                "tryboot_a_b=1 is missing: a trial reads tryboot.txt of its partition, not config.txt".to_owned(),
                "add tryboot_a_b=1 below [all]".to_owned(),
            );
            break;
        }
    }
    let since = run.card.device.eeprom_since.clone().unwrap_or_default();
    let eeprom = &releases.eeprom;
    if since.as_str() < eeprom.sections_since.as_str()
        && named_partition(text, false, false) != named_partition(text, false, true)
    {
        let display = if since.is_empty() { "any EEPROM" } else { &since };
        run.stop(
            "eeprom-sections",
            place(),
            format!(
                "`eeprom-since` allows {display}, but an EEPROM before {} reads no sections and always starts partition {}",
                eeprom.sections_since,
                named_partition(text, false, false).unwrap_or(0)
            ),
            format!("set `eeprom-since` in board.toml to {} or later", eeprom.sections_since),
        );
    }
    if run.card.gpt.is_some()
        && since.as_str() < eeprom.gpt_fat16_since.as_str()
        && first.width() == 16
    {
        run.degrade(
            "eeprom-gpt",
            place(),
            format!(
                "an EEPROM before {} does not find a FAT16 volume in a GPT",
                eeprom.gpt_fat16_since
            ),
            format!(
                "set `eeprom-since` in board.toml to {} or later, or use an MBR",
                eeprom.gpt_fat16_since
            ),
        );
    }
    if first.files.keys().any(|name| name.starts_with("start") && name.ends_with(".elf")) {
        run.stop(
            "autoboot-firmware",
            place(),
            "the partition with autoboot.txt also has firmware: the search for a partition can end there".to_owned(),
            "put the firmware only on boot-a and boot-b".to_owned(),
        );
    }
}

fn check_partition<'a>(
    run: &mut Run<'a>,
    volume: &'a FatVolume,
    tryboot: bool,
) -> Option<Boot<'a>> {
    let number = volume.number;
    let Some(text) = volume.file("config.txt") else {
        run.stop(
            "config-missing",
            CardLocation::partition(number),
            "config.txt is missing".to_owned(),
            "add a boot file with the path config.txt".to_owned(),
        );
        return None;
    };
    let filters =
        ConfigFilters { models: Some(&run.model.filters), tryboot: Some(tryboot), sections: true };
    // The EEPROM reads no included files (what_is_config_txt.adoc); `start4.elf` on a Raspberry Pi 4 does.
    let (own, unread) = config::read_with_includes(text, filters, &|_| None);
    let (settings, refused) = if run.soc.second_stage.is_empty() {
        let unread = unread.into_iter().next();
        (own.clone(), unread.map(|(include, _)| (include, "the EEPROM reads no included files")))
    } else {
        let (settings, refused) =
            config::read_with_includes(text, filters, &|name| volume.file(name));
        (settings, refused.into_iter().next())
    };
    // boot.adoc, `boot_ramdisk`.
    if let Some(ramdisk) = config::last_value(&own, "boot_ramdisk").filter(|set| set.value != "0") {
        run.stop(
            "boot-ramdisk",
            CardLocation::line(number, "config.txt", ramdisk.line),
            "boot_ramdisk loads everything from boot.img: its content is not checked, and updates do not write it".to_owned(),
            "delete the line".to_owned(),
        );
    }
    let (mut program, mut date) = (None, None);
    if !run.soc.second_stage.is_empty() {
        // Continue, to report other findings too.
        if let Some((bytes, day)) = second_stage(run, volume, "config.txt", &own) {
            (program, date) = (Some(bytes), day);
        }
        let rule = &run.facts.releases.second_stage;
        let first = run.card.volumes.iter().map(|volume| volume.offset).min();
        let other = first != Some(volume.offset);
        let old = date.as_deref().is_some_and(|day| day < rule.gpt_partition_since.as_str());
        if run.card.gpt.is_some() && other && old {
            run.stop(
                "second-stage-gpt",
                CardLocation::file(number, &run.soc.second_stage[0]),
                format!(
                    "this firmware is from {}: before {} it does not find the partition in a GPT that the EEPROM has chosen, and starts another one",
                    date.clone().unwrap_or_default(),
                    rule.gpt_partition_since
                ),
                "use an MBR with logical partitions, or newer firmware".to_owned(),
            );
        }
    }
    let (steps, prefix, config) = (std::mem::take(&mut run.steps), String::new(), "config.txt");
    Some(Boot { volume, tryboot, config, settings, prefix, refused, date, program, steps })
}
