//! A small card with the real boot script and two kernels that only say who they are, and the real
//! U-Boot in QEMU to start it.

use crate::common::{partition, tool};

use std::fs;
use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bootmodel::script::{BootStateCopies, StartedKernel, WriteBehavior};
use bundle::bootstate::{SECTOR, Slot};
use camino::{Utf8Path, Utf8PathBuf};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write;
use uuid::Uuid;
use xtask::build::wrap_script;
use xtask::cache::Cache;
use xtask::config::machine::QemuMachine;
use xtask::disk::{
    DiskLayout, DiskRequest, DiskSpec, FatFile, FileSource, Filesystem, PartitionContent,
    PartitionRequest, PartitionSpec, TableKind, assemble, lay_out_disk, sum_image,
};
use xtask::ext4::{self, Ext4Request};
use xtask::fetch::Downloader;
use xtask::qemu::{CardOverlay, MachineFiles, QemuSession, RestartEffect};
use xtask::render::render;
use xtask::rootfs::debian::{AptMirrors, PackagesLock, host_e2fs, unpack_locked};
use xtask::workspace::{BuildSelection, resolve_plan};

const MIB: u64 = 1 << 20;
const EPOCH: u64 = 1_700_000_000;
/// What one start needs on a busy machine; an idle one takes three seconds.
const START: Duration = Duration::from_secs(90);

/// What the script prints instead of starting a watchdog, and of stopping it.
const GUARD_ON: &str = "guard is on";
const GUARD_OFF: &str = "guard is off";

/// What is wrong with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// `/boot/vmlinuz` is missing.
    NoKernel,
    /// `/boot/initrd.img` is missing.
    NoInitrd,
    /// `/boot/vmlinuz` is not a kernel.
    NotAKernel,
    /// The block with the superblock is zero: an install began and has not ended.
    HalfInstalled,
}

impl Fault {
    const FILES: [Self; 3] = [Self::NoKernel, Self::NoInitrd, Self::NotAKernel];
}

/// What U-Boot did.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub started: Option<StartedKernel>,
    pub copies: BootStateCopies,
}

/// The card and the machine.
pub struct Rig {
    machine: QemuMachine,
    files: MachineFiles,
    layout: DiskLayout,
    faulty: Vec<(Fault, Utf8PathBuf)>,
    /// What `root=` must be for slot a and b.
    guids: [Uuid; 2],
    folder: tempfile::TempDir,
}

impl Rig {
    pub fn new() -> Result<Self> {
        let dir = Utf8Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = tempfile::Builder::new().prefix("bootscript-").tempdir_in(dir)?;
        let at = |name: &str| Utf8Path::from_path(folder.path()).expect("UTF-8").join(name);
        let target = BuildSelection { product: None, board: Some("qemu-arm64".to_owned()) };
        let (config, _, mut plan) = resolve_plan(&target)?;
        let offsets: Vec<u64> = plan.disk.states.iter().map(|s| s.offset).collect();
        plan.disk = lay_out_disk(&disk(offsets)).map_err(|f| anyhow::anyhow!(f.join("\n")))?;
        // This machine has no watchdog that U-Boot could start: the script says what it would do.
        for (key, command) in [("watchdog-start", GUARD_ON), ("watchdog-stop", GUARD_OFF)] {
            plan.board.uboot.insert(key.to_owned(), format!("echo {command}"));
        }
        let rendered = render(&config.root, &plan)?;
        let script = rendered.boot.iter().find(|((_, path), _)| path == "boot.scr");
        let (_, script) = script.context("the board has a boot script")?;
        let script = wrap_script(script, EPOCH, &at(""), &at("mkimage.log"))?;

        let cache = Cache::locate()?.root;
        let lock = PackagesLock::load(&config.root.join("configs/robot-dev.packages.lock"))?;
        let downloader = Downloader::new(&cache, false)?;
        // Files in the cache need no mirror.
        let mirrors = AptMirrors::from_host().ok();
        let unpacked = at("u-boot");
        unpack_locked(&lock, "u-boot-qemu", &downloader, mirrors.as_ref(), &unpacked)?;
        let mke2fs = host_e2fs(&lock, &downloader, mirrors.as_ref(), &cache)?;
        let slot = |name: &str, kernel: Option<Vec<u8>>, initrd: bool| -> Result<Utf8PathBuf> {
            let (tar, out) = (at(&format!("{name}.tar")), at(&format!("{name}.ext4")));
            slot_tar(&tar, kernel, initrd)?;
            let request = Ext4Request {
                tar: Some(&tar),
                size: 8 * MIB,
                label: "root",
                uuid: Uuid::from_u128(0x5107),
                hash_seed: Uuid::from_u128(0x5eed),
                epoch: EPOCH,
                journal: false,
                grows_to: None,
                size_key: "this test",
            };
            ext4::make_image(&mke2fs, &request, &out)?;
            Ok(out)
        };
        let kernels = [kernel(&at(""), "a")?, kernel(&at(""), "b")?];
        let [whole_a, whole_b] = [
            slot("a", Some(gzip(&kernels[0])?), true)?,
            slot("b", Some(gzip(&kernels[1])?), true)?,
        ];
        let mut faulty = Vec::new();
        for fault in Fault::FILES {
            let packed = gzip(&kernels[0])?;
            let kernel = match fault {
                Fault::NoKernel => None,
                Fault::NotAKernel => Some(gzip(&[0; 4096])?),
                _ => Some(packed),
            };
            let image = slot(&format!("{fault:?}"), kernel, fault != Fault::NoInitrd)?;
            faulty.push((fault, image));
        }
        let guids = [2u128, 3].map(Uuid::from_u128);
        let contents = [
            PartitionContent::Fat {
                label: "boot".to_owned(),
                volume_id: 1,
                placed: true,
                files: vec![FatFile {
                    path: "boot.scr".to_owned(),
                    source: FileSource::Bytes(script),
                }],
            },
            PartitionContent::Image(sum_image(&whole_a)?),
            PartitionContent::Image(sum_image(&whole_b)?),
            PartitionContent::Empty,
        ];
        let spec = DiskSpec {
            layout: plan.disk.clone(),
            disk_guid: Uuid::from_u128(0xd15c),
            mbr_signature: 1,
            epoch: EPOCH,
            states: Vec::new(),
            partitions: (1u128..)
                .zip(contents)
                .map(|(n, content)| PartitionSpec {
                    guid: Uuid::from_u128(n),
                    content,
                    size_key: "this test".to_owned(),
                })
                .collect(),
        };
        let image = assemble(&spec, &at("card.img"))?.path;
        let qemu = plan.board.qemu.as_ref().context("the board has a machine")?;
        let loader = plan.board.bootloader.as_ref().context("the board has a boot loader")?;
        let bootloader = unpacked.join(loader);
        ensure!(bootloader.is_file(), "{bootloader} is missing");
        let files =
            MachineFiles { image, bootloader, device_tree: None, device_tree_changes: None };
        let mut machine = qemu.machine.clone();
        // Two processors and a gigabyte only cost time here.
        (machine.cpus, machine.memory) = (1, 512 * MIB);
        Ok(Self { machine, files, layout: plan.disk, faulty, guids, folder })
    }

    fn at(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.folder.path()).expect("UTF-8").join(name)
    }

    /// A card of its own, for tests that run at once, with these copies of the boot state and faults in slot a and b.
    fn card(
        &self,
        name: &str,
        copies: &BootStateCopies,
        faults: [Fault; 2],
    ) -> Result<CardOverlay> {
        let overlay = CardOverlay::create(
            &self.machine,
            &self.files.image,
            &self.at(&format!("{}.qcow2", name.replace(' ', "-"))),
        )?;
        for (state, copy) in self.layout.states.iter().zip(copies) {
            overlay.write(state.offset, copy)?;
        }
        for (slot, fault) in [Slot::A, Slot::B].into_iter().zip(faults) {
            let role = format!("root-{slot}");
            let offset = self.layout.partition(&role).context("a slot")?.offset;
            if fault == Fault::HalfInstalled {
                overlay.write(offset, &[0; 4096])?;
            }
            if let Some((_, image)) = self.faulty.iter().find(|(known, _)| *known == fault) {
                overlay.write(offset, &fs::read(image)?)?;
            }
        }
        Ok(overlay)
    }

    /// Starts a card as often as the list of `cards` says, one after the other as a robot would, and
    /// returns what each start did.
    pub fn starts(
        &self,
        name: &str,
        copies: &BootStateCopies,
        faults: [Fault; 2],
        cards: &[WriteBehavior],
    ) -> Result<Vec<Seen>> {
        let overlay = self.card(name, copies, faults)?;
        let run = |card: &WriteBehavior| -> Result<Seen> {
            let started = self.start(name, &overlay, *card)?;
            Ok(Seen { started, copies: self.copies(&overlay)? })
        };
        cards.iter().map(run).collect()
    }

    fn start(
        &self,
        name: &str,
        overlay: &CardOverlay,
        card: WriteBehavior,
    ) -> Result<Option<StartedKernel>> {
        let log = Utf8Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bootscript/{name}.log"));
        let mut machine = self.machine.clone();
        if card == WriteBehavior::Refuses {
            // What QEMU's block layer then does to every write to the state's sectors.
            machine.arguments.extend(["-set".to_owned(), "drive.card.readonly=on".to_owned()]);
        }
        let mut session =
            QemuSession::start(&machine, &self.files, overlay, &log, RestartEffect::Exit, None)?;
        // Saves the two seconds that U-Boot waits for a person. `boot` is what it does then.
        session.expect("stop autoboot", START).context("no boot loader")?;
        session.send_line("")?;
        session.expect("=> ", START)?;
        session.send_line("boot")?;
        let (which, before) = session
            .expect_any(&["stub ", "slipway: neither slot loads"], START)
            .context("no start")?;
        if which == 1 {
            return Ok(None);
        }
        let printed = session.expect("]\n", START)?;
        let slot = match printed.as_bytes().first() {
            Some(b'a') => Slot::A,
            Some(b'b') => Slot::B,
            _ => anyhow::bail!("the kernel said `{printed}`"),
        };
        let guid = self.guids[usize::from(slot == Slot::B)];
        ensure!(printed.contains(&format!("root=PARTUUID={guid} ")), "{printed}");
        ensure!(printed.contains(&format!(" slipway.slot={slot} ")), "{printed}");
        let unloadable = printed.split("slipway.unloadable=").nth(1).map(|rest| rest.as_bytes()[0]);
        let unloadable = unloadable.map(|name| if name == b'a' { Slot::A } else { Slot::B });
        session.wait(START)?;
        let trial = printed.contains(" slipway.trial=1 ");
        // The last word before the kernel: a trial runs with the watchdog, and nothing else does.
        let guarded = before.rfind(GUARD_ON) > before.rfind(GUARD_OFF);
        ensure!(guarded == trial, "trial: {trial}, watchdog: {guarded}: {before}");
        Ok(Some(StartedKernel { slot, trial, unloadable }))
    }

    fn copies(&self, overlay: &CardOverlay) -> Result<BootStateCopies> {
        let raw = overlay.path().with_extension("raw");
        tool("qemu-img")
            .args(["convert", "-O", "raw", overlay.path().as_str(), raw.as_str()])
            .run()?;
        let bytes = fs::read(&raw)?;
        fs::remove_file(&raw)?;
        let copy = |n: usize| -> Result<[u8; SECTOR]> {
            let offset = self.layout.states[n].offset as usize;
            Ok(bytes[offset..offset + SECTOR].try_into()?)
        };
        Ok([copy(0)?, copy(1)?])
    }
}

/// The board's places for the boot state, and a first partition behind them.
fn disk(states: Vec<u64>) -> DiskRequest {
    let first_partition = states.iter().max().map_or(MIB, |last| last + 4 * MIB);
    DiskRequest {
        table: TableKind::Gpt,
        size: first_partition + 28 * MIB,
        first_partition,
        alignment: MIB,
        states,
        trust: Vec::new(),
        partitions: vec![
            PartitionRequest { in_mbr: false, ..partition("boot", 5, Filesystem::Vfat) },
            partition("root-a", 8, Filesystem::Ext4),
            partition("root-b", 8, Filesystem::Ext4),
            partition("data", 1, Filesystem::Raw),
        ],
    }
}

fn slot_tar(path: &Utf8Path, kernel: Option<Vec<u8>>, initrd: bool) -> Result<()> {
    let mut tar = tar::Builder::new(File::create(path)?);
    let mut add = |name: &str, kind, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_mtime(EPOCH);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, name, content)
    };
    add("./boot/", tar::EntryType::Directory, b"")?;
    if let Some(kernel) = kernel {
        add("./boot/vmlinuz", tar::EntryType::Regular, &kernel)?;
    }
    if initrd {
        add("./boot/initrd.img", tar::EntryType::Regular, &[7; 1000])?;
    }
    Ok(tar.finish()?)
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = GzEncoder::new(Vec::new(), Compression::default());
    out.write_all(bytes)?;
    Ok(out.finish()?)
}

/// The kernel of a slot, which is told apart only here: in a product both slots hold the same bytes.
fn kernel(dir: &Utf8Path, slot: &str) -> Result<Vec<u8>> {
    let source = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bootscript/stub.S");
    let (object, image) = (dir.join("stub.o"), dir.join("stub.bin"));
    tool("aarch64-linux-gnu-gcc")
        .arg(format!("-DSLOT=\"{slot}\""))
        .args(["-c", "-o", object.as_str(), source.as_str()])
        .run()?;
    tool("aarch64-linux-gnu-objcopy")
        .args(["-O", "binary", "-j", ".text", object.as_str(), image.as_str()])
        .run()?;
    Ok(fs::read(&image)?)
}
