//! A directory that records every change of its files, and simulates what a power cut could leave of it.
//!
//! The model is harsher than any file system in use: a change that was not flushed may be present or lost after the
//! cut, independent of the changes before and after it. A file's bytes and mode are durable once the file is synced; a
//! name in a directory once the directory is; everything once its file system is. A rename or an exchange is atomic,
//! also between two directories (one transaction of a journal), and is durable once both are synced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use slotd::files::{DirectFileChanges, FileChanges};

/// The file at a path, for display and comparison: mode and content.
pub type Snapshot = BTreeMap<PathBuf, String>;

#[derive(Clone, Debug)]
enum Node {
    Folder(BTreeMap<String, usize>),
    File(Vec<u8>),
    Link(PathBuf),
}

#[derive(Clone, Debug)]
struct Inode {
    node: Node,
    mode: u32,
    /// Seconds since 1970; `None`: that of its last change.
    time: Option<u64>,
}

/// One change, of one inode.
#[derive(Clone, Debug)]
enum Change {
    Name {
        folder: usize,
        name: String,
        to: usize,
    },
    Unname {
        folder: usize,
        name: String,
    },
    Swap {
        folder: usize,
        one: String,
        other: String,
    },
    Replace {
        folder: usize,
        from: String,
        name: String,
        to: usize,
    },
    /// From one directory to another: done or not, never half.
    Move {
        folder: usize,
        name: String,
        into: usize,
        other: String,
        to: usize,
    },
    Append {
        file: usize,
        bytes: Vec<u8>,
    },
    Zeros {
        file: usize,
    },
    Mode {
        inode: usize,
        mode: u32,
    },
    Time {
        inode: usize,
        time: u64,
    },
    Sync {
        inode: usize,
    },
    SyncAll,
}

impl Change {
    /// All inodes that it changes: two directories for a move.
    fn inodes(&self) -> Vec<usize> {
        match self {
            Self::Move { folder, into, .. } => vec![*folder, *into],
            other => other.inode().into_iter().collect(),
        }
    }

    /// The single inode that it changes; `None`: nothing, or two.
    fn inode(&self) -> Option<usize> {
        match self {
            Self::Name { folder, .. }
            | Self::Unname { folder, .. }
            | Self::Swap { folder, .. }
            | Self::Replace { folder, .. } => Some(*folder),
            Self::Append { file: inode, .. }
            | Self::Zeros { file: inode }
            | Self::Mode { inode, .. }
            | Self::Time { inode, .. } => Some(*inode),
            Self::Move { .. } | Self::Sync { .. } | Self::SyncAll => None,
        }
    }

    /// Whether it makes changes of an inode durable.
    fn saves(&self, inode: usize) -> bool {
        match self {
            Self::Sync { inode: synced } => *synced == inode,
            Self::SyncAll => true,
            _ => false,
        }
    }
}

/// Inodes by number; the first is the directory itself.
#[derive(Clone, Debug)]
struct Store(Vec<Inode>);

impl Store {
    fn read(folder: &Path) -> Self {
        let mut store = Self(Vec::new());
        store.add(folder);
        store
    }

    fn add(&mut self, path: &Path) -> usize {
        let about = fs::symlink_metadata(path).unwrap();
        let number = self.0.len();
        let mode = about.permissions().mode() & 0o7777;
        let time = about.modified().unwrap().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let time = about.is_file().then_some(time);
        self.0.push(Inode { node: Node::File(Vec::new()), mode, time });
        self.0[number].node = if about.is_dir() {
            let names =
                fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            // The files of the reserve, 24 MiB in total, which a start creates again.
            if path.ends_with("slotd/reserve") {
                names.clear();
            }
            Node::Folder(names.into_iter().map(|n| (n.clone(), self.add(&path.join(n)))).collect())
        } else if about.is_symlink() {
            Node::Link(fs::read_link(path).unwrap())
        } else {
            Node::File(fs::read(path).unwrap())
        };
        number
    }

    fn names(&mut self, folder: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.0[folder].node {
            Node::Folder(names) => names,
            other => panic!("{other:?} is not a directory"),
        }
    }

    fn find(&mut self, path: &Path) -> usize {
        path.iter().fold(0, |at, name| self.names(at)[name.to_str().unwrap()])
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Name { folder, name, to } => {
                self.names(*folder).insert(name.clone(), *to);
            }
            Change::Unname { folder, name } => {
                self.names(*folder).remove(name);
            }
            Change::Swap { folder, one, other } => {
                let names = self.names(*folder);
                let (a, b) = (names.remove(one), names.remove(other));
                names.extend(a.map(|a| (other.clone(), a)));
                names.extend(b.map(|b| (one.clone(), b)));
            }
            Change::Replace { folder, from, name, to } => {
                let names = self.names(*folder);
                names.remove(from);
                names.insert(name.clone(), *to);
            }
            Change::Move { folder, name, into, other, to } => {
                self.names(*folder).remove(name);
                self.names(*into).insert(other.clone(), *to);
            }
            Change::Zeros { file } => match &mut self.0[*file].node {
                Node::File(content) => content.fill(0),
                other => panic!("{other:?} is not a file"),
            },
            Change::Append { file, bytes } => match &mut self.0[*file].node {
                Node::File(content) => content.extend(bytes),
                other => panic!("{other:?} is not a file"),
            },
            Change::Mode { inode, mode } => self.0[*inode].mode = *mode,
            Change::Time { inode, time } => self.0[*inode].time = Some(*time),
            Change::Sync { .. } | Change::SyncAll => {}
        }
    }

    fn snapshot(&self, inode: usize, path: &Path, into: &mut Snapshot) {
        let Inode { node, mode, .. } = &self.0[inode];
        let text = match node {
            Node::Folder(names) => {
                for (name, inode) in names {
                    self.snapshot(*inode, &path.join(name), into);
                }
                format!("{mode:o} directory")
            }
            Node::File(bytes) => format!("{mode:o} {}", String::from_utf8_lossy(bytes)),
            Node::Link(to) => format!("-> {}", to.display()),
        };
        into.insert(path.to_owned(), text);
    }

    fn write(&self, inode: usize, path: &Path) {
        let Inode { node, mode, time } = &self.0[inode];
        match node {
            Node::Folder(names) => {
                fs::create_dir_all(path).unwrap();
                for (name, inode) in names {
                    self.write(*inode, &path.join(name));
                }
            }
            Node::File(bytes) => {
                fs::write(path, bytes).unwrap();
                if let Some(time) = time {
                    let file = fs::File::options().write(true).open(path).unwrap();
                    file.set_modified(UNIX_EPOCH + Duration::from_secs(*time)).unwrap();
                }
            }
            Node::Link(to) => return symlink(to, path).unwrap(),
        }
        fs::set_permissions(path, Permissions::from_mode(*mode)).unwrap();
    }
}

/// A possible state after a cut.
#[derive(Clone, Debug)]
pub struct State(Store);

impl State {
    /// Everything below a directory of the state; empty when it does not exist.
    pub fn below(&self, folder: &str) -> Snapshot {
        let mut all = Snapshot::new();
        if let Node::Folder(names) = &self.0.0[0].node
            && let Some(inode) = names.get(folder)
        {
            self.0.snapshot(*inode, Path::new(""), &mut all);
        }
        all
    }

    /// A hash of the state, including times. `passed` selects names to leave out.
    pub fn key(&self, passed: &dyn Fn(&str) -> bool) -> u64 {
        let mut key = DefaultHasher::new();
        let mut waiting = vec![("", 0)];
        while let Some((name, inode)) = waiting.pop() {
            let Inode { node, mode, time } = &self.0.0[inode];
            (name, mode, time).hash(&mut key);
            match node {
                Node::Folder(names) => {
                    let from = waiting.len();
                    let names = names.iter().map(|(name, inode)| (name.as_str(), *inode));
                    waiting.extend(names.filter(|(name, _)| !passed(name)));
                    (0, waiting.len() - from).hash(&mut key);
                }
                Node::File(bytes) => (1, bytes).hash(&mut key),
                Node::Link(to) => (2, to).hash(&mut key),
            }
        }
        key.finish()
    }

    /// Creates the state as a real directory, instead of what is there.
    pub fn write(&self, folder: &Path) {
        fs::remove_dir_all(folder).unwrap();
        self.0.write(0, folder);
    }
}

/// The same for a real directory.
pub fn snapshot(folder: &Path) -> Snapshot {
    let mut all = Snapshot::new();
    if folder.symlink_metadata().is_ok() {
        Store::read(folder).snapshot(0, Path::new(""), &mut all);
    }
    all
}

/// Makes every change in a real directory, and records it.
pub struct Recorder {
    folder: PathBuf,
    before: Store,
    now: Mutex<(Store, Vec<Change>)>,
    /// The number of the call that fails, and its error.
    fails: Option<(usize, i32)>,
    calls: Mutex<usize>,
    /// The number of the flush that is skipped.
    forgets: Option<usize>,
    flushes: Mutex<Vec<PathBuf>>,
}

impl Recorder {
    pub fn new(folder: &Path) -> Self {
        let before = Store::read(folder);
        let now = Mutex::new((before.clone(), Vec::new()));
        Self {
            folder: folder.to_owned(),
            before,
            now,
            fails: None,
            calls: Mutex::new(0),
            forgets: None,
            flushes: Mutex::default(),
        }
    }

    /// The call of this number fails with this error of the system.
    pub fn failing(self, call: usize, errno: i32) -> Self {
        Self { fails: Some((call, errno)), ..self }
    }

    /// The flush with this number is skipped, as if its line were missing.
    #[allow(dead_code, reason = "not every test leaves flushes out")]
    pub fn forgetting(self, flush: usize) -> Self {
        Self { forgets: Some(flush), ..self }
    }

    /// The flushes, in order.
    #[allow(dead_code, reason = "not every test leaves flushes out")]
    pub fn flushes(&self) -> Vec<PathBuf> {
        self.flushes.lock().unwrap().clone()
    }

    fn flush(&self, path: &Path, make: impl FnOnce(&mut Store) -> Vec<Change>) {
        let mut flushes = self.flushes.lock().unwrap();
        flushes.push(path.strip_prefix(&self.folder).expect("outside of the directory").to_owned());
        if self.forgets.is_none_or(|forgotten| forgotten + 1 != flushes.len()) {
            self.change(make);
        }
    }

    pub fn calls(&self) -> usize {
        *self.calls.lock().unwrap()
    }

    fn call(&self) -> io::Result<()> {
        let mut calls = self.calls.lock().unwrap();
        *calls += 1;
        match self.fails {
            Some((call, errno)) if call + 1 == *calls => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    /// The directory of a path, and its name there.
    fn place(&self, store: &mut Store, path: &Path) -> (usize, String) {
        let inside = path.strip_prefix(&self.folder).expect("outside of the directory");
        let folder = store.find(inside.parent().unwrap());
        (folder, inside.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn inode(&self, store: &mut Store, path: &Path) -> usize {
        store.find(path.strip_prefix(&self.folder).expect("outside of the directory"))
    }

    fn change(&self, make: impl FnOnce(&mut Store) -> Vec<Change>) {
        let mut now = self.now.lock().unwrap();
        let changes = make(&mut now.0);
        for change in &changes {
            now.0.apply(change);
        }
        now.1.extend(changes);
    }

    fn new_inode(&self, path: &Path, node: Node, mode: u32) {
        self.change(|store| {
            let (folder, name) = self.place(store, path);
            let to = store.0.len();
            store.0.push(Inode { node, mode, time: None });
            vec![Change::Name { folder, name, to }]
        });
    }

    /// The number of points between changes.
    pub fn points(&self) -> usize {
        self.now.lock().unwrap().1.len() + 1
    }

    /// All possible states after a cut at a point: of the unflushed changes before it, all are present, or none, or
    /// all but one, or only one, or some; a file's bytes also in part.
    pub fn states(&self, point: usize) -> Vec<State> {
        let now = self.now.lock().unwrap();
        let changes = &now.1[..point];
        let safe = |at: usize, inode| changes[at..].iter().any(|change| change.saves(inode));
        let open: Vec<usize> = (0..point)
            .filter(|at| changes[*at].inodes().into_iter().any(|inode| !safe(*at, inode)))
            .collect();
        let all: BTreeSet<usize> = open.iter().copied().collect();
        let mut kept = vec![all.clone(), BTreeSet::new()];
        for at in &open {
            kept.push(BTreeSet::from([*at]));
            kept.push(all.iter().copied().filter(|other| other != at).collect());
        }
        let mut seed = point as u64 | 1;
        for _ in 0..16 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            kept.push(
                open.iter()
                    .enumerate()
                    .filter(|(n, _)| seed >> (n % 60 + 3) & 1 == 1)
                    .map(|(_, at)| *at)
                    .collect(),
            );
        }
        let mut states = Vec::new();
        for kept in kept {
            let written = |at: &usize| matches!(changes[*at], Change::Append { .. });
            let tears: &[bool] = if kept.iter().any(written) { &[false, true] } else { &[false] };
            for &torn in tears {
                // The inodes that were created; their content only as far as it was durable.
                let mut store = self.before.clone();
                store.0.extend(now.0.0[self.before.0.len()..].iter().map(|inode| Inode {
                    node: match &inode.node {
                        Node::Folder(_) => Node::Folder(BTreeMap::new()),
                        Node::File(_) => Node::File(Vec::new()),
                        Node::Link(to) => Node::Link(to.clone()),
                    },
                    mode: if matches!(inode.node, Node::Folder(_)) { 0o700 } else { 0o600 },
                    time: None,
                }));
                for (at, change) in changes.iter().enumerate() {
                    match change {
                        change if !all.contains(&at) => store.apply(change),
                        Change::Append { file, bytes } if torn && kept.contains(&at) => {
                            let bytes = bytes[..bytes.len() / 2].to_vec();
                            store.apply(&Change::Append { file: *file, bytes });
                        }
                        change if kept.contains(&at) => store.apply(change),
                        _ => {}
                    }
                }
                states.push(State(store));
            }
        }
        states
    }
}

impl FileChanges for Recorder {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.create_dir(path)?;
        self.new_inode(path, Node::Folder(BTreeMap::new()), 0o700);
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.create(path)?;
        self.new_inode(path, Node::File(Vec::new()), 0o600);
        Ok(())
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.append(path, bytes)?;
        self.change(|store| {
            vec![Change::Append { file: self.inode(store, path), bytes: bytes.to_vec() }]
        });
        Ok(())
    }

    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.set_mode(path, mode)?;
        self.change(|store| vec![Change::Mode { inode: self.inode(store, path), mode }]);
        Ok(())
    }

    fn set_owner(&self, path: &Path, user: u32, group: u32) -> io::Result<()> {
        self.call()?;
        // All files of a test are of one owner.
        DirectFileChanges.set_owner(path, user, group)
    }

    fn overwrite(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.overwrite(path)?;
        self.change(|store| vec![Change::Zeros { file: self.inode(store, path) }]);
        Ok(())
    }

    fn set_modified(&self, path: &Path, time: SystemTime) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.set_modified(path, time)?;
        let time = time.duration_since(UNIX_EPOCH).unwrap().as_secs();
        self.change(|store| vec![Change::Time { inode: self.inode(store, path), time }]);
        Ok(())
    }

    fn link(&self, file: &Path, path: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.link(file, path)?;
        self.change(|store| {
            let to = self.inode(store, file);
            let (folder, name) = self.place(store, path);
            vec![Change::Name { folder, name, to }]
        });
        Ok(())
    }

    fn symlink(&self, to: &Path, path: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.symlink(to, path)?;
        self.new_inode(path, Node::Link(to.to_owned()), 0o777);
        Ok(())
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.sync(path)?;
        self.flush(path, |store| vec![Change::Sync { inode: self.inode(store, path) }]);
        Ok(())
    }

    fn sync_all(&self, folder: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.sync_all(folder)?;
        self.flush(folder, |_| vec![Change::SyncAll]);
        Ok(())
    }

    fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.replace(from, to)?;
        self.change(|store| {
            let inode = self.inode(store, from);
            let ((folder, from), (same, name)) = (self.place(store, from), self.place(store, to));
            assert_eq!(folder, same, "between two directories a rename is two changes");
            vec![Change::Replace { folder, from, name, to: inode }]
        });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.rename(from, to)?;
        self.swap(from, to);
        Ok(())
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.call()?;
        DirectFileChanges.exchange(one, other)?;
        self.swap(one, other);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        let there = path.symlink_metadata().is_ok();
        DirectFileChanges.remove(path)?;
        if there {
            self.change(|store| {
                let mut changes = Vec::new();
                let (folder, name) = self.place(store, path);
                unname(store, folder, name, &mut changes);
                changes
            });
        }
        Ok(())
    }
}

impl Recorder {
    fn swap(&self, from: &Path, to: &Path) {
        self.change(|store| {
            let ((folder, one), (into, other)) = (self.place(store, from), self.place(store, to));
            if folder == into {
                return vec![Change::Swap { folder, one, other }];
            }
            // slotd never exchanges names between two directories.
            assert!(!store.names(into).contains_key(&other), "{from:?} to {to:?}");
            let inode = store.names(folder)[&one];
            vec![Change::Move { folder, name: one, into, other, to: inode }]
        });
    }
}

/// The changes that remove a name and everything below it.
fn unname(store: &Store, folder: usize, name: String, into: &mut Vec<Change>) {
    let Node::Folder(names) = &store.0[folder].node else { panic!("not a directory") };
    let inode = names[&name];
    if let Node::Folder(inner) = &store.0[inode].node {
        for name in inner.keys() {
            unname(store, inode, name.clone(), into);
        }
    }
    into.push(Change::Unname { folder, name });
}
