//! The additional apt archives of a product: all rules over several values, and their part of the
//! plan.

use serde::Serialize;

use camino::Utf8PathBuf;

use super::keyring::{KeyringError, decode_keyring};
use super::must_exist;
use crate::config::Config;
use crate::config::product::{AptSource, Engine};
use crate::config::reader::ConfigFinding;

/// An additional apt archive.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AptSourcePlan {
    /// Its name in messages and in the lock.
    pub name: String,
    /// Its address, without a slash at the end.
    pub address: String,
    /// Its suite.
    pub suite: String,
    /// Its components.
    pub components: Vec<String>,
    /// The file of its public key, relative to the workspace.
    pub key: Utf8PathBuf,
    /// Packages that may come from it.
    pub packages: Vec<String>,
}

/// The names of Debian's own archives in a lock.
const OWN: [&str; 2] = ["debian", "security"];

/// The archives, and all findings about them.
pub fn plan_sources(config: &Config) -> (Vec<AptSourcePlan>, Vec<ConfigFinding>) {
    let mut out = Vec::new();
    let rootfs = &config.product.rootfs;
    for (n, source) in rootfs.sources.iter().enumerate() {
        let (name, place) = (&source.name.value.0, &source.name.place);
        let mut find =
            |message: String, help: &str| out.push(ConfigFinding::new(place, message, help));
        if rootfs.engine.value != Engine::Debian {
            find(
                format!("the source {name} has no effect with this engine"),
                "remove it: only the engine debian uses apt archives",
            );
        }
        if OWN.contains(&name.as_str()) {
            find(
                format!("the source {name} has the name of one of Debian's own archives"),
                "choose another `name`",
            );
        }
        if rootfs.sources[..n].iter().any(|other| other.name.value == source.name.value) {
            find(
                format!("the source {name} is listed twice"),
                "use a different name for each source",
            );
        }
        if source.components.is_empty() {
            find(
                format!("the source {name} has no component"),
                "add `components = [\"main\"]`, or what the archive has",
            );
        }
        if source.packages.is_empty() {
            find(
                format!("no packages are allowed from the source {name}"),
                "list names or patterns in `packages`",
            );
        }
        check_key(config, source, &mut out);
    }
    let plain = |source: &AptSource| AptSourcePlan {
        name: source.name.value.0.clone(),
        address: source.address.value.clone(),
        suite: source.suite.value.0.clone(),
        components: source.components.iter().map(|c| c.value.0.clone()).collect(),
        key: source.key.value.clone(),
        packages: source.packages.iter().map(|p| p.value.0.clone()).collect(),
    };
    (rootfs.sources.iter().map(plain).collect(), out)
}

fn check_key(config: &Config, source: &AptSource, out: &mut Vec<ConfigFinding>) {
    let (name, key) = (&source.name.value.0, &source.key);
    let help = format!(
        "create the file with the OpenPGP public key of {}, armoured or binary, from a source that \
         you trust",
        source.address.value
    );
    must_exist(config, &key.place, &key.value, &help, out);
    let Some((_, bytes)) = config.source_keys.iter().find(|(path, _)| *path == key.value) else {
        return;
    };
    let (message, help) = match decode_keyring(bytes) {
        Ok(_) => return,
        Err(KeyringError::Secret) => (
            format!("{}, the key of the source {name}, is a secret key", key.value),
            "replace it with the public key (`gpg --export`); the secret key would allow everyone \
             with the repository to sign the archive",
        ),
        Err(KeyringError::NoKey(why)) => (
            format!("{}, the key of the source {name}, is not a public key: {why}", key.value),
            "replace it with an OpenPGP public key, armoured or binary",
        ),
    };
    out.push(ConfigFinding::new(&key.place, message, help));
}
