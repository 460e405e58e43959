//! `device.toml`: the description of a system and the layout of its card, the same bytes in either slot. The overlay's
//! template `device.toml.j2` writes it; the build refuses what [`DeviceFile::parse`] does not accept.

use std::collections::BTreeMap;

use bundle::{BuildKind, Version};
use serde::{Deserialize, Serialize};

/// Its path in the root file system.
pub const PATH: &str = "usr/lib/slipway/device.toml";

/// Bytes of a sector, the unit in `device.toml` and sysfs, independent of the disk's own sector size.
pub const SECTOR: u64 = 512;

/// Which program chooses the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootFlow {
    /// U-Boot's script, from the boot state in raw sectors.
    Uboot,
    /// The Raspberry Pi's firmware, from `autoboot.txt`.
    Tryboot,
}

/// A partition, as the image's builder laid it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PartitionExtent {
    /// Its number in the table, from 1.
    pub number: u32,
    /// Its first sector.
    pub start_sector: u64,
    /// Its length in sectors; `data` has grown since.
    pub sectors: u64,
}

/// The position of the boot state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct BootStateSectors {
    /// First sector of each copy; empty if the boot flow keeps its state elsewhere.
    #[serde(default)]
    pub sectors: Vec<u64>,
}

/// The position of the state that must survive the loss of `data`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct TrustSectors {
    /// First sector of each of the two copies, each of [`bundle::area::COPY`] bytes; empty in an image without such an
    /// area.
    #[serde(default)]
    pub sectors: Vec<u64>,
}

/// The layout of cards that were flashed with an earlier image: a card keeps its table for ever.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct EarlierLayout {
    /// The position of the boot state.
    #[serde(default)]
    pub boot_state: BootStateSectors,
    /// Where the floor and the keys are stored besides `data`.
    #[serde(default)]
    pub trust: TrustSectors,
    /// By role, as in [`DeviceFile`].
    pub partitions: BTreeMap<String, PartitionExtent>,
}

/// `device.toml`. Unknown keys are ignored: a later image may have more. A known key of another type is an error, and so
/// is a missing key without a default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceFile {
    /// The product.
    pub product: String,
    /// The version of the running system.
    pub version: Version,
    /// The lowest version that may follow this one.
    #[serde(default)]
    pub minimum_version: Option<Version>,
    /// The lowest key epoch that is accepted; 0: any.
    #[serde(default)]
    pub key_epoch: u32,
    /// A development image accepts development keys and bundles; a release image never does.
    pub kind: BuildKind,
    /// The board.
    pub board: String,
    /// The boot flow.
    pub boot_flow: BootFlow,
    /// One of these must be among the running machine's device-tree compatibles.
    pub compatible: Vec<String>,
    /// The oldest EEPROM release that can try a slot, as a day; only with the flow `tryboot`.
    #[serde(default)]
    pub eeprom_since: Option<String>,
    /// The position of the boot state.
    #[serde(default)]
    pub boot_state: BootStateSectors,
    /// Where the floor and the keys are stored besides `data`.
    #[serde(default)]
    pub trust: TrustSectors,
    /// By role: `boot`, `root-a`, `root-b`, `data`, …
    pub partitions: BTreeMap<String, PartitionExtent>,
    /// Other card layouts that this image runs on. The agent puts those of its actual card into `boot_state`, `trust` and
    /// `partitions`.
    #[serde(default)]
    pub earlier_cards: Vec<EarlierLayout>,
}

impl DeviceFile {
    /// Reads the text of `device.toml`.
    ///
    /// # Errors
    /// What is wrong and where, without the file's name.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}

/// Only the positions in raw sectors, as `inspect` reads them from an image of any age, which may lack other keys. All
/// other keys are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawSectors {
    /// The position of the boot state; empty if the image does not name it.
    #[serde(default)]
    pub boot_state: BootStateSectors,
    /// Where the floor and the keys are stored besides `data`; empty if the image does not name it.
    #[serde(default)]
    pub trust: TrustSectors,
}

impl RawSectors {
    /// Reads the text of `device.toml`.
    ///
    /// # Errors
    /// What is wrong and where, without the file's name.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }
}
