//! `keys`: make, list and rotate signing keys. Secrets are never printed.

use anyhow::Result;
use bundle::Kind;
use serde_json::json;

use crate::cli::{Format, Keys as Verb};
use crate::keys::{KEY_SET, Keys, Listed, directory};
use crate::progress::say;
use crate::{outln, program, text};

/// `cargo xtask keys …`.
///
/// # Errors
/// When the key directory cannot be used, a key exists already (`new`), or no key exists
/// (`rotate`).
pub fn keys(verb: &Verb) -> Result<()> {
    let mut keys = Keys::open(&directory()?)?;
    match verb {
        Verb::New => {
            let key = keys.new_key(Kind::Release)?;
            outln!("made the release key {} of epoch {} in {}", key.id, key.epoch, directory()?);
        }
        Verb::Rotate { revoke, development } => {
            let kind = if *development { Kind::Development } else { Kind::Release };
            let key = keys.rotate(kind, *revoke)?;
            outln!("made the {kind} key {} of epoch {} in {}", key.id, key.epoch, directory()?);
            let is_older = |listed: &Listed| {
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
        Verb::Revoke { id } => {
            let key = keys.revoke(id)?;
            outln!("revoked the {} key {} in {}", key.kind, key.id, directory()?);
            say(
                "keys",
                "robots learn of it with their next update, or by the key set itself (docs/reference/slotd.md, Keys)",
            );
        }
        Verb::List { format: Format::Json } => {
            let value = json!({ "serial": keys.set().serial, "keys": keys.list() });
            outln!("{}", text::json(&value)?);
        }
        Verb::List { format: Format::Text } => {
            let list = keys.list();
            if list.is_empty() {
                let next = match program::is_standalone() {
                    true => format!("copy the {KEY_SET} of the team that makes the releases there"),
                    false => "the first build makes the development key".to_owned(),
                };
                outln!("no keys in {}; {next}", directory()?);
            } else {
                outln!("key set {}, serial {}", directory()?.join(KEY_SET), keys.set().serial);
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
