//! `keys`: make, list and rotate signing keys. Secrets are never printed.

use anyhow::Result;
use bundle::Kind;

use crate::cli::{Format, Keys as Verb};
use crate::keys::{Keys, directory};
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
                let secret = if listed.secret.is_some() { "can sign" } else { "public part only" };
                let kind = key.kind.to_string();
                let state = if key.revoked { ", revoked" } else { "" };
                outln!("{}  {:<11} epoch {:<3} {secret}{state}", key.id, kind, key.epoch);
            }
        }
    }
    Ok(())
}
