//! `keys`: make, list and rotate signing keys. Secrets are never printed.

use anyhow::Result;
use bundle::BuildKind;
use serde_json::json;

use crate::cli::{KeysCommand, OutputFormat};
use crate::keys::{KEY_SET, KeyDirectory, ListedKey, key_directory};
use crate::progress::say;
use crate::{outln, program, text};

/// `cargo xtask keys …`.
///
/// # Errors
/// When the key directory cannot be used, a key exists already (`new`), or no key exists
/// (`rotate`).
pub fn keys(verb: &KeysCommand) -> Result<()> {
    let mut keys = KeyDirectory::open(&key_directory()?)?;
    match verb {
        KeysCommand::New => {
            let key = keys.new_key(BuildKind::Release)?;
            outln!(
                "made the release key {} of epoch {} in {}",
                key.id,
                key.epoch,
                key_directory()?
            );
        }
        KeysCommand::Rotate { revoke, development } => {
            let kind = if *development { BuildKind::Development } else { BuildKind::Release };
            let key = keys.rotate(kind, *revoke)?;
            outln!("made the {kind} key {} of epoch {} in {}", key.id, key.epoch, key_directory()?);
            let is_older = |listed: &ListedKey| {
                let (older, known) = (listed.key.epoch < key.epoch, listed.key.kind == kind);
                older && known && !listed.key.revoked && listed.secret.is_some()
            };
            let signs_on = keys.list().iter().any(is_older);
            say(
                "keys",
                match (revoke, signs_on) {
                    (false, true) => {
                        "bundles are also signed by the older keys: robots learn of the new key \
                         with their next update"
                    }
                    (false, false) => {
                        "no older key can sign here (its secret part is missing): robots that know \
                         only the older key reject what is signed from now on"
                    }
                    (true, _) => {
                        "robots that know only the revoked keys take no bundle any more: carry the key set to them, signed by a key that they know (docs/reference/slotd.md, Keys)"
                    }
                },
            );
        }
        KeysCommand::Revoke { id } => {
            let key = keys.revoke(id)?;
            outln!("revoked the {} key {} in {}", key.kind, key.id, key_directory()?);
            say(
                "keys",
                "robots learn of it with their next update, or by the key set itself (docs/reference/slotd.md, Keys)",
            );
        }
        KeysCommand::List { format: OutputFormat::Json } => {
            let value = json!({ "serial": keys.set().serial, "keys": keys.list() });
            outln!("{}", text::to_json(&value)?);
        }
        KeysCommand::List { format: OutputFormat::Text } => {
            let list = keys.list();
            if list.is_empty() {
                let next = match program::is_standalone() {
                    true => format!("copy the {KEY_SET} of the team that makes the releases there"),
                    false => "the first build makes the development key".to_owned(),
                };
                outln!("no keys in {}; {next}", key_directory()?);
            } else {
                outln!("key set {}, serial {}", key_directory()?.join(KEY_SET), keys.set().serial);
            }
            for listed in list {
                let key = &listed.key;
                let kind = key.kind.to_string();
                let state = match (key.revoked, listed.secret.is_some()) {
                    (true, true) => "revoked (its secret part is here)",
                    (true, false) => "revoked",
                    (false, true) => "can sign",
                    (false, false) => "public part only",
                };
                outln!("{}  {:<11} epoch {:<3} {state}", key.id, kind, key.epoch);
            }
        }
    }
    Ok(())
}
