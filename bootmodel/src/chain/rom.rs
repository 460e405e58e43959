//! Stage 2, the boot ROM and `bootcode.bin` of the Raspberry Pi 3.
//!
//! Sources: strings of `bootcode.bin` of 26 August 2022 (`gpu_mem`, `gpu_mem_256/512/1024`, `start_x`,
//! `start_debug`, `start_file`, `fixup_file`, `start_cd.elf`, `fixup_cd.dat`): it chooses the firmware itself, and
//! ignores the sections of config.txt. raspberrypi/firmware#984, raspberrypi/linux#503, raspberrypi/documentation, pull
//! requests 3233 and 4194; boot ROM: raspberrypi/firmware#1738. Its strings also
//! include `autoboot.txt` and `boot_partition`. It reads no included files (what_is_config_txt.adoc).

use super::config::{self, ConfigFilters, ConfigSetting};
use super::{Boot, CardLocation, Run, find_bytes};

/// The day in `VC_BUILD_ID_TIME: Aug 26 2022`, as 2022-08-26.
pub(super) fn build_day(program: &[u8]) -> Option<String> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let mark = b"VC_BUILD_ID_TIME: ";
    let mut from = 0;
    while let Some(at) = find_bytes(program.get(from..)?, mark) {
        from += at + mark.len();
        let text = program.get(from..from + 11)?;
        let text = std::str::from_utf8(text).unwrap_or_default();
        // The same key is also used for the time of day.
        let mut words = text.split_whitespace();
        let month = words.next().and_then(|month| MONTHS.find(month)).map(|at| at / 3 + 1);
        let day = words.next().and_then(|day| day.parse::<u32>().ok());
        let year = words.next().and_then(|year| year.parse::<u32>().ok());
        if let (Some(month), Some(day), Some(year)) = (month, day, year) {
            return Some(format!("{year:04}-{month:02}-{day:02}"));
        }
    }
    None
}

/// The names of the firmware files with these settings (program and memory settings), and the line that selects them.
fn firmware_files(run: &Run<'_>, settings: &[ConfigSetting]) -> ([String; 2], Option<usize>) {
    let [program, fixup] = run.soc.second_stage.as_slice() else { return Default::default() };
    let rules = &run.facts.releases.first_stage;
    let with = |mark: &str| {
        let name = |file: &str| {
            let (stem, end) = file.rsplit_once('.').unwrap_or((file, ""));
            // start.elf and start_cd.elf, but start4.elf and start4cd.elf.
            let gap = if stem.ends_with(|c: char| c.is_ascii_digit()) { "" } else { "_" };
            format!("{stem}{gap}{mark}.{end}")
        };
        [name(program), name(fixup)]
    };
    let named = |key: &str| config::last_value(settings, key);
    if let (Some(start), Some(fix)) = (named("start_file"), named("fixup_file")) {
        return ([start.value.clone(), fix.value.clone()], Some(start.line));
    }
    let on = |key: &str| named(key).filter(|setting| setting.value == "1");
    if let Some(setting) = on("start_debug") {
        return (with("db"), Some(setting.line));
    }
    if let Some(setting) = on("start_x") {
        return (with("x"), Some(setting.line));
    }
    // The key for this memory size takes precedence over the general one.
    let largest = run.model.ram.iter().map(|ram| ram.0 >> 20).max().unwrap_or(0).min(1024);
    let exact = rules.memory_keys.iter().filter(|key| key.ends_with(&format!("_{largest}")));
    let setting = exact.chain(&rules.memory_keys[..1]).find_map(|key| named(key));
    let low = |setting: &&ConfigSetting| {
        setting.value.parse().is_ok_and(|mib: u64| mib < rules.below_cut_down)
    };
    match setting.filter(low) {
        Some(setting) => (with("cd"), Some(setting.line)),
        None => ([program.clone(), fixup.clone()], None),
    }
}

/// The firmware's two files on a partition and their build day; reports what is wrong with them. `sections` says
/// whether the program that chooses them reads sections of config.txt.
pub(super) fn second_stage<'a>(
    run: &mut Run<'a>,
    volume: &'a super::card::FatVolume,
    config: &'static str,
    settings: &[ConfigSetting],
) -> Option<(&'a [u8], Option<String>)> {
    let ([program, fixup], line) = firmware_files(run, settings);
    let place = match line {
        Some(line) => CardLocation::line(volume.number, config, line),
        None => CardLocation::partition(volume.number),
    };
    let missing: Vec<&str> = [&program, &fixup]
        .into_iter()
        .filter(|name| volume.file(name).is_none_or(<[u8]>::is_empty))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        let setting = settings.iter().find(|setting| Some(setting.line) == line);
        let why = match setting {
            Some(ConfigSetting { key, value, .. }) => {
                format!("with `{key}={value}` the firmware loads")
            }
            None => "the firmware loads".to_owned(),
        };
        let are = if missing.len() == 1 { "does" } else { "do" };
        let message =
            format!("{why} {program} and {fixup}, but {} {are} not exist", missing.join(" and "));
        let help = match line {
            Some(_) => "delete the line, or add the files to `firmware` in board.toml",
            None => "add the files to `firmware` in board.toml",
        };
        run.stop("firmware-file", place, message, help.to_owned());
        return None;
    }
    let bytes = volume.file(&program).unwrap_or_default();
    let day = build_day(bytes);
    let display = day.clone().unwrap_or_else(|| "of unknown date".to_owned());
    run.step(
        "firmware",
        format!("{program} ({display}) and {fixup} of partition {}", volume.number),
    );
    if day.is_none() {
        run.stop(
            "firmware-date",
            CardLocation::file(volume.number, &program),
            "the file has no build date, so it is not Raspberry Pi firmware".to_owned(),
            "use the file from the package raspi-firmware".to_owned(),
        );
    }
    let wrong = volume.file(&fixup).is_some_and(|bytes| !is_fixup(bytes));
    if wrong {
        run.stop(
            "firmware-fixup",
            CardLocation::file(volume.number, &fixup),
            format!("the file does not begin like {fixup}; without the matching file {program} cannot set up memory"),
            "use both files from the same package".to_owned(),
        );
    }
    Some((bytes, day))
}

/// All fixup files begin with the same bytes (checked in raspi-firmware 1.20220830). They have no date, and their
/// format is not published, so whether one matches its program cannot be checked.
fn is_fixup(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0x0f, 0x13])
}

/// What the ROM starts: the first partition, if it is a FAT with `bootcode.bin` in its root.
pub(super) fn find_boots<'a>(run: &mut Run<'a>) -> Vec<Boot<'a>> {
    let first = run.soc.first_stage.clone().unwrap_or_default();
    let Some(volume) = run.card.volumes.iter().min_by_key(|volume| volume.offset) else {
        run.stop(
            "no-fat",
            CardLocation::card(),
            "the boot ROM finds no FAT volume".to_owned(),
            "define a partition with the role `boot` in board.toml".to_owned(),
        );
        return Vec::new();
    };
    let number = volume.number;
    if volume.file(&first).is_none_or(<[u8]>::is_empty) {
        run.stop(
            "rom-file",
            CardLocation::partition(number),
            format!(
                "the boot ROM loads {first} from the root directory, but the file does not exist"
            ),
            format!("add {first} to `firmware` in board.toml"),
        );
        return Vec::new();
    }
    run.step("boot ROM", format!("{first} of partition {number} (FAT{})", volume.width()));
    if volume.file("autoboot.txt").is_some() {
        run.stop(
            "rom-autoboot",
            CardLocation::file(number, "autoboot.txt"),
            format!("{first} also reads autoboot.txt, and starts the partition that it names"),
            "delete the file: only Raspberry Pi 4 and later can try a partition with it".to_owned(),
        );
    }
    let text = volume.file("config.txt").unwrap_or_default();
    // Sections are ignored here.
    let all =
        config::read_settings(text, ConfigFilters { models: None, tryboot: None, sections: false });
    // Continue, to report other findings too.
    let second = second_stage(run, volume, "config.txt", &all);
    let (program, date) = second.map_or((None, None), |(program, date)| (Some(program), date));
    let loader = build_day(volume.file(&first).unwrap_or_default());
    if let (Some(loader), Some(date)) = (&loader, &date)
        && loader != date
    {
        run.stop(
            "firmware-date",
            CardLocation::file(number, &first),
            format!(
                "bootcode.bin is from {loader} but start.elf from {date}: not the same release"
            ),
            "use all firmware files from the same package".to_owned(),
        );
    }
    let filters =
        ConfigFilters { models: Some(&run.model.filters), tryboot: Some(false), sections: true };
    let (settings, refused) = config::read_with_includes(text, filters, &|name| volume.file(name));
    let (steps, prefix) = (std::mem::take(&mut run.steps), String::new());
    let (refused, config) = (refused.into_iter().next(), "config.txt");
    vec![Boot { volume, tryboot: false, config, settings, prefix, refused, date, program, steps }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_day_is_read_past_the_time() {
        let program = b"xx\0VC_BUILD_ID_TIME: 14:04:36\0VC_BUILD_ID_TIME: Aug 26 2022\0";
        assert_eq!(build_day(program).as_deref(), Some("2022-08-26"));
        assert_eq!(
            build_day(b"VC_BUILD_ID_TIME: 14:04:36\0VC_BUILD_ID_TIME: May  4 2024\0").as_deref(),
            Some("2024-05-04")
        );
        assert_eq!(build_day(b"none"), None);
    }
}
