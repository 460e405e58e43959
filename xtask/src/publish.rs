//! Stores of releases, and bringing releases into them. Objects come first, then manifests, and the
//! channel's index last, by compare-and-swap: a reader never meets an index whose objects are not all
//! there, and of two publishers neither loses the other's release.

pub mod client;
pub mod directory;
pub mod http;
pub mod memory;
pub mod s3;
pub mod ssh;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bundle::{KeySet, Kind};
use camino::{Utf8Path, Utf8PathBuf};

use self::memory::{Memory, Seen};
use crate::artifact::hash_bytes;
use crate::config::workspace_root;
use crate::keys::{self, Keys, Signer};
use crate::progress::{Step, Unit, bytes};
use crate::release::format::{Channel, Entry, File, Index, Manifest, Retired};
use crate::release::index::Retention;
use crate::release::pins::Pins;

/// How often a channel is changed anew when somebody else was quicker. Each time one publisher gets on,
/// so this bounds how many may publish at once.
const ATTEMPTS: u32 = 50;
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What a channel's file was when it was read; [`Store::swap`] replaces no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// There was none.
    Absent,
    /// The store's own word for the version that was read.
    Version(String),
}

/// What is wrong with an object, in a store that works.
#[derive(Debug)]
pub enum BadObject {
    /// It is not there.
    Missing(String),
    /// It is not what its name says.
    Damaged(String),
}

impl std::fmt::Display for BadObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Missing(what) | Self::Damaged(what)) = self;
        f.write_str(what)
    }
}

impl std::error::Error for BadObject {}

/// A place for files, each written once and never changed; it has its name only when it is complete.
pub trait Files {
    /// The place for people.
    fn name(&self) -> String;

    /// A small file; `None` when there is none.
    ///
    /// # Errors
    /// When the place cannot be asked, or the file is larger than 16 MiB.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;

    /// Which of these objects (SHA-256 and size) lie there complete.
    ///
    /// # Errors
    /// When the place cannot be asked.
    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>>;

    /// Stores an object, and checks what has arrived.
    ///
    /// # Errors
    /// When it cannot be stored, or something else arrived.
    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()>;

    /// Fetches an object of at most `limit` bytes into a local file, and checks it. `received` is told
    /// how many bytes more have come.
    ///
    /// # Errors
    /// [`BadObject`] when it is not there or is another one; others when it cannot be had.
    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()>;

    /// Writes a small file.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write(&self, path: &str, content: &[u8]) -> Result<()>;
}

/// A place for releases. Paths are those of `docs/reference/release-store.md`. Only a channel's file ever changes.
pub trait Store: Files {
    /// The store's address in its one spelling: what it is remembered by.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn identity(&self) -> Result<String> {
        Ok(self.name())
    }

    /// Whether there is a place at all. A folder that is not there is a store that begins.
    fn exists(&self) -> bool {
        true
    }

    /// The channel's newest file, and the token to replace it with.
    ///
    /// # Errors
    /// When the store cannot be asked.
    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, Token)>;

    /// Replaces the channel's file if it still is what the token stands for. `false`: somebody else was
    /// quicker, and nothing has changed.
    ///
    /// # Errors
    /// When it cannot be written.
    fn swap(&self, channel: Channel, token: &Token, serial: u64, content: &[u8]) -> Result<bool>;

    /// Makes readers see the newest file, should an interrupted publisher not have got to it.
    ///
    /// # Errors
    /// When it cannot be written.
    fn settle(&self, channel: Channel) -> Result<()>;
}

/// Options of a store's address.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The S3 service, such as `https://s3.example.org`.
    pub endpoint: Option<String>,
    /// The S3 region.
    pub region: Option<String>,
    /// Options of ssh_config(5), `KEY=VALUE`.
    pub ssh: Vec<String>,
    /// How long a server is waited for.
    pub patience: client::Patience,
    /// The value of the header `Authorization`, for servers that are neither.
    pub authorization: Option<Secret>,
}

/// A text that is never printed.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Takes the text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the request that needs it.
    fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Opens a place for files that several machines use at once, by its address: a folder, `http[s]://…` or
/// `s3://…`. Nothing is written yet.
///
/// # Errors
/// When the address is none.
pub fn open_files(address: &str, options: &Options) -> Result<Box<dyn Files + Send + Sync>> {
    if let Some(rest) = address.strip_prefix("s3://") {
        return Ok(Box::new(s3::Bucket::new(rest, options)?));
    }
    if address.starts_with("https://") || address.starts_with("http://") {
        return Ok(Box::new(http::Server::new(address, options)?));
    }
    ensure!(
        Utf8Path::new(address).is_absolute(),
        "`{address}` is no address of a shared cache\n\
         help: https://HOST[/PATH], s3://BUCKET[/PREFIX], or the full path of a folder"
    );
    Ok(Box::new(directory::Directory::new(Utf8Path::new(address))))
}

/// Opens a store by its address: a folder, `ssh://…` or `s3://…`. Nothing is written yet.
///
/// # Errors
/// When the address is none.
pub fn open(address: &str, options: &Options) -> Result<Box<dyn Store>> {
    if let Some(rest) = address.strip_prefix("s3://") {
        return Ok(Box::new(s3::Bucket::new(rest, options)?));
    }
    if let Some(rest) = address.strip_prefix("ssh://") {
        return Ok(Box::new(ssh::Host::new(rest, &options.ssh)?));
    }
    ensure!(
        !address.contains("://"),
        "`{address}` is no address of a store\n\
         help: a folder, ssh://[USER@]HOST[:PORT]/PATH, or s3://BUCKET[/PREFIX]"
    );
    // As scp spells it: a folder of that name would be made here, and nobody would look for it.
    if let Some((host, path)) = address.split_once(':').filter(|(host, _)| !host.contains('/')) {
        bail!(
            "`{address}` is no folder\nhelp: ssh://{host}/{}, or ./{address} for a folder of that name",
            path.trim_start_matches('/')
        );
    }
    Ok(Box::new(directory::Directory::new(Utf8Path::new(address))))
}

/// Whom we trust, with what, and who signs for us: the key directory, with each key opened once; the pinned
/// kinds; and what was seen before. Nothing of it comes from a store.
pub struct Authority {
    dir: Utf8PathBuf,
    set: KeySet,
    signers: BTreeMap<&'static str, Signer>,
    pins: Pins,
    memory: Memory,
}

impl Authority {
    /// Reads the key set, and the pins of the workspace that this is called in, if any. `restored`: what
    /// stores have now counts, whatever was seen before.
    ///
    /// # Errors
    /// When the key directory or the workspace's files cannot be used.
    pub fn open(restored: bool) -> Result<Self> {
        let root = workspace_root().ok();
        let pins = Pins::read(root.as_deref())?;
        Self::at(&keys::directory()?, pins, Memory::locate(restored)?)
    }

    /// Reads the key set of this key directory.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn at(dir: &Utf8Path, pins: Pins, memory: Memory) -> Result<Self> {
        let set = Keys::open(dir)?.set().clone();
        Ok(Self { dir: dir.to_owned(), set, signers: BTreeMap::new(), pins, memory })
    }

    /// The pinned kinds.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// What was seen before.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// To be called before anything is written to a store. One that is not there begins anew: what was
    /// remembered of an earlier one in its place is forgotten.
    ///
    /// # Errors
    /// When the memory cannot be written.
    pub fn begin(&self, store: &dyn Store) -> Result<()> {
        if store.exists() { Ok(()) } else { self.memory.forget(store) }
    }

    /// The keys that count.
    pub fn keys(&self) -> &KeySet {
        &self.set
    }

    /// The key that signs for products of this kind.
    ///
    /// # Errors
    /// When there is none, or its password is wrong.
    pub fn signer(&mut self, kind: Kind) -> Result<&Signer> {
        let name = match kind {
            Kind::Development => "development",
            Kind::Release => "release",
        };
        if !self.signers.contains_key(name) {
            let mut keys = Keys::open(&self.dir)?;
            let signer = keys.signer(kind)?;
            // The first development key is made on first use.
            self.set = keys.set().clone();
            self.signers.insert(name, signer);
        }
        self.signers.get(name).context("the key was just opened")
    }
}

/// Seconds since 1970, for what has no commit's time.
///
/// # Errors
/// When the clock stands before 1970.
pub fn now() -> Result<u64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(since.context("this machine's clock stands before 1970")?.as_secs())
}

/// A channel as the store has it: verified, of the pinned kind, and not older than what was seen before.
///
/// # Errors
/// When it cannot be read, no trusted key has signed it, or it is older.
pub fn load(store: &dyn Store, channel: Channel, authority: &Authority) -> Result<(Index, Token)> {
    // Before the store is asked: of two processes here, the quicker one must not make the other's index old.
    let seen = authority.memory.of(store, channel)?;
    let there = store.exists();
    let (file, token) = store.index(channel)?;
    let index = match &file {
        Some(file) => Index::open(channel, file, &authority.set, &authority.pins)
            .with_context(|| format!("trusting {}", store.name()))?,
        None => Index::empty(channel),
    };
    if there {
        let sha256 = hash_bytes(file.as_deref().unwrap_or_default());
        let now = Seen { serial: index.serial, sha256 };
        authority.memory.judge(store, channel, seen.as_ref(), &now)?;
    }
    Ok((index, token))
}

/// A release's manifest, verified.
///
/// # Errors
/// When it is missing, is another one, is of another kind than its channel says, or no trusted key has
/// signed it.
pub fn manifest(store: &dyn Store, entry: &Entry, keys: &KeySet) -> Result<Manifest> {
    let [text, signature] = manifest_files(store, &entry.manifest)?;
    let manifest = Manifest::open(&entry.manifest, &text, &signature, keys)?;
    let found = (&manifest.product, &manifest.version, manifest.kind);
    ensure!(
        found == (&entry.product, &entry.version, entry.kind),
        "{}: it is {} {} ({}), and the channel lists it as {} {} ({})",
        entry.manifest.path,
        manifest.product,
        manifest.version,
        manifest.kind,
        entry.product,
        entry.version,
        entry.kind
    );
    Ok(manifest)
}

/// A manifest and its signature, as they are.
fn manifest_files(store: &dyn Store, file: &File) -> Result<[Vec<u8>; 2]> {
    let read = |path: &str| {
        let found = store.read(path)?;
        found.with_context(|| format!("{} lacks {path}", store.name()))
    };
    Ok([read(&file.path)?, read(&file.signature())?])
}

/// Changes a channel: `change` makes the new index of the present one (`None`: nothing to do), `prepare`
/// brings in all that the new one refers to. Both run again when somebody else was quicker.
/// Returns whether anything changed.
///
/// # Errors
/// Whatever they return; a store that cannot be written.
pub fn change(
    store: &dyn Store,
    channel: Channel,
    authority: &mut Authority,
    mut change: impl FnMut(&Index, &mut Authority) -> Result<Option<Index>>,
    mut prepare: impl FnMut(&Index, &Index) -> Result<()>,
) -> Result<bool> {
    let mut pause = Duration::from_millis(50);
    authority.begin(store)?;
    for _ in 0..ATTEMPTS {
        let (current, token) = load(store, channel, authority)?;
        let Some(mut next) = change(&current, authority)? else {
            store.settle(channel)?;
            return Ok(false);
        };
        authority.pins.check(&next)?;
        prepare(&current, &next)?;
        next.serial = current.serial.checked_add(1).context("the serial is at its end")?;
        let kind = authority.pins.channel(channel);
        let content = next.sign(authority.signer(kind)?)?;
        if store.swap(channel, &token, next.serial, &content)? {
            let now = Seen { serial: next.serial, sha256: hash_bytes(&content) };
            authority.memory.wrote(store, channel, &now)?;
            store.settle(channel)?;
            return Ok(true);
        }
        // Different processes wait differently long, so that one of them gets through.
        let jitter = Duration::from_millis(u64::from(std::process::id()) % 50);
        std::thread::sleep(pause + jitter);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    bail!(
        "changing the channel {channel} of {}: others were quicker {ATTEMPTS} times\n\
         help: try again when fewer publish at once",
        store.name()
    )
}

/// What a publish did to one channel.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Published {
    /// The channel.
    pub channel: Channel,
    /// Whether its index changed.
    pub changed: bool,
    /// Releases that the target did not have: product and version.
    pub releases: Vec<String>,
    /// Objects that were sent.
    pub sent: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that the target had already.
    pub kept: usize,
}

/// Brings everything of a channel from one store on this machine into another.
///
/// # Errors
/// When the two contradict each other, an object of ours is damaged, or the target cannot be written.
pub fn publish(
    from: &directory::Directory,
    to: &dyn Store,
    channel: Channel,
    authority: &mut Authority,
    retention: Retention,
) -> Result<Published> {
    let (ours, _) = load(from, channel, authority)?;
    let keys = authority.keys().clone();
    let now = now()?;
    let mut done =
        Published { channel, changed: false, releases: Vec::new(), sent: 0, bytes: 0, kept: 0 };
    let merge = |current: &Index, _: &mut Authority| -> Result<Option<Index>> {
        let mut next = current.clone();
        next.merge(&ours)?;
        next.retain(retention, now);
        // What the target has let go of does not come back to be retired once more.
        let known = |r: &Retired| {
            current.retired.contains(r) || current.find(&r.product, &r.version).is_some()
        };
        next.retired.retain(known);
        Ok((next.releases != current.releases).then_some(next))
    };
    let mut sent = BTreeSet::new();
    let prepare = |current: &Index, next: &Index| -> Result<()> {
        done.releases.clear();
        for entry in &next.releases {
            if current.find(&entry.product, &entry.version).is_some() {
                continue;
            }
            done.releases.push(format!("{} {}", entry.product, entry.version));
            let manifest = manifest(from, entry, &keys)?;
            let wanted: Vec<(String, u64)> = manifest
                .objects()
                .map(|o| (o.sha256.clone(), o.size))
                .filter(|(sha256, _)| !sent.contains(sha256))
                .collect();
            let present = to.present(&wanted)?;
            done.kept += present.len();
            let (sources, kept): (Vec<_>, Vec<_>) =
                wanted.into_iter().partition(|(sha256, _)| !present.contains(sha256));
            sent.extend(kept.into_iter().map(|(sha256, _)| sha256));
            let total = sources.iter().map(|(_, size)| size).sum();
            let what = format!("{} {} to {}", entry.product, entry.version, to.name());
            let step = Step::new("publish", what, total, Unit::Bytes);
            for (sha256, size) in sources {
                if !sent.insert(sha256.clone()) {
                    continue;
                }
                step.note(format!("{} {}", bytes(size), sha256));
                to.put(&sha256, &from.object(&sha256))
                    .with_context(|| format!("sending {sha256} to {}", to.name()))?;
                step.advance(size);
                done.sent += 1;
                done.bytes += size;
            }
            let [text, signature] = manifest_files(from, &entry.manifest)?;
            to.write(&entry.manifest.signature(), &signature)?;
            to.write(&entry.manifest.path, &text)?;
        }
        Ok(())
    };
    let changed = change(to, channel, authority, merge, prepare)
        .with_context(|| format!("publishing the channel {channel} to {}", to.name()))?;
    done.changed = changed;
    Ok(done)
}

/// A name that no other process uses at the same time.
pub(crate) fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let text = format!(
        "{}-{}-{nanoseconds}-{}",
        rustix::system::uname().nodename().to_string_lossy(),
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    hash_bytes(text.as_bytes()).chars().take(16).collect()
}

/// Where the fetched parts of a store lie while they are looked at.
///
/// # Errors
/// When no temporary folder can be made.
pub(crate) fn scratch() -> Result<(tempfile::TempDir, Utf8PathBuf)> {
    let dir = tempfile::tempdir().context("making a temporary folder")?;
    let path = Utf8PathBuf::try_from(dir.path().to_owned()).context("the temporary folder")?;
    Ok((dir, path))
}
