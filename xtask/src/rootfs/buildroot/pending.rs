//! What the next make would build again in an output directory, and the permission to build
//! everything again: that can take hours.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use camino::Utf8Path;

use super::info::BuildrootInfo;
use super::rebuild::{OutputState, RebuildAction, compare_trees};
use super::tree::BuildrootTree;
use crate::artifact::none_if_missing;
use crate::progress::{format_duration, warn};
use crate::text;

/// The difference between an output directory and a request: what the next make builds again, and how
/// much is finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingRebuild {
    /// What is to be done.
    pub action: RebuildAction,
    /// How many packages are finished.
    pub finished: usize,
    /// How many packages the configuration has.
    pub total: usize,
    /// The build time that is recorded for this directory; `None` if there is no record.
    pub took: Option<Duration>,
}

impl PendingRebuild {
    /// Compares an output directory with what is requested.
    ///
    /// # Errors
    /// When a file of the directory or of the tree cannot be read.
    pub fn find(
        output: &Utf8Path,
        tree: &BuildrootTree,
        state: &OutputState,
        info: &BuildrootInfo,
    ) -> Result<Self> {
        let finished = info.finished(output);
        let action = match OutputState::load(output)? {
            Some(old) if old.tree == state.tree => compare_trees(&old, state, info, None),
            Some(old) => {
                let commit = old.tree.split(' ').next().unwrap_or_default();
                let differ = tree.changed_since(commit, &old.tree_changed)?;
                compare_trees(&old, state, info, differ.as_ref())
            }
            None if finished == 0 => RebuildAction::Nothing,
            None => RebuildAction::Everything(
                "the configuration of the output directory is unknown".to_owned(),
            ),
        };
        let log = none_if_missing(fs::read_to_string(output.join("build/build-time.log")))
            .with_context(|| format!("reading the times of {output}"))?;
        let took = log.and_then(|log| busy_time(&log));
        Ok(Self { action, finished, total: info.packages().count(), took })
    }

    /// Asks on the `terminal` before finished packages are removed to be built again.
    ///
    /// # Errors
    /// Without permission: no `yes`, and no terminal or another answer.
    pub fn require_permission(&self, output: &Utf8Path, yes: bool, terminal: bool) -> Result<()> {
        let RebuildAction::Everything(why) = &self.action else { return Ok(()) };
        if yes || self.finished == 0 {
            return Ok(());
        }
        let lost = self.describe_loss(output);
        ensure!(
            terminal,
            "a full rebuild is necessary: {why}; {lost} would be built again, and there is no terminal \
             to confirm it\n\
             help: `cargo xtask buildroot why` shows what changed; undo the change, or add --yes"
        );
        warn(format!("a full rebuild is necessary: {why}; {lost} would be built again"));
        let answer = text::ask_line("Type yes to continue: ")?;
        ensure!(answer == "yes", "not confirmed: nothing was removed or built");
        Ok(())
    }

    /// The finished packages and their build time: `78 finished packages in /o (62 min 5 s)`.
    pub fn describe_loss(&self, output: &Utf8Path) -> String {
        let took = self.took.map(|took| format!(" ({})", format_duration(took)));
        format!("{} finished packages in {output}{}", self.finished, took.unwrap_or_default())
    }
}

/// The time in which at least one step ran, by the last run of each step in `build-time.log`, whose
/// lines are `seconds:start|end:step : package`. Breaks between builds are not part of it.
fn busy_time(log: &str) -> Option<Duration> {
    let mut started: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    let mut ran: BTreeMap<(&str, &str), (f64, f64)> = BTreeMap::new();
    for line in log.lines() {
        let fields: Vec<&str> = line.splitn(4, ':').map(str::trim).collect();
        let [time, edge, step, package] = fields.as_slice() else { continue };
        let Ok(time) = time.parse::<f64>() else { continue };
        if *edge == "start" {
            started.insert((step, package), time);
        } else if let Some(start) = started.remove(&(*step, *package)) {
            ran.insert((step, package), (start, time));
        }
    }
    let mut ran: Vec<(f64, f64)> = ran.into_values().collect();
    ran.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut busy, mut until) = (0.0, f64::MIN);
    for (start, end) in ran {
        busy += (end - start.max(until)).max(0.0);
        until = until.max(end);
    }
    Duration::try_from_secs_f64(busy).ok().filter(|busy| !busy.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_ran_at_once_are_counted_once() {
        let log = "100.0:start:build               : zlib\n110.5:start:build               : kmod\n\
                   120.5:end  :build               : zlib\n130.5:end  :build               : kmod\n\
                   900.0:start:extract             : nano\nbroken\n\
                   5000.0:start:install-target      : zlib\n5010.0:end  :install-target      : zlib\n";
        assert_eq!(busy_time(log), Some(Duration::from_millis(40_500)));
        assert_eq!(busy_time("900.0:start:extract : nano\n"), None);
    }

    #[test]
    fn finished_packages_are_removed_only_with_permission() {
        let pending = |action: RebuildAction, finished: usize| PendingRebuild {
            action,
            finished,
            total: 78,
            took: Some(Duration::from_secs(3725)),
        };
        let all = || RebuildAction::Everything("BR2_INIT_SYSTEMD changed".to_owned());
        let output = Utf8Path::new("/o");
        for (pending, yes) in [
            (pending(RebuildAction::Nothing, 78), false),
            (pending(all(), 0), false),
            (pending(all(), 78), true),
        ] {
            pending.require_permission(output, yes, false).expect("nothing to ask");
        }
        let error = pending(all(), 78).require_permission(output, false, false);
        let error = error.unwrap_err().to_string();
        assert_eq!(
            error,
            "a full rebuild is necessary: BR2_INIT_SYSTEMD changed; 78 finished packages in /o \
             (62 min 5 s) would be built again, and there is no terminal to confirm it\n\
             help: `cargo xtask buildroot why` shows what changed; undo the change, or add --yes"
        );
    }
}
