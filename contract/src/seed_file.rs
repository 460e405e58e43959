//! `slipway-seed.toml`: the first-boot settings from the flasher, in the root directory of the partition `boot`. It may
//! contain a password, which neither `Debug` nor an error shows.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names;

/// The file's name.
pub const FILE: &str = "slipway-seed.toml";

/// Its maximum length in bytes: the flasher writes no more, and the robot reads no more.
pub const LARGEST: usize = 64 << 10;

/// The settings that the first boot applies. No setting is silently dropped: with an unknown key the robot refuses the
/// whole file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SeedFile {
    /// The robot's name in the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Public keys that may log in, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// The network to join.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wifi: Option<WifiNetwork>,
}

/// A Wi-Fi network.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WifiNetwork {
    /// Its name.
    pub ssid: String,
    /// Its password or derived key; `None`: an open network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

impl fmt::Debug for WifiNetwork {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wifi").field("ssid", &self.ssid).finish_non_exhaustive()
    }
}

impl SeedFile {
    /// Parses a file. Anyone with access to the card may have written it.
    ///
    /// # Errors
    /// Says what is wrong without quoting the file: the parser's own message would show the line, which may contain the
    /// password.
    pub fn parse(text: &[u8]) -> Result<Self, &'static str> {
        if text.len() > LARGEST {
            return Err("the file is larger than 64 KiB");
        }
        let seed = std::str::from_utf8(text).ok().and_then(|text| toml::from_str(text).ok());
        let seed: Self = seed.ok_or("the file is not in the format that the flasher writes")?;
        seed.check()?;
        Ok(seed)
    }

    /// Checks whether a robot applies it.
    ///
    /// # Errors
    /// Says what is wrong without quoting the file.
    pub fn check(&self) -> Result<(), &'static str> {
        if !self.hostname.as_deref().is_none_or(names::is_hostname) {
            return Err("`hostname` is not a valid host name");
        }
        if !self.ssh_keys.iter().all(|key| names::is_public_key(key)) {
            return Err("`ssh-keys` has a line that is not a public key");
        }
        let Some(wifi) = &self.wifi else { return Ok(()) };
        if !names::is_ssid(&wifi.ssid) {
            return Err("`wifi.ssid` must be 1 to 32 bytes long");
        }
        if !wifi.password.as_deref().is_none_or(names::is_wifi_password) {
            return Err(
                "`wifi.password` must have 8 to 63 printable ASCII characters or 64 hexadecimal digits",
            );
        }
        Ok(())
    }

    /// The text of the file.
    ///
    /// # Errors
    /// None is known: every value can be written as TOML.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// Whether there are no settings.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
