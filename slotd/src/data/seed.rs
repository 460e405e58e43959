//! The first-boot settings from the flasher: a file on the boot partition with the robot's name, SSH keys
//! and Wi-Fi. They are copied to `data`, and the file is overwritten because it may contain a password.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use contract::names;
pub use contract::seed_file::{FILE, SeedFile};
use contract::seed_file::{LARGEST, WifiNetwork};
use fatfs::{FileSystem, FsOptions};
use serde::Serialize;
use serde_json::json;

use crate::condition::{DataCondition, DataState};
use crate::device::RobotDevice;
use crate::durable;
use crate::events::EventLog;
use crate::files::{DirectFileChanges, FileChanges};
use crate::policy;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// Bytes of a sector, which a card writes atomically.
const SECTOR: usize = 512;

/// The wireless device of a board. A board has only one, so the name is fixed.
const WIRELESS: &str = "wlan0";

/// The names of the settings that were applied; empty if there was no file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AppliedSettings {
    /// `hostname`, `ssh-keys`, `wifi`.
    pub taken: Vec<&'static str>,
}

/// Applies the file. After a power cut at any moment, the next start resumes.
///
/// # Errors
/// `bad-seed`: the file is malformed; the file stays. `no-data`: data is in memory; the file stays.
/// `bad-device`, `wrong-layout`, `io`.
pub fn apply_seed(root: &RootDir) -> Result<AppliedSettings> {
    let path = RobotDevice::read(root)?.partition_path("boot")?;
    let open = OpenOptions::new().read(true).write(true).open(&path);
    let volume = open.map_err(|error| Refusal::io(describe_reading(&path), &error))?;
    seed_with(root, &DirectFileChanges, &path, volume, &|| File::open(&path)?.sync_all())
}

fn describe_reading(path: &Path) -> String {
    format!("reading {FILE} on {}", path.display())
}

/// [`apply_seed`] with every change of `data` made through `files`, and of the boot partition through `volume`, whose
/// name is `path`; `flush` returns when what was written to it would survive a power cut.
///
/// # Errors
/// As [`apply_seed`].
pub fn seed_with<V: Read + Write + Seek>(
    root: &RootDir,
    files: &dyn FileChanges,
    path: &Path,
    volume: V,
    flush: &dyn Fn() -> io::Result<()>,
) -> Result<AppliedSettings> {
    let failed = |error: io::Error| Refusal::io(describe_reading(path), &error);
    let fat = FileSystem::new(volume, FsOptions::new()).map_err(failed)?;
    let text = match fat.root_dir().open_file(FILE) {
        Ok(file) => {
            let mut bytes = Vec::new();
            file.take(LARGEST as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
            bytes
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(AppliedSettings::default()),
        Err(error) => return Err(failed(error)),
    };
    let mut taken = AppliedSettings::default();
    if !is_half_wiped(&text) {
        let bad = |why: &str| {
            let help = "flash the card again, or correct the file on another computer";
            Refusal::new("bad-seed", format!("{}: {why}", describe_reading(path)), help)
        };
        let seed = SeedFile::parse(&text).map_err(bad)?;
        if DataState::read(root)?.condition == DataCondition::Memory {
            return Err(Refusal::new(
                "no-data",
                format!(
                    "{}: data is in memory, and the settings would be lost",
                    describe_reading(path)
                ),
                "repair or replace the card; the file stays for the next start",
            ));
        }
        taken = apply_settings(root, files, &seed)
            .map_err(|error| Refusal::io("writing to data", &error))?;
        EventLog::new(root).add("seeded", json!({ "taken": taken.taken }));
    }
    let wiped = || -> io::Result<()> {
        let folder = fat.root_dir();
        let mut file = folder.open_file(FILE)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&vec![0; text.len()])?;
        file.flush()?;
        drop(file);
        // Flushed before the directory entry is removed: otherwise the bytes would stay on the card.
        flush()?;
        folder.remove(FILE)
    };
    let wiped = wiped().and_then(|()| fat.unmount()).and_then(|()| flush());
    wiped.map_err(|error| Refusal::io(format!("removing {FILE}"), &error))?;
    Ok(taken)
}

/// Whether the file was already applied and the power failed while it was overwritten: some of its sectors are zero.
/// No text in any encoding has 512 zeros in a row.
fn is_half_wiped(text: &[u8]) -> bool {
    text.chunks(SECTOR).any(|sector| sector.iter().all(|byte| *byte == 0))
}

fn apply_settings(
    root: &RootDir,
    files: &dyn FileChanges,
    seed: &SeedFile,
) -> io::Result<AppliedSettings> {
    let mut taken = Vec::new();
    if let Some(name) = &seed.hostname {
        let path = root.path("data/identity/hostname");
        durable::write_with(files, &path, format!("{name}\n").as_bytes())?;
        // In this start the host name is already set.
        fs::write(root.path("proc/sys/kernel/hostname"), name)?;
        taken.push("hostname");
    }
    if !seed.ssh_keys.is_empty() {
        // The owner's keys: for root if the product lets root log in, and for the update user if the product has one.
        for user in ["root", policy::USER].into_iter().filter(|user| has_account(root, user)) {
            let path = root.path(format!("data/identity/ssh/authorized_keys.d/{user}"));
            add_keys(files, &path, seed)?;
        }
        taken.push("ssh-keys");
    }
    if let Some(configuration) = wifi_configuration(seed) {
        let path = root.path(format!("data/network/wpa_supplicant-{WIRELESS}.conf"));
        durable::write_secret_with(files, &path, configuration.as_bytes())?;
        taken.push("wifi");
    }
    Ok(AppliedSettings { taken })
}

/// Whether the system has this account; root always exists.
fn has_account(root: &RootDir, user: &str) -> bool {
    let accounts = fs::read_to_string(root.path("etc/passwd")).unwrap_or_default();
    user == "root" || accounts.lines().any(|line| line.split(':').next() == Some(user))
}

/// Adds the seed's keys to the existing authorised keys.
fn add_keys(files: &dyn FileChanges, path: &Path, seed: &SeedFile) -> io::Result<()> {
    let before = String::from_utf8(durable::read(path)?.unwrap_or_default());
    let mut keys = before.map_err(|_| io::Error::other("the SSH keys on data are not UTF-8"))?;
    for key in &seed.ssh_keys {
        if !keys.lines().any(|line| line == key) {
            if !keys.is_empty() && !keys.ends_with('\n') {
                keys.push('\n');
            }
            keys.push_str(key);
            keys.push('\n');
        }
    }
    durable::write_with(files, path, keys.as_bytes())
}

/// The configuration of the wireless device, as in wpa_supplicant.conf(5); `None`: the seed has no network.
pub fn wifi_configuration(seed: &SeedFile) -> Option<String> {
    seed.wifi.as_ref().map(format_network)
}

/// The network name is written in hexadecimal, because it may contain any byte.
fn format_network(wifi: &WifiNetwork) -> String {
    let ssid: String = wifi.ssid.bytes().map(|byte| format!("{byte:02x}")).collect();
    let key = match &wifi.password {
        // A key in hexadecimal is written without quotes (wpa_supplicant.conf(5)).
        Some(key) if names::is_wifi_key(key) => format!("psk={key}"),
        // A quoted password ends at the line's last quote.
        Some(password) => format!("psk=\"{password}\""),
        None => "key_mgmt=NONE".to_owned(),
    };
    format!("network={{\n\tssid={ssid}\n\tscan_ssid=1\n\t{key}\n}}\n")
}
