//! The inputs of a build from outside of the configuration: the commit and the epoch.

use anyhow::{Context, Result, anyhow};
use camino::Utf8Path;

use crate::git;
use crate::plan::CheckoutFacts;
use crate::variable;

/// Asks git and the environment. The epoch is `SOURCE_DATE_EPOCH`, else the commit's time.
///
/// # Errors
/// `SOURCE_DATE_EPOCH` that is not a number; neither it nor a commit; a checkout that git cannot compare.
pub fn collect(root: &Utf8Path) -> Result<CheckoutFacts> {
    let commit = git::git_in(root).args(["rev-parse", "HEAD"]).read();
    let commit = commit.map(|message| message.trim().to_owned()).ok();
    let modified = match &commit {
        Some(commit) => !git::changed_files(root, commit)?.is_empty(),
        None => false,
    };
    // CI systems export what is not set as an empty text.
    let epoch = match variable::find("SOURCE_DATE_EPOCH")? {
        Some(text) if !text.trim().is_empty() => text.trim().parse().with_context(|| {
            format!("SOURCE_DATE_EPOCH: expected seconds since 1970, found \"{text}\"")
        })?,
        _ => git::commit_time(root).map_err(|error| {
            let message = format!("{error:#}");
            let help = help_for_git_error(&message);
            anyhow!("reading the commit's time for reproducible outputs: {message}\nhelp: {help}")
        })?,
    };
    Ok(CheckoutFacts { commit, modified, epoch })
}

/// The help for an error of git.
fn help_for_git_error(message: &str) -> &'static str {
    const KNOWN: [(&str, &str); 3] = [
        (
            "dubious ownership",
            "the checkout belongs to another user: build as that user, or add it to git's setting \
             `safe.directory`",
        ),
        ("bad config", "correct git's settings: `git config --list --show-origin` shows the file"),
        ("bogus format in GIT_CONFIG", "correct or unset GIT_CONFIG_PARAMETERS"),
    ];
    let known = KNOWN.iter().find(|(sign, _)| message.contains(sign)).map(|(_, help)| *help);
    known.unwrap_or(
        "build in a checkout with a commit (git must be installed), or set SOURCE_DATE_EPOCH",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_git_says_brings_its_remedy() {
        // As git 2.47 says it.
        let owner = "fatal: detected dubious ownership in repository at '/srv/robot'";
        assert!(help_for_git_error(owner).contains("`safe.directory`"));
        let config = "fatal: bad config line 1 in file /home/me/.gitconfig";
        assert!(help_for_git_error(config).contains("git config --list --show-origin"));
        assert!(help_for_git_error("fatal: not a git repository").contains("SOURCE_DATE_EPOCH"));
    }
}
