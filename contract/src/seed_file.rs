//! `slipway-seed.toml`: what the flasher leaves for the first boot, in the root directory of the partition `boot`. It may
//! hold a password, so that neither `Debug` nor an error shows it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names;

/// The file's name.
pub const FILE: &str = "slipway-seed.toml";

/// The most bytes that it may have: the flasher writes no more, and the robot reads no more.
pub const LARGEST: usize = 64 << 10;

/// What the first boot takes over. Strict, so that nothing that was asked for is dropped in silence: an unknown key
/// makes the robot refuse the whole file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Seed {
    /// The robot's name in the network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Public keys that may log in, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// The network to join.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wifi: Option<Wifi>,
}

/// A Wi-Fi network.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wifi {
    /// Its name.
    pub ssid: String,
    /// Its password, or the key that was made of one; `None`: an open network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

impl fmt::Debug for Wifi {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wifi").field("ssid", &self.ssid).finish_non_exhaustive()
    }
}

impl Seed {
    /// Reads a file, which whoever has the card may have written.
    ///
    /// # Errors
    /// What is wrong, without quoting it: the parser's own message would show the line, and with it perhaps the
    /// password.
    pub fn parse(text: &[u8]) -> Result<Self, &'static str> {
        if text.len() > LARGEST {
            return Err("it is larger than 64 KiB");
        }
        let seed = std::str::from_utf8(text).ok().and_then(|text| toml::from_str(text).ok());
        let seed: Self = seed.ok_or("it is not in the form that the flasher writes")?;
        seed.check()?;
        Ok(seed)
    }

    /// Whether a robot takes it over.
    ///
    /// # Errors
    /// What is wrong, without quoting it.
    pub fn check(&self) -> Result<(), &'static str> {
        if !self.hostname.as_deref().is_none_or(names::is_hostname) {
            return Err("`hostname` is no host name");
        }
        if !self.ssh_keys.iter().all(|key| names::is_public_key(key)) {
            return Err("`ssh-keys` has a line that is no public key");
        }
        let Some(wifi) = &self.wifi else { return Ok(()) };
        if !names::is_ssid(&wifi.ssid) {
            return Err("`wifi.ssid` has not 1 to 32 bytes");
        }
        if !wifi.password.as_deref().is_none_or(names::is_wifi_password) {
            return Err(
                "`wifi.password` has not 8 to 63 printable ASCII characters or 64 hexadecimal digits",
            );
        }
        Ok(())
    }

    /// The text of the file.
    ///
    /// # Errors
    /// None that is known: every value has a form in TOML.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// Whether there is nothing to take over.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
