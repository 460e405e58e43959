//! The settings that the first boot applies (name, SSH keys, Wi-Fi): one file on the card's boot
//! partition. The image is not changed; only the card gets the file, before its partition table.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use contract::names;
use contract::seed_file::LARGEST;
pub use contract::seed_file::{FILE, SeedFile, WifiNetwork};
use fatfs::{FileSystem, FsOptions};

use super::card::{AlignedMemory, CardIo};
use super::write::ImagePiece;
use crate::disk::layout::BLOCK;
use crate::disk::read::{self, FoundPartition};
use crate::disk::seek_position;
use crate::ssh_keys;

/// The environment variable with the Wi-Fi password.
pub const PASSWORD_VARIABLE: &str = "SLIPWAY_WIFI_PASSWORD";
/// The MBR types of FAT partitions.
const FAT_TYPES: [&str; 6] = ["01", "04", "06", "0b", "0c", "0e"];
/// The role, and in a GPT the name, of the partition that updates never change.
const BOOT: &str = "boot";

/// Makes a network with a password, or an open one.
///
/// # Errors
/// When no such network can exist ([`names::is_ssid`], [`names::is_wifi_password`]), or its name has control characters.
pub fn wifi_network(ssid: &str, password: Option<String>) -> Result<WifiNetwork> {
    ensure!(
        names::is_ssid(ssid) && !ssid.chars().any(char::is_control),
        "the Wi-Fi name has {} bytes, expected 1 to 32 without control characters",
        ssid.len()
    );
    if let Some(password) = &password {
        let other = password.chars().position(|c| !names::is_passphrase_character(c));
        ensure!(
            other.is_none(),
            "character {} of the Wi-Fi password is not a printable ASCII character\n\
             help: expected 8 to 63 of them, or the 64 hexadecimal digits of wpa_passphrase; \
             is the file in UTF-8, without a byte order mark?",
            other.map_or(0, |at| at + 1)
        );
        ensure!(
            names::is_wifi_password(password),
            "the Wi-Fi password has {} characters, expected 8 to 63, or the 64 hexadecimal \
             digits of wpa_passphrase",
            password.len()
        );
    }
    Ok(WifiNetwork { ssid: ssid.to_owned(), password })
}

/// Checks a host name: RFC 1123, section 2.1, one label.
///
/// # Errors
/// When the name is invalid.
pub fn check_hostname(name: &str) -> Result<()> {
    ensure!(
        names::is_hostname(name),
        "invalid host name `{name}`\n\
         help: use 1 to 63 lower-case letters, digits and inner hyphens"
    );
    Ok(())
}

/// The public keys of a file such as `~/.ssh/id_ed25519.pub`.
///
/// # Errors
/// When the file cannot be read, contains a secret key, or contains no public key.
pub fn read_keys(path: &Utf8Path) -> Result<Vec<String>> {
    let file = std::fs::read(path).with_context(|| match path.starts_with("~") {
        true => {
            format!("reading {path}\nhelp: the shell does not replace a `~` in quotes; write $HOME")
        }
        false => format!("reading {path}"),
    })?;
    let keys = ssh_keys::parse_keys(&file).map_err(|bad| bad.into_error(path))?;
    ensure!(
        keys.iter().all(|key| !key.has_options),
        "{path}: a key has options, which the first boot does not support\n\
         help: leave the key itself, or put the line on the robot's `data` (docs/reference/robot.md)"
    );
    Ok(keys.into_iter().map(|key| key.text).collect())
}

/// The names of the seed's settings.
fn setting_names(seed: &SeedFile) -> Vec<&'static str> {
    let parts = [
        ("hostname", seed.hostname.is_some()),
        ("ssh-keys", !seed.ssh_keys.is_empty()),
        ("wifi", seed.wifi.is_some()),
    ];
    parts.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect()
}

/// Writes the file to the card's boot partition and reads it back. The partition table is still
/// in memory, in the `held` pieces. Returns the names of the settings.
///
/// # Errors
/// When the image has no boot partition with a FAT, or the card fails.
pub fn write_seed(
    seed: &SeedFile,
    card: &dyn CardIo,
    held: &[(usize, AlignedMemory)],
    pieces: &[ImagePiece],
) -> Result<Vec<&'static str>> {
    let text = seed.to_text().context("encoding the settings for the first boot")?;
    ensure!(
        text.len() <= LARGEST,
        "{FILE} would have {} bytes, the maximum is {LARGEST}",
        text.len()
    );
    let boot = boot_partition(card, held, pieces)?;
    let mut volume = Volume { card, place: boot, position: 0, blocks: BTreeMap::new() };
    let context = || format!("writing {FILE} to the boot partition");
    {
        let fat = FileSystem::new(&mut volume, FsOptions::new()).with_context(context)?;
        let mut file = fat.root_dir().create_file(FILE).with_context(context)?;
        file.truncate().with_context(context)?;
        file.write_all(text.as_bytes()).with_context(context)?;
        file.flush().with_context(context)?;
        drop(file);
        fat.unmount().with_context(context)?;
    }
    volume.store().with_context(context)?;
    Ok(setting_names(seed))
}

/// The place of the boot partition.
fn boot_partition(
    card: &dyn CardIo,
    held: &[(usize, AlignedMemory)],
    pieces: &[ImagePiece],
) -> Result<std::ops::Range<u64>> {
    let dir = tempfile::tempdir().context("creating a directory")?;
    let path = Utf8PathBuf::try_from(dir.path().join("table.img"))?;
    let file = File::create(&path).context("writing down the partition table")?;
    let size = pieces.iter().map(|piece| piece.offset + piece.size as u64).max().unwrap_or(0);
    file.set_len(size).context("writing down the partition table")?;
    for (index, buffer) in held {
        let piece = &pieces[*index];
        file.write_all_at(buffer.bytes(), piece.offset)
            .context("writing down the partition table")?;
    }
    let tables = read::read_tables(&path).context("looking for the image's boot partition")?;
    let named = tables.partitions.iter().find(|p| p.name.as_deref() == Some(BOOT));
    let fat = |p: &&FoundPartition| p.name.is_none() && FAT_TYPES.contains(&p.kind.as_str());
    let found = named.or_else(|| tables.partitions.iter().find(fat));
    let Some(found) = found else {
        bail!("the image has no boot partition for the settings of the first boot");
    };
    let end = found.offset.saturating_add(found.size);
    ensure!(
        end <= card.size()
            && found.offset.is_multiple_of(BLOCK)
            && found.size.is_multiple_of(BLOCK),
        "the boot partition is at {} to {end} of {} bytes, expected whole blocks within the card",
        found.offset,
        card.size()
    );
    Ok(found.offset..end)
}

/// A partition on the card: blocks are read when they are needed, and kept until they are stored.
struct Volume<'a> {
    card: &'a dyn CardIo,
    place: std::ops::Range<u64>,
    position: u64,
    /// By block number: the bytes, and whether they were changed.
    blocks: BTreeMap<u64, (AlignedMemory, bool)>,
}

impl Volume<'_> {
    /// The part of a block from the current position to its end.
    fn with_block<T>(&mut self, work: impl FnOnce(&mut [u8], &mut bool) -> T) -> io::Result<T> {
        let (number, inside) = (self.position / BLOCK, (self.position % BLOCK) as usize);
        let (buffer, changed) = match self.blocks.entry(number) {
            std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::btree_map::Entry::Vacant(new) => {
                let mut buffer = AlignedMemory::new(BLOCK as usize);
                let place = self.place.start + number * BLOCK;
                self.card.read_at(place, buffer.part(BLOCK as usize))?;
                new.insert((buffer, false))
            }
        };
        Ok(work(&mut buffer.part(BLOCK as usize)[inside..], changed))
    }

    fn left(&self) -> u64 {
        (self.place.end - self.place.start).saturating_sub(self.position)
    }

    /// Writes the changed blocks, flushes, and reads them back.
    fn store(mut self) -> Result<()> {
        let (card, start) = (self.card, self.place.start);
        let mut written = Vec::new();
        for (number, (buffer, _)) in self.blocks.iter_mut().filter(|(_, (_, changed))| *changed) {
            let place = start + number * BLOCK;
            card.write_at(place, buffer.part(BLOCK as usize))
                .with_context(|| format!("writing at {place}"))?;
            written.push((place, buffer));
        }
        card.flush().context("flushing the card")?;
        let mut found = AlignedMemory::new(BLOCK as usize);
        for (place, buffer) in written {
            card.read_at(place, found.part(BLOCK as usize))
                .with_context(|| format!("reading back at {place}"))?;
            ensure!(
                found.bytes() == buffer.bytes(),
                "the card does not return the data that was written at {place}\n\
                 help: use another card"
            );
        }
        Ok(())
    }
}

impl Read for Volume<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let most = out.len().min(usize::try_from(self.left()).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let count = self.with_block(|bytes, _| {
            let count = most.min(bytes.len());
            out[..count].copy_from_slice(&bytes[..count]);
            count
        })?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for Volume<'_> {
    fn write(&mut self, input: &[u8]) -> io::Result<usize> {
        let most = input.len().min(usize::try_from(self.left()).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let count = self.with_block(|bytes, changed| {
            let count = most.min(bytes.len());
            bytes[..count].copy_from_slice(&input[..count]);
            *changed = true;
            count
        })?;
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Volume<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let size = self.place.end - self.place.start;
        let position = seek_position(to, size, self.position);
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        self.position = position.filter(|at| *at <= size).ok_or_else(outside)?;
        Ok(self.position)
    }
}
