//! `board/<board>/board.toml`: what the hardware is. Only its form is checked here; what follows
//! from several files together is checked when the plan is resolved.

use std::collections::BTreeMap;

use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};

use super::machine::{BootloaderOption, CardDrive, QemuMachine};
use super::product::Engine;
use super::reader::{ConfigPlace, ConfigSource, FromToml, Located, TableFields, WholeNumber};
use super::units::{BinarySize, CalendarDay, SafeName};
use crate::disk::layout::{Filesystem, TableKind};
use toml::de::DeValue;

/// How the slot that boots is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootFlowKind {
    /// U-Boot reads the boot state from reserved sectors and loads the slot's kernel.
    Uboot,
    /// The Raspberry Pi firmware's one-shot flag and `autoboot.txt`.
    Tryboot,
}

macro_rules! words {
    ($type:ty, $expected:literal, $($word:literal => $value:expr),+) => {
        impl FromToml for $type {
            const EXPECTED: &'static str = $expected;
            fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
                match value.as_str() {
                    $(Some($word) => Ok($value),)+
                    _ => Err(String::new()),
                }
            }
        }
    };
}

words!(BootFlowKind, "\"uboot\" or \"tryboot\"", "uboot" => Self::Uboot, "tryboot" => Self::Tryboot);
words!(TableKind, "\"mbr\", \"gpt\" or \"hybrid\"",
    "mbr" => Self::Mbr, "gpt" => Self::Gpt, "hybrid" => Self::Hybrid);
words!(Filesystem, "\"vfat\" or \"ext4\"", "vfat" => Self::Vfat, "ext4" => Self::Ext4);

/// The bus of a board's disk; the initrd's script uses the same words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// A slot for SD cards, or a soldered eMMC.
    Mmc,
    /// The bus of a virtual machine.
    Virtio,
}

impl DiskBus {
    /// The word that `board.toml` uses.
    pub fn word(self) -> &'static str {
        match self {
            Self::Mmc => "mmc",
            Self::Virtio => "virtio",
        }
    }
}

words!(DiskBus, "\"mmc\" or \"virtio\"", "mmc" => Self::Mmc, "virtio" => Self::Virtio);

/// A board, as written.
#[derive(Debug)]
pub struct BoardConfig {
    /// The file it was read from.
    pub place: ConfigPlace,
    /// The files that it includes: what it shares with other boards, relative to the workspace.
    pub include: Vec<Located<Utf8PathBuf>>,
    /// Its name; equals the directory's name.
    pub name: Located<SafeName>,
    /// Human-readable name: "Raspberry Pi 3".
    pub title: String,
    /// Debian's name for the architecture.
    pub arch: Located<String>,
    /// How the slot that boots is selected.
    pub boot_flow: Located<BootFlowKind>,
    /// Device-tree `compatible` strings of the models that this board covers.
    pub compatible: Vec<String>,
    /// The oldest release of the firmware in the board's EEPROM that can try a slot.
    pub eeprom_since: Option<Located<CalendarDay>>,
    /// Revisions of the board that are known not to boot; they are excluded on purpose.
    pub left_out_revisions: Vec<String>,
    /// The serial console.
    pub console: ConsoleConfig,
    /// The memory of the smallest machine that it covers, for boards with a boot script.
    pub memory: Option<MemoryConfig>,
    /// The bus of the disk. The initrd ignores disks on other buses.
    pub disk_bus: Located<DiskBus>,
    /// The disk.
    pub disk: DiskConfig,
    /// The disks of cards that were flashed with earlier images of this board.
    pub earlier: Vec<EarlierDiskConfig>,
    /// Its partitions, in order.
    pub partitions: Vec<PartitionConfig>,
    /// Kernel, command line, device trees, modules.
    pub kernel: KernelConfig,
    /// What the engine `debian` uses for this board.
    pub debian: Option<BoardDebianConfig>,
    /// Variables for the boot script's template.
    pub uboot: BTreeMap<String, String>,
    /// What the engine `buildroot` uses for this board.
    pub buildroot: Option<BoardBuildrootConfig>,
    /// Files for the boot partitions.
    pub boot_files: Vec<BootFileConfig>,
    /// How to run it in QEMU, as data for `run`.
    pub qemu: Option<QemuConfig>,
}

/// The serial console.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConsoleConfig {
    /// Linux's name, such as `ttyS1`.
    pub device: String,
    /// Bits per second.
    pub baud: u32,
}

/// The memory of the smallest machine that a board covers.
#[derive(Debug)]
pub struct MemoryConfig {
    /// Address of the first byte.
    pub start: Located<MemoryAddress>,
    /// How much the smallest machine has.
    pub smallest: Located<BinarySize>,
    /// How much of its end the firmware and U-Boot use themselves.
    pub reserved: Located<BinarySize>,
}

/// An address in memory, written in hexadecimal: `"0x0c000000"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryAddress(pub u64);

impl FromToml for MemoryAddress {
    const EXPECTED: &'static str = "an address such as \"0x0c000000\", of 16 digits at most";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let digits = value.as_str().and_then(|text| text.strip_prefix("0x"));
        let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number.map(Self).ok_or_else(String::new)
    }
}

/// The layout of cards that were flashed with earlier images. Updates do not change the layout of a
/// card.
#[derive(Debug)]
pub struct EarlierDiskConfig {
    /// The last date of images with this layout, for the reader.
    pub until: String,
    /// The disk.
    pub disk: DiskConfig,
    /// Its partitions, in order.
    pub partitions: Vec<PartitionConfig>,
    /// Where the table is in the file.
    pub place: ConfigPlace,
}

/// The disk.
#[derive(Debug)]
pub struct DiskConfig {
    /// Kind of partition table.
    pub table: Located<TableKind>,
    /// Size of the image.
    pub size: Located<BinarySize>,
    /// Where the first partition starts.
    pub first_partition: Located<BinarySize>,
    /// Byte offsets of the two raw boot-state sectors (flow `uboot`).
    pub boot_state: Vec<Located<BinarySize>>,
    /// Byte offsets of the two copies of what a robot trusts, 64 KiB each.
    pub trust: Vec<Located<BinarySize>>,
}

/// A partition.
#[derive(Debug)]
pub struct PartitionConfig {
    /// `boot`, `root-a`, `root-b`, `data`, and for tryboot `boot-a`, `boot-b`.
    pub role: Located<SafeName>,
    /// What it holds.
    pub filesystem: Located<Filesystem>,
    /// Its size.
    pub size: Located<BinarySize>,
    /// Where it starts; directly after the previous one when absent.
    pub start: Option<Located<BinarySize>>,
    /// Carries the MBR's boot flag.
    pub bootable: bool,
    /// Shown in the hybrid MBR as well.
    pub hybrid_mbr: bool,
}

/// Kernel, command line, device trees, modules.
#[derive(Debug)]
pub struct KernelConfig {
    /// Command line, one argument an element, without the serial console.
    pub cmdline: Vec<Located<String>>,
    /// Globs of the device trees that the slot carries.
    pub device_trees: Vec<Located<String>>,
    /// Modules in the initrd, without their dependencies.
    pub initrd_modules: Vec<Located<String>>,
    /// Globs of the modules that stay in the root filesystem.
    pub modules_keep: Vec<Located<String>>,
}

/// What the engine `debian` uses for this board from packages that are unpacked, not installed.
#[derive(Debug)]
pub struct BoardDebianConfig {
    /// The packages.
    pub packages: Vec<Located<String>>,
    /// Firmware files for the boot partition: globs of paths inside the packages.
    pub firmware: Vec<Located<String>>,
    /// The U-Boot binary inside the packages.
    pub bootloader: Option<Located<String>>,
    /// The kernel packages that support this board, where not all do: a product must list one of
    /// them.
    pub kernels: Vec<Located<String>>,
    /// The machines that these packages can boot.
    pub machines: EngineMachines,
}

/// What the engine `buildroot` uses for this board.
#[derive(Debug)]
pub struct BoardBuildrootConfig {
    /// Fragments of the defconfig, relative to the workspace.
    pub fragments: Vec<Located<Utf8PathBuf>>,
    /// Firmware files for the boot partition: globs below Buildroot's `images`.
    pub firmware: Vec<Located<String>>,
    /// The U-Boot binary below Buildroot's `images`.
    pub bootloader: Option<Located<String>>,
    /// The machines that its kernel and firmware can boot.
    pub machines: EngineMachines,
}

/// The machines that an engine's kernel and firmware can boot, where these differ from the board's.
#[derive(Debug)]
pub struct EngineMachines {
    /// Replaces the board's own list; empty: use the board's list.
    pub compatible: Vec<String>,
    /// Adds to the board's own list.
    pub left_out_revisions: Vec<String>,
}

/// How to run the board's image in QEMU.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct QemuConfig {
    /// The machine.
    pub machine: QemuMachine,
    /// Device tree that QEMU passes to U-Boot instead of the firmware, by its path in the base
    /// system.
    pub device_tree: Option<String>,
    /// Changes to it for the machine: a device-tree source file in the workspace.
    pub device_tree_changes: Option<Utf8PathBuf>,
}

words!(BootloaderOption, "\"bios\" or \"kernel\"", "bios" => Self::Bios, "kernel" => Self::Kernel);
words!(CardDrive, "\"sd\" or \"virtio\"", "sd" => Self::Sd, "virtio" => Self::Virtio);

/// What Linux can set a serial line to: B50 to B4000000 (termios(3)).
const BAUD: WholeNumber = WholeNumber { of: "bits per second", from: 50, to: 4_000_000 };
/// The most that a machine of QEMU has, `virt` (`-machine virt -cpu help`, `MachineClass::max_cpus`).
const CPUS: WholeNumber = WholeNumber { of: "processors", from: 1, to: 512 };
/// Each port below it is one more argument for QEMU; the machines that start here have seven at most.
const SERIAL_PORT: WholeNumber = WholeNumber { of: "", from: 0, to: 7 };
/// A day; a machine that needs longer hangs.
const BOOT_TIMEOUT: WholeNumber = WholeNumber { of: "seconds", from: 1, to: 86_400 };

fn read_qemu(f: &mut TableFields<'_>) -> Option<QemuConfig> {
    let machine = f.required("machine");
    let cpu = f.optional("cpu");
    let memory = f.required::<BinarySize>("memory");
    let cpus = f.number("cpus", CPUS);
    let bootloader = f.required("bootloader");
    let since = f.optional("since");
    let device_tree = f.optional("device-tree");
    let device_tree_changes = f.optional("device-tree-changes");
    let drive = f.required("drive");
    let power_of_two_card = f.or("power-of-two-card", false);
    let serial_port = f.number_or("serial-port", SERIAL_PORT, 0);
    let network = f.optional("network");
    let arguments = f.list("arguments");
    let boot_timeout = f.number_or("boot-timeout", BOOT_TIMEOUT, 300);
    Some(QemuConfig {
        machine: QemuMachine {
            machine: machine?.value,
            since: since?.map(|l| l.value),
            cpu: cpu?.map(|l| l.value),
            memory: memory?.value.0,
            cpus: cpus?.value,
            bootloader: bootloader?.value,
            drive: drive?.value,
            power_of_two_card: power_of_two_card?,
            serial_port: u8::try_from(serial_port?).ok()?,
            network: network?.map(|l| l.value),
            arguments: into_values(arguments?),
            boot_timeout: u64::from(boot_timeout?),
        },
        device_tree: device_tree?.map(|l| l.value),
        device_tree_changes: device_tree_changes?.map(|l| l.value),
    })
}

/// One entry of a boot partition: a rendered template, or files of the base system.
#[derive(Debug)]
pub struct BootFileConfig {
    /// Where the content comes from.
    pub source: BootSourceConfig,
    /// Its name in the partition; `.` keeps the names of several files.
    pub path: String,
    /// The partition's role; `boot-slot` stands for `boot-a` and `boot-b` alike.
    pub partition: Located<SafeName>,
    /// The only engine whose images need it.
    pub engine: Option<Engine>,
    /// Aliases to add to a device tree, `name=/path`.
    pub aliases: Vec<String>,
}

/// How a rendered template is processed.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum BootFileFormat {
    /// Wrapped as a U-Boot script.
    BootScript,
    /// Lines `name=value` become U-Boot's environment in a file.
    UbootEnvironment,
}

words!(BootFileFormat, "\"boot-script\" or \"u-boot-environment\"",
    "boot-script" => Self::BootScript, "u-boot-environment" => Self::UbootEnvironment);

/// Where a boot file comes from; `T` names a template.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootSource<T> {
    /// A rendered template.
    Template {
        /// The template.
        source: T,
        /// How it is processed; `None`: a plain text file.
        compile: Option<BootFileFormat>,
    },
    /// The firmware files of the base system.
    Firmware,
    /// The device trees of the base system, without their directory.
    DeviceTrees,
    /// One of them, by its path in the base system, under another name.
    DeviceTree(String),
    /// The boot loader of the base system.
    Bootloader,
    /// The kernel of the base system.
    Kernel,
    /// The initrd.
    Initrd,
}

/// The name of a template's file is looked up in the board's directory, then in `board/common`.
pub type BootSourceConfig = BootSource<Located<Utf8PathBuf>>;

impl<T> BootSource<T> {
    /// The same source, with another name of the template.
    pub fn map_template<U>(&self, map: impl FnOnce(&T) -> U) -> BootSource<U> {
        match self {
            Self::Template { source, compile } => {
                BootSource::Template { source: map(source), compile: *compile }
            }
            Self::Firmware => BootSource::Firmware,
            Self::DeviceTrees => BootSource::DeviceTrees,
            Self::DeviceTree(path) => BootSource::DeviceTree(path.clone()),
            Self::Bootloader => BootSource::Bootloader,
            Self::Kernel => BootSource::Kernel,
            Self::Initrd => BootSource::Initrd,
        }
    }
}

impl FromToml for BootSourceConfig {
    const EXPECTED: &'static str =
        "\"firmware\", \"device-trees\", \"bootloader\", \"kernel\" or \"initrd\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("firmware") => Ok(Self::Firmware),
            Some("device-trees") => Ok(Self::DeviceTrees),
            Some("bootloader") => Ok(Self::Bootloader),
            Some("kernel") => Ok(Self::Kernel),
            Some("initrd") => Ok(Self::Initrd),
            _ => Err(String::new()),
        }
    }
}

fn into_values<T>(list: Vec<Located<T>>) -> Vec<T> {
    list.into_iter().map(|l| l.value).collect()
}

/// The board of `board/<name>/board.toml`; `read` reads that file and those that it includes.
///
/// # Errors
/// All findings of the file at once.
pub fn parse_board(
    name: &str,
    read: &dyn Fn(&Utf8Path) -> anyhow::Result<ConfigSource>,
) -> anyhow::Result<BoardConfig> {
    let shown = Utf8Path::new("board").join(name).join("board.toml");
    let own = read(&shown)?;
    let shared = own.paths("include");
    let is_board = |path: &&Utf8PathBuf| path.file_name() == Some("board.toml") && **path != shown;
    if let Some(path) = shared.iter().find(is_board) {
        anyhow::bail!(
            "{shown}: `include` names {path}, which is another board\n\
             help: a board includes files of board/common only; move what both share into one, or copy the board"
        );
    }
    let included = shared
        .into_iter()
        .map(|path| read(&path).with_context(|| format!("{shown} includes {path}")));
    let included = included.collect::<anyhow::Result<Vec<_>>>()?;
    own.parse_over(included, |fields| {
        let board = read_board(fields)?;
        if let Some(nested) = board.include.iter().find(|path| path.place.file != shown) {
            let message = format!(
                "`include`: {} includes other files, which an included file may not do",
                nested.place.file
            );
            fields.reject(&nested.place, message, format!("write this line into {shown}"));
            return None;
        }
        // Its lists would be joined twice.
        let again = board.include.iter().enumerate().find(|(at, path)| {
            let before = board.include.iter().take(*at);
            path.value == shown || before.map(|before| &before.value).any(|b| *b == path.value)
        });
        if let Some((_, again)) = again {
            let message = format!("`include`: {} is included twice", again.value);
            fields.reject(
                &again.place,
                message,
                "list each file once, and do not list this file itself",
            );
            return None;
        }
        if board.name.value.0 != name {
            let message = format!(
                "`name`: expected \"{name}\" as the directory, found \"{}\"",
                board.name.value.0
            );
            fields.reject(
                &board.name.place,
                message,
                "use the same name for the directory and the board",
            );
            return None;
        }
        Some(board)
    })
}

fn read_machines(f: &mut TableFields<'_>) -> Option<EngineMachines> {
    let (compatible, left_out) = (f.list("compatible"), f.list("left-out-revisions"));
    Some(EngineMachines {
        compatible: into_values(compatible?),
        left_out_revisions: into_values(left_out?),
    })
}

fn read_board(f: &mut TableFields<'_>) -> Option<BoardConfig> {
    let include = f.list("include");
    let name = f.required("name");
    let title = f.required::<String>("title");
    let arch = f.required::<String>("arch");
    let boot_flow = f.required("boot-flow");
    let compatible = f.list("compatible");
    let eeprom_since = f.optional("eeprom-since");
    let left_out_revisions = f.list("left-out-revisions");
    let console = f.table("console", |f| {
        let device = f.required("device");
        let baud = f.number_or("baud", BAUD, 115_200);
        Some(ConsoleConfig { device: device?.value, baud: baud? })
    });
    let memory = f.optional_table("memory", |f| {
        let (start, smallest, reserved) =
            (f.required("start"), f.required("smallest"), f.required("reserved"));
        Some(MemoryConfig { start: start?, smallest: smallest?, reserved: reserved? })
    });
    let disk = f.table("disk", |f| {
        let bus = f.required("bus");
        let disk = disk_of(f);
        Some((bus?, disk?))
    });
    let earlier = f.tables("earlier-cards", |f| {
        let until = f.required::<String>("until");
        let disk = f.table("disk", disk_of);
        let partitions = f.tables("partitions", read_partition);
        let place = f.place();
        Some(EarlierDiskConfig { until: until?.value, disk: disk?, partitions: partitions?, place })
    });
    let partitions = f.tables("partitions", read_partition);
    let kernel = f.table("kernel", |f| {
        let cmdline = f.list("cmdline");
        let device_trees = f.list("device-trees");
        let initrd_modules = f.list("initrd-modules");
        let modules_keep = f.list("modules-keep");
        Some(KernelConfig {
            cmdline: cmdline?,
            device_trees: device_trees?,
            initrd_modules: initrd_modules?,
            modules_keep: modules_keep?,
        })
    });
    let debian = f.optional_table("debian", |f| {
        let packages = f.list("packages");
        let firmware = f.list("firmware");
        let bootloader = f.optional("bootloader");
        let kernels = f.list("kernels");
        let machines = read_machines(f);
        Some(BoardDebianConfig {
            packages: packages?,
            firmware: firmware?,
            bootloader: bootloader?,
            kernels: kernels?,
            machines: machines?,
        })
    });
    let uboot = f.optional_table("u-boot", |f| Some(f.strings()));
    let buildroot = f.optional_table("buildroot", |f| {
        let fragments = f.list("fragments");
        let firmware = f.list("firmware");
        let bootloader = f.optional("bootloader");
        let machines = read_machines(f);
        Some(BoardBuildrootConfig {
            fragments: fragments?,
            firmware: firmware?,
            bootloader: bootloader?,
            machines: machines?,
        })
    });
    let boot_files = f.tables("boot-files", boot_file);
    let qemu = f.optional_table("qemu", read_qemu);
    let place = f.place();
    let (disk_bus, disk) = disk?;
    Some(BoardConfig {
        place,
        include: include?,
        name: name?,
        title: title?.value,
        arch: arch?,
        boot_flow: boot_flow?,
        compatible: into_values(compatible?),
        eeprom_since: eeprom_since?,
        left_out_revisions: into_values(left_out_revisions?),
        console: console?,
        memory: memory?,
        disk_bus,
        disk,
        earlier: earlier?,
        partitions: partitions?,
        kernel: kernel?,
        debian: debian?,
        uboot: uboot?.unwrap_or_default(),
        buildroot: buildroot?,
        boot_files: boot_files?,
        qemu: qemu?,
    })
}

fn boot_file(f: &mut TableFields<'_>) -> Option<BootFileConfig> {
    let template = f.optional::<Utf8PathBuf>("template");
    let source = f.optional::<BootSourceConfig>("source");
    let device_tree = f.optional::<String>("device-tree");
    let aliases = f.list::<String>("aliases");
    let path = f.required::<String>("path");
    let partition = f.optional("partition");
    let compile = f.optional::<BootFileFormat>("compile");
    let engine = f.optional::<Engine>("engine");
    let place = f.place();
    let partition = partition?.unwrap_or(Located { value: SafeName("boot".to_owned()), place });
    let compile = compile?.map(|located| located.value);
    let source = match (template?, source?, device_tree?) {
        (Some(name), None, None) => BootSourceConfig::Template { source: name, compile },
        (None, Some(source), None) => source.value,
        (None, None, Some(path)) => BootSourceConfig::DeviceTree(path.value),
        _ => {
            let message = "a boot file has one of `template`, `source` and `device-tree`";
            f.reject(&f.place(), message, "write one of the three");
            return None;
        }
    };
    let engine = engine?.map(|located| located.value);
    let aliases = into_values(aliases?);
    Some(BootFileConfig { source, path: path?.value, partition, engine, aliases })
}

fn disk_of(f: &mut TableFields<'_>) -> Option<DiskConfig> {
    let table = f.required("table");
    let size = f.required("size");
    let first_partition = f.required("first-partition");
    let boot_state = f.optional_table("boot-state", |f| f.list("offsets"));
    let trust = f.optional_table("trust", |f| f.list("offsets"));
    Some(DiskConfig {
        table: table?,
        size: size?,
        first_partition: first_partition?,
        boot_state: boot_state?.unwrap_or_default(),
        trust: trust?.unwrap_or_default(),
    })
}

fn read_partition(f: &mut TableFields<'_>) -> Option<PartitionConfig> {
    let role = f.required("role");
    let filesystem = f.required("filesystem");
    let size = f.required("size");
    let start = f.optional("start");
    let bootable = f.or("bootable", false);
    let hybrid_mbr = f.or("hybrid-mbr", false);
    Some(PartitionConfig {
        role: role?,
        filesystem: filesystem?,
        size: size?,
        start: start?,
        bootable: bootable?,
        hybrid_mbr: hybrid_mbr?,
    })
}
