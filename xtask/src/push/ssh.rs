//! One robot behind the system's `ssh`: each question to its agent is a connection of its own.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use contract::Refusal;
use contract::answer::{Progress, Status};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::exec::Tool;

/// After the user's own options: ssh takes the first value of each.
const OPTIONS: [&str; 14] = [
    // Nobody is there to be asked.
    "BatchMode=yes",
    // Robots are new, or were flashed anew under a new address; a key that has changed is refused.
    "StrictHostKeyChecking=accept-new",
    "ConnectTimeout=20",
    // A robot that is gone is noticed after 30 seconds.
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    // A shared connection would not survive the restart, and break for all at once.
    "ControlMaster=no",
    "ControlPath=none",
    "ClearAllForwardings=yes",
    // What a person may want of a login there: another command, a terminal (which would change the bytes), no input,
    // a program on this side that writes into the answer.
    "RemoteCommand=none",
    "RequestTTY=no",
    "SessionType=default",
    "StdinNull=no",
    "ForkAfterAuthentication=no",
    "PermitLocalCommand=no",
];

/// The robot's user whose sessions reach its agent and nothing else.
const UPDATER: &str = "update";

/// What ssh exits with when it is the connection that fails (ssh(1), "EXIT STATUS").
const SSH_FAILED: i32 = 255;
/// What a shell exits with when there is no such program (POSIX).
const NOT_FOUND: i32 = 127;
/// How many of the last lines from the other side an error shows.
const TAIL: usize = 5;

/// What came back.
#[derive(Debug)]
pub enum Reply<T> {
    /// The answer.
    Said(T),
    /// The agent refuses.
    Refused(Refusal),
    /// There is no connection, or it broke before the answer: ssh's own words.
    Broken(String),
}

/// One robot.
#[derive(Debug)]
pub struct Connection {
    /// As it was named.
    pub host: String,
    options: Vec<String>,
    /// The agent, or how to become root for it.
    agent: Vec<&'static str>,
    /// Whether it is the user who may update the robot and do nothing else (docs/robot.md).
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

/// What ssh says, in the C library's words, when nobody answers at all.
const UNREACHED: [&str; 5] = [
    "Could not resolve hostname",
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Network is unreachable",
];

/// Whether ssh would take this for a host, and for the one that is meant: HOST, USER@HOST, or either behind `ssh://`
/// with or without a port.
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

impl Connection {
    /// Nothing is connected yet.
    ///
    /// # Errors
    /// When the host would be taken for an option, or an option is none.
    pub fn new(host: &str, options: &[String]) -> Result<Self> {
        ensure!(
            is_address(host),
            "`{host}` is no robot's address\nhelp: HOST, USER@HOST or ssh://USER@HOST:PORT"
        );
        check_options(options)?;
        let mut options = options.to_vec();
        options.extend(OPTIONS.map(str::to_owned));
        // Nobody's name on the workstation is an account on a robot.
        if !host.contains('@') {
            options.push("User=root".to_owned());
        }
        let user = host.trim_start_matches("ssh://").split_once('@').map(|(user, _)| user);
        let updater = user == Some(UPDATER);
        Ok(Self { host: host.to_owned(), options, agent: vec!["slotd"], updater })
    }

    /// The first contact: finds out how the agent is to be called, and how the robot stands.
    ///
    /// # Errors
    /// When the robot cannot be reached, has no agent, or refuses.
    pub fn first(&mut self) -> Result<Status> {
        // The updater's sessions reach the agent and nothing else.
        if !self.updater {
            let (code, out, tail) = self.run(&["id", "-u"], None, |_| false)?;
            if code != Some(0) {
                return self.no_login(&last(&tail));
            }
            if String::from_utf8_lossy(&out).trim() != "0" {
                self.agent = vec!["sudo", "-n", "slotd"];
            }
        }
        match self.status()? {
            Reply::Said(status) => Ok(status),
            Reply::Refused(refused) => Err(refused.into()),
            Reply::Broken(why) if self.updater => self.no_login(&why),
            Reply::Broken(why) => bail!("the connection broke: {why}"),
        }
    }

    fn no_login<T>(&self, why: &str) -> Result<T> {
        // A product may forbid root to log in, as those that are released do.
        let other = match self.host.rsplit_once('@') {
            None => format!(
                "; a robot whose product lets root not log in is reached as {}",
                match self.host.strip_prefix("ssh://") {
                    Some(name) => format!("ssh://{UPDATER}@{name}"),
                    None => format!("{UPDATER}@{}", self.host),
                }
            ),
            Some(_) => String::new(),
        };
        if UNREACHED.iter().any(|sign| why.contains(sign)) {
            bail!(
                "cannot reach it: {why}\n\
                 help: is the robot on, in this network, and is that its name? `ssh {}` tells more",
                self.host
            );
        }
        bail!(
            "cannot log in: {why}\n\
             help: try `ssh {}`; the robot must know your public key (README, \"Pushing to robots\"){other}",
            self.host
        )
    }

    /// How the robot stands.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn status(&self) -> Result<Reply<Status>> {
        let reply = self.ask::<Status>(&["status"], None, |_| {})?;
        if let Reply::Said(status) = &reply {
            // By it alone a restart is seen.
            ensure!(status.boot_id.is_some(), "the robot's kernel does not say its boot id");
        }
        Ok(reply)
    }

    /// Asks the agent. The words go through the robot's shell: they are our own, and plain.
    ///
    /// # Errors
    /// When there is no agent, or it says something else than it should.
    pub fn ask<T: DeserializeOwned>(
        &self,
        verb: &[&str],
        input: Option<File>,
        mut progress: impl FnMut(Progress),
    ) -> Result<Reply<T>> {
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
                    format!("`{shown}` answers with something else than this version expects")
                });
                Ok(Reply::Said(answer?))
            }
            None | Some(SSH_FAILED) => Ok(Reply::Broken(last(&tail))),
            Some(NOT_FOUND) => bail!(
                "the robot lacks a program: {}\nhelp: log in as root, to an image that `cargo xtask build-image` made",
                last(&tail)
            ),
            Some(code) => match serde_json::from_slice::<RefusedLine>(&out) {
                Ok(line) => Ok(Reply::Refused(line.refused)),
                Err(_) => bail!("`{shown}` failed with exit code {code}: {}", tail.join("\n")),
            },
        }
    }

    /// Runs words on the robot: exit code (`None`: ssh was killed), standard output, and the last lines
    /// of standard error but for those that `taken` takes.
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

/// Refuses what is no option of ssh_config(5).
///
/// # Errors
/// Names the one that is none.
pub(crate) fn check_options(options: &[String]) -> Result<()> {
    for option in options {
        let key = option.split_once('=').map(|(key, _)| key).unwrap_or_default();
        ensure!(
            !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric()),
            "`{option}` is no option of ssh\nhelp: KEY=VALUE as in ssh_config(5), such as Port=2222"
        );
    }
    Ok(())
}

fn last(tail: &[String]) -> String {
    tail.last().cloned().unwrap_or_else(|| "ssh says nothing".to_owned())
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
