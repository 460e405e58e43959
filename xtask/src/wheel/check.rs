//! Checks a set of wheels against the target and against each other: tags, `Requires-Python`, and
//! that every `Requires-Dist` whose marker holds on the target is met.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use anyhow::{Result, anyhow, bail};
use pep508_rs::pep440_rs::Version;
use pep508_rs::{ExtraName, MarkerEnvironment};
use serde::{Deserialize, Serialize};

use super::archive::CheckedWheel;
use super::metadata::{Dependency, WheelMetadata, satisfies};
use super::target::{WheelTag, WheelTarget, normalise_name};

/// A Python distribution in the base.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BaseDistribution {
    /// Its name; compared as PEP 503 says.
    pub name: String,
    /// Its version (PEP 440).
    pub version: String,
}

/// A requirement that is not met.
#[derive(Debug, Clone)]
pub struct UnmetRequirement {
    /// The distribution whose metadata asks for it; `None` for the lock's own requirement.
    pub needed_by: Option<String>,
    /// What it asks for, without its marker.
    pub requirement: String,
    /// The version that is present but does not meet it.
    pub found: Option<String>,
}

/// What follows from a set of distributions' metadata on one target.
#[derive(Debug, Default)]
pub struct DependencyClosure {
    /// For each distribution that is needed, the distributions that need it (normalised names).
    pub needed_by: BTreeMap<String, BTreeSet<String>>,
    /// What the base provides, by normalised name.
    pub from_base: BTreeMap<String, String>,
    /// What is not met.
    pub unmet: Vec<UnmetRequirement>,
}

/// Follows requirements from `top` through `wheels`; what the base provides is not followed.
///
/// # Errors
/// When a version of the base cannot be read.
pub fn follow_requirements(
    top: &Dependency,
    wheels: &BTreeMap<String, &WheelMetadata>,
    base: &[BaseDistribution],
    markers: &MarkerEnvironment,
) -> Result<DependencyClosure> {
    let mut provided = BTreeMap::new();
    for distribution in base {
        // A distribution whose version is invalid in PEP 440 cannot meet a requirement.
        if let Ok(version) = Version::from_str(&distribution.version) {
            provided.insert(normalise_name(&distribution.name), version);
        }
    }
    let mut closure = DependencyClosure::default();
    let mut visited = BTreeSet::new();
    let mut queue: Vec<(Option<String>, Dependency)> = vec![(None, top.clone())];
    while let Some((by, requirement)) = queue.pop() {
        let name = normalise_name(requirement.name.as_ref());
        let found = wheels.get(&name).map(|m| &m.version).or_else(|| provided.get(&name));
        if !found.is_some_and(|version| satisfies(&requirement, version)) {
            let mut plain = requirement.clone();
            plain.marker = pep508_rs::MarkerTree::TRUE;
            closure.unmet.push(UnmetRequirement {
                needed_by: by.clone(),
                requirement: plain.to_string(),
                found: found.map(Version::to_string),
            });
        }
        let Some(metadata) = wheels.get(&name) else {
            closure.from_base.extend(found.map(|version| (name, version.to_string())));
            continue;
        };
        let needed = closure.needed_by.entry(name.clone()).or_default();
        // An extra may make a distribution need itself (`foo[all]` needs `foo[a]`).
        needed.extend(by.filter(|by| *by != name));
        let mut extras: Vec<ExtraName> = requirement.extras.clone();
        extras.sort();
        let key = extras.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        if !visited.insert((name.clone(), key)) {
            continue;
        }
        for dependency in &metadata.requires {
            if dependency.evaluate_markers(markers, &extras) {
                queue.push((Some(name.clone()), dependency.clone()));
            }
        }
    }
    closure
        .unmet
        .sort_by(|a, b| (&a.needed_by, &a.requirement).cmp(&(&b.needed_by, &b.requirement)));
    closure.unmet.dedup_by(|a, b| a.needed_by == b.needed_by && a.requirement == b.requirement);
    Ok(closure)
}

/// Checks wheels against the target and each other; returns which distribution needs which.
///
/// # Errors
/// Names every wheel and rule that is broken: a wrong tag, a Python that does not fit, a
/// requirement that neither the wheels nor the base meet, a wheel that nothing needs, two wheels of
/// one distribution.
pub fn check_wheels(
    requirement: &str,
    wheels: &[CheckedWheel],
    target: &WheelTarget,
    base: &[BaseDistribution],
) -> Result<DependencyClosure> {
    let accepted = target.tags();
    let mut wrong = Vec::new();
    let mut by_name = BTreeMap::new();
    for wheel in wheels {
        if !wheel.name.matches_any(&accepted) {
            let tags =
                wheel.name.tags.iter().map(WheelTag::to_string).collect::<Vec<_>>().join(", ");
            wrong.push(format!("{}: its tags ({tags}) do not fit {target}", wheel.file));
        }
        if let Err(error) = wheel.metadata.check_python(target) {
            wrong.push(format!("{}: {}/METADATA: {error:#}", wheel.file, wheel.dist_info));
        }
        if by_name.insert(wheel.name.name.clone(), &wheel.metadata).is_some() {
            wrong.push(format!("{}: a second wheel of {}", wheel.file, wheel.name.name));
        }
    }
    let top = super::metadata::parse_requirement(requirement)?;
    let closure = follow_requirements(&top, &by_name, base, &target.markers()?)?;
    for unmet in &closure.unmet {
        let by = match &unmet.needed_by {
            None => "the lock".to_owned(),
            Some(name) => wheels
                .iter()
                .find(|wheel| wheel.name.name == *name)
                .map_or_else(|| name.clone(), |w| format!("{}: {}/METADATA", w.file, w.dist_info)),
        };
        let found = match &unmet.found {
            Some(version) => format!("but the version is {version}"),
            None => "but neither the wheels nor the base contain it".to_owned(),
        };
        wrong.push(format!("{by} requires {}, {found}", unmet.requirement));
    }
    for wheel in wheels {
        if !closure.needed_by.contains_key(&wheel.name.name) {
            wrong.push(format!("{}: not needed by any other wheel", wheel.file));
        }
    }
    match wrong.len() {
        0 => Ok(closure),
        1 => Err(anyhow!("{}\n{HELP}", wrong[0])),
        n => bail!("the wheels have {n} errors:\n  {}\n{HELP}", wrong.join("\n  ")),
    }
}

/// What to do when the wheels do not fit.
const HELP: &str = "help: resolve the wheels again for this base with `cargo xtask lock`";
