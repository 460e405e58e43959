//! Checks an image against its block map and tables, a bundle against its signatures.

use anyhow::{Context, Result, bail, ensure};
use bundle::keys::key_id;
use bundle::{BuildKind, BundlePolicy, KeySet, TrustedKey};
use camino::Utf8Path;
use serde_json::json;

use crate::disk::{bmap, read};
use crate::keys::{KeyDirectory, key_directory};
use crate::progress::format_bytes;
use crate::update;

/// Checks a bundle against the keys in a file, else against one's own key set: the result as JSON and as a sentence.
///
/// # Errors
/// Whatever is wrong.
pub(crate) fn verify_bundle(
    bundle: &Utf8Path,
    keys: Option<&Utf8Path>,
) -> Result<(serde_json::Value, String)> {
    // A public key file does not state the kind and the epoch of the key.
    let (keys, alone) = match keys {
        Some(path) => read_keys(path)?,
        None => (KeyDirectory::open(&key_directory()?)?.set().clone(), false),
    };
    ensure!(
        !keys.keys.is_empty(),
        "no trusted keys\nhelp: name a key set or a minisign public key with --keys"
    );
    let policy = BundlePolicy { product: None, board: None, floor: None, key_epoch: 0 };
    let verified = update::verify_bundle(bundle, &keys, &policy)?;
    let manifest = &verified.manifest;
    let named = |kind: BuildKind, id: &str| match alone {
        true => format!("the key {id}"),
        false => format!("the {kind} key {id}"),
    };
    let signers: Vec<_> = verified.signed_by.iter().map(|s| named(s.kind, &s.id)).collect();
    let text = format!(
        "good: {} {} for {}, signed by {}",
        manifest.product,
        manifest.version,
        manifest.boards.join(", "),
        signers.join(" and ")
    );
    let mut value = serde_json::to_value(&verified)?;
    let signers = value.get_mut("signed-by").and_then(serde_json::Value::as_array_mut);
    for signer in signers.into_iter().flatten().filter(|_| alone) {
        if let Some(signer) = signer.as_object_mut() {
            signer.retain(|key, _| key == "id");
        }
    }
    Ok((value, text))
}

/// A key set, or the public key file of minisign, which is treated as a release key of the highest
/// epoch, since naming it on the command line means to trust it. Also returns whether it is the
/// latter.
fn read_keys(path: &Utf8Path) -> Result<(KeySet, bool)> {
    let text = std::fs::read(path).with_context(|| format!("reading {path}"))?;
    if text.first() == Some(&b'{') {
        let set = KeySet::parse(&text).with_context(|| {
            format!(
                "reading the key set {path}\n\
                 help: the file was truncated or changed: copy it again from its origin, or name a public key (.pub) with --keys"
            )
        })?;
        return Ok((set, false));
    }
    let text = String::from_utf8(text).with_context(|| format!("{path} is not a public key"))?;
    ensure!(
        !text.lines().next().is_some_and(|comment| comment.contains("secret key")),
        "{path} is a secret key, which must not be shared\n\
         help: name the public part, which ends in .pub"
    );
    let public = text.lines().find(|l| !l.starts_with("untrusted comment:") && !l.is_empty());
    let public = public.with_context(|| format!("{path} contains no public key"))?;
    let id = key_id(public.trim()).with_context(|| format!("reading {path}"))?;
    let public = public.trim().to_owned();
    let key = TrustedKey { id, epoch: u32::MAX, kind: BuildKind::Release, public, revoked: false };
    Ok((KeySet { keys: vec![key], ..KeySet::default() }, true))
}

/// Checks an image against its tables and the block map beside it: the result as JSON and as a sentence.
///
/// # Errors
/// Whatever is wrong.
pub(crate) fn verify_image(image: &Utf8Path) -> Result<(serde_json::Value, String)> {
    let map_path = bmap::path_for(image);
    ensure!(
        map_path.is_file(),
        "the block map {map_path} does not exist\nhelp: keep the block map beside the image"
    );
    let tables = read::read_tables(image)?;
    if !tables.findings.is_empty() {
        bail!("the partition table of {image} is damaged:\n  - {}", tables.findings.join("\n  - "));
    }
    let map = bmap::check_image(image, &map_path)?;
    let mapped = map.mapped_blocks() * map.block_size;
    let text = format!(
        "good: {} in {} ranges match the block map, {} partitions (block maps are not signed)",
        format_bytes(mapped),
        map.ranges.len(),
        tables.partitions.len()
    );
    let value = json!({
        "image": image, "good": true, "mapped-bytes": mapped, "ranges": map.ranges.len(),
        "partitions": tables.partitions.len(),
    });
    Ok((value, text))
}
