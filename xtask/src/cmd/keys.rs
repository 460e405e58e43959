//! `keys`: make, list and rotate signing keys. Secrets are never printed.

use anyhow::Result;
use bundle::Kind;

use crate::cli::{Format, Keys as Verb};
use crate::keys::{Keys, directory};
use crate::progress::say;
use crate::{outln, text};

/// `cargo xtask keys …`.
///
/// # Errors
/// When the key directory cannot be used, or there is a key already (`new`) or none (`rotate`).
pub fn keys(verb: &Verb) -> Result<()> {
    let mut keys = Keys::open(&directory()?)?;
    match verb {
        Verb::New => {
            let key = keys.new_key(Kind::Release)?;
            outln!("made the release key {} of epoch {} in {}", key.id, key.epoch, directory()?);
        }
        Verb::Rotate { revoke } => {
            let key = keys.rotate(Kind::Release, *revoke)?;
            outln!("made the release key {} of epoch {} in {}", key.id, key.epoch, directory()?);
            say(
                "keys",
                match revoke {
                    false => {
                        "bundles are signed by the older keys as well: robots learn of the new one with their next update"
                    }
                    true => {
                        "robots that know only the revoked keys take no bundle any more: carry the key set to them, signed by a key that they know (docs/slotd.md, Keys)"
                    }
                },
            );
        }
        Verb::Revoke { id } => {
            let key = keys.revoke(id)?;
            outln!("revoked the {} key {} in {}", key.kind, key.id, directory()?);
            say(
                "keys",
                "robots learn of it with their next update, or by the key set itself (docs/slotd.md, Keys)",
            );
        }
        Verb::List { format: Format::Json } => {
            outln!("{}", text::json(&keys.list())?);
        }
        Verb::List { format: Format::Text } => {
            let list = keys.list();
            if list.is_empty() {
                outln!("no keys in {}; the first build makes the development key", directory()?);
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
