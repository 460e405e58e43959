//! Stage 7, U-Boot: its environment, as compiled in or from `uboot.env`, and its script.
//!
//! Sources: env/common.c and env/fat.c of U-Boot (a file with a wrong checksum is ignored; a valid one replaces
//! the compiled-in environment); include/env_default.h; common/autoboot.c (a `bootdelay` of -2 checks for no key); the
//! legacy image of a script (include/image.h); Opentrons/buildroot, pull requests 177 and 179, and
//! home-assistant/operating-system for what characters on the UART do.

use std::collections::BTreeMap;

use super::fdt::DeviceTree;
use super::{Boot, CardLocation, Run, facts, find_bytes};

/// The environment's file, and its bytes: CONFIG_ENV_FAT_FILE and CONFIG_ENV_SIZE of every Raspberry Pi's U-Boot.
const ENV_FILE: &str = "uboot.env";
const ENV_SIZE: usize = 0x4000;
const SCRIPT: &str = "boot.scr";
/// IH_TYPE_SCRIPT.
const TYPE_SCRIPT: u8 = 6;

/// Whether a program is U-Boot.
pub(super) fn is_uboot(program: &[u8]) -> bool {
    super::versions::uboot_version(program).is_some()
}

/// Bytes that are searched before and after a variable of the compiled-in environment: four times its maximum size.
const COMPILED_IN: usize = 4 * ENV_SIZE;
/// The largest script that is parsed; Slipway's has 8 KiB.
const LARGEST_SCRIPT: usize = 256 << 10;

type Environment = BTreeMap<String, String>;

fn parse_variable(text: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(text).ok()?;
    let (name, value) = text.split_once('=')?;
    let good =
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    good.then(|| (name.to_owned(), value.to_owned()))
}

/// The compiled-in environment: the consecutive variables around `bootdelay=`.
fn compiled_in(program: &[u8]) -> Option<Environment> {
    let at = find_bytes(program, b"\0bootdelay=")? + 1;
    let from = at.saturating_sub(COMPILED_IN);
    let program = program.get(from..program.len().min(at + COMPILED_IN))?;
    let mut start = at - from;
    while let Some(before) = start.checked_sub(1) {
        let from = program[..before].iter().rposition(|byte| *byte == 0).map_or(0, |nul| nul + 1);
        if parse_variable(&program[from..before]).is_none() {
            break;
        }
        start = from;
    }
    let texts = program[start..].split(|byte| *byte == 0);
    Some(texts.map_while(parse_variable).collect())
}

/// The variables of `uboot.env`.
fn from_file(bytes: &[u8]) -> Result<Environment, String> {
    if bytes.len() != ENV_SIZE {
        return Err(format!("the file has {} bytes, but U-Boot reads {ENV_SIZE}", bytes.len()));
    }
    let (sum, data) = bytes.split_at(4);
    if sum != crc32fast::hash(data).to_le_bytes() {
        return Err("checksum mismatch".to_owned());
    }
    Ok(data.split(|byte| *byte == 0).map_while(parse_variable).collect())
}

/// Everything that a command may run: the command itself, what it runs and the content of its variables.
fn reachable_text(environment: &Environment, command: &str) -> String {
    let mut all = command.to_owned();
    let mut seen = vec![command.to_owned()];
    let mut left = vec![command.to_owned()];
    while let Some(text) = left.pop() {
        let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c == ';').collect();
        let runs = words.windows(2).filter(|pair| pair[0] == "run").map(|pair| pair[1]);
        let uses = text.split("${").skip(1).filter_map(|rest| rest.split('}').next());
        for name in runs.chain(uses) {
            let Some(value) = environment.get(name).filter(|value| !seen.contains(*value)) else {
                continue;
            };
            seen.push(value.clone());
            left.push(value.clone());
            all.push_str(" ; ");
            all.push_str(value);
        }
    }
    all
}

/// A file that the script loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScriptLoad {
    /// The address it is loaded to.
    pub address: u64,
    /// The file's path.
    pub path: String,
}

/// The parts of the script that matter for a start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootScript {
    /// The number of its partition.
    pub partition: u32,
    /// The files that it loads.
    pub loads: Vec<ScriptLoad>,
    /// Where a compressed kernel is decompressed to.
    pub unpacked_at: Option<u64>,
    /// Maximum number of compressed bytes.
    pub unpacked_size: Option<u64>,
    /// The kernel's command line.
    pub words: String,
    /// Writes: address and value.
    pub writes: Vec<(u64, u64)>,
}

/// The script of a boot partition.
pub(super) fn read_script(run: &mut Run<'_>, boot: &Boot<'_>) -> Option<BootScript> {
    let number = boot.volume.number;
    let Some(bytes) = boot.volume.file(SCRIPT) else {
        run.stop(
            "script-missing",
            CardLocation::partition(number),
            format!("U-Boot runs {SCRIPT}, which does not exist"),
            format!("add a boot file with the path {SCRIPT} and `compile = \"boot-script\"`"),
        );
        return None;
    };
    let size =
        bytes.get(12..16).and_then(|four| four.try_into().ok()).map_or(0, u32::from_be_bytes);
    let body = bytes
        .get(64..)
        .filter(|body| bytes.starts_with(&[0x27, 0x05, 0x19, 0x56]) && body.len() == size as usize);
    let sum = bytes.get(24..28).and_then(|four| four.try_into().ok()).map_or(0, u32::from_be_bytes);
    // The header has its own checksum, computed with that field zero, and the image type at offset 30 (include/image.h).
    let head = bytes.get(..64).is_some_and(|head| {
        let without = [&head[..4], &[0; 4], &head[8..]].concat();
        head[4..8] == crc32fast::hash(&without).to_be_bytes() && head[30] == TYPE_SCRIPT
    });
    // Before the text: its length, and the zero that ends the list of parts.
    let Some(text) = body
        .filter(|body| head && crc32fast::hash(body) == sum && body.len() <= LARGEST_SCRIPT)
        .and_then(|body| body.get(8..))
    else {
        run.stop(
            "script-damaged",
            CardLocation::file(number, SCRIPT),
            "boot.scr is not a script image, or one of its checksums is wrong: U-Boot does not run it"
                .to_owned(),
            "set `compile = \"boot-script\"` for the boot file".to_owned(),
        );
        return None;
    };
    run.step("U-Boot", format!("runs {SCRIPT} of partition {number}"));
    Some(parse(number, &String::from_utf8_lossy(text)))
}

/// Whether the script passes a device tree from the slot to the kernel, not the one that the firmware has completed.
pub(super) fn takes_a_tree(boot: &Boot<'_>) -> bool {
    let text = boot.volume.file(SCRIPT).unwrap_or_default();
    // Without a script nothing starts anyway.
    text.is_empty() || find_bytes(text, b"dtbs/").is_some()
}

fn parse(partition: u32, text: &str) -> BootScript {
    let mut script = BootScript { partition, ..BootScript::default() };
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let plain = line.replace(['\'', ';'], " ");
        let words: Vec<&str> = plain.split_whitespace().collect();
        for (at, word) in words.iter().enumerate() {
            let rest = &words[at + 1..];
            let number = |place: usize| rest.get(place).and_then(|word| facts::parse_number(word));
            match *word {
                "load" => {
                    // `load ${from} ADDRESS PATH` or `load DEVICE PART ADDRESS PATH`.
                    let from = rest.iter().position(|word| word.starts_with("0x"));
                    if let Some(from) = from.filter(|from| *from < 3)
                        && let (Some(address), Some(path)) = (number(from), rest.get(from + 1))
                    {
                        script.loads.push(ScriptLoad { address, path: (*path).to_owned() });
                    }
                }
                "kernel_comp_addr_r" => script.unpacked_at = number(0),
                "kernel_comp_size" => script.unpacked_size = number(0),
                "mw.l" => script.writes.extend(number(0).zip(number(1))),
                _ => {}
            }
        }
        if let Some((_, rest)) = line.split_once("setenv bootargs \"") {
            script.words = rest.split('"').next().unwrap_or_default().to_owned();
        }
    }
    script
}

/// U-Boot's number for the card's controller: by alias, else by the order in the tree.
fn card_number(run: &Run<'_>, tree: &DeviceTree) -> Option<usize> {
    let is = |list: &[String], node: &super::fdt::DeviceTreeNode| {
        node.compatible().iter().any(|c| list.contains(c))
    };
    let numbered =
        tree.nodes.iter().filter(|node| is(&run.soc.u_boot_mmc, node) && tree.enabled(node));
    let numbered: Vec<_> = numbered.collect();
    let aliased = (0..8)
        .find(|n| tree.alias(&format!("mmc{n}")).is_some_and(|node| is(&run.soc.storage, node)));
    aliased.or_else(|| numbered.iter().position(|node| is(&run.soc.storage, node)))
}

pub(super) fn check(run: &mut Run<'_>, boot: &Boot<'_>, program: &[u8], tree: &str) {
    let number = boot.volume.number;
    let reads_file = find_bytes(program, ENV_FILE.as_bytes()).is_some();
    let mut place = boot.place("kernel");
    let mut environment = compiled_in(program).unwrap_or_default();
    let mut is_file = false;
    match boot.volume.file(ENV_FILE).filter(|_| reads_file).map(from_file) {
        Some(Ok(own)) => {
            place = CardLocation::file(number, ENV_FILE);
            (environment, is_file) = (own, true);
            run.step(
                "U-Boot",
                format!("uses the environment from {ENV_FILE} of partition {number}"),
            );
        }
        Some(Err(reason)) => {
            run.stop(
                "uboot-env",
                CardLocation::file(number, ENV_FILE),
                format!("{reason}: U-Boot ignores the file and uses its compiled-in environment"),
                "build the image again".to_owned(),
            );
        }
        None => run.step("U-Boot", "uses its compiled-in environment".to_owned()),
    }
    let help = || match is_file {
        true => format!(
            "correct the boot file that {ENV_FILE} is made from: bootdelay=-2, no preboot, a bootcmd that runs boot.scr from the card"
        ),
        false => format!(
            "put a {ENV_FILE} on the boot partition ([[boot-files]] with `compile = \"u-boot-environment\"`), or use a U-Boot built for Slipway"
        ),
    };
    let value = |name: &str| environment.get(name).cloned().unwrap_or_default();
    if value("bootdelay") != "-2" {
        run.stop(
            "uboot-stops",
            place.clone(),
            format!(
                "bootdelay is {:?}: any character on the serial line or key of a keyboard stops U-Boot, for ever",
                value("bootdelay")
            ),
            help(),
        );
    }
    let preboot = reachable_text(&environment, &value("preboot"));
    let mut command = reachable_text(&environment, &value("bootcmd"));
    // `bootflow scan` takes its devices from this variable, without naming it (boot/bootmeth-uclass.c, bootdev order).
    if command.contains("bootflow") {
        command = format!("{command} ; {}", value("boot_targets"));
    }
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| c.is_whitespace() || c == ';').map(str::to_owned).collect()
    };
    if words(&preboot).iter().chain(&words(&command)).any(|word| word.starts_with("usb")) {
        run.degrade(
            "uboot-usb",
            place.clone(),
            "U-Boot searches USB: this takes seconds, hangs on some devices, and a USB stick can start another system".to_owned(),
            help(),
        );
    }
    if words(&command).iter().any(|word| word.starts_with("pxe") || word.starts_with("dhcp")) {
        run.degrade(
            "uboot-network",
            place.clone(),
            "U-Boot starts a system from the network when the card has none".to_owned(),
            help(),
        );
    }
    let own = value("bootcmd");
    let all = words(&command);
    // U-Boot's default commands find the script themselves.
    let scans = all.iter().any(|word| word == "bootflow" || word == "distro_bootcmd");
    let sources = all.iter().any(|word| word == "source") && command.contains(SCRIPT);
    // `load mmc 0:1 ADDRESS boot.scr`: the partition in hexadecimal, the disk's number before it.
    let elsewhere = all.windows(5).find(|part| {
        let from = part[2].split_once(':').and_then(|(_, number)| facts::parse_number(number));
        part[0].ends_with("load")
            && part[4].ends_with(SCRIPT)
            && from.is_some_and(|from| from != u64::from(number))
    });
    if !(scans || sources) {
        run.stop(
            "uboot-command",
            place.clone(),
            format!("bootcmd does not run {SCRIPT}: nothing starts, and U-Boot restarts for ever"),
            help(),
        );
    } else if let Some(part) = elsewhere {
        run.stop(
            "uboot-command",
            place.clone(),
            format!(
                "bootcmd loads {} from {}, but the file is on partition {number}",
                part[4], part[2]
            ),
            help(),
        );
    }
    let end =
        own.trim().trim_end_matches(';').rsplit(';').next().unwrap_or_default().trim().to_owned();
    if end != "reset" {
        run.stop(
            "uboot-prompt",
            place.clone(),
            format!("bootcmd ends in {end:?}: when the script returns or is missing, U-Boot waits at a prompt for ever"),
            help(),
        );
    }
    let names_card = place.file.as_deref() == Some(ENV_FILE) || own.contains("mmc 0");
    let tree = boot.volume.file(tree).map(DeviceTree::read);
    if let (true, Some(Ok(tree))) = (names_card, tree)
        && let Some(card) = card_number(run, &tree)
        && card != 0
    {
        run.stop(
            "uboot-device",
            place,
            format!("on this model the card is mmc {card} in U-Boot, but U-Boot looks for {ENV_FILE} and bootcmd's files on mmc 0"),
            "give U-Boot a device tree with the alias mmc0 for the card's controller".to_owned(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_cut_out_of_the_program() {
        let program = b"some text\0bootcmd=run a\0bootdelay=2\0preboot=usb start\0\0more=no";
        let found = compiled_in(program).expect("an environment");
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found["bootcmd"], "run a");
    }

    #[test]
    fn what_a_command_reaches_is_followed() {
        let text = "bootcmd=run d\0d=for t in ${targets}; do run b_${t}; done\0targets=mmc0 dhcp\0";
        let all: Environment =
            text.as_bytes().split(|b| *b == 0).map_while(parse_variable).collect();
        assert!(reachable_text(&all, "run d").contains("dhcp"));
    }
}
