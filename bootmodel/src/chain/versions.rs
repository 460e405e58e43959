//! Stage 6, compatible versions: board revision and firmware date, firmware and U-Boot, model and kernel. All of it
//! is data, in `models.toml` and `firmware.toml`.

use super::system::{BootSystem, SystemParts};
use super::{Boot, CardLocation, Run, Severity, find_bytes};

/// The version in `U-Boot 2023.01+dfsg-2`, as year and month.
pub(super) fn uboot_version(program: &[u8]) -> Option<String> {
    let mut from = 0;
    while let Some(at) = find_bytes(program.get(from..)?, b"U-Boot 20") {
        from += at + 7;
        let text = program.get(from..from + 7).unwrap_or_default();
        let text = std::str::from_utf8(text).unwrap_or_default();
        if text.len() == 7 && text.as_bytes()[4] == b'.' {
            return Some(text.to_owned());
        }
    }
    None
}

/// Reports revisions of this model that this firmware does not start.
pub(super) fn check_boards(run: &mut Run<'_>, boot: &Boot<'_>) {
    let (Some(date), Some(file)) = (&boot.date, run.soc.second_stage.first().cloned()) else {
        return;
    };
    for revision in run.model.revisions.clone() {
        let left_out = run.card.device.left_out_revisions.contains(&revision.code);
        if *date >= revision.firmware_since || left_out {
            continue;
        }
        let level = if revision.certain { Severity::Stops } else { Severity::Degrades };
        run.find(
            level,
            "firmware-old",
            CardLocation::file(boot.volume.number, &file),
            format!(
                "this firmware is from {date} and does not start {} ({}), which needs firmware from {} or later",
                revision.title, revision.code, revision.firmware_since
            ),
            format!(
                "use newer firmware; or set `left-out-revisions = [\"{}\"]` in board.toml if no robot has such a board",
                revision.code
            ),
        );
    }
}

/// Checks U-Boot with this firmware, and with a device tree from the slot on boards with much memory.
pub(super) fn check_uboot(run: &mut Run<'_>, boot: &Boot<'_>, program: &[u8], own_tree: bool) {
    let Some(version) = uboot_version(program) else { return };
    let place = || boot.place("kernel");
    let date = boot.date.clone().unwrap_or_default();
    let largest = run.model.ram.iter().max().copied();
    for pair in run.facts.releases.pairs.iter().filter(|pair| pair.soc == run.soc.name).cloned() {
        let firmware = pair.firmware_after.as_ref().is_some_and(|after| date > *after);
        let memory = own_tree
            && pair.memory_above.is_some_and(|above| largest.is_some_and(|ram| ram > above));
        if version >= pair.u_boot_below || !(firmware || memory) {
            continue;
        }
        let with = if firmware {
            format!("firmware of {date}")
        } else {
            format!("{} GiB of memory", largest.map_or(0, |ram| ram.0 >> 30))
        };
        run.stop(
            "uboot-pair",
            place(),
            format!("U-Boot {version} is incompatible with {with}: {}", pair.reason),
            format!("use U-Boot {} or later", pair.u_boot_below),
        );
    }
    let turbo = &run.facts.releases.turbo;
    let set = boot.settings.iter().any(|s| format!("{}={}", s.key, s.value) == turbo.setting);
    if date >= turbo.since && !set {
        let message = format!(
            "firmware of {date} runs all clocks at their maximum for 60 s, and U-Boot then fails to read some cards"
        );
        let help = format!("add {} to config.txt", turbo.setting);
        run.degrade("turbo", CardLocation::file(boot.volume.number, boot.config), message, help);
    }
}

/// Numbers of a version such as 6.6.28-v8.
fn version_numbers(version: &str) -> Vec<u32> {
    let parts = version.split(|c: char| !c.is_ascii_digit());
    parts.take(3).map(|part| part.parse().unwrap_or(0)).collect()
}

/// Checks that the kernel is new enough for the model.
pub(super) fn check_kernel(run: &mut Run<'_>, system: &BootSystem<'_>, parts: &SystemParts) {
    let Some(since) = run.model.kernel_since.clone() else { return };
    if version_numbers(&parts.version) < version_numbers(&since) {
        run.stop(
            "kernel-old",
            system.places[0].clone(),
            format!(
                "Linux {} is too old for the {}, which needs {since}",
                parts.version, run.model.title
            ),
            "use a newer kernel, or remove the model from `compatible` in board.toml".to_owned(),
        );
    }
}
