//! An apt archive of a test's own: a server on the loopback address, indexes, signatures. Needs dpkg-deb and gpg.
#![allow(dead_code)]

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use anyhow::Result;
use camino::Utf8Path;
use xtask::artifact::{hash_bytes, hash_file};
use xtask::exec::Tool;

/// What the server does with a path for a number of times, besides serving the file.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    Truncate,
    Busy,
}

#[derive(Default)]
struct State {
    faults: HashMap<String, (Fault, usize)>,
    log: Vec<String>,
}

pub struct Server {
    pub address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub fn start(root: &Utf8Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, root) = (state.clone(), root.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, root) = (shared.clone(), root.clone());
                std::thread::spawn(move || drop(serve(stream, &root, &shared)));
            }
        });
        Ok(Self { address, state })
    }

    pub fn fault(&self, path: &str, fault: Fault, times: usize) {
        self.state.lock().unwrap().faults.insert(path.to_owned(), (fault, times));
    }

    pub fn log(&self) -> Vec<String> {
        self.state.lock().unwrap().log.clone()
    }
}

fn serve(mut stream: TcpStream, root: &Utf8Path, state: &Mutex<State>) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    lines.read_line(&mut first)?;
    let (mut start, mut line) = (0, String::new());
    while lines.read_line(&mut line)? > 2 {
        let lower = line.to_lowercase();
        if let Some(range) = lower.trim().strip_prefix("range: bytes=") {
            start = range.trim_end_matches('-').parse().unwrap_or(0);
        }
        line.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or("/").replace("%2b", "+").replace("%7e", "~");
    let fault = {
        let mut state = state.lock().unwrap();
        state.log.push(format!("{path} from {start}"));
        match state.faults.get_mut(&path) {
            Some((fault, times)) if *times > 0 => {
                *times -= 1;
                Some(*fault)
            }
            _ => None,
        }
    };
    let head = |status: &str, length: usize| {
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    match fs::read(root.join(path.trim_start_matches('/'))) {
        _ if fault == Some(Fault::Busy) => stream.write_all(head("503 Busy", 0).as_bytes())?,
        Err(_) => stream.write_all(head("404 Not Found", 0).as_bytes())?,
        Ok(body) => {
            let rest = &body[start.min(body.len())..];
            let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
            stream.write_all(head(status, rest.len()).as_bytes())?;
            let end = if fault == Some(Fault::Truncate) { rest.len() / 2 } else { rest.len() };
            stream.write_all(&rest[..end])?;
        }
    }
    Ok(())
}

/// A key that signs the archive in the directory of that name, and the file of its public half;
/// armoured as `.asc`.
pub fn new_key(root: &Utf8Path, folder: &str, file: &str) -> Result<()> {
    let home = root.join(format!("gpg-{folder}"));
    fs::create_dir_all(&home)?;
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700))?;
    let gpg = || Tool::new("gpg").env("GNUPGHOME", home.as_str()).arg("--batch");
    gpg().args(["--passphrase", "", "--quick-gen-key", folder, "ed25519", "sign"]).run()?;
    let armour = if file.ends_with(".asc") { "--armor" } else { "--no-armor" };
    gpg().args([armour, "--export", "-o"]).arg(root.join(file)).run()
}

/// The index of the packages in the pool of a component.
pub fn index(archive: &Utf8Path, component: &str) -> Result<String> {
    let mut index = String::new();
    for folder in archive.join("pool").join(component).read_dir_utf8()? {
        for deb in folder?.path().read_dir_utf8()? {
            let deb = deb?.into_path();
            let control = Tool::new("dpkg-deb").arg("-f").arg(&deb).read()?;
            let (size, hash) = hash_file(&deb)?;
            let name = deb.strip_prefix(archive)?;
            let control = control.trim_end();
            index += &format!("{control}\nFilename: {name}\nSize: {size}\nSHA256: {hash}\n\n");
        }
    }
    Ok(index)
}

/// Writes the indexes of a suite (component, architecture, text), and signs it with the key of that
/// directory.
pub fn sign(
    root: &Utf8Path,
    folder: &str,
    suite: &str,
    key: &str,
    indexes: &[(&str, &str, &str)],
) -> Result<()> {
    let dist = root.join(folder).join("dists").join(suite);
    let mut sums = String::new();
    for (component, arch, text) in indexes {
        let path = format!("{component}/binary-{arch}");
        fs::create_dir_all(dist.join(&path))?;
        fs::write(dist.join(&path).join("Packages"), text)?;
        let hash = hash_bytes(text.as_bytes());
        sums += &format!(" {hash} {} {path}/Packages\n", text.len());
    }
    let words = |words: BTreeSet<&str>| Vec::from_iter(words).join(" ");
    let release = format!(
        "Suite: {suite}\nCodename: {suite}\nArchitectures: {}\nComponents: {}\n\
         Date: Sat, 01 Jan 2022 00:00:00 UTC\nSHA256:\n{sums}",
        words(indexes.iter().map(|(_, arch, _)| *arch).collect()),
        words(indexes.iter().map(|(component, ..)| *component).collect())
    );
    fs::write(dist.join("Release"), release)?;
    Tool::new("gpg")
        .env("GNUPGHOME", root.join(format!("gpg-{key}")).as_str())
        .args(["--batch", "--yes", "--clearsign", "-o"])
        .arg(dist.join("InRelease"))
        .arg(dist.join("Release"))
        .run()
}
