//! A board as QEMU knows it.

use serde::{Deserialize, Serialize};

/// How the boot loader is passed to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootloaderOption {
    /// As flash content (`-bios`).
    Bios,
    /// As the machine's kernel (`-kernel`).
    Kernel,
}

/// How the card is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CardDrive {
    /// The machine's own SD slot.
    Sd,
    /// A virtio block device.
    Virtio,
}

/// A board's machine in QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QemuMachine {
    /// The value of `-M`.
    pub machine: String,
    /// The first version of QEMU that supports it, such as `9.0`; `None`: all versions in use.
    pub since: Option<String>,
    /// The value of `-cpu`; without one the machine's own.
    pub cpu: Option<String>,
    /// Memory in bytes, whole MiB.
    pub memory: u64,
    /// Number of processors.
    pub cpus: u32,
    /// How the boot loader is passed.
    pub bootloader: BootloaderOption,
    /// How the card is attached.
    pub drive: CardDrive,
    /// Whether the card's size must be a power of two (QEMU's SD card rejects others).
    pub power_of_two_card: bool,
    /// Which of the machine's serial ports is the console, from 0.
    pub serial_port: u8,
    /// The network device (`-device`), if any.
    pub network: Option<String>,
    /// Further arguments, unmodified.
    pub arguments: Vec<String>,
    /// Seconds until a login on a busy host; the timeout of tests.
    pub boot_timeout: u64,
}
