//! The inputs of a build from outside of the configuration: the commit and the epoch.

use anyhow::{Context, Result, anyhow};
use camino::Utf8Path;

use crate::git;

/// Facts about this checkout. Collected once; `plan::resolve` is pure.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Facts {
    /// The commit that is checked out; `None` outside a git checkout.
    pub commit: Option<String>,
    /// Whether files differ from that commit ([`git::changes`]).
    pub modified: bool,
    /// Seconds since 1970 that every timestamp in the outputs is set to.
    pub epoch: u64,
}

impl Facts {
    /// Reads git and the environment. The epoch is `SOURCE_DATE_EPOCH`, else the commit's time.
    ///
    /// # Errors
    /// `SOURCE_DATE_EPOCH` is not a number; there is neither this variable nor a commit; git cannot
    /// compare the checkout.
    pub fn collect(root: &Utf8Path) -> Result<Self> {
        let commit = git::at(root).args(["rev-parse", "HEAD"]).read();
        let commit = commit.map(|said| said.trim().to_owned()).ok();
        let modified = match &commit {
            Some(commit) => !git::changes(root, commit)?.is_empty(),
            None => false,
        };
        // CI systems export unset variables as empty text.
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) if !text.trim().is_empty() => text.trim().parse().with_context(|| {
                format!("SOURCE_DATE_EPOCH: expected seconds since 1970, found \"{text}\"")
            })?,
            _ => git::time(root).map_err(|error| {
                let said = format!("{error:#}");
                let help = help(&said);
                anyhow!("reading the commit's time for reproducible outputs: {said}\nhelp: {help}")
            })?,
        };
        Ok(Self { commit, modified, epoch })
    }
}

/// The help for an error of git.
fn help(said: &str) -> &'static str {
    const KNOWN: [(&str, &str); 3] = [
        (
            "dubious ownership",
            "the checkout belongs to another user: build as that user, or add it to git's setting \
             `safe.directory`",
        ),
        ("bad config", "correct git's settings: `git config --list --show-origin` shows the file"),
        ("bogus format in GIT_CONFIG", "correct or unset GIT_CONFIG_PARAMETERS"),
    ];
    let known = KNOWN.iter().find(|(sign, _)| said.contains(sign)).map(|(_, help)| *help);
    known.unwrap_or(
        "build in a checkout with a commit (git must be installed), or set SOURCE_DATE_EPOCH",
    )
}
