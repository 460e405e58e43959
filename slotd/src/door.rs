//! The update user's interface. A person or program that may only update this robot logs in over SSH as the user
//! `update`, whose only command is the client in this module. The client sends a typed request to a socket. For each
//! connection, systemd starts the server in this module as root, which runs slotd with arguments that it chooses itself.
//!
//! From client to server: one line of JSON, the [`UpdateRequest`], then the bundle to the end of the stream. From
//! server to client: frames with a kind (a byte), a length (four bytes, big-endian) and that many bytes.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::lobby::{self, Caller, CallerRights};
use crate::policy::{self, not_offered};
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;
use crate::source::{Pace, PaceLimits};

/// The account whose sessions may do nothing else.
pub const USER: &str = policy::USER;

/// The server's socket; only root and [`USER`] may use it.
pub const SOCKET: &str = "run/slipway/update.sock";

/// Maximum length of a request in bytes. The longest valid one has fewer than 60.
const LONGEST: usize = 256;

/// How long a request may take, to its last byte; the bundle after it and the answer must keep their [`Pace`].
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum bytes in a frame; a pipe returns no more at once.
const FRAME: usize = 64 << 10;

/// A request. No verb starts older software, replaces data or keys, or names a file on the robot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct UpdateRequest {
    /// The verb.
    pub verb: UpdateVerb,
    /// Whether the answer is machine-readable.
    #[serde(default)]
    pub json: bool,
}

/// The verbs of the update user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum UpdateVerb {
    /// The robot's status.
    Status,
    /// The health checks, once.
    Health,
    /// The log's last events; all of them without a number.
    Log {
        /// Number of events.
        last: Option<u32>,
    },
    /// Checks the bundle that follows.
    Verify,
    /// Installs the bundle that follows, never below the floor.
    Install {
        /// Do not restart: the trial begins with a later restart.
        no_restart: bool,
    },
}

impl UpdateRequest {
    /// Parses a command line that the user or `push` has sent: `slotd install - --format json`.
    ///
    /// # Errors
    /// `not-offered`: anything other than these verbs and options.
    pub fn parse(line: &str) -> Result<Self> {
        let mut words: Vec<&str> = line.split_ascii_whitespace().collect();
        if words.first() == Some(&"slotd") {
            words.remove(0);
        }
        let mut json = false;
        if let Some(at) = words.windows(2).position(|pair| matches!(pair, ["--format", _])) {
            match words.get(at + 1) {
                Some(&"json") => json = true,
                Some(&"text") => {}
                _ => return Err(not_offered(line)),
            }
            words.drain(at..at + 2);
        }
        let verb = match words.as_slice() {
            ["status"] => UpdateVerb::Status,
            ["health"] => UpdateVerb::Health,
            ["log"] => UpdateVerb::Log { last: None },
            ["log", "-n" | "--last", number] => {
                let last = number.parse().map_err(|_| not_offered(line))?;
                UpdateVerb::Log { last: Some(last) }
            }
            ["verify", "-"] => UpdateVerb::Verify,
            ["install", "-"] => UpdateVerb::Install { no_restart: false },
            ["install", "-", "--no-restart"] => UpdateVerb::Install { no_restart: true },
            _ => return Err(not_offered(line)),
        };
        let typed = Self { verb, json };
        match policy::is_allowed(CallerRights::Update, &typed.to_agent_request()) {
            true => Ok(typed),
            false => Err(not_offered(line)),
        }
    }

    /// As a request to the lobby.
    fn to_agent_request(&self) -> lobby::AgentRequest {
        let source = || "-".to_owned();
        match &self.verb {
            UpdateVerb::Status => lobby::AgentRequest::Status,
            UpdateVerb::Health => lobby::AgentRequest::Health,
            UpdateVerb::Log { last } => {
                lobby::AgentRequest::Log { last: last.map(|last| last as usize) }
            }
            UpdateVerb::Verify => lobby::AgentRequest::Verify { source: source(), slot: None },
            UpdateVerb::Install { no_restart } => lobby::AgentRequest::Install {
                source: source(),
                no_restart: *no_restart,
                allow_downgrade: None,
            },
        }
    }

    /// Whether a bundle follows.
    fn expects_bundle(&self) -> bool {
        matches!(self.verb, UpdateVerb::Verify | UpdateVerb::Install { .. })
    }

    /// The arguments for the agent.
    fn arguments(&self) -> Vec<String> {
        let mut words: Vec<String> = match &self.verb {
            UpdateVerb::Status => vec!["status".into()],
            UpdateVerb::Health => vec!["health".into()],
            UpdateVerb::Log { last: None } => vec!["log".into()],
            UpdateVerb::Log { last: Some(last) } => {
                vec!["log".into(), "-n".into(), last.to_string()]
            }
            UpdateVerb::Verify => vec!["verify".into(), "-".into()],
            UpdateVerb::Install { no_restart } => {
                let mut words = vec!["install".into(), "-".into()];
                words.extend(no_restart.then(|| "--no-restart".to_owned()));
                words
            }
        };
        words.extend(["--format".to_owned(), if self.json { "json" } else { "text" }.to_owned()]);
        words
    }
}

/// The client: sends the request, passes standard input on, and prints the agent's answer. Returns the exit code.
///
/// # Errors
/// `not-offered`; `busy`: the server closed the connection without an answer; `io`: no server, or an invalid answer.
pub fn run_client(root: &RootDir, line: &str) -> Result<u8> {
    let request = UpdateRequest::parse(line)?;
    let path = root.path(SOCKET);
    let failed = |error: io::Error| Refusal::io(format!("asking {}", path.display()), &error);
    let mut stream = UnixStream::connect(&path).map_err(failed)?;
    let mut text = serde_json::to_vec(&request).map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    // The server may have refused and closed already: its answer says why.
    drop(stream.write_all(&text));
    let upload = stream.try_clone().map_err(failed)?;
    let expects_bundle = request.expects_bundle();
    // This thread ends with the process: a server that has answered reads no more.
    std::thread::spawn(move || {
        let mut upload = upload;
        if expects_bundle {
            // The server's answer says what is missing.
            drop(io::copy(&mut io::stdin().lock(), &mut upload));
        }
        drop(upload.shutdown(std::net::Shutdown::Write));
    });
    print_answer(&mut stream).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Refusal::new(
            "busy",
            format!("the agent has closed the session: {USER} has too many sessions, or the robot is restarting"),
            "end the other sessions, or wait; as root, `journalctl -u slipway-update.socket` shows why",
        ),
        _ => failed(error),
    })
}

/// Prints frames until the last one, which has the exit code.
fn print_answer(stream: &mut impl Read) -> io::Result<u8> {
    let strange = || io::Error::other("invalid answer from the agent");
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = usize::try_from(u32::from_be_bytes(length)).map_err(|_| strange())?;
        if length > FRAME {
            return Err(strange());
        }
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes)?;
        match (Kind::from_byte(kind), bytes.as_slice()) {
            (Some(Kind::Out), bytes) => io::stdout().write_all(bytes)?,
            (Some(Kind::Err), bytes) => io::stderr().write_all(bytes)?,
            (Some(Kind::End), [code]) => return Ok(*code),
            _ => return Err(strange()),
        }
    }
}

/// The kinds of frames.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Out = 1,
    Err = 2,
    End = 3,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Out, Self::Err, Self::End].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// The connection to the client. A client that does not read must not block the agent, which holds its lock: it must
/// keep the same pace as the sender of a bundle, or it gets no more output.
struct Answers {
    stream: UnixStream,
    pace: Pace,
    gone: bool,
}

impl Answers {
    fn new(stream: UnixStream, limits: PaceLimits) -> Self {
        Self { stream, pace: Pace::new(limits), gone: false }
    }

    fn frame(&mut self, kind: Kind, bytes: &[u8]) {
        let Ok(length) = u32::try_from(bytes.len()) else { return };
        let mut whole = vec![kind as u8];
        whole.extend_from_slice(&length.to_be_bytes());
        whole.extend_from_slice(bytes);
        self.gone = self.gone || self.send(&whole).is_err();
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // A timeout of zero would mean to wait for ever.
            let wait = self.pace.left().max(Duration::from_millis(1));
            self.stream.set_write_timeout(Some(wait))?;
            let started = Instant::now();
            let sent = match self.stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                sent => sent?,
            };
            self.pace.count(started.elapsed(), sent as u64)?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Sends a frame from any of the threads.
fn send_frame(answers: &Mutex<Answers>, kind: Kind, bytes: &[u8]) {
    answers.lock().unwrap_or_else(PoisonError::into_inner).frame(kind, bytes);
}

/// The server: serves the one connection on standard input, as systemd passes it (`Accept=yes`). A client that has
/// disconnected is not an error.
///
/// # Errors
/// `io`: standard input is not a connection.
pub fn run_server(root: &RootDir, prefix: &Path) -> Result<()> {
    let failed = |error: io::Error| Refusal::io("serving the update user", &error);
    let fd = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let stream = UnixStream::from(fd);
    let answers = stream.try_clone().map_err(failed)?;
    let answers = Mutex::new(Answers::new(answers, PaceLimits::default()));
    let done = check_peer(root, &stream)
        .and_then(|uid| {
            let request = read_request(&stream)?;
            let caller = Caller { uid, ..lobby::this_process(root, CallerRights::Update) };
            lobby::authorise(&caller, &request.to_agent_request()).map(|()| request)
        })
        .and_then(|request| run(&request, prefix, &stream, &answers).map_err(failed));
    let code = done.unwrap_or_else(|refusal| {
        let text = serde_json::json!({ "refused": refusal }).to_string() + "\n";
        send_frame(&answers, Kind::Out, text.as_bytes());
        refusal.kind() as u8
    });
    send_frame(&answers, Kind::End, &[code]);
    Ok(())
}

/// The user id of the peer, which must be root or [`USER`]. The socket's mode checks this too, but its directory is shared.
fn check_peer(root: &RootDir, stream: &UnixStream) -> Result<u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream.as_fd())
        .map_err(|error| Refusal::io("reading the user of a connection", &error.into()))?;
    let own = rustix::process::geteuid();
    let accounts = fs::read_to_string(root.path("etc/passwd")).unwrap_or_default();
    let user = accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(USER)).then(|| fields.nth(1)?.parse::<u32>().ok()).flatten()
    });
    if peer.uid == own || Some(peer.uid.as_raw()) == user {
        return Ok(peer.uid.as_raw());
    }
    Err(not_offered(&format!("any command, as user id {}", peer.uid.as_raw())))
}

/// Reads one line, byte by byte: the bytes after it belong to the agent.
fn read_request(mut stream: &UnixStream) -> Result<UpdateRequest> {
    let failed = |error: io::Error| Refusal::io("reading a request", &error);
    let end = Instant::now() + PATIENCE;
    let mut text = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(not_offered("an unterminated request"));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        let mut byte = [0];
        match (stream.read(&mut byte), byte) {
            (Ok(0), _) | (Ok(_), [b'\n']) => break,
            (Ok(_), _) if text.len() == LONGEST => {
                return Err(not_offered("an unterminated request"));
            }
            (Ok(_), [byte]) => text.push(byte),
            // The time limit is checked above.
            (Err(error), _)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            (Err(error), _) => return Err(failed(error)),
        }
    }
    stream.set_read_timeout(None).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|_| not_offered(&String::from_utf8_lossy(&text)))
}

/// Runs the agent with the connection as its standard input.
fn run(
    request: &UpdateRequest,
    prefix: &Path,
    stream: &UnixStream,
    answers: &Mutex<Answers>,
) -> io::Result<u8> {
    let program: PathBuf = std::env::current_exe()?;
    let input = OwnedFd::from(stream.try_clone()?);
    let mut child = Command::new(program)
        .arg("--root")
        .arg(prefix)
        // The agent runs as root, with only the rights of the user.
        .arg("--as-update")
        .args(request.arguments())
        .stdin(Stdio::from(input))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        scope.spawn(|| out.map(|pipe| pass_on(pipe, Kind::Out, answers)));
        scope.spawn(|| err.map(|pipe| pass_on(pipe, Kind::Err, answers)));
    });
    let status = child.wait()?;
    // As a shell reports a program that was ended by a signal.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(128))
}

/// Passes everything from a pipe to the client. If the client has disconnected, the agent's output is still read to its
/// end, so that the agent never waits for a reader; the agent notices by itself when its bundle ends early.
fn pass_on(mut pipe: impl Read, kind: Kind, answers: &Mutex<Answers>) {
    let mut buffer = vec![0; FRAME];
    while let Ok(count @ 1..) = pipe.read(&mut buffer) {
        send_frame(answers, kind, buffer.get(..count).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test")]

    use super::*;

    #[test]
    fn only_the_doors_own_words_are_understood() {
        for (line, expected) in [
            ("slotd status --format json", "status --format json"),
            ("slotd --format json status", "status --format json"),
            ("status", "status --format text"),
            ("slotd log -n 30 --format json", "log -n 30 --format json"),
            ("slotd install - --format json", "install - --format json"),
            ("slotd install - --no-restart", "install - --no-restart --format text"),
            ("slotd verify -", "verify - --format text"),
            ("slotd health", "health --format text"),
        ] {
            let request = UpdateRequest::parse(line).unwrap();
            assert_eq!(request.arguments().join(" "), expected);
            let text = serde_json::to_vec(&request).unwrap();
            assert!(text.len() < LONGEST, "{}", text.len());
            assert_eq!(serde_json::from_slice::<UpdateRequest>(&text).unwrap(), request);
        }
        for line in [
            "",
            "slotd",
            "id -u",
            "sh -c id",
            "slotd boot-other",
            "slotd roll-back",
            "slotd commit",
            "slotd keys",
            "slotd reset",
            "slotd backup -",
            "slotd restore -",
            "slotd provision",
            "slotd seed",
            "slotd data prepare",
            "slotd health --watch",
            "slotd install - --allow-downgrade why",
            "slotd install /data/x.bundle",
            "slotd install http://robot/x.bundle",
            "slotd verify - --slot a",
            "slotd --root /tmp status",
            "slotd status; id",
            "slotd status && id",
            "slotd log -n -1",
            "slotd log -n 99999999",
            "slotd status --format yaml",
            "slotd slotd status",
        ] {
            let refusal = UpdateRequest::parse(line).unwrap_err();
            assert_eq!(refusal.code, "not-offered", "{line}");
        }
        let message = UpdateRequest::parse("a\u{1b}]0;x\u{7}").unwrap_err().message;
        assert!(!message.chars().any(char::is_control), "{message:?}");
    }

    #[test]
    fn who_reads_no_answers_holds_nobody_up() {
        let (client, stream) = UnixStream::pair().unwrap();
        let limits = PaceLimits { slowest: 1024, grace: Duration::from_millis(200) };
        let mut answers = Answers::new(stream, limits);
        // More than the socket buffers, and then much more.
        let started = Instant::now();
        for _ in 0..1000 {
            answers.frame(Kind::Err, &[b'.'; FRAME]);
        }
        assert!(answers.gone);
        // Generous for a busy machine, but a thousand waits would take 200 seconds.
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
        drop(client);
    }

    #[test]
    fn a_request_that_does_not_end_is_given_up() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let started = Instant::now();
        let writes = std::thread::spawn(move || {
            // A byte a second, for longer than the total limit.
            while client.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        assert_eq!(read_request(&stream).unwrap_err().code, "not-offered");
        assert!(started.elapsed() < PATIENCE * 10, "{:?}", started.elapsed());
        drop(stream);
        writes.join().unwrap();
    }
}
