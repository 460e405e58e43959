//! Shared by the tests of releases: stores with small releases, the tool as a user starts it, and a reader that verifies
//! everything.

use crate::common::{find, folder_on_disk, good, noise, root};

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bundle::{BuildKind, KeySet, Version};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::artifact::{hash_bytes, hash_file};
use xtask::publish::SigningAuthority;
use xtask::publish::memory::IndexMemory;
use xtask::publish::pins::PinnedKinds;
use xtask::release::create::add_to_channel;
use xtask::store::FileStore;
use xtask::store::directory::DirectoryStore;
use xtask::store::format::{
    Channel, ChannelEntry, FORMAT, ReleaseBoard, ReleaseManifest, ReleaseObject, StoreFile,
};
use xtask::store::index::Retention;

/// What would set a terminal's title, in the notes of each release.
pub const HARM: &str = "\u{1b}]0;owned\u{7}";

/// Objects of each release but for its notes.
pub const OBJECTS: usize = 4;

/// A directory with keys, and stores in it.
pub struct Bench {
    pub dir: Utf8PathBuf,
    _keep: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let (_keep, dir) = folder_on_disk();
        let bench = Self { dir, _keep };
        // A workspace of its own: the one around it pins the kinds of products that are called the same.
        for folder in ["configs", "board"] {
            fs::create_dir_all(bench.dir.join(folder)).unwrap();
        }
        bench.authority().signer(BuildKind::Development).unwrap();
        bench
    }

    pub fn authority(&self) -> SigningAuthority {
        let memory = IndexMemory::in_dir(self.dir.join("state"), false);
        SigningAuthority::open_dir(&self.dir.join("keys"), self.pins(), memory).unwrap()
    }

    pub fn pins(&self) -> PinnedKinds {
        PinnedKinds::read(&self.dir).unwrap()
    }

    pub fn keys(&self) -> KeySet {
        self.authority().keys().clone()
    }

    pub fn store(&self, name: &str) -> DirectoryStore {
        DirectoryStore::new(&self.dir.join(name))
    }

    /// A release of small files in the channel nightly of a store on this machine.
    pub fn release(&self, store: &DirectoryStore, product: &str, version: &str) {
        let version = Version::parse(version).unwrap();
        let object = |role: &str, content: Vec<u8>| {
            let (sha256, size) = (hash_bytes(&content), content.len() as u64);
            let path = self.dir.join("object");
            fs::write(&path, content).unwrap();
            store.put(&sha256, &path).unwrap();
            let name = format!("{product}-{version}-{role}");
            ReleaseObject { role: role.to_owned(), name, size, sha256, unpacked: None }
        };
        let objects = (0..OBJECTS)
            .map(|n| {
                object(&format!("part-{n}"), noise(64 << 10, format!("{product}{version}{n}")))
            })
            .collect();
        let notes = object("notes", format!("# {product} {version}\n{HARM}\n").into_bytes());
        let manifest = ReleaseManifest {
            format: FORMAT,
            product: product.to_owned(),
            title: product.to_owned(),
            version: version.clone(),
            kind: BuildKind::Development,
            commit: None,
            epoch: 0,
            previous: None,
            notes,
            boards: vec![ReleaseBoard {
                board: "one".to_owned(),
                engine: "none".to_owned(),
                objects,
                components: Vec::new(),
            }],
            programs: Vec::new(),
        };
        let mut authority = self.authority();
        let text = manifest.to_text().unwrap();
        let signature = manifest.sign(&text, authority.signer(BuildKind::Development).unwrap());
        let file = StoreFile::manifest(product, &version, &text);
        store.write(&file.signature(), &signature).unwrap();
        store.write(&file.path, &text).unwrap();
        let entry = ChannelEntry {
            product: product.to_owned(),
            version,
            kind: BuildKind::Development,
            commit: None,
            added: 1,
            manifest: file,
            yanked: None,
        };
        add_to_channel(store, Channel::Nightly, &entry, Retention::default(), &mut authority)
            .unwrap();
    }

    /// The tool, in this directory, with these keys.
    pub fn xtask(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(arguments).current_dir(&self.dir).env("SLIPWAY_KEYS", self.dir.join("keys"));
        command.env("SLIPWAY_STATE", self.dir.join("state"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn good(&self, arguments: &[&str]) -> String {
        good(self.xtask(arguments).output().unwrap())
    }

    /// The error of a call that fails as it should.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.xtask(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{errors}");
        errors
    }
}

/// Waits for a call that may have been killed, or must have succeeded.
pub fn ended(child: Child, killed: bool) {
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    // A signal leaves no exit code.
    assert!(output.status.success() || (killed && output.status.code().is_none()), "{errors}");
}

/// A GET of a path in a store.
type Get<'a> = dyn Fn(&str) -> Option<Vec<u8>> + 'a;

/// A reader with nothing but GETs. It follows every reference, and remembers what it has hashed.
pub struct Reader<'a> {
    get: Box<Get<'a>>,
    keys: KeySet,
    seen: RefCell<BTreeSet<String>>,
    serials: RefCell<BTreeMap<Channel, u64>>,
}

impl<'a> Reader<'a> {
    pub fn new(keys: KeySet, get: impl Fn(&str) -> Option<Vec<u8>> + 'a) -> Self {
        let (seen, serials) = (RefCell::default(), RefCell::default());
        Self { get: Box::new(get), keys, seen, serials }
    }

    pub fn of_folder(keys: KeySet, folder: Utf8PathBuf) -> Self {
        Self::new(keys, move |path| fs::read(folder.join(path)).ok())
    }

    /// Reads everything that the channels offer: product and version of each release.
    ///
    /// # Panics
    /// When an index, a manifest or an object is missing or damaged.
    pub fn read(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for channel in Channel::ALL {
            let Some(file) = (self.get)(&channel.path()) else { continue };
            let index = PinnedKinds::default().open(channel, &file, &self.keys).unwrap();
            let mut serials = self.serials.borrow_mut();
            let last = serials.insert(channel, index.serial);
            assert!(last <= Some(index.serial), "serial {} after {last:?}", index.serial);
            for entry in &index.releases {
                let get = |path: &str| {
                    let text = (self.get)(path);
                    text.unwrap_or_else(|| panic!("{} {}: no {path}", entry.product, entry.version))
                };
                let (path, signature) = (&entry.manifest.path, entry.manifest.signature());
                let manifest = ReleaseManifest::open(
                    &entry.manifest,
                    &get(path),
                    &get(&signature),
                    &self.keys,
                );
                for object in manifest.unwrap().objects() {
                    if self.seen.borrow().contains(&object.sha256) {
                        continue;
                    }
                    let content = get(&object.path());
                    assert_eq!(hash_bytes(&content), object.sha256, "{}", object.name);
                    self.seen.borrow_mut().insert(object.sha256.clone());
                }
                found.insert(format!("{} {}", entry.product, entry.version));
            }
        }
        found
    }
}

pub fn free_port() -> u16 {
    xtask::qemu::free_port(0).unwrap()
}

/// A server that ends with this value.
pub struct Server {
    pub port: u16,
    child: Child,
}

impl Server {
    /// moto, which serves buckets, and its address.
    pub fn s3(dir: &Utf8Path) -> (Self, String) {
        let port = free_port();
        let mut moto = python("s3.requirements.txt");
        moto.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]);
        let server = Self::start(moto, port, &dir.join("moto.log"));
        (server, format!("http://127.0.0.1:{port}"))
    }

    /// Starts it, and waits until its port answers.
    pub fn start(mut command: Command, port: u16, log: &Utf8Path) -> Self {
        let file = fs::File::create(log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let printed = fs::read_to_string(log).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "the server ended: {printed}");
            assert!(started.elapsed() < Duration::from_secs(120), "it does not listen: {printed}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, child }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().expect("the server runs until now");
        self.child.wait().expect("it ended");
    }
}

/// Python packages by a file of hashes beside this one, in `target/`, installed once: the command that
/// runs Python with them.
pub fn python(requirements: &str) -> Command {
    let file = root().join("xtask/tests/release").join(requirements);
    let key = hash_file(&file).unwrap().1;
    let dir = root().join("target/python").join(&key[..16]);
    fs::create_dir_all(dir.parent().unwrap()).unwrap();
    // Tests run at once; one installs.
    let lock = fs::File::create(format!("{dir}.lock")).unwrap();
    lock.lock().unwrap();
    if !dir.is_dir() {
        let new = Utf8PathBuf::from(format!("{dir}.new"));
        drop(fs::remove_dir_all(&new));
        let options = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        let more = ["--require-hashes", "--only-binary=:all:", "--target"];
        let mut pip = Command::new(find("python3"));
        pip.args(options).args(more).args([new.as_str(), "-r", file.as_str()]);
        good(pip.output().unwrap());
        fs::rename(&new, &dir).unwrap();
    }
    let mut command = Command::new(find("python3"));
    command.env("PYTHONPATH", dir.as_str()).env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// How often publishers are killed where each connection costs more than in a directory.
pub fn remote_kills() -> u32 {
    if std::env::var_os(xtask::cmd::check::ALL).is_some() { 30 } else { 4 }
}

/// Publishers are killed at moments spread over a whole run, each at a separate place: readers see
/// complete releases or none, and the next publisher finishes. `read` counts a place's releases,
/// `begun` knows whether anything is there.
pub fn killed_anywhere(
    kills: u32,
    publish: impl Fn(&str) -> Command,
    read: impl Fn(&str) -> usize,
    begun: impl Fn(&str) -> bool,
) {
    let started = Instant::now();
    good(publish("whole").output().unwrap());
    let whole = started.elapsed();
    let all = read("whole");
    assert!(all > 0);
    let (mut half, wanted) = (0, (kills / 6).max(1));
    // How long a publish takes depends on what else the machine does: more kills, until enough of them met one.
    for kill in 0..kills * 10 {
        if kill >= kills && half >= wanted {
            break;
        }
        let place = format!("killed-{kill}");
        // Never twice at the same moment.
        let share = f64::from(kill % kills + 1) - f64::from(kill / kills) / 10.0;
        let delay = whole.mul_f64(share / f64::from(kills + 1));
        killed_after(publish(&place), delay);
        let seen = read(&place);
        half += u32::from(begun(&place) && seen < all);
        good(publish(&place).output().unwrap());
        assert_eq!(read(&place), all, "after {delay:?}");
    }
    eprintln!("{half} kills met a publish that was under way, in {whole:.1?}");
    assert!(half >= wanted, "only {half} kills met a publish that was under way");
}

/// Starts something, and kills it after a while.
pub fn killed_after(mut command: Command, delay: Duration) {
    let mut child = command.spawn().unwrap();
    std::thread::sleep(delay);
    child.kill().unwrap();
    ended(child, true);
}
