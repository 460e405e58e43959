//! A store on an SFTP host, through the system's `sftp`: the host needs no shell. The index changes
//! as in a directory: a hard link can create the file of a serial only once.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;

use super::format::{Channel, ChannelIndex, LARGEST_TEXT, object_path};
use super::{ChannelToken, FileStore, ObjectError, ReleaseStore, newest_index};
use crate::artifact::{hash_bytes, hash_file};
use crate::exec::Tool;
use crate::scratch::{create_scratch_dir, unique_name};
use crate::ssh::check_options;

/// As for pushes: never ask questions, and detect an unreachable host after 30 seconds.
const OPTIONS: [&str; 11] = [
    "BatchMode=yes",
    "StrictHostKeyChecking=accept-new",
    "ConnectTimeout=20",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    // As for pushes: override settings for interactive logins. sftp requests its subsystem itself.
    "RemoteCommand=none",
    "RequestTTY=no",
    "StdinNull=no",
    "ForkAfterAuthentication=no",
    "PermitLocalCommand=no",
];

/// A directory on a host.
#[derive(Debug)]
pub struct SshStore {
    /// `USER@HOST`, or `HOST`.
    destination: String,
    port: Option<u16>,
    /// The directory: absolute, or relative to the user's home.
    path: String,
    options: Vec<String>,
    /// The connection that all commands share.
    control: Option<Control>,
}

/// The socket of a shared connection (ssh_config(5): ControlPath), in a directory that only this
/// user can enter.
#[derive(Debug)]
struct Control {
    socket: String,
    _folder: tempfile::TempDir,
}

/// The maximum length of a socket's path in bytes, including the 17 that ssh(1) adds while it
/// creates the socket (unix(7): 108 with the end).
const SOCKET: usize = 108 - 1 - 17;

impl Control {
    /// `None` when the temporary directory's path is too long: then each command opens its own
    /// connection.
    fn new() -> Result<Option<Self>> {
        let (dir, path) = create_scratch_dir()?;
        let socket = path.join("ssh").into_string();
        Ok((socket.len() <= SOCKET).then_some(Self { socket, _folder: dir }))
    }

    /// The first command opens the connection. After a killed process it stays open for this many
    /// seconds.
    fn options(&self) -> [String; 3] {
        let socket = format!("ControlPath={}", self.socket);
        ["ControlMaster=auto".to_owned(), "ControlPersist=10".to_owned(), socket]
    }
}

impl Drop for SshStore {
    fn drop(&mut self) {
        if let Some(control) = &self.control {
            let end = Tool::new("ssh").args(["-O", "exit", "-o"]);
            let end = end.arg(format!("ControlPath={}", control.socket));
            // If this fails, the connection closes itself a little later.
            drop(end.arg("--").arg(&self.destination).read());
        }
    }
}

impl SshStore {
    /// Parses `[USER@]HOST[:PORT]/PATH`; `/~/PATH` is below the user's home. Does not connect.
    ///
    /// # Errors
    /// When the address is invalid, or its path contains characters that `sftp` would interpret.
    pub fn new(address: &str, options: &[String]) -> Result<Self> {
        let help =
            "help: ssh://[USER@]HOST[:PORT]/PATH, or /~/PATH for a directory below the user's home";
        let (host, path) = address.split_once('/').unwrap_or((address, ""));
        let (destination, port) = match host.rsplit_once(':') {
            Some((name, port)) if !port.ends_with(']') => {
                let port = port.parse::<u16>();
                (
                    name,
                    Some(port.with_context(|| format!("ssh://{address}: invalid port\n{help}"))?),
                )
            }
            _ => (host, None),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-@:[]%".contains(c);
        ensure!(
            !destination.is_empty()
                && !destination.starts_with('-')
                && destination.chars().all(plain),
            "ssh://{address}: invalid host `{destination}`\n{help}"
        );
        let path = match path.strip_prefix("~/") {
            Some(below) => below.to_owned(),
            None => format!("/{path}"),
        };
        let path = path.trim_end_matches('/').to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-+=,@/".contains(c);
        ensure!(
            !path.is_empty() && !path.starts_with('-') && path.chars().all(plain),
            "ssh://{address}: expected a directory of letters, digits and ._-+=,@ only, found \
             `{path}`\n{help}"
        );
        check_options(options)?;
        let mut options = options.to_vec();
        options.extend(OPTIONS.map(str::to_owned));
        let control = Control::new()?;
        options.extend(control.iter().flat_map(Control::options));
        Ok(Self { destination: destination.to_owned(), port, path, options, control })
    }

    fn path_in_store(&self, path: &str) -> String {
        format!("{}/{path}", self.path)
    }

    /// Runs commands of sftp(1) in a local directory. A command that begins with `-` may fail.
    /// Returns whether all others succeeded, the output, and the error messages.
    fn run(&self, directory: &Utf8Path, commands: &[String]) -> Result<(bool, String, String)> {
        let (_keep, dir) = create_scratch_dir()?;
        let batch = dir.join("batch");
        fs::write(&batch, commands.join("\n") + "\n")
            .with_context(|| format!("writing {batch}"))?;
        let mut tool = Tool::new("sftp").args(["-b", batch.as_str()]);
        for option in &self.options {
            tool = tool.args(["-o", option]);
        }
        if let Some(port) = self.port {
            tool = tool.args(["-P", &port.to_string()]);
        }
        let mut output = String::new();
        let tool = tool.arg("--").arg(&self.destination).current_dir(directory);
        let (status, out) = tool.converse(None, |line| {
            output.push_str(line);
            output.push('\n');
        })?;
        // sftp(1) exits with the status of ssh when there is no connection (ssh(1), "EXIT STATUS");
        // if ssh ended before sftp used it, sftp dies of SIGPIPE.
        ensure!(
            status.code().is_some_and(|code| code != 255),
            "connecting to {}: {}\nhelp: try `sftp {}`; it must connect without asking anything",
            self.destination,
            output.trim_end(),
            self.destination
        );
        Ok((status.success(), String::from_utf8_lossy(&out).into_owned(), output))
    }

    fn run_checked(&self, dir: &Utf8Path, commands: &[String]) -> Result<()> {
        let (good, _, output) = self.run(dir, commands)?;
        ensure!(good, "sftp on {}: {}", self.destination, output.trim_end());
        Ok(())
    }

    /// Commands that create the directories of a path, which may exist.
    fn folders(&self, path: &str) -> Vec<String> {
        let mut made = vec![format!("-mkdir {}", self.path)];
        let mut dir = String::new();
        let mut parts: Vec<&str> = path.split('/').collect();
        parts.pop();
        for part in parts {
            dir = if dir.is_empty() { part.to_owned() } else { format!("{dir}/{part}") };
            made.push(format!("-mkdir {}", self.path_in_store(&dir)));
        }
        made
    }

    /// The files with these paths or in these directories: name and size.
    fn list(&self, paths: &[String]) -> Result<Vec<(String, u64)>> {
        let commands: Vec<String> =
            paths.iter().map(|path| format!("-ls -ln {}", self.path_in_store(path))).collect();
        let (_, out, _) = self.run(Utf8Path::new("."), &commands)?;
        let lines = out.lines().filter(|line| line.starts_with('-'));
        Ok(lines
            .filter_map(|line| {
                // Mode, links, owner, group, size, three words of time, name: as `ls -ln`.
                let words: Vec<&str> = line.split_whitespace().collect();
                let name = words.get(8)?.rsplit('/').next()?;
                Some((name.to_owned(), words.get(4)?.parse().ok()?))
            })
            .collect())
    }

    /// The SHA-256 of the stored file: from the host's own `sha256sum`, or by reading it back if
    /// the host has no shell.
    fn arrived(&self, path: &str) -> Result<String> {
        let mut tool = Tool::new("ssh").arg("-T");
        for option in &self.options {
            tool = tool.args(["-o", option]);
        }
        if let Some(port) = self.port {
            tool = tool.args(["-p", &port.to_string()]);
        }
        // The path is interpreted by the host's shell: it contains plain characters only.
        let tool = tool.arg("--").arg(&self.destination).args(["sha256sum", "--", path]);
        let (status, out) = tool.converse(None, |_| {})?;
        if status.success() {
            let text = String::from_utf8_lossy(&out);
            let sum = text.split_whitespace().next().unwrap_or_default();
            if sum.len() == 64 {
                return Ok(sum.to_owned());
            }
        }
        let (_keep, dir) = create_scratch_dir()?;
        self.run_checked(&dir, &[format!("get {path} back")])?;
        Ok(hash_file(&dir.join("back"))?.1)
    }

    /// Uploads a file under a unique name, flushed and verified; returns the name.
    fn upload(&self, path: &str, dir: &Utf8Path, name: &str, sha256: &str) -> Result<String> {
        let (parent, _) = path.rsplit_once('/').context("a stored file has a directory")?;
        let temporary = self.path_in_store(&format!("{parent}/.partial-{}", unique_name()));
        let mut commands = self.folders(path);
        commands.push(format!("put -f {name} {temporary}"));
        self.run_checked(dir, &commands)?;
        let found = self.arrived(&temporary)?;
        if found != sha256 {
            // Best effort: report the error below.
            drop(self.run(dir, &[format!("rm {temporary}")]));
            bail!("{path} was stored with the SHA-256 {found}, expected {sha256}");
        }
        Ok(temporary)
    }

    fn write_small(&self, path: &str, content: &[u8]) -> Result<String> {
        let (_keep, dir) = create_scratch_dir()?;
        fs::write(dir.join("content"), content)
            .with_context(|| format!("writing {dir}/content"))?;
        self.upload(path, &dir, "content", &hash_bytes(content))
    }

    fn newest(&self, channel: Channel) -> Result<Option<u64>> {
        let list = self.list(&[format!("channels/{channel}.d")])?;
        Ok(list.iter().filter_map(|(name, _)| name.parse().ok()).max())
    }
}

impl FileStore for SshStore {
    fn name(&self) -> String {
        format!("{}:{}", self.destination, self.path)
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let (_keep, dir) = create_scratch_dir()?;
        let (good, _, output) =
            self.run(&dir, &[format!("get {} content", self.path_in_store(path))])?;
        if !good {
            if output.contains("not found") || output.contains("No such file") {
                return Ok(None);
            }
            bail!("reading {path} of {}: {}", self.name(), output.trim_end());
        }
        let file = dir.join("content");
        let size =
            fs::metadata(&file).with_context(|| format!("reading the metadata of {file}"))?.len();
        ensure!(size <= LARGEST_TEXT, "{path} has {size} bytes, expected at most {LARGEST_TEXT}");
        Ok(Some(fs::read(&file).with_context(|| format!("reading {file}"))?))
    }

    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>> {
        if objects.is_empty() {
            return Ok(BTreeSet::new());
        }
        let paths: Vec<String> = objects.iter().map(|(sha256, _)| object_path(sha256)).collect();
        // An object gets its name only after its content was verified.
        let there = self.list(&paths)?;
        let complete = objects.iter().filter(|object| there.contains(object));
        Ok(complete.map(|(sha256, _)| sha256.clone()).collect())
    }

    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()> {
        let path = object_path(sha256);
        let (Some(dir), Some(name)) = (from.parent(), from.file_name()) else {
            bail!("{from} is not a file")
        };
        let temporary = self.upload(&path, dir, name, sha256)?;
        self.run_checked(dir, &[format!("rename {temporary} {}", self.path_in_store(&path))])
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()> {
        let (Some(dir), Some(name)) = (into.parent(), into.file_name()) else {
            bail!("{into} is not a file")
        };
        let path = object_path(sha256);
        let named = |what: String| format!("{sha256} of {} {what}", self.name());
        match self.list(std::slice::from_ref(&path))?.first() {
            Some((_, size)) if *size <= limit => {}
            Some((_, size)) => {
                let what = named(format!("has {size} bytes, expected at most {limit}"));
                return Err(ObjectError::Damaged(what).into());
            }
            None => return Err(ObjectError::Missing(named("is missing".to_owned())).into()),
        }
        self.run_checked(dir, &[format!("get {} {name}", self.path_in_store(&path))])?;
        let (size, found) = hash_file(into)?;
        received(size);
        if found != sha256 {
            let what = named(format!("is damaged: its SHA-256 is {found}"));
            return Err(ObjectError::Damaged(what).into());
        }
        Ok(())
    }

    fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        if self.read(path)?.as_deref() == Some(content) {
            return Ok(());
        }
        let temporary = self.write_small(path, content)?;
        self.run_checked(
            Utf8Path::new("."),
            &[format!("rename {temporary} {}", self.path_in_store(path))],
        )
    }
}

impl ReleaseStore for SshStore {
    fn identities(&self) -> Result<Vec<String>> {
        let port = self.port.map_or(String::new(), |port| format!(" port {port}"));
        Ok(vec![format!("ssh {}:{}{port}", self.destination, self.path)])
    }

    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, ChannelToken)> {
        let visible = self.read(&channel.path())?;
        let seen = visible.as_deref().map(ChannelIndex::serial_of).transpose()?;
        newest_index((visible, seen), self.newest(channel)?, |newest| {
            let content = self.read(&format!("channels/{channel}.d/{newest}"))?;
            content.with_context(|| {
                format!("the file of the serial {newest} of {channel} no longer exists")
            })
        })
    }

    fn swap(
        &self,
        channel: Channel,
        token: &ChannelToken,
        serial: u64,
        content: &[u8],
    ) -> Result<bool> {
        let seen = match token {
            ChannelToken::Absent => 0,
            ChannelToken::Version(seen) => seen.parse::<u64>().context("a serial is a number")?,
        };
        ensure!(serial == seen + 1, "the index has the serial {serial}, but the store has {seen}");
        let path = format!("channels/{channel}.d/{serial}");
        let temporary = self.write_small(&path, content)?;
        let link = format!("ln {temporary} {}", self.path_in_store(&path));
        let here = Utf8Path::new(".");
        let (made, _, output) = self.run(here, &[link])?;
        self.run_checked(here, &[format!("rm {temporary}")])?;
        if made {
            return Ok(true);
        }
        let taken = self.newest(channel)?.is_some_and(|newest| newest >= serial);
        ensure!(taken, "{} does not support hard links: {}", self.name(), output.trim_end());
        Ok(false)
    }

    fn make_visible(&self, channel: Channel) -> Result<()> {
        loop {
            let (newest, token) = self.index(channel)?;
            let Some(newest) = newest else { return Ok(()) };
            if self.read(&channel.path())?.as_ref() != Some(&newest) {
                let temporary = self.write_small(&channel.path(), &newest)?;
                let rename = format!("rename {temporary} {}", self.path_in_store(&channel.path()));
                self.run_checked(Utf8Path::new("."), &[rename])?;
            }
            // Another publisher's older file may have been written last: repair that.
            if self.index(channel)?.1 == token
                && self.read(&channel.path())?.as_ref() == Some(&newest)
            {
                return Ok(());
            }
        }
    }
}
