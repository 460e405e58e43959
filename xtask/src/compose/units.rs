//! Enables systemd units as `systemctl preset` would: the presets of the overlays select the units,
//! the units' `[Install]` sections define the links. Done here because the root filesystem is
//! read-only on the robot and the build machine need not have systemd; `xtask/tests/presets.rs`
//! compares with the real systemctl.

mod install;
mod name;
mod preset;

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

use self::install::InstallSection;
use self::name::{UnitName, UnitNameForm, why_no_alias};
use self::preset::{PresetAction, PresetRule};
use crate::rootfs::tree::{EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree};

/// The directory for links.
const CONFIG: &str = "etc/systemd/system";

/// The directories of units; the first match applies (systemd.unit(5), as far as it concerns an
/// image).
const UNIT_DIRS: [&str; 4] =
    [CONFIG, "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system"];

/// Makes and removes links as `systemctl preset` would for each unit that a line of an overlay's
/// preset matches.
///
/// # Errors
/// An `enable` line of an overlay that names a unit (not by a pattern) that cannot be enabled; an
/// invalid line.
pub fn apply_presets(tree: &mut RootTree) -> Result<()> {
    let rules = preset::read_rules(tree)?;
    let (mut wanted, mut unwanted) = (Vec::new(), Vec::new());
    let units = Units::from_tree(tree);
    for unit in units.asked(&rules) {
        let Some(rule) = rules.iter().find(|rule| rule.matches(&unit)) else { continue };
        // A named unit must exist and be valid; a unit that matches a pattern may be anything.
        let named = rule.ours && rule.unit().is_some();
        let found = units.find(&unit).map(|found| found.map(|found| found.name));
        match (&rule.action, found) {
            (PresetAction::Ignore, _) => {}
            (PresetAction::Disable, Ok(Some(name))) if name == unit => unwanted.push(unit),
            (PresetAction::Disable, _) => {}
            (PresetAction::Enable(instances), Ok(Some(name))) if name == unit => {
                if unit.form() == UnitNameForm::Template && !instances.is_empty() {
                    let filled = instances.iter().map(|i| {
                        unit.with_instance(i).with_context(|| format!("invalid instance name {i}"))
                    });
                    for one in filled {
                        wanted.push((one.with_context(|| rule.line.clone())?, named, &rule.line));
                    }
                } else {
                    wanted.push((unit, named, &rule.line));
                }
            }
            (PresetAction::Enable(_), _) if !named => {}
            (PresetAction::Enable(_), found) => {
                let problem = match found {
                    Ok(Some(name)) => anyhow::anyhow!(
                        "{unit} is an alias of {name}\nhelp: use {name} in the preset"
                    ),
                    Ok(None) => anyhow::anyhow!(
                        "there is no unit {}\nhelp: name a unit of the base system or of an overlay",
                        unit.template().as_ref().unwrap_or(&unit)
                    ),
                    Err(error) => error,
                };
                return Err(problem.context(format!("applying {}", rule.line)));
            }
        }
    }
    let gone = units.links_to(&unwanted);
    let mut done = BTreeSet::new();
    let mut links = Vec::new();
    for (unit, named, line) in wanted {
        match units.enable(&unit, &mut done) {
            Ok(made) => links.extend(made.into_iter().map(|link| (link, named, line.clone()))),
            Err(error) if named => return Err(error.context(format!("applying {line}"))),
            Err(_) => {}
        }
    }
    for path in gone {
        tree.remove(&path);
        remove_empty_parents(tree, &path);
    }
    for (link, named, line) in links {
        match link.make(tree) {
            Err(error) if named => return Err(error.context(format!("applying {line}"))),
            _ => {}
        }
    }
    Ok(())
}

/// A link to create.
#[derive(Debug)]
struct Link {
    path: String,
    /// The unit's file, absolute.
    to: String,
    /// An alias, whose path must be free; the links of dependencies replace existing links.
    alias: bool,
}

impl Link {
    fn make(&self, tree: &mut RootTree) -> Result<()> {
        if let Some(there) = tree.get(&self.path) {
            let RootEntryKind::Symlink(target) = &there.kind else {
                bail!("/{} must be a link to {}, but is not a link", self.path, self.to);
            };
            if self.is_already(tree, target) {
                return Ok(());
            }
            ensure!(
                !self.alias,
                "/{} must be a link to {}, but is a link to {target}\n\
                 help: two units claim the same name (Alias=): disable the other unit in a preset \
                 that sorts earlier",
                self.path,
                self.to
            );
        }
        let entry =
            RootEntry::new(0o777, RootEntryKind::Symlink(self.to.clone()), EntryOrigin::Compose);
        tree.insert(&self.path, entry)
    }

    /// Whether a link to `target` is equivalent: the same file, or a unit of that name.
    fn is_already(&self, tree: &RootTree, target: &str) -> bool {
        let there = absolute_target(&self.path, target);
        let known = |path: &str| UNIT_DIRS.iter().any(|dir| dir_of(path) == *dir);
        let to = self.to.trim_start_matches('/');
        let named = file_name(&there) == file_name(to) && known(&there) && known(to);
        let same =
            tree.resolve(&there).map(|(path, _)| path) == tree.resolve(to).map(|(path, _)| path);
        there == to || named || (same && tree.resolve(to).is_some())
    }
}

/// A unit that was found.
#[derive(Debug)]
struct Unit {
    name: UnitName,
    /// Its file, without the leading slash.
    path: String,
    masked: bool,
    install: InstallSection,
}

/// How systemd interprets a path.
enum Found {
    Masked,
    File,
    /// An alias of another unit: the path in the link.
    Alias(String),
    /// A unit outside of the search path.
    Linked(String),
}

/// The units of a tree.
struct Units<'t> {
    tree: &'t RootTree,
    /// The entries below [`UNIT_DIRS`].
    paths: BTreeSet<&'t str>,
}

impl<'t> Units<'t> {
    fn from_tree(tree: &'t RootTree) -> Self {
        let below = |path: &str| {
            UNIT_DIRS.iter().any(|f| path.strip_prefix(f).is_some_and(|p| p.starts_with('/')))
        };
        Self { tree, paths: tree.iter().map(|(path, _)| path).filter(|path| below(path)).collect() }
    }

    /// The units that lines of overlays select: those that are named, and all that match a pattern;
    /// sorted.
    fn asked(&self, rules: &[PresetRule]) -> BTreeSet<UnitName> {
        let ours = || rules.iter().filter(|rule| rule.ours);
        let there = self.paths.iter().filter(|path| UNIT_DIRS.contains(&dir_of(path)));
        let there = there.filter_map(|path| UnitName::new(file_name(path)));
        let matched = there.filter(|unit| ours().any(|rule| rule.matches(unit)));
        matched.chain(ours().filter_map(PresetRule::unit)).collect()
    }

    /// Finds a unit and follows links to it, as systemd does. The name of the result differs from
    /// the given one when that is an alias.
    fn find(&self, name: &UnitName) -> Result<Option<Unit>> {
        self.find_through(name, true)
    }

    /// Like [`Units::find`]; `Also=` does not follow an alias that was configured in `/etc`.
    fn find_through(&self, name: &UnitName, through_config: bool) -> Result<Option<Unit>> {
        let Some((mut unit, mut found)) = self.look_up(name)? else { return Ok(None) };
        // systemd's own limit for links.
        for _ in 0..64 {
            let target = match found {
                Found::Masked => {
                    unit.masked = true;
                    return Ok(Some(unit));
                }
                Found::File => return Ok(Some(unit)),
                _ if !through_config && dir_of(&unit.path) == CONFIG => {
                    bail!("/{} is a link", unit.path);
                }
                Found::Linked(target) => {
                    unit.path = target;
                    found = self.open(&mut unit)?;
                    continue;
                }
                Found::Alias(target) => target,
            };
            let Some(mut next) = UnitName::new(file_name(&target)) else {
                bail!("/{} is a link to /{target}, which is not a unit", unit.path);
            };
            if unit.name.form() == UnitNameForm::Instance && next.form() == UnitNameForm::Template {
                next = next.with_instance(unit.name.instance()).context("a name is too long")?;
            }
            if next == unit.name {
                unit.path = target;
                found = self.open(&mut unit)?;
            } else {
                let looked = self.look_up(&next)?;
                (unit, found) = looked.with_context(|| {
                    format!("{name} is an alias of {next}, which does not exist")
                })?;
            }
        }
        bail!("{name} is in a circle of links")
    }

    /// The file of a unit, or of its template, with the settings of the file and its drop-ins.
    fn look_up(&self, name: &UnitName) -> Result<Option<(Unit, Found)>> {
        let template = if name.form() == UnitNameForm::Instance { name.template() } else { None };
        let names: Vec<&UnitName> = std::iter::once(name).chain(&template).collect();
        let mut candidates =
            names.iter().flat_map(|name| UNIT_DIRS.iter().map(move |dir| format!("{dir}/{name}")));
        let Some(path) = candidates.find(|path| self.paths.contains(path.as_str())) else {
            return Ok(None);
        };
        let install = InstallSection::default();
        let mut unit = Unit { name: name.clone(), path, masked: false, install };
        let found = self.open(&mut unit)?;
        if matches!(found, Found::Masked) {
            return Ok(Some((unit, found)));
        }
        ensure!(
            name.form() == UnitNameForm::Plain || name.may_template(),
            "{name}: units of type {} cannot be templates",
            name.kind()
        );
        for path in self.drop_ins(&names) {
            // A dangling link hides a drop-in of that name.
            if self.tree.resolve(path).is_some() {
                let text = self.tree.read(path)?;
                unit.install.read(name, &text).with_context(|| format!("reading /{path}"))?;
            }
        }
        Ok(Some((unit, found)))
    }

    /// Drop-ins sorted by file name; of two with the same name, that of the first directory.
    fn drop_ins(&self, names: &[&UnitName]) -> Vec<&'t str> {
        let mut files: Vec<&str> = Vec::new();
        for dir in names.iter().flat_map(|n| UNIT_DIRS.iter().map(move |f| format!("{f}/{n}.d"))) {
            for &path in &self.paths {
                let is_new =
                    |files: &[&str]| !files.iter().any(|f| file_name(f) == file_name(path));
                if dir_of(path) == dir && path.ends_with(".conf") && is_new(&files) {
                    files.push(path);
                }
            }
        }
        files.sort_by(|a, b| file_name(a).cmp(file_name(b)));
        files
    }

    /// The entry at the unit's path; a file is read.
    fn open(&self, unit: &mut Unit) -> Result<Found> {
        let path = unit.path.clone();
        let entry = self.tree.get(&path).with_context(|| format!("/{path} does not exist"))?;
        let target = match &entry.kind {
            RootEntryKind::File(data) if is_empty(data) => return Ok(Found::Masked),
            RootEntryKind::File(_) | RootEntryKind::Hardlink(_) => {
                let text = self.tree.read(&path)?;
                unit.install.read(&unit.name, &text).with_context(|| format!("reading /{path}"))?;
                return Ok(Found::File);
            }
            RootEntryKind::Symlink(target) => absolute_target(&path, target),
            RootEntryKind::Folder | RootEntryKind::Special(..) => bail!("/{path} is not a file"),
        };
        let end = self.tree.resolve(&target).map(|(_, entry)| &entry.kind);
        if target == "dev/null" || matches!(end, Some(RootEntryKind::File(data)) if is_empty(data))
        {
            return Ok(Found::Masked);
        }
        if !UNIT_DIRS.iter().any(|f| target.strip_prefix(f).is_some_and(|p| p.starts_with('/'))) {
            return Ok(Found::Linked(target));
        }
        let other = UnitName::new(file_name(&target));
        let own = UnitName::new(file_name(&path));
        if let (Some(own), Some(other)) = (own, &other)
            && let Some(why) = why_no_alias(&own, other)
        {
            bail!("/{path} cannot be a link to /{target}: {why}");
        }
        Ok(Found::Alias(target))
    }

    /// The links to these units, by their name or by their target.
    fn links_to(&self, units: &[UnitName]) -> Vec<String> {
        let mut gone: BTreeSet<&str> = units
            .iter()
            .filter(|unit| matches!(self.find(unit), Ok(Some(found)) if !found.masked))
            .map(UnitName::as_str)
            .collect();
        let mut links = BTreeSet::new();
        // A link to a removed link is removed, too.
        loop {
            let before = links.len();
            for &path in &self.paths {
                let Some(RootEntryKind::Symlink(target)) = self.tree.get(path).map(|e| &e.kind)
                else {
                    continue;
                };
                let Some(name) = UnitName::new(file_name(path)) else { continue };
                let end = absolute_target(path, target);
                let end = self.tree.resolve(&end).map_or(end.as_str(), |(path, _)| path);
                let leads = gone.contains(name.as_str())
                    || name.template().is_some_and(|t| gone.contains(t.as_str()))
                    || gone.contains(file_name(end))
                    || gone.contains(end);
                if path.starts_with(CONFIG) && leads && links.insert(path.to_owned()) {
                    gone.insert(path);
                }
            }
            if links.len() == before {
                return links.into_iter().collect();
            }
        }
    }

    /// The links of a unit and of those that it names in `Also=`; `done` contains those that were
    /// visited, so that units may name each other.
    fn enable(&self, first: &UnitName, done: &mut BTreeSet<UnitName>) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        let mut rest = vec![first.clone()];
        while let Some(name) = rest.pop() {
            if !done.insert(name.clone()) {
                continue;
            }
            let found = self.find_through(&name, name == *first);
            // `Also=` names units of the same package; a unit that is not installed is not an
            // error.
            if name != *first && !matches!(&found, Ok(Some(unit)) if !unit.masked) {
                continue;
            }
            let Some(unit) = found? else { continue };
            ensure!(
                !unit.masked,
                "{name} is masked: /{} is empty or a link to /dev/null",
                unit.path
            );
            if unit.name != name {
                rest.push(unit.name);
                continue;
            }
            let asks = !unit.install.is_empty();
            ensure!(
                asks || name != *first,
                "/{} has no [Install] section: the unit cannot be enabled, another unit starts it",
                unit.path
            );
            links.extend(
                self.links_of(&unit)
                    .or_else(|error| if name == *first { Err(error) } else { Ok(Vec::new()) })?,
            );
            rest.extend(unit.install.also);
        }
        Ok(links)
    }

    fn links_of(&self, unit: &Unit) -> Result<Vec<Link>> {
        let to = format!("/{}", unit.path);
        let mut links = Vec::new();
        for alias in &unit.install.aliases {
            let alias = unit.install.print(&unit.name, alias)?;
            if let Some(path) = alias_path(&unit.name, &alias)? {
                links.push(Link { path: format!("{CONFIG}/{path}"), to: to.clone(), alias: true });
            }
        }
        let template = unit.name.form() == UnitNameForm::Template;
        let mut linked = unit.name.clone();
        if let (true, Some(instance)) = (template, &unit.install.default_instance) {
            linked = linked.with_instance(instance).context("its name is too long")?;
        }
        let whole = linked.form() != UnitNameForm::Template;
        let lists = [
            (&unit.install.wanted_by, "wants"),
            (&unit.install.required_by, "requires"),
            (&unit.install.upheld_by, "upholds"),
        ];
        let mut left = Vec::new();
        for (by, word) in
            lists.iter().flat_map(|(list, word)| list.iter().map(move |by| (by, word)))
        {
            let by = unit.install.print(&unit.name, by)?;
            match UnitName::new(&by) {
                Some(by) if whole || by.form() != UnitNameForm::Plain => {
                    let path = format!("{CONFIG}/{by}.{word}/{linked}");
                    links.push(Link { path, to: to.clone(), alias: false });
                }
                _ => left.push(by),
            }
        }
        // Like systemctl, which ignores them; without any valid unit the preset would have no
        // effect.
        let nothing = links.is_empty() && !left.is_empty();
        ensure!(
            !nothing || !whole,
            "{} is wanted by {}, which is not a unit",
            unit.name,
            left.join(", ")
        );
        ensure!(
            !nothing,
            "{} has no instance, so {} cannot start it\n\
             help: enable an instance, such as {}; or write DefaultInstance= into the unit",
            unit.name,
            left.join(", "),
            unit.name.with_instance("NAME").unwrap_or_else(|| unit.name.clone())
        );
        Ok(links)
    }
}

/// The path below [`CONFIG`] of a unit's alias; `None` for the unit's own name.
fn alias_path(unit: &UnitName, alias: &str) -> Result<Option<String>> {
    // An old form of WantedBy=: `Alias=multi-user.target.wants/a.service`.
    if let Some((dir, file)) = alias.rsplit_once('/') {
        let by = [".wants", ".requires"].iter().find_map(|end| dir.strip_suffix(end));
        let by = by.and_then(UnitName::new);
        let name = UnitName::new(file);
        let fits = |by: &UnitName, name: &UnitName| match name.form() {
            UnitNameForm::Plain => name == unit,
            UnitNameForm::Instance => name == unit || name.template().as_ref() == Some(unit),
            UnitNameForm::Template => by.form() == UnitNameForm::Template && name == unit,
        };
        ensure!(
            by.zip(name).is_some_and(|(by, name)| fits(&by, &name)),
            "Alias={alias}: not a link to {unit} in the .wants or .requires directory of a unit"
        );
        return Ok(Some(alias.to_owned()));
    }
    let Some(mut name) = UnitName::new(alias) else {
        bail!("Alias={alias}: not a valid unit name");
    };
    if name.form() == UnitNameForm::Template && unit.form() == UnitNameForm::Instance {
        name = name.with_instance(unit.instance()).context("a name is too long")?;
    }
    if name == *unit {
        return Ok(None);
    }
    match why_no_alias(&name, unit) {
        Some(why) => bail!("{name} cannot be an alias of {unit}: {why}"),
        None => Ok(Some(name.as_str().to_owned())),
    }
}

fn remove_empty_parents(tree: &mut RootTree, path: &str) {
    let mut dir = dir_of(path);
    while dir.len() > CONFIG.len() {
        let inside = format!("{dir}/");
        if tree.iter().any(|(path, _)| path.starts_with(&inside)) {
            return;
        }
        tree.remove(dir);
        dir = dir_of(dir);
    }
}

fn is_empty(data: &FileData) -> bool {
    data.size() == 0
}

fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

fn dir_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

/// A link's target as a path of the tree, with `.` and `..` resolved textually.
fn absolute_target(link: &str, target: &str) -> String {
    let base = if target.starts_with('/') { "" } else { dir_of(link) };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(target.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}
