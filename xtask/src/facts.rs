//! What the build takes from outside the configuration: the commit and the epoch.

use anyhow::{Context, Result, bail};
use camino::Utf8Path;

use crate::exec::Tool;

/// Facts about this checkout. Collected once; `plan::resolve` is pure.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Facts {
    /// The commit that is checked out; `None` outside a git checkout.
    pub commit: Option<String>,
    /// Files differ from that commit.
    pub modified: bool,
    /// Seconds since 1970 that every timestamp in the outputs is set to.
    pub epoch: u64,
}

impl Facts {
    /// Asks git and the environment. The epoch is `SOURCE_DATE_EPOCH`, else the commit's time.
    ///
    /// # Errors
    /// `SOURCE_DATE_EPOCH` that is not a number; neither it nor a commit.
    pub fn collect(root: &Utf8Path) -> Result<Self> {
        let git =
            |args: &[&str]| Tool::new("git").args(["-C", root.as_str()]).args(args).read().ok();
        let commit = git(&["rev-parse", "HEAD"]).map(|s| s.trim().to_owned());
        let modified = git(&["status", "--porcelain"]).is_some_and(|s| !s.trim().is_empty());
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) => text.trim().parse().with_context(|| {
                format!("SOURCE_DATE_EPOCH: expected seconds since 1970, found \"{text}\"")
            })?,
            Err(_) => match git(&["log", "-1", "--format=%ct"]).and_then(|s| s.trim().parse().ok())
            {
                Some(time) => time,
                None => bail!(
                    "choosing the time for reproducible outputs: {root} is not a git checkout with a commit\n\
                     help: build in a checkout (git must be installed), or set SOURCE_DATE_EPOCH"
                ),
            },
        };
        Ok(Self { commit, modified, epoch })
    }
}
