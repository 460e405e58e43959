//! The first-boot settings from the flasher: a file on the boot partition with the robot's name, SSH keys
//! and Wi-Fi. They are copied to `data`, and the file is overwritten because it may contain a password.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use fatfs::{FileSystem, FsOptions};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::condition::{Condition, State};
use crate::device::Device;
use crate::door;
use crate::durable;
use crate::events::Events;
use crate::files::{Disk, Files};
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// The file, in the root directory of the partition `boot`.
pub const FILE: &str = "slipway-seed.toml";

/// Maximum length in bytes; the flasher writes no more.
const LARGEST: u64 = 64 << 10;

/// Bytes of a sector, which a card writes atomically.
const SECTOR: usize = 512;

/// The wireless device of a board. A board has only one, so the name is fixed.
const WIRELESS: &str = "wlan0";

/// Types of SSH keys that OpenSSH writes.
const KEY_TYPES: [&str; 3] = ["ssh-", "ecdsa-", "sk-"];

/// The file's content, as the flasher writes it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Seed {
    hostname: Option<String>,
    #[serde(default)]
    ssh_keys: Vec<String>,
    wifi: Option<Wifi>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wifi {
    ssid: String,
    password: Option<String>,
}

impl Seed {
    /// Parses a file of at most 64 KiB.
    ///
    /// # Errors
    /// Says what is wrong without quoting the file: the parser's own message would show the line, which may
    /// contain the password.
    pub fn parse(text: &[u8]) -> std::result::Result<Self, &'static str> {
        if text.len() as u64 > LARGEST {
            return Err("the file is larger than 64 KiB");
        }
        let seed = std::str::from_utf8(text).ok().and_then(|text| toml::from_str(text).ok());
        let seed = seed.ok_or("the file is not in the format that the flasher writes")?;
        check(&seed)?;
        Ok(seed)
    }

    /// The configuration of the wireless device, as in wpa_supplicant.conf(5).
    pub fn wireless(&self) -> Option<String> {
        self.wifi.as_ref().map(supplicant)
    }
}

/// The names of the settings that were applied; empty if there was no file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Seeded {
    /// `hostname`, `ssh-keys`, `wifi`.
    pub taken: Vec<&'static str>,
}

/// Applies the file. After a power cut at any moment, the next start resumes.
///
/// # Errors
/// `bad-seed`: the file is malformed; the file stays. `no-data`: data is in memory; the file stays.
/// `bad-device`, `wrong-layout`, `io`.
pub fn seed(root: &Root) -> Result<Seeded> {
    let path = Device::read(root)?.partition_path("boot")?;
    let open = OpenOptions::new().read(true).write(true).open(&path);
    let volume = open.map_err(|error| Refusal::io(reading(&path), &error))?;
    seed_with(root, &Disk, &path, volume, &|| File::open(&path)?.sync_all())
}

fn reading(path: &Path) -> String {
    format!("reading {FILE} on {}", path.display())
}

/// [`seed`] with every change of `data` made through `files`, and of the boot partition through `volume`, whose name
/// is `path`; `flush` returns when what was written to it would survive a power cut.
///
/// # Errors
/// As [`seed`].
pub fn seed_with<V: Read + Write + Seek>(
    root: &Root,
    files: &dyn Files,
    path: &Path,
    volume: V,
    flush: &dyn Fn() -> io::Result<()>,
) -> Result<Seeded> {
    let failed = |error: io::Error| Refusal::io(reading(path), &error);
    let fat = FileSystem::new(volume, FsOptions::new()).map_err(failed)?;
    let text = match fat.root_dir().open_file(FILE) {
        Ok(file) => {
            let mut bytes = Vec::new();
            file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
            bytes
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Seeded::default()),
        Err(error) => return Err(failed(error)),
    };
    let mut taken = Seeded::default();
    if !is_half_wiped(&text) {
        let bad = |why: &str| {
            let help = "flash the card again, or correct the file on another computer";
            Refusal::new("bad-seed", format!("{}: {why}", reading(path)), help)
        };
        let seed = Seed::parse(&text).map_err(bad)?;
        if State::read(root)?.condition == Condition::Memory {
            return Err(Refusal::new(
                "no-data",
                format!("{}: data is in memory, and the settings would be lost", reading(path)),
                "repair or replace the card; the file stays for the next start",
            ));
        }
        taken = take(root, files, &seed).map_err(|error| Refusal::io("writing to data", &error))?;
        Events::new(root).add("seeded", json!({ "taken": taken.taken }));
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

/// RFC 1123 (one label), OpenSSH's public keys, IEEE 802.11: as the flasher checks them. Anyone with
/// access to the card may have written the file.
fn check(seed: &Seed) -> std::result::Result<(), &'static str> {
    let hostname = |name: &str| {
        let inner = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        (1..=63).contains(&name.len()) && inner && !name.starts_with('-') && !name.ends_with('-')
    };
    let key = |key: &String| {
        KEY_TYPES.iter().any(|kind| key.starts_with(kind)) && !key.chars().any(char::is_control)
    };
    if !seed.hostname.as_deref().is_none_or(hostname) {
        return Err("`hostname` is not a valid host name");
    }
    if !seed.ssh_keys.iter().all(key) {
        return Err("`ssh-keys` has a line that is not a public key");
    }
    let Some(wifi) = &seed.wifi else { return Ok(()) };
    if !(1..=32).contains(&wifi.ssid.len()) {
        return Err("`wifi.ssid` must be 1 to 32 bytes long");
    }
    let printable = |p: &String| p.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    let fits = |p: &String| is_key(p) || ((8..=63).contains(&p.len()) && printable(p));
    if !wifi.password.as_ref().is_none_or(fits) {
        return Err(
            "`wifi.password` must have 8 to 63 printable ASCII characters or 64 hexadecimal digits",
        );
    }
    Ok(())
}

fn take(root: &Root, files: &dyn Files, seed: &Seed) -> io::Result<Seeded> {
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
        for user in ["root", door::USER].into_iter().filter(|user| has_account(root, user)) {
            let path = root.path(format!("data/identity/ssh/authorized_keys.d/{user}"));
            add_keys(files, &path, seed)?;
        }
        taken.push("ssh-keys");
    }
    if let Some(configuration) = seed.wireless() {
        let path = root.path(format!("data/network/wpa_supplicant-{WIRELESS}.conf"));
        durable::write_secret_with(files, &path, configuration.as_bytes())?;
        taken.push("wifi");
    }
    Ok(Seeded { taken })
}

/// Whether the system has this account; root always exists.
fn has_account(root: &Root, user: &str) -> bool {
    let accounts = fs::read_to_string(root.path("etc/passwd")).unwrap_or_default();
    user == "root" || accounts.lines().any(|line| line.split(':').next() == Some(user))
}

/// Adds the seed's keys to the existing authorised keys.
fn add_keys(files: &dyn Files, path: &Path, seed: &Seed) -> io::Result<()> {
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

/// Whether a password is a derived key, as `wpa_passphrase` prints it: 256 bits in hexadecimal.
fn is_key(password: &str) -> bool {
    password.len() == 64 && password.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The network name is written in hexadecimal, because it may contain any byte.
fn supplicant(wifi: &Wifi) -> String {
    let ssid: String = wifi.ssid.bytes().map(|byte| format!("{byte:02x}")).collect();
    let key = match &wifi.password {
        // A key in hexadecimal is written without quotes (wpa_supplicant.conf(5)).
        Some(key) if is_key(key) => format!("psk={key}"),
        // A quoted password ends at the line's last quote.
        Some(password) => format!("psk=\"{password}\""),
        None => "key_mgmt=NONE".to_owned(),
    };
    format!("network={{\n\tssid={ssid}\n\tscan_ssid=1\n\t{key}\n}}\n")
}
