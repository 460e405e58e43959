//! Models a start from power on to `/init`, for each model that a card is for: what boot ROM, `bootcode.bin`, EEPROM,
//! `start*.elf`, U-Boot and kernel do with the card's bytes, and what would prevent that board from starting, trying
//! an update or rolling back. A pure function over the card's bytes and [`BootFacts`]. Each stage is a module that
//! names its sources; everything about a particular model or release is data ([`facts`]).
//!
//! | stage | module | |
//! |---|---|---|
//! | 1 | [`table`] | the partition table and the FAT volumes |
//! | 2 | [`rom`] | the boot ROM and `bootcode.bin` |
//! | 3 | [`eeprom`] | the EEPROM and `autoboot.txt` |
//! | 4 | [`settings`] | `config.txt` against the shipped `start*.elf` |
//! | 5 | [`names`] | device trees by model |
//! | 6 | [`versions`] | firmware, boards and U-Boot that go together |
//! | 7 | [`uboot`] | U-Boot's environment |
//! | 8 | [`memory`] | the script's addresses |
//! | 9 | [`supply`] | the storage's suppliers |
//! | 10 | [`restart`] | a restart after a panic |
//! | 11 | [`watchdog`] | seconds that the watchdog can count |
//! | 12 | [`console`] | the console |
//! | 13 | [`layout`] | what shares an erase block |
//! | 14 | [`words`] | the kernel's command line |

pub mod card;
pub mod config;
mod console;
mod eeprom;
pub mod facts;
mod fat;
pub mod fdt;
mod layout;
mod memory;
mod names;
mod restart;
mod rom;
mod settings;
mod supply;
pub mod system;
pub(crate) mod table;
mod uboot;
mod versions;
pub mod watchdog;
mod words;

use std::collections::BTreeMap;
use std::fmt;

pub use card::CardContent;
pub use facts::BootFacts;

use card::FatVolume;
use config::ConfigSetting;
use facts::{BoardModel, Soc};
use system::BootSystem;

/// What a finding means for the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The board does not start, or an update never succeeds, or a failed update is not rolled back.
    Stops,
    /// The board starts, but a function is missing.
    Degrades,
}

/// A place on the card.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct CardLocation {
    /// The partition's number; none for the table.
    pub partition: Option<u32>,
    /// The file in it.
    pub file: Option<String>,
    /// The line in the file, from 1.
    pub line: Option<usize>,
}

impl CardLocation {
    fn card() -> Self {
        Self::default()
    }

    fn partition(number: u32) -> Self {
        Self { partition: Some(number), file: None, line: None }
    }

    fn file(number: u32, file: &str) -> Self {
        Self { file: Some(file.to_owned()), ..Self::partition(number) }
    }

    fn line(number: u32, file: &str, line: usize) -> Self {
        Self { line: Some(line), ..Self::file(number, file) }
    }
}

impl fmt::Display for CardLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.partition {
            None => write!(f, "the card")?,
            Some(number) => write!(f, "partition {number}")?,
        }
        if let Some(file) = &self.file {
            write!(f, ", {file}")?;
        }
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        Ok(())
    }
}

/// Something that is wrong for one or several models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFinding {
    /// A stable name of the rule.
    pub rule: &'static str,
    /// How severe it is.
    pub level: Severity,
    /// Where.
    pub place: CardLocation,
    /// What was found, and its consequence.
    pub message: String,
    /// What to do.
    pub help: String,
    /// The models that it concerns.
    pub models: Vec<String>,
}

impl fmt::Display for BootFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, place, message, help, models, .. } = self;
        write!(f, "{place}: {message} [{rule}; {}]\nhelp: {help}", models.join(", "))
    }
}

/// One thing that happens in a start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootStep {
    /// The program that does it.
    pub who: &'static str,
    /// What the program does, with the file that it uses.
    pub what: String,
}

/// How one model starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootChain {
    /// The model, as boards list it.
    pub model: String,
    /// Human-readable name.
    pub title: String,
    /// What happens, in order.
    pub steps: Vec<BootStep>,
    /// Whether no finding prevents the start.
    pub starts: bool,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChainVerdict {
    /// One for each model of the card.
    pub chains: Vec<BootChain>,
    /// What is wrong, worst first.
    pub findings: Vec<BootFinding>,
}

impl ChainVerdict {
    /// The findings that prevent a start, an update or a rollback.
    pub fn stops(&self) -> impl Iterator<Item = &BootFinding> {
        self.findings.iter().filter(|finding| finding.level == Severity::Stops)
    }
}

/// Maximum number of findings of one rule for one model.
const MOST_OF_A_RULE: usize = 40;

/// One model on one card.
struct Run<'a> {
    card: &'a CardContent,
    facts: &'a BootFacts,
    model: &'a BoardModel,
    soc: &'a Soc,
    findings: Vec<BootFinding>,
    steps: Vec<BootStep>,
}

impl Run<'_> {
    fn stop(&mut self, rule: &'static str, place: CardLocation, message: String, help: String) {
        self.find(Severity::Stops, rule, place, message, help);
    }

    fn degrade(&mut self, rule: &'static str, place: CardLocation, message: String, help: String) {
        self.find(Severity::Degrades, rule, place, message, help);
    }

    fn find(
        &mut self,
        level: Severity,
        rule: &'static str,
        place: CardLocation,
        message: String,
        help: String,
    ) {
        let models = vec![self.model.compatible.clone()];
        let finding = BootFinding { rule, level, place, message, help, models };
        let same = self.findings.iter().filter(|known| known.rule == rule).count();
        if same < MOST_OF_A_RULE && !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    fn step(&mut self, who: &'static str, what: String) {
        let step = BootStep { who, what };
        if !self.steps.contains(&step) {
            self.steps.push(step);
        }
    }
}

/// A partition that the firmware starts from, with what its `config.txt` says on this model.
struct Boot<'a> {
    volume: &'a FatVolume,
    tryboot: bool,
    config: &'static str,
    settings: Vec<ConfigSetting>,
    /// The prefix of the names of the operating system's files ([`names::find_prefix`]).
    prefix: String,
    /// The first `include` that is not followed, and why.
    refused: Option<(ConfigSetting, &'static str)>,
    /// The day of the firmware's program, where it is on the card.
    date: Option<String>,
    /// The program itself.
    program: Option<&'a [u8]>,
    /// The steps up to here.
    steps: Vec<BootStep>,
}

impl Boot<'_> {
    fn value(&self, key: &str) -> Option<&str> {
        config::last_value(&self.settings, key).map(|setting| setting.value.as_str())
    }

    /// The path of a file of the operating system: the prefix plus the name, or the name alone if it is absolute.
    fn os_file(&self, name: &str) -> String {
        match name.strip_prefix('/') {
            Some(absolute) => absolute.to_owned(),
            None => format!("{}{name}", self.prefix),
        }
    }

    fn place(&self, key: &str) -> CardLocation {
        match config::last_value(&self.settings, key) {
            Some(setting) => self.at(setting),
            None => CardLocation::file(self.volume.number, self.config),
        }
    }

    fn at(&self, setting: &ConfigSetting) -> CardLocation {
        let file = setting.file.as_deref().unwrap_or(self.config);
        CardLocation::line(self.volume.number, file, setting.line)
    }

    /// Whether a setting is on.
    fn is_on(&self, key: &str) -> bool {
        self.value(key).is_some_and(|value| value != "0")
    }
}

/// What happens on each model that the card is for.
pub fn check(card: &CardContent, facts: &BootFacts) -> ChainVerdict {
    let mut verdict = ChainVerdict::default();
    let mut systems = Systems::default();
    for compatible in &card.device.compatible {
        let Some((model, soc)) = facts.model(compatible) else {
            let (chain, finding) = unknown_model(compatible);
            verdict.chains.push(chain);
            verdict.findings.extend(finding);
            continue;
        };
        let mut run = Run { card, facts, model, soc, findings: Vec::new(), steps: Vec::new() };
        check_model(&mut run, &mut systems);
        let starts = run.findings.iter().all(|finding| finding.level != Severity::Stops);
        let (steps, title) = (run.steps, model.title.clone());
        verdict.chains.push(BootChain { model: compatible.clone(), title, steps, starts });
        for mut finding in run.findings {
            let same = verdict.findings.iter_mut().find(|known| {
                (known.rule, &known.place, &known.message)
                    == (finding.rule, &finding.place, &finding.message)
            });
            match same {
                Some(known) => known.models.append(&mut finding.models),
                None => verdict.findings.push(finding),
            }
        }
    }
    verdict.findings.sort_by_key(|finding| finding.level);
    verdict
}

/// A model without facts. Boards of other makers are not modelled; a new Raspberry Pi must get its facts.
fn unknown_model(compatible: &str) -> (BootChain, Option<BootFinding>) {
    let ours = compatible.starts_with("raspberrypi,");
    let what = "the firmware of this model is not modelled; nothing is checked".to_owned();
    let chain = BootChain {
        model: compatible.to_owned(),
        title: compatible.to_owned(),
        steps: vec![BootStep { who: "model", what }],
        starts: !ours,
    };
    let finding = ours.then(|| BootFinding {
        rule: "model-unknown",
        level: Severity::Stops,
        place: CardLocation::card(),
        message: format!("no facts about the model {compatible}"),
        help: "add the model to bootmodel/facts/models.toml, with the source of each fact, or remove it from `compatible` in board.toml".to_owned(),
        models: vec![compatible.to_owned()],
    });
    (chain, finding)
}

/// Parsed systems, by the checksum of their parts. Slots hold the same bytes, so a kernel is decompressed and
/// searched once, not once for each model.
#[derive(Default)]
struct Systems(BTreeMap<Vec<u32>, Result<system::SystemParts, String>>);

impl Systems {
    fn take(
        &mut self,
        tree: Option<&[u8]>,
        kernel: Option<&[u8]>,
        initrd: Option<&[u8]>,
        slot: &card::CardSlot,
    ) -> &Result<system::SystemParts, String> {
        let modules = slot.files.iter().filter(|(path, _)| path.contains("/modules."));
        let parts = [tree, kernel, initrd].map(Option::unwrap_or_default);
        let parts = parts.into_iter().chain(modules.map(|(_, bytes)| bytes.as_slice()));
        let key = parts.map(crc32fast::hash).collect();
        let read = || system::SystemParts::read(tree, kernel, initrd, slot);
        self.0.entry(key).or_insert_with(read)
    }
}

fn check_model(run: &mut Run<'_>, systems: &mut Systems) {
    layout::check(run);
    let boots = match run.soc.generation {
        3 => rom::find_boots(run),
        _ => eeprom::find_boots(run),
    };
    let volumes: Vec<&FatVolume> = boots.iter().map(|boot| boot.volume).collect();
    let first = run.card.volumes.iter().min_by_key(|volume| volume.offset);
    let first = first.filter(|volume| volumes.iter().all(|v| v.number != volume.number));
    let read: Vec<&FatVolume> = first.into_iter().chain(volumes).collect();
    table::check(run, &read);
    for (index, mut boot) in boots.into_iter().enumerate() {
        boot.prefix = names::find_prefix(run, &boot);
        let boot = &boot;
        boot.steps.iter().for_each(|step| run.step(step.who, step.what.clone()));
        settings::check(run, boot);
        versions::check_boards(run, boot);
        let kernel = names::kernel_name(run, boot);
        let Some(program) = boot.volume.file(&kernel).filter(|bytes| !bytes.is_empty()) else {
            run.stop(
                "kernel-missing",
                boot.place("kernel"),
                format!("the firmware loads {kernel}, which does not exist"),
                format!("add a boot file with the path {kernel}, or change `kernel=`"),
            );
            continue;
        };
        let Some(tree) = names::firmware_tree(run, boot) else { continue };
        if uboot::is_uboot(program) {
            run.step(
                "firmware",
                format!("starts U-Boot, {kernel} of partition {}", boot.volume.number),
            );
            settings::check_mode(run, boot, &kernel, Some(program));
            check_uboot_stages(run, boot, program, tree, systems);
        } else {
            settings::check_mode(run, boot, &kernel, None);
            check_compression(run, boot, &kernel, program);
            let Some(slot) = run.card.slots.get(index.min(run.card.slots.len().saturating_sub(1)))
            else {
                continue;
            };
            let initrd = boot.os_file(boot.value("initramfs").unwrap_or_default());
            let number = boot.volume.number;
            run.step(
                "firmware",
                format!("starts the kernel {kernel} of partition {number} with {initrd}"),
            );
            let file = |name: &str| boot.volume.file(name);
            let parts = systems.take(file(&tree), Some(program), file(&initrd), slot);
            let cmdline = boot.os_file(boot.value("cmdline").unwrap_or("cmdline.txt"));
            let words = boot.volume.file(&cmdline).unwrap_or_default();
            let words =
                String::from_utf8_lossy(words).lines().next().unwrap_or_default().to_owned();
            let file = |name: &str| CardLocation::file(number, name);
            let places = [file(&kernel), file(&initrd), file(&tree), file(&cmdline)];
            let system = BootSystem { parts, words, places, slot, script: None };
            kernel_stages(run, Some(boot), &system);
        }
    }
}

/// The firmware decompresses only gzip (documentation of config.txt, `arm_64bit`: "uncompressed image files or a
/// gzip archive of an image").
fn check_compression(run: &mut Run<'_>, boot: &Boot<'_>, kernel: &str, program: &[u8]) {
    if program.starts_with(&system::ZSTD) {
        run.stop(
            "kernel-packed",
            CardLocation::file(boot.volume.number, kernel),
            "the kernel is compressed with zstd, but the firmware decompresses only gzip: it runs the compressed bytes"
                .to_owned(),
            "use an Image, uncompressed or compressed with gzip".to_owned(),
        );
    }
}

/// The stages of U-Boot, and of each slot that it starts.
fn check_uboot_stages(
    run: &mut Run<'_>,
    boot: &Boot<'_>,
    program: &[u8],
    tree: String,
    systems: &mut Systems,
) {
    uboot::check(run, boot, program, &tree);
    let Some(script) = uboot::read_script(run, boot) else { return };
    // Without a tree from the slot, the kernel gets the one that the firmware has completed.
    let own_tree = script.loads.iter().any(|load| load.path.contains("dtbs/"));
    versions::check_uboot(run, boot, program, own_tree);
    let slots: Vec<_> = run.card.slots.iter().collect();
    for slot in slots {
        let Some(files) = names::slot_files(run, slot, &script, program, own_tree) else {
            continue;
        };
        let file = |name: &str| slot.files.get(name.trim_start_matches('/')).map(Vec::as_slice);
        let taken = if own_tree { file(&files.tree) } else { boot.volume.file(&tree) };
        let parts = systems.take(taken, file(&files.kernel), file(&files.initrd), slot);
        let display = if own_tree { &files.tree } else { "the firmware's tree" };
        run.step(
            "U-Boot",
            format!(
                "slot in partition {}: {}, {}, {}",
                slot.number, files.kernel, files.initrd, display
            ),
        );
        let number = slot.number;
        let file = |name: &str| CardLocation::file(number, name);
        let script_place = CardLocation::file(boot.volume.number, "boot.scr");
        let tree_place = match own_tree {
            true => file(&files.tree),
            false => CardLocation::file(boot.volume.number, &tree),
        };
        let places = [file(&files.kernel), file(&files.initrd), tree_place, script_place];
        let system =
            BootSystem { parts, words: script.words.clone(), places, slot, script: Some(&script) };
        memory::check(run, boot, program, &system);
        kernel_stages(run, None, &system);
    }
}

/// Stages 9 to 12, which do not depend on what loaded the kernel.
fn kernel_stages(run: &mut Run<'_>, boot: Option<&Boot<'_>>, system: &BootSystem<'_>) {
    let parts = match system.parts {
        Ok(parts) => parts,
        Err(message) => {
            run.stop(
                "system-unreadable",
                system.places[0].clone(),
                message.clone(),
                "build the image again".to_owned(),
            );
            return;
        }
    };
    versions::check_kernel(run, system, parts);
    words::check(run, boot, system);
    supply::check(run, system, parts);
    restart::check(run, boot, system, parts);
    watchdog::check(run, boot, system, parts);
    console::check(run, system, parts);
    names::check_wifi(run, system.slot);
    run.step("kernel", format!("Linux {} runs /init", parts.version));
}

/// The offset of `needle` in `haystack`.
fn find_bytes(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let (first, rest) = needle.split_first()?;
    let mut from = 0;
    loop {
        let at = from + haystack.get(from..)?.iter().position(|byte| byte == first)?;
        if haystack.get(at + 1..)?.starts_with(rest) {
            return Some(at);
        }
        from = at + 1;
    }
}
