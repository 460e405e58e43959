//! A robot behind the system's `ssh`: each request to its agent opens a connection.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use contract::Refusal;
use contract::answer::{Progress, RobotStatus};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::exec::Tool;
use crate::ssh::check_options;

/// After the user's own options: ssh takes the first value of each.
const OPTIONS: [&str; 14] = [
    // Never ask questions.
    "BatchMode=yes",
    // Robots are new, or were flashed again and have a new address; a changed key is rejected.
    "StrictHostKeyChecking=accept-new",
    "ConnectTimeout=20",
    // An unreachable robot is detected after 30 seconds.
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    // A shared connection would not survive the restart, and would break for all requests at once.
    "ControlMaster=no",
    "ControlPath=none",
    "ClearAllForwardings=yes",
    // Override settings for interactive logins: another command, a terminal (which would change the
    // bytes), no input, a local program that writes into the answer.
    "RemoteCommand=none",
    "RequestTTY=no",
    "SessionType=default",
    "StdinNull=no",
    "ForkAfterAuthentication=no",
    "PermitLocalCommand=no",
];

/// The robot's user whose sessions can only run the agent.
const UPDATER: &str = "update";

/// The exit status of ssh when the connection fails (ssh(1), "EXIT STATUS").
const SSH_FAILED: i32 = 255;
/// The exit status of a shell when the program does not exist (POSIX).
const NOT_FOUND: i32 = 127;
/// How many of the robot's last lines an error shows.
const TAIL: usize = 5;

/// The result of a request.
#[derive(Debug)]
pub enum RobotReply<T> {
    /// The answer.
    Said(T),
    /// The agent's refusal.
    Refused(Refusal),
    /// There is no connection, or it broke before the answer: ssh's own message.
    Broken(String),
}

/// One robot.
#[derive(Debug)]
pub struct RobotConnection {
    /// The host, as given on the command line.
    pub host: String,
    options: Vec<String>,
    /// The command for the agent, with the way to become root.
    agent: Vec<&'static str>,
    /// Whether it is the user who may only update the robot (docs/reference/robot.md).
    updater: bool,
}

#[derive(Deserialize)]
struct RefusedLine {
    refused: Refusal,
}

#[derive(Deserialize)]
struct ProgressLine {
    progress: Progress,
}

/// The messages of ssh, from the C library, when there is no answer at all.
const UNREACHED: [&str; 5] = [
    "Could not resolve hostname",
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
];

/// Whether ssh would read this as the intended host: HOST, USER@HOST, or either after `ssh://` with
/// or without a port.
fn is_address(host: &str) -> bool {
    let (rest, with_port) = match host.strip_prefix("ssh://") {
        Some(rest) => (rest, true),
        None => (host, false),
    };
    let (user, name) = match rest.rsplit_once('@') {
        Some((user, name)) => (Some(user), name),
        None => (None, rest),
    };
    let is_word = |word: &str| {
        let strange = |c: char| c.is_whitespace() || c == '/';
        !word.is_empty() && !word.starts_with('-') && !word.contains(strange)
    };
    // More than one colon is an IPv6 address.
    let has_port = name.matches(':').count() == 1;
    user.is_none_or(is_word) && is_word(name) && (with_port || !has_port)
}

impl RobotConnection {
    /// Does not connect.
    ///
    /// # Errors
    /// When the host would be read as an option, or an option is invalid.
    pub fn new(host: &str, options: &[String]) -> Result<Self> {
        ensure!(
            is_address(host),
            "invalid address of a robot: `{host}`\nhelp: HOST, USER@HOST or ssh://USER@HOST:PORT"
        );
        check_options(options)?;
        let mut options = options.to_vec();
        options.extend(OPTIONS.map(str::to_owned));
        // User names of the workstation do not exist on a robot.
        if !host.contains('@') {
            options.push("User=root".to_owned());
        }
        let user = host.trim_start_matches("ssh://").split_once('@').map(|(user, _)| user);
        let updater = user == Some(UPDATER);
        Ok(Self { host: host.to_owned(), options, agent: vec!["slotd"], updater })
    }

    /// The first contact: finds out how to call the agent, and reads the robot's status.
    ///
    /// # Errors
    /// When the robot cannot be reached, has no agent, or rejects the request.
    pub fn first(&mut self) -> Result<RobotStatus> {
        // The updater's sessions can only run the agent.
        if !self.updater {
            let (code, out, tail) = self.run(&["id", "-u"], None, |_| false)?;
            if code != Some(0) {
                return self.no_login(&last_lines(&tail));
            }
            if String::from_utf8_lossy(&out).trim() != "0" {
                self.agent = vec!["sudo", "-n", "slotd"];
            }
        }
        match self.status()? {
            RobotReply::Said(status) => Ok(status),
            RobotReply::Refused(refused) => Err(refused.into()),
            RobotReply::Broken(why) if self.updater => self.no_login(&why),
            RobotReply::Broken(why) => bail!("the connection broke: {why}"),
        }
    }

    fn no_login<T>(&self, why: &str) -> Result<T> {
        // A product may forbid logins as root, as release products do.
        let other = match self.host.rsplit_once('@') {
            None => format!(
                "; if the robot's product forbids logins as root, use {}",
                match self.host.strip_prefix("ssh://") {
                    Some(name) => format!("ssh://{UPDATER}@{name}"),
                    None => format!("{UPDATER}@{}", self.host),
                }
            ),
            Some(_) => String::new(),
        };
        if UNREACHED.iter().any(|sign| why.contains(sign)) {
            bail!(
                "cannot reach the robot: {why}\n\
                 help: check that the robot is on, in this network, and has that name; `ssh {}` \
                 shows more",
                self.host
            );
        }
        bail!(
            "cannot log in: {why}\n\
             help: try `ssh {}`; the robot must know your public key (docs/guides/push.md){other}",
            self.host
        )
    }

    /// The robot's status.
    ///
    /// # Errors
    /// As [`RobotConnection::request`].
    pub fn status(&self) -> Result<RobotReply<RobotStatus>> {
        let reply = self.request::<RobotStatus>(&["status"], None, |_| {})?;
        if let RobotReply::Said(status) = &reply {
            // By it alone a restart is seen.
            ensure!(status.boot_id.is_some(), "the robot's kernel does not say its boot id");
        }
        Ok(reply)
    }

    /// Sends a request to the agent. The robot's shell interprets the words: they are our own and
    /// contain plain characters only.
    ///
    /// # Errors
    /// When there is no agent, or its answer is invalid.
    pub fn request<T: DeserializeOwned>(
        &self,
        verb: &[&str],
        input: Option<File>,
        mut progress: impl FnMut(Progress),
    ) -> Result<RobotReply<T>> {
        let words = [&self.agent, verb, &["--format", "json"]].concat();
        let (code, out, tail) = self.run(&words, input, |line| {
            let at = serde_json::from_str::<ProgressLine>(line);
            let is_progress = at.is_ok();
            if let Ok(line) = at {
                progress(line.progress);
            }
            is_progress
        })?;
        let shown = words.join(" ");
        match code {
            Some(0) => {
                let answer = serde_json::from_slice(&out).with_context(|| {
                    format!("the answer of `{shown}` is not supported by this version")
                });
                Ok(RobotReply::Said(answer?))
            }
            None | Some(SSH_FAILED) => Ok(RobotReply::Broken(last_lines(&tail))),
            Some(NOT_FOUND) => bail!(
                "a program is missing on the robot: {}\n\
                 help: log in as root, to a robot with an image of Slipway",
                last_lines(&tail)
            ),
            Some(code) => match serde_json::from_slice::<RefusedLine>(&out) {
                Ok(line) => Ok(RobotReply::Refused(line.refused)),
                Err(_) => bail!("`{shown}` failed with exit code {code}: {}", tail.join("\n")),
            },
        }
    }

    /// Runs a command on the robot: returns the exit code (`None`: ssh was killed), standard
    /// output, and the last lines of standard error except those that `taken` accepts.
    fn run(
        &self,
        words: &[&str],
        input: Option<File>,
        mut taken: impl FnMut(&str) -> bool,
    ) -> Result<(Option<i32>, Vec<u8>, Vec<String>)> {
        let mut tail = Vec::new();
        let options = self.options.iter().flat_map(|option| ["-o", option]);
        let tool = Tool::new("ssh").arg("-T").args(options).args(["--", &self.host]).args(words);
        let (status, out) = tool.converse(input, |line| {
            if !taken(line) && !line.is_empty() {
                if tail.len() == TAIL {
                    tail.remove(0);
                }
                tail.push(line.to_owned());
            }
        })?;
        Ok((status.code(), out, tail))
    }
}

fn last_lines(tail: &[String]) -> String {
    tail.last().cloned().unwrap_or_else(|| "no message from ssh".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ssh_would_take_for_something_else_is_no_address() {
        for good in
            ["robot", "update@robot", "ssh://robot", "ssh://a@robot:22", "fe80::1%eth0", "root@::1"]
        {
            assert!(is_address(good), "{good}");
        }
        for bad in [
            "",
            "-oProxyCommand=x",
            "a b",
            "http://x",
            "robot:22",
            "update@",
            "@robot",
            "ssh://",
            "ssh://u@h/path",
            "a@-x",
        ] {
            assert!(!is_address(bad), "{bad}");
        }
    }
}
