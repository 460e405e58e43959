//! A checkout as a build uses it: what is chosen in it, the plan that this makes, and the directory of the results, which
//! one build at a time may write.

use std::fs::File;

use anyhow::{Context, Result};
use bundle::Version;
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::write_atomically;
use crate::config::{self, Config};
use crate::facts;
use crate::plan::{self, CheckoutFacts, Plan};
use crate::progress::{list_names, say};
use crate::time::format_timestamp;

/// What is chosen among the products and boards of a workspace.
#[derive(Debug, Clone, Default)]
pub struct BuildSelection {
    /// The product; `None`: the one with `default = true`.
    pub product: Option<String>,
    /// The board; `None`: the product's default-board.
    pub board: Option<String>,
}

/// Loads the selected product and board, without resolving them.
///
/// # Errors
/// Everything that is wrong with the files.
pub fn load_config(target: &BuildSelection) -> Result<Config> {
    let (product, board) = (target.product.as_deref(), target.board.as_deref());
    let config = config::load(&config::workspace_root()?, product, board)?;
    let junk: Vec<&Utf8PathBuf> = config.overlays.iter().flat_map(|o| &o.junk).collect();
    if !junk.is_empty() {
        say("overlay", format!("ignored (left by an editor or a desktop): {}", list_names(&junk)));
    }
    Ok(config)
}

/// Loads and resolves the selected product and board.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn resolve_plan(target: &BuildSelection) -> Result<(Config, CheckoutFacts, Plan)> {
    let config = load_config(target)?;
    let facts = facts::collect(&config.root)?;
    let plan = plan::resolve(&config, &facts)?;
    Ok((config, facts, plan))
}

/// Like [`resolve_plan`], but for a nightly: with a version that is higher than the product's and than
/// those of all earlier commits.
///
/// # Errors
/// Everything that is wrong with the configuration.
pub fn resolve_nightly(target: &BuildSelection) -> Result<(Config, CheckoutFacts, Plan)> {
    let mut config = load_config(target)?;
    let facts = facts::collect(&config.root)?;
    let version = &mut config.product.version.value;
    *version = nightly_version(version, facts.epoch)?;
    let plan = plan::resolve(&config, &facts)?;
    Ok((config, facts, plan))
}

/// The nightly's version: a pre-release of the next patch version, numbered by the commit's time in
/// UTC.
fn nightly_version(version: &Version, epoch: u64) -> Result<Version> {
    let digits: String = format_timestamp(epoch).chars().filter(char::is_ascii_digit).collect();
    let next = match version.as_str().split_once('-') {
        // Of a pre-release, nightlies sort after it and before the next one. One more word would
        // exceed the length of a version.
        Some(_) => format!("{version}.{digits}"),
        None => {
            let (major_minor, patch) =
                version.as_str().rsplit_once('.').context("a version has three numbers")?;
            let patch = patch.parse::<u64>().context("a version has three numbers")?;
            let patch =
                patch.checked_add(1).context("cannot increment the patch version any further")?;
            format!("{major_minor}.{patch}-nightly.{digits}")
        }
    };
    Version::parse(&next).with_context(|| format!("naming the nightly of {version}"))
}

/// The directory for the results of a build.
pub fn dist_dir(root: &Utf8Path, plan: &Plan) -> Utf8PathBuf {
    root.join("dist").join(&plan.product.name).join(&plan.board.name)
}

/// Waits until no other build writes results there; the returned guard grants exclusive use, since
/// all builds write the same temporary names.
///
/// # Errors
/// When the directory cannot be made or locked.
pub fn lock_dist_dir(dist: &Utf8Path) -> Result<File> {
    let context = || format!("locking {dist}");
    std::fs::create_dir_all(dist).with_context(context)?;
    let dir = File::open(dist).with_context(context)?;
    if dir.try_lock().is_err() {
        say("plan", format!("waiting for another build in {dist}"));
        dir.lock().with_context(context)?;
    }
    Ok(dir)
}

/// Writes `plan.json` beside the results.
///
/// # Errors
/// When it cannot be written.
pub fn save_plan(plan: &Plan, dist: &Utf8Path) -> Result<()> {
    let json = serde_json::to_vec_pretty(plan).context("describing the plan")?;
    write_atomically(&dist.join("plan.json"), |out| Ok(out.write_all(&json)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nightlies_grow_with_time_and_lie_between_releases() {
        let version = |text: &str| Version::parse(text).expect("a version");
        let night = |text: &str, epoch| nightly_version(&version(text), epoch).expect("a nightly");
        let one = night("0.1.0", 1_795_222_196);
        assert_eq!(one.as_str(), "0.1.1-nightly.20261121004956");
        assert!(version("0.1.0") < one && one < night("0.1.0", 1_795_222_197));
        assert!(night("0.1.0", 1_795_222_197) < version("0.1.1"));
        let pre = night("2.0.0-rc.1", 0);
        assert!(version("2.0.0-rc.1") < pre && pre < version("2.0.0-rc.2"), "{pre}");
    }
}
