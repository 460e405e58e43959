//! Hardware facts as data: `bootmodel/facts/*.toml`, each entry with its source. No fact about a board or a
//! firmware release is in code.

use serde::Deserialize;

/// A size as written in the facts: `64MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct FactSize(pub u64);

impl TryFrom<String> for FactSize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(0));
        let shift = match unit {
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => return Err(format!("{text:?} is not a size such as 64MiB")),
        };
        let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size"))?;
        Ok(Self(number << shift))
    }
}

/// An address as written in the facts: `0x00080000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct FactAddress(pub u64);

impl TryFrom<String> for FactAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        parse_number(&text)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not an address such as 0x00080000"))
    }
}

/// A hexadecimal number, with or without `0x`, as U-Boot reads it.
pub(super) fn parse_number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

/// A model: one string that a board lists in `compatible`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BoardModel {
    /// The root `compatible` of its device tree.
    pub compatible: String,
    /// Human-readable name.
    pub title: String,
    /// The name of its [`Soc`].
    pub soc: String,
    /// Sections of `config.txt` that pass on it.
    pub filters: Vec<String>,
    /// Every memory size that was sold.
    pub ram: Vec<FactSize>,
    /// Device trees that the firmware loads.
    pub firmware_dtbs: Vec<String>,
    /// The same with `upstream_kernel=1`; empty when the names do not differ.
    #[serde(default)]
    pub upstream_dtbs: Vec<String>,
    /// The first kernel of Raspberry Pi's branch that knows it.
    pub kernel_since: Option<String>,
    /// A line of `config.txt` without which its USB ports do not work.
    pub usb_setting: Option<String>,
    /// The middle part of the name of its Wi-Fi settings.
    pub wifi: String,
    /// Its Wi-Fi chips, as Linux's driver names them: `43455`.
    pub wifi_chips: Vec<String>,
    /// Revisions of the board with different facts.
    #[serde(default, rename = "revision")]
    pub revisions: Vec<BoardRevision>,
    /// The source of these facts.
    pub source: String,
}

/// A revision of a board.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BoardRevision {
    /// As `/proc/cpuinfo` has it.
    pub code: String,
    /// Human-readable name.
    pub title: String,
    /// The day of the first `start*.elf` that starts it.
    pub firmware_since: String,
    /// Whether the sources are clear.
    #[serde(default = "default_true")]
    pub certain: bool,
    /// The source of these facts.
    pub source: String,
}

fn default_true() -> bool {
    true
}

/// A chip, and what it does before a kernel runs.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Soc {
    /// Its name.
    pub name: String,
    /// Which boot chain it has: 3, 4 or 5.
    pub generation: u32,
    /// Kinds of partition table that it reads.
    pub table: Vec<String>,
    /// The program that the boot ROM loads from the card, if it does.
    pub first_stage: Option<String>,
    /// The firmware's program and its memory settings, if they are on the card.
    pub second_stage: Vec<String>,
    /// The defaults of `kernel=`; the first existing file is used.
    pub kernel: Vec<String>,
    /// Whether it starts a kernel in 64-bit mode when `arm_64bit` is not set.
    pub starts_64bit: bool,
    /// The default of `gpu_mem=`.
    pub gpu_memory: FactSize,
    /// The end of the memory that firmware and U-Boot use.
    pub memory_top: FactSize,
    /// Widths of FAT that every release of the first stage reads.
    pub fat_widths: Vec<u32>,
    /// Sectors in a cluster that the first stage reads.
    pub cluster_sectors: Vec<u32>,
    /// `compatible` strings of the card's controller.
    pub storage: Vec<String>,
    /// `compatible` strings of all controllers that U-Boot numbers.
    pub u_boot_mmc: Vec<String>,
    /// Where the firmware loads U-Boot.
    pub u_boot_address: FactAddress,
    /// The watchdog's driver, which also restarts the board.
    pub watchdog: String,
    /// Its registers: timeout and start.
    pub watchdog_start: [FactAddress; 2],
    /// The source of these facts.
    pub source: String,
}

/// What releases of the firmware do.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FirmwareReleases {
    /// Bytes in a line of `config.txt`.
    pub line_limit: usize,
    /// The source of these facts.
    pub line_source: String,
    /// Bytes in `autoboot.txt`.
    pub autoboot_limit: usize,
    /// The source of these facts.
    pub autoboot_source: String,
    /// Known keys that occur in no file of the card.
    pub known_key: Vec<KnownKeys>,
    /// What `bootcode.bin` reads.
    pub first_stage: FirstStage,
    /// What the EEPROM does by date.
    pub eeprom: Eeprom,
    /// What `start4.elf` does by date.
    pub second_stage: SecondStage,
    /// When the firmware runs the clocks at their maximum.
    pub turbo: TurboRule,
    /// When the firmware needs two settings to start the watchdog before the kernel.
    pub early_watchdog: EarlyWatchdog,
    /// Incompatible pairs.
    #[serde(rename = "pair")]
    pub pairs: Vec<UbootConflict>,
}

/// Keys of `config.txt` or `autoboot.txt`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownKeys {
    /// The keys.
    pub keys: Vec<String>,
    /// The source of these facts.
    pub source: String,
}

/// What `bootcode.bin` reads of `config.txt`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FirstStage {
    /// MiB of GPU memory below which the cut-down firmware is loaded.
    pub below_cut_down: u64,
    /// The keys that set it.
    pub memory_keys: Vec<String>,
    /// The source of these facts.
    pub source: String,
}

/// What the EEPROM does by date.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Eeprom {
    /// The first release that knows sections in `autoboot.txt`.
    pub sections_since: String,
    /// The source of these facts.
    pub sections_source: String,
    /// The first release that reads a FAT16 in a GPT.
    pub gpt_fat16_since: String,
    /// The source of these facts.
    pub gpt_fat16_source: String,
}

/// What `start4.elf` does by date.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SecondStage {
    /// The first release that finds the EEPROM's partition in a GPT.
    pub gpt_partition_since: String,
    /// The source of these facts.
    pub source: String,
}

/// When the firmware runs the clocks at their maximum.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TurboRule {
    /// The first such release.
    pub since: String,
    /// The line of `config.txt` that prevents it.
    pub setting: String,
    /// The source of these facts.
    pub source: String,
}

/// When the firmware starts the watchdog before the kernel only if the device tree also asks for it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct EarlyWatchdog {
    /// The first such release.
    pub since: String,
    /// The `dtparam` that does this.
    pub parameter: String,
    /// The source of these facts.
    pub source: String,
}

/// A U-Boot that is incompatible with a firmware or with a memory size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct UbootConflict {
    /// On which chip.
    pub soc: String,
    /// U-Boot before this version.
    pub u_boot_below: String,
    /// With firmware after this day.
    pub firmware_after: Option<String>,
    /// On boards with more memory.
    pub memory_above: Option<FactSize>,
    /// Why.
    pub reason: String,
    /// The source of these facts.
    pub source: String,
}

/// What a watchdog driver does with a number of seconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WatchdogDriver {
    /// The module's name.
    pub name: String,
    /// The hardware gets the seconds modulo this; 0 when it gets the number itself.
    pub modulo: u64,
    /// The maximum that the driver states for its hardware, in milliseconds.
    pub limit_ms: u64,
    /// The smallest remainder, in seconds, that is longer than the kernel's feed interval.
    pub smallest_rest: u64,
    /// The source of these facts.
    pub source: String,
}

/// All facts.
#[derive(Debug, Clone)]
pub struct BootFacts {
    /// Of models.
    pub models: Vec<BoardModel>,
    /// Of chips.
    pub socs: Vec<Soc>,
    /// Of releases of the firmware.
    pub releases: FirmwareReleases,
    /// Of watchdogs.
    pub watchdogs: Vec<WatchdogDriver>,
}

/// The texts of `bootmodel/facts` built into this program: what a check depends on besides the card.
pub const TEXTS: [&str; 4] = [
    include_str!("../../facts/models.toml"),
    include_str!("../../facts/socs.toml"),
    include_str!("../../facts/firmware.toml"),
    include_str!("../../facts/watchdog.toml"),
];

impl BootFacts {
    /// The facts built into this program.
    ///
    /// # Errors
    /// When a file is malformed; a test reads them all.
    pub fn known() -> Result<Self, String> {
        let [models, socs, firmware, watchdog] = TEXTS;
        Self::read(models, socs, firmware, watchdog)
    }

    /// Parses texts in the format of `bootmodel/facts`.
    ///
    /// # Errors
    /// When a text is malformed.
    pub fn read(models: &str, socs: &str, firmware: &str, watchdog: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Models {
            model: Vec<BoardModel>,
        }
        #[derive(Deserialize)]
        struct Socs {
            soc: Vec<Soc>,
        }
        #[derive(Deserialize)]
        struct Watchdogs {
            driver: Vec<WatchdogDriver>,
        }
        let in_context = |name: &'static str| move |error| format!("{name}: {error}");
        let models: Models = toml::from_str(models).map_err(in_context("models.toml"))?;
        let socs: Socs = toml::from_str(socs).map_err(in_context("socs.toml"))?;
        let releases = toml::from_str(firmware).map_err(in_context("firmware.toml"))?;
        let watchdogs: Watchdogs = toml::from_str(watchdog).map_err(in_context("watchdog.toml"))?;
        Ok(Self { models: models.model, socs: socs.soc, releases, watchdogs: watchdogs.driver })
    }

    /// The model with this `compatible` string, with its chip.
    pub fn model(&self, compatible: &str) -> Option<(&BoardModel, &Soc)> {
        let model = self.models.iter().find(|model| model.compatible == compatible)?;
        Some((model, self.socs.iter().find(|soc| soc.name == model.soc)?))
    }

    /// The watchdog driver with this name.
    pub fn watchdog(&self, name: &str) -> Option<&WatchdogDriver> {
        self.watchdogs.iter().find(|driver| driver.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fact_has_its_form_and_says_who_says_so() {
        let facts = BootFacts::known().expect("the facts");
        for model in &facts.models {
            assert!(facts.model(&model.compatible).is_some(), "{}: no such chip", model.compatible);
            assert!(!model.ram.is_empty() && !model.firmware_dtbs.is_empty(), "{model:?}");
            let sources = model.revisions.iter().map(|r| &r.source).chain([&model.source]);
            assert!(sources.into_iter().all(|source| source.len() > 5), "{model:?}");
        }
        for soc in &facts.socs {
            assert!(facts.watchdog(&soc.watchdog).is_some(), "{}: no such watchdog", soc.name);
            assert!(soc.source.len() > 5, "{soc:?}");
        }
    }
}
