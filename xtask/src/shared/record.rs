//! A shared cache's record of a stage: which files its inputs gave. Signed by the builder; reading
//! checks every rule. This module does not access a store.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use bundle::keys::SignaturePurpose;
use bundle::{KeySet, SignedBy};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::keys::SigningKey;
use crate::store::format::{check_hash, to_pretty_json};

/// The version of the records. It is raised when an old reader would misread a new one.
pub const FORMAT: u32 = 1;
/// The maximum number of files of a stage; a base has dozens.
const MOST_FILES: usize = 4096;
/// The maximum total size of a stage's files: 16 GiB, ten times Buildroot's largest.
const MOST_BYTES: u64 = 16 << 30;
/// The longest path of a file in a stage, in bytes.
const LONGEST_PATH: usize = 512;

/// A record and its signature in one file, so that one step writes both.
#[derive(Serialize, Deserialize)]
struct Envelope {
    /// The exact text of the record that is signed.
    record: String,
    /// Its minisign signature file.
    signature: String,
}

/// A stage's result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StageRecord {
    /// [`FORMAT`].
    pub format: u32,
    /// The stage.
    pub stage: String,
    /// The key of its inputs.
    pub key: String,
    /// The stage's value, with paths relative to its directory.
    pub value: Value,
    /// The places of these paths in `value`: JSON pointers (RFC 6901).
    pub paths: Vec<String>,
    /// The files.
    pub files: Vec<StageFile>,
}

/// A file of a stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StageFile {
    /// Relative to the stage's directory.
    pub path: Utf8PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of its content.
    pub sha256: String,
    /// Whether it is executable.
    pub executable: bool,
    /// The stored object.
    pub object: PackedObject,
}

/// An object of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PackedObject {
    /// SHA-256 of the stored bytes; the object's name.
    pub sha256: String,
    /// Its stored size in bytes.
    pub size: u64,
    /// How it was packed.
    pub compression: ObjectCompression,
}

/// How an object was packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectCompression {
    /// Not packed.
    None,
    /// One zstd frame.
    Zstd,
}

/// The path of a stage's record. Each signing key has a separate file: a record never replaces that
/// of another key.
pub fn record_path(key: &str, signer: &str) -> String {
    format!("stages/{}/{key}-{signer}.json", key.get(..2).unwrap_or_default())
}

/// A stage's value, independent of the directory in which it was created.
#[derive(Debug, PartialEq, Eq)]
pub struct PortableValue {
    /// The value.
    pub value: Value,
    /// Like [`StageRecord::paths`].
    pub paths: Vec<String>,
    /// The files that it names.
    pub files: BTreeSet<Utf8PathBuf>,
}

impl PortableValue {
    /// Makes the paths in `value` relative to `dir`. `cache` is the directory that no other path
    /// may be in.
    ///
    /// # Errors
    /// When it contains a path of this machine outside of `dir`.
    pub fn from_value(mut value: Value, dir: &Utf8Path, cache: &Utf8Path) -> Result<Self> {
        let (mut paths, mut files) = (Vec::new(), BTreeSet::new());
        map_strings(&mut value, &mut String::new(), &mut |pointer, text| {
            let path = Utf8Path::new(&*text);
            match path.strip_prefix(dir) {
                Ok(inside) => {
                    check_path(inside)?;
                    files.insert(inside.to_owned());
                    paths.push(pointer.to_owned());
                    *text = inside.to_string();
                }
                Err(_) => ensure!(
                    !path.starts_with(cache),
                    "the result of the stage names {path}, which is not in its own directory"
                ),
            }
            Ok(())
        })?;
        Ok(Self { value, paths, files })
    }
}

/// Calls `on` with each string in a value and its JSON pointer.
fn map_strings(
    value: &mut Value,
    pointer: &mut String,
    on: &mut dyn FnMut(&str, &mut String) -> Result<()>,
) -> Result<()> {
    let length = pointer.len();
    match value {
        Value::String(text) => on(pointer, text)?,
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                pointer.push_str(&format!("/{index}"));
                map_strings(item, pointer, on)?;
                pointer.truncate(length);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                pointer.push_str(&format!("/{}", name.replace('~', "~0").replace('/', "~1")));
                map_strings(field, pointer, on)?;
                pointer.truncate(length);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}

impl StageRecord {
    /// The signed file.
    ///
    /// # Errors
    /// When it has no JSON form.
    pub fn sign(&self, signer: &SigningKey) -> Result<Vec<u8>> {
        let record = to_pretty_json(self)?;
        let comment = format!("slipway stage {} {}", self.stage, self.key);
        let signature = signer.sign(record.as_bytes(), &comment).text;
        Ok(to_pretty_json(&Envelope { record, signature })?.into_bytes())
    }

    /// Opens a record of a stage: verifies the signature first, then checks every rule.
    ///
    /// # Errors
    /// When it is not signed by a trusted key, belongs to another stage, or contains an unsafe name
    /// or size.
    pub fn open(file: &[u8], keys: &KeySet, stage: &str, key: &str) -> Result<(Self, SignedBy)> {
        let envelope: Envelope = serde_json::from_slice(file).context("not a record")?;
        let text = envelope.record.as_bytes();
        let signer = keys.verify(
            SignaturePurpose::Stage,
            "reading its signature",
            envelope.signature.as_bytes(),
            text,
        )?;
        let record: Self = serde_json::from_slice(text).context("not a record")?;
        record.check(stage, key)?;
        Ok((record, signer))
    }

    fn check(&self, stage: &str, key: &str) -> Result<()> {
        ensure!(self.format == FORMAT, "expected format {FORMAT}, found {}", self.format);
        ensure!(
            self.stage == stage && self.key == key,
            "the record belongs to the stage {} with the key {}",
            self.stage.escape_debug(),
            self.key.escape_debug()
        );
        let count = self.files.len();
        ensure!(count <= MOST_FILES, "the record has {count} files, the maximum is {MOST_FILES}");
        let (mut total, mut names) = (0_u64, BTreeSet::new());
        for file in &self.files {
            check_path(&file.path)?;
            check_hash(&file.sha256)?;
            check_hash(&file.object.sha256)?;
            ensure!(names.insert(&file.path), "the record lists {} twice", file.path);
            // A packed file is only stored if it is smaller.
            let fits = match file.object.compression {
                ObjectCompression::None => {
                    file.object.size == file.size && file.object.sha256 == file.sha256
                }
                ObjectCompression::Zstd => file.object.size < file.size,
            };
            ensure!(fits, "{}: {} bytes are stored as {}", file.path, file.size, file.object.size);
            total = total.saturating_add(file.size);
        }
        ensure!(total <= MOST_BYTES, "the files have {total} bytes, the maximum is {MOST_BYTES}");
        Ok(())
    }

    /// The value with its paths in `dir`.
    ///
    /// # Errors
    /// When a pointer does not refer to a file of the record.
    pub fn value_in(&self, dir: &Utf8Path) -> Result<Value> {
        let names: BTreeSet<&str> = self.files.iter().map(|file| file.path.as_str()).collect();
        let mut value = self.value.clone();
        for pointer in &self.paths {
            let Some(Value::String(text)) = value.pointer_mut(pointer) else {
                bail!("the pointer `{}` does not refer to a path", pointer.escape_debug())
            };
            // After the replacement it is not a name of the record any more, so each pointer is
            // used once.
            ensure!(
                names.contains(text.as_str()),
                "`{}` is not a file of the record",
                text.escape_debug()
            );
            *text = dir.join(&*text).into_string();
        }
        Ok(value)
    }
}

/// A relative path within the directory that is not used by the cache itself.
fn check_path(path: &Utf8Path) -> Result<()> {
    let text = path.as_str();
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.len() <= 255
            && !part.chars().any(|c| c.is_control() || c == '\\')
    };
    let good = text.len() <= LONGEST_PATH && text.split('/').all(plain);
    let own = text == crate::cache::STAMP || text.ends_with(".partial") || text.starts_with('.');
    ensure!(good && !own, "unsafe path `{}`", text.escape_debug());
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(path: &str, size: u64) -> StageRecord {
        let sha256 = "0".repeat(64);
        let object =
            PackedObject { sha256: sha256.clone(), size, compression: ObjectCompression::None };
        StageRecord {
            format: FORMAT,
            stage: "base".to_owned(),
            key: "k".to_owned(),
            value: json!({ "file": path, "text": path }),
            paths: vec!["/file".to_owned()],
            files: vec![StageFile { path: path.into(), size, sha256, executable: false, object }],
        }
    }

    #[test]
    fn a_value_moves_from_folder_to_folder_and_only_its_paths_change() {
        let value = json!({
            "a/b~c": ["/cache/stages/base/1/x.tar", "x.tar"],
            "size": 7,
            "scripts": "/usr/bin",
        });
        let cache = Utf8Path::new("/cache");
        let portable =
            PortableValue::from_value(value, Utf8Path::new("/cache/stages/base/1"), cache).unwrap();
        assert_eq!(portable.paths, ["/a~1b~0c/0"]);
        assert_eq!(portable.files, BTreeSet::from(["x.tar".into()]));
        let mut record = record("x.tar", 1);
        (record.value, record.paths) = (portable.value, portable.paths);
        let moved = record.value_in(Utf8Path::new("/elsewhere")).unwrap();
        let expected = json!({
            "a/b~c": ["/elsewhere/x.tar", "x.tar"],
            "size": 7,
            "scripts": "/usr/bin",
        });
        assert_eq!(moved, expected);
        let outside = json!(["/cache/tools/mke2fs"]);
        let error =
            PortableValue::from_value(outside, Utf8Path::new("/cache/stages/base/1"), cache);
        assert!(error.unwrap_err().to_string().contains("/cache/tools/mke2fs"));
    }

    #[test]
    fn names_and_sizes_that_nobody_should_trust_are_refused() {
        record("dtbs/broadcom/one.dtb", 1).check("base", "k").unwrap();
        let long = "x/".repeat(300);
        let bad = [
            "../x",
            "/etc/passwd",
            "a/../../x",
            "a//b",
            "",
            ".",
            "a/",
            "stage.json",
            "a.partial",
            "a\nb",
            "a\\b",
            ".hidden",
            &long,
        ];
        for path in bad {
            let error = record(path, 1).check("base", "k").unwrap_err().to_string();
            assert!(error.contains("unsafe path"), "{path}: {error}");
        }
        let error = |record: &StageRecord| record.check("base", "k").unwrap_err().to_string();
        assert!(error(&record("a", MOST_BYTES + 1)).contains("bytes, the maximum is"));
        let mut one = record("a", 1);
        one.files[0].object.compression = ObjectCompression::Zstd;
        assert!(error(&one).contains("1 bytes are stored as 1"));
        one = record("a", 1);
        one.files[0].object.sha256 = "../".to_owned();
        assert!(error(&one).contains("not a SHA-256"));
        one = record("a", 1);
        one.files.push(one.files[0].clone());
        assert!(error(&one).contains("twice"));
        one = record("a", 1);
        one.files = vec![one.files[0].clone(); MOST_FILES + 1];
        assert!(error(&one).contains("files, the maximum is"));
        assert!(error(&StageRecord { format: 2, ..record("a", 1) }).contains("expected format 1"));
        assert!(record("a", 1).check("api", "k").is_err());
        assert!(record("a", 1).check("base", "l").is_err());
    }

    #[test]
    fn a_pointer_leads_to_a_file_of_the_record_once() {
        let dir = Utf8Path::new("/dir");
        let with = |paths: &[&str]| {
            let paths = paths.iter().map(|p| (*p).to_owned()).collect();
            StageRecord { paths, ..record("a", 1) }.value_in(dir)
        };
        assert_eq!(with(&["/file"]).unwrap()["file"], "/dir/a");
        for bad in [&["/nothing"][..], &[""], &["/file", "/file"]] {
            assert!(with(bad).is_err(), "{bad:?}");
        }
        let mut other = record("a", 1);
        other.value = json!({ "file": "b" });
        assert!(other.value_in(dir).is_err());
    }
}
