//! What a root filesystem would start on a robot, from its own unit files: which services, in which
//! order, with which environment. Only reads files; starts nothing.
//!
//! Services of overlays are run; the base system's own services need systemd, D-Bus or hardware.
//! Unsupported settings of a service are reported, unless they only restrict the service.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
pub use contract::health_file::HttpCheck;
use contract::health_file::{self, HealthFile};
use serde::{Deserialize, Serialize};

/// The directories of unit files; the first one overrides the second one (systemd.unit(5)).
const FOLDERS: [&str; 2] = ["etc/systemd/system", "usr/lib/systemd/system"];

/// The default start timeout of a service (systemd-system.conf(5)).
const START_TIMEOUT: Duration = Duration::from_secs(90);

/// The default delay before systemd restarts a service (systemd.service(5)).
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// Prefixes of settings that only restrict a service, or only affect `systemctl`.
const CONFINEMENT: [&str; 24] = [
    "AmbientCapabilities",
    "Capability",
    "Device",
    "ExecReload",
    "InaccessiblePaths",
    "Kill",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "MemoryMax",
    "NoNewPrivileges",
    "Private",
    "Proc",
    "Protect",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RemainAfterExit",
    "Restrict",
    "RuntimeDirectoryPreserve",
    "Standard",
    "SystemCall",
    "SyslogIdentifier",
    "TasksMax",
    "TemporaryFileSystem",
    "TimeoutStop",
];

/// When a service is considered started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartCriterion {
    /// When its programs have ended.
    Ended,
    /// When its program runs.
    Running,
    /// When its program reports it (sd_notify(3)).
    Notified,
}

/// When a service that has ended is restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    No,
    /// When it has failed.
    Failed,
    /// Always.
    Always,
}

/// One program of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ServiceProgram {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// Its failure is ignored.
    pub may_fail: bool,
}

/// A condition without which a service is skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct UnitCondition {
    /// The condition as in the unit, for messages.
    pub text: String,
    /// What is checked.
    pub test: ConditionTest,
    /// The condition is negated.
    pub negated: bool,
}

/// The kinds of conditions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConditionTest {
    /// Whether a path exists.
    Exists(Utf8PathBuf),
    /// Whether an executable file exists.
    Executable(Utf8PathBuf),
    /// Whether a non-empty file exists.
    NotEmpty(Utf8PathBuf),
    /// Whether a non-empty directory exists.
    Populated(Utf8PathBuf),
    /// Whether this is a container: always true.
    Container,
}

/// A service, as far as its settings are supported here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ServiceUnit {
    /// Its name, such as `proxy.service`.
    pub name: String,
    /// Its conditions; the service is skipped when one fails.
    pub conditions: Vec<UnitCondition>,
    /// Services that start before it.
    pub after: Vec<String>,
    /// Services that start after it, from its own unit.
    #[serde(skip)]
    pub ahead_of: Vec<String>,
    /// When it is considered started.
    pub start: StartCriterion,
    /// Programs that run first, one after the other.
    pub before: Vec<ServiceProgram>,
    /// Its main programs.
    pub programs: Vec<ServiceProgram>,
    /// Variables.
    pub environment: Vec<(String, String)>,
    /// Files of variables, and whether each may be missing.
    pub environment_files: Vec<(Utf8PathBuf, bool)>,
    /// The working directory of its programs.
    pub folder: Utf8PathBuf,
    /// Directories below `/run` that are created for it.
    pub runtime: Vec<String>,
    /// Their mode.
    pub runtime_mode: u32,
    /// Its umask.
    pub umask: u32,
    /// Whether it has its own user, who is not root.
    pub own_user: bool,
    /// When it is restarted.
    pub again: RestartPolicy,
    /// The delay before a restart.
    pub pause: Duration,
    /// How long it may take to start.
    pub timeout: Duration,
}

/// A mount from the root's fstab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FstabMount {
    /// The mount point.
    pub at: Utf8PathBuf,
    /// The source: a path of the same root, or memory.
    pub what: Option<Utf8PathBuf>,
    /// For memory: its options (tmpfs(5)).
    pub options: String,
    /// The service that must have run first.
    pub after: Option<String>,
}

/// The services and mounts of a root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LocalServices {
    /// Services of overlays.
    pub units: Vec<ServiceUnit>,
    /// Enabled units that are not run here: the base system's own, and units that are not services.
    pub left_out: Vec<String>,
    /// Settings of services that are not supported here.
    pub notes: Vec<String>,
    /// The mounts of fstab.
    pub mounts: Vec<FstabMount>,
    /// Addresses that must answer for the system to be healthy (`/etc/slotd/health.d`).
    pub addresses: Vec<HttpCheck>,
}

/// Reads what `root` would start. `overlay` lists the paths of overlays, without a leading slash.
///
/// # Errors
/// A unit of an overlay that is malformed, has an unsupported setting, or depends on itself.
pub fn read_services(root: &Utf8Path, overlay: &BTreeSet<Utf8PathBuf>) -> Result<LocalServices> {
    let mut system = LocalServices { mounts: read_fstab(root)?, ..LocalServices::default() };
    for name in enabled_units(root)? {
        let there = |dir: &&&str| root.join(dir).join(&name).symlink_metadata().is_ok();
        let dir = FOLDERS.iter().find(there).copied();
        let path = Utf8Path::new(dir.unwrap_or_default()).join(&name);
        // Masked (systemctl(1)): treated as missing.
        if fs::read_link(root.join(&path)).is_ok_and(|to| to == Path::new("/dev/null")) {
            continue;
        }
        match dir {
            Some(dir) if name.ends_with(".service") && overlay.contains(&path) => {
                let text = with_drop_ins(root, dir, &name)?;
                let parsed = parse_service(&name, &text, &mut system.notes);
                system.units.push(parsed.with_context(|| format!("reading /{dir}/{name}"))?);
            }
            _ => system.left_out.push(name),
        }
    }
    in_order(&mut system.units)?;
    system.addresses = read_addresses(root)?;
    Ok(system)
}

/// The units that a target wants or requires.
fn enabled_units(root: &Utf8Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let folder = root.join(FOLDERS[0]);
    for entry in list_dir(&folder)? {
        if entry.ends_with(".wants") || entry.ends_with(".requires") {
            names.extend(list_dir(&folder.join(entry))?);
        }
    }
    Ok(names)
}

/// The names in a directory, sorted; empty if it does not exist.
fn list_dir(folder: &Utf8Path) -> Result<Vec<String>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in folder.read_dir_utf8().with_context(|| format!("reading {folder}"))? {
        let entry = entry.with_context(|| format!("reading {folder}"))?;
        names.push(entry.file_name().to_owned());
    }
    names.sort();
    Ok(names)
}

/// A unit's file and its drop-ins, by name; those of the first directory override others.
fn with_drop_ins(root: &Utf8Path, dir: &str, name: &str) -> Result<String> {
    let get = |path: &Utf8Path| {
        fs::read_to_string(root.join(path)).with_context(|| format!("reading /{path}"))
    };
    let mut text = get(&Utf8Path::new(dir).join(name))?;
    let mut drop_ins = BTreeMap::new();
    for dir in FOLDERS.iter().rev() {
        let folder = Utf8Path::new(dir).join(format!("{name}.d"));
        let found = list_dir(&root.join(&folder))?.into_iter().filter(|n| n.ends_with(".conf"));
        drop_ins.extend(found.map(|file| (file.clone(), folder.join(file))));
    }
    for path in drop_ins.values() {
        text.push('\n');
        text.push_str(&get(path)?);
    }
    Ok(text)
}

/// Settings as `section`, `key`, `value`, in order; an empty value resets earlier ones.
fn parse_settings(text: &str) -> Result<Vec<(String, String, String)>> {
    let joined = text.replace("\\\n", " ");
    let mut section = String::new();
    let mut found: Vec<(String, String, String)> = Vec::new();
    for line in joined.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name.to_owned();
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            bail!("expected `[Section]` or `Key=Value`, found `{line}`")
        };
        let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
        if value.is_empty() {
            found.retain(|(s, k, _)| *s != section || *k != key);
        } else {
            found.push((section.clone(), key, value));
        }
    }
    Ok(found)
}

/// Parses a service.
fn parse_service(name: &str, text: &str, notes: &mut Vec<String>) -> Result<ServiceUnit> {
    let mut unit = ServiceUnit {
        name: name.to_owned(),
        conditions: Vec::new(),
        after: Vec::new(),
        ahead_of: Vec::new(),
        start: StartCriterion::Running,
        before: Vec::new(),
        programs: Vec::new(),
        environment: Vec::new(),
        environment_files: Vec::new(),
        folder: Utf8PathBuf::from("/"),
        runtime: Vec::new(),
        runtime_mode: 0o755,
        umask: 0o022,
        own_user: false,
        again: RestartPolicy::No,
        pause: RESTART_PAUSE,
        timeout: START_TIMEOUT,
    };
    let mut oneshot = false;
    for (section, key, value) in parse_settings(text)? {
        let context = || format!("`{key}={value}`");
        match (section.as_str(), key.as_str()) {
            ("Unit", "After") => unit.after.extend(value.split_whitespace().map(str::to_owned)),
            ("Unit", "Before") => unit.ahead_of.extend(value.split_whitespace().map(str::to_owned)),
            ("Unit", key) if key.starts_with("Condition") => {
                unit.conditions.push(parse_condition(key, &value)?);
            }
            ("Service", "Type") => {
                oneshot = value == "oneshot";
                unit.start = match value.as_str() {
                    "oneshot" => StartCriterion::Ended,
                    "simple" | "exec" => StartCriterion::Running,
                    "notify" => StartCriterion::Notified,
                    _ => bail!("{}: expected oneshot, simple, exec or notify", context()),
                };
            }
            ("Service", "ExecStartPre") => {
                unit.before.push(parse_program(&value).with_context(context)?)
            }
            ("Service", "ExecStart") => {
                unit.programs.push(parse_program(&value).with_context(context)?)
            }
            ("Service", "Environment") => {
                for word in split_words(&value).with_context(context)? {
                    let (name, value) = word.split_once('=').with_context(context)?;
                    unit.environment.push((name.to_owned(), value.to_owned()));
                }
            }
            ("Service", "EnvironmentFile") => {
                let path = value.strip_prefix('-').unwrap_or(&value);
                unit.environment_files.push((path.into(), value.starts_with('-')));
            }
            ("Service", "WorkingDirectory") => unit.folder = value.into(),
            ("Service", "RuntimeDirectory") => {
                unit.runtime = value.split_whitespace().map(str::to_owned).collect();
            }
            ("Service", "RuntimeDirectoryMode") => {
                unit.runtime_mode = u32::from_str_radix(&value, 8).with_context(context)?;
            }
            ("Service", "UMask") => {
                unit.umask = u32::from_str_radix(&value, 8).with_context(context)?;
            }
            ("Service", "DynamicUser") => unit.own_user = value == "yes" || value == "true",
            ("Service", "Restart") => {
                unit.again = match value.as_str() {
                    "no" => RestartPolicy::No,
                    "always" => RestartPolicy::Always,
                    "on-failure" | "on-abnormal" | "on-abort" => RestartPolicy::Failed,
                    _ => bail!("{}: expected no, always or on-failure", context()),
                };
            }
            ("Service", "RestartSec") => {
                unit.pause = parse_time_span(&value).with_context(context)?
            }
            ("Service", "TimeoutStartSec" | "TimeoutSec") => {
                unit.timeout = parse_time_span(&value).with_context(context)?;
            }
            ("Service", key) if CONFINEMENT.iter().any(|start| key.starts_with(start)) => {}
            ("Service", _) => {
                notes.push(format!("{name}: {} is not supported here and ignored", context()))
            }
            _ => {}
        }
    }
    ensure!(
        !unit.programs.is_empty() && (oneshot || unit.programs.len() == 1),
        "expected one ExecStart=, found {}; several are for Type=oneshot",
        unit.programs.len()
    );
    Ok(unit)
}

fn parse_condition(key: &str, value: &str) -> Result<UnitCondition> {
    let (negated, bare) = match value.strip_prefix('!') {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let path = || Utf8PathBuf::from(bare);
    let test = match (key, bare) {
        ("ConditionPathExists", _) => ConditionTest::Exists(path()),
        ("ConditionFileIsExecutable", _) => ConditionTest::Executable(path()),
        ("ConditionFileNotEmpty", _) => ConditionTest::NotEmpty(path()),
        ("ConditionDirectoryNotEmpty", _) => ConditionTest::Populated(path()),
        ("ConditionVirtualization", "container") => ConditionTest::Container,
        _ => bail!(
            "`{key}={value}` is not supported here\n\
             help: supported are PathExists, FileIsExecutable, FileNotEmpty, DirectoryNotEmpty, \
             and ConditionVirtualization=!container for services that need hardware"
        ),
    };
    Ok(UnitCondition { text: format!("{key}={value}"), test, negated })
}

fn parse_program(value: &str) -> Result<ServiceProgram> {
    let bare = value.trim_start_matches(['-', '@', ':', '+', '!']);
    let prefix = &value[..value.len() - bare.len()];
    ensure!(!prefix.contains('@'), "the prefix @ is not supported here");
    let words = split_words(bare)?;
    ensure!(words.first().is_some_and(|w| w.starts_with('/')), "expected an absolute path");
    Ok(ServiceProgram { words, may_fail: prefix.contains('-') })
}

/// Words without specifiers, quotes or variables.
fn split_words(text: &str) -> Result<Vec<String>> {
    if let Some(c) = text.chars().find(|c| ['"', '\'', '\\', '$', '%'].contains(c)) {
        bail!("`{c}` is not supported here: only plain words are");
    }
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// A span of time (systemd.time(7)), in whole units.
fn parse_time_span(text: &str) -> Result<Duration> {
    if text == "infinity" {
        return Ok(Duration::MAX);
    }
    let mut total = Duration::ZERO;
    for part in text.split_whitespace() {
        let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        let (number, unit) = part.split_at(digits);
        let number: u64 = number.parse().context("expected a number and a unit, such as 5min")?;
        total += match unit {
            "ms" => Duration::from_millis(number),
            "" | "s" | "sec" => Duration::from_secs(number),
            "m" | "min" => Duration::from_secs(number.saturating_mul(60)),
            "h" => Duration::from_secs(number.saturating_mul(3600)),
            _ => bail!("expected ms, s, min or h, found `{unit}`"),
        };
    }
    Ok(total)
}

/// Sorts services so that each comes after its dependencies, and drops dependencies that are not
/// among them.
fn in_order(units: &mut Vec<ServiceUnit>) -> Result<()> {
    let names: BTreeSet<String> = units.iter().map(|unit| unit.name.clone()).collect();
    let declared: Vec<(String, Vec<String>)> =
        units.iter_mut().map(|u| (u.name.clone(), std::mem::take(&mut u.ahead_of))).collect();
    for unit in units.iter_mut() {
        let others = declared.iter().filter(|(_, later)| later.contains(&unit.name));
        unit.after.extend(others.map(|(name, _)| name.clone()));
        unit.after.retain(|other| names.contains(other));
    }
    let mut placed: Vec<ServiceUnit> = Vec::new();
    while !units.is_empty() {
        let ready =
            |unit: &ServiceUnit| unit.after.iter().all(|o| placed.iter().any(|p| p.name == *o));
        let Some(next) = units.iter().position(ready) else {
            let names: Vec<&str> = units.iter().map(|unit| unit.name.as_str()).collect();
            bail!("these services depend on each other in a circle: {}", names.join(", "));
        };
        placed.push(units.remove(next));
    }
    *units = placed;
    Ok(())
}

/// The mounts of fstab, except the root: memory, and bind mounts of `data`.
fn read_fstab(root: &Utf8Path) -> Result<Vec<FstabMount>> {
    let path = root.join("etc/fstab");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [what, at, kind, options, ..] = fields[..] else { continue };
        let has = |name: &str| options.split(',').any(|option| option == name);
        let what = match kind {
            "tmpfs" => None,
            _ if has("bind") => Some(Utf8PathBuf::from(what)),
            // The line of the slot; any other source would be a partition.
            _ => continue,
        };
        let own = |option: &&str| ["mode=", "size="].iter().any(|key| option.starts_with(key));
        let own: Vec<&str> = options.split(',').filter(own).collect();
        let after = options.split(',').find_map(|o| o.strip_prefix("x-systemd.requires="));
        found.push(FstabMount {
            at: at.into(),
            what,
            options: own.join(","),
            after: after.map(str::to_owned),
        });
    }
    Ok(found)
}

/// The addresses of the agent's declared health checks.
fn read_addresses(root: &Utf8Path) -> Result<Vec<HttpCheck>> {
    let folder = root.join(health_file::FOLDER);
    let mut found = Vec::new();
    for name in list_dir(&folder)?.into_iter().filter(|name| name.ends_with(".toml")) {
        let path = folder.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        found.extend(HealthFile::parse_address(&text).with_context(|| format!("reading {path}"))?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const PROXY: &str = "[Unit]\nDescription=x = y\nAfter=api.service network.target\n\
        After=state.service\nConditionFileIsExecutable=/usr/bin/x\n# why\n\
        [Service]\nType=notify\nEnvironmentFile=-/usr/lib/x.env\nEnvironment=A=1 B=a=b\n\
        ExecStartPre=-/bin/prepare all\nExecStart=/usr/bin/x \\\n  --fast\nRestart=always\nRestartSec=2s\n\
        TimeoutStartSec=1min 30s\nDynamicUser=yes\nRuntimeDirectory=x\nRuntimeDirectoryMode=0700\n\
        WorkingDirectory=/run/x\nUMask=0077\nProtectSystem=strict\nLimitNOFILE=5\n\
        [Install]\nWantedBy=multi-user.target\n";

    fn one(text: &str) -> Result<ServiceUnit> {
        parse_service("x.service", text, &mut Vec::new())
    }

    #[test]
    fn a_service_is_read_as_systemd_would() {
        let mut notes = Vec::new();
        let unit = parse_service("x.service", PROXY, &mut notes).unwrap();
        assert_eq!(unit.after, ["api.service", "network.target", "state.service"]);
        assert_eq!(unit.conditions[0].test, ConditionTest::Executable("/usr/bin/x".into()));
        assert_eq!(unit.environment, [("A".into(), "1".into()), ("B".into(), "a=b".into())]);
        assert_eq!(unit.environment_files, [("/usr/lib/x.env".into(), true)]);
        assert_eq!(
            unit.before,
            [ServiceProgram { words: vec!["/bin/prepare".into(), "all".into()], may_fail: true }]
        );
        assert_eq!(unit.programs[0].words, ["/usr/bin/x", "--fast"]);
        assert_eq!((unit.start, unit.again), (StartCriterion::Notified, RestartPolicy::Always));
        assert_eq!((unit.pause.as_secs(), unit.timeout.as_secs()), (2, 90));
        assert_eq!((unit.runtime_mode, unit.umask, unit.own_user), (0o700, 0o077, true));
        assert_eq!(unit.folder, "/run/x");
        assert_eq!(notes, ["x.service: `LimitNOFILE=5` is not supported here and ignored"]);
    }

    #[test]
    fn a_drop_in_replaces_and_adds() {
        let text = format!("{PROXY}[Service]\nExecStart=\nExecStart=/usr/bin/other\nUMask=0022\n");
        let unit = one(&text).unwrap();
        assert_eq!(unit.programs[0].words, ["/usr/bin/other"]);
        assert_eq!((unit.programs.len(), unit.umask), (1, 0o022));
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for (text, why) in [
            ("[Service]\nType=forking\nExecStart=/x\n", "`Type=forking`: expected oneshot"),
            ("[Service]\nExecStart=/x \"a b\"\n", "`\"` is not supported here"),
            ("[Service]\nExecStart=/x %i\n", "`%` is not supported here"),
            ("[Service]\nExecStart=x\n", "expected an absolute path"),
            ("[Service]\nType=exec\n", "expected one ExecStart=, found 0"),
            ("[Service]\nExecStart=/x\nExecStart=/y\n", "expected one ExecStart=, found 2"),
            (
                "[Unit]\nConditionHost=x\n[Service]\nExecStart=/x\n",
                "`ConditionHost=x` is not supported",
            ),
            ("[Service]\nExecStart=/x\nRestartSec=2 fortnights\n", "RestartSec=2 fortnights"),
            ("nonsense\n", "found `nonsense`"),
        ] {
            let error = format!("{:#}", one(text).unwrap_err());
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    /// A root with unit files, the given ones enabled.
    fn root(files: &[(&str, &str)], enabled: &[&str]) -> (tempfile::TempDir, Utf8PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wants).unwrap();
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        for name in enabled {
            fs::write(wants.join(name), "").unwrap();
        }
        (dir, root)
    }

    const FSTAB: &str = "# /\n/dev/root / auto defaults,ro 0 0\n\
        tmpfs /tmp tmpfs mode=1777,nosuid,size=25% 0 0\n\
        /data/var/log /var/log none bind,nofail,x-systemd.requires=b.service 0 0\n";

    #[test]
    fn a_roots_own_files_say_what_runs_and_in_which_order() {
        let unit = |rest: &str| format!("{rest}\n[Service]\nExecStart=/bin/true\n");
        let (a, b) = (unit("[Unit]\nAfter=b.service missing.service"), unit(""));
        let (_guard, root) = root(
            &[
                ("usr/lib/systemd/system/a.service", a.as_str()),
                ("usr/lib/systemd/system/b.service", b.as_str()),
                ("etc/systemd/system/b.service.d/10-x.conf", "[Service]\nUMask=0077\n"),
                ("etc/fstab", FSTAB),
                ("etc/slotd/health.d/40-x.toml", "[http]\nurl = \"http://127.0.0.1:80/x\"\n"),
                ("etc/slotd/health.d/30-y.toml", "[unit]\nname = \"a.service\"\n"),
            ],
            &["a.service", "b.service", "masked.service", "ssh.service"],
        );
        symlink("/dev/null", root.join("etc/systemd/system/masked.service")).unwrap();
        let overlay = ["a.service", "b.service", "never.service", "masked.service"];
        let overlay = overlay.map(|n| Utf8PathBuf::from(format!("usr/lib/systemd/system/{n}")));
        let system = read_services(&root, &overlay.into_iter().collect()).unwrap();
        let names: Vec<&str> = system.units.iter().map(|unit| unit.name.as_str()).collect();
        assert_eq!(names, ["b.service", "a.service"]);
        assert_eq!(system.units[0].umask, 0o077);
        assert_eq!(system.units[1].after, ["b.service"]);
        assert_eq!(system.left_out, ["ssh.service"]);
        assert_eq!(
            system.addresses,
            [HttpCheck { url: "http://127.0.0.1:80/x".into(), status: 200 }]
        );
        let [tmp, log] = system.mounts.as_slice() else { panic!("{:?}", system.mounts) };
        assert_eq!((tmp.at.as_str(), tmp.options.as_str()), ("/tmp", "mode=1777,size=25%"));
        assert_eq!(log.what.as_deref(), Some(Utf8Path::new("/data/var/log")));
        assert_eq!(log.after.as_deref(), Some("b.service"));
    }

    #[test]
    fn before_is_after_seen_from_the_other_side() {
        let unit = |more: &str| one(&format!("[Unit]\n{more}\n[Service]\nExecStart=/x\n")).unwrap();
        let named = |name: &str, unit: ServiceUnit| ServiceUnit { name: name.to_owned(), ..unit };
        let mut units =
            vec![named("b.service", unit("")), named("a.service", unit("Before=b.service never"))];
        in_order(&mut units).unwrap();
        let names: Vec<&str> = units.iter().map(|unit| unit.name.as_str()).collect();
        assert_eq!(names, ["a.service", "b.service"]);
        assert_eq!(units[1].after, ["a.service"]);
    }

    #[test]
    fn services_that_wait_for_each_other_are_named() {
        let unit = |after: &str| format!("[Unit]\nAfter={after}\n[Service]\nExecStart=/bin/true\n");
        let (a, b) = (unit("b.service"), unit("a.service"));
        let files = [
            ("etc/systemd/system/a.service", a.as_str()),
            ("etc/systemd/system/b.service", b.as_str()),
            ("etc/fstab", ""),
        ];
        let (_guard, root) = root(&files, &["a.service", "b.service"]);
        let overlay = files.iter().map(|(path, _)| Utf8PathBuf::from(*path)).collect();
        let error = read_services(&root, &overlay).unwrap_err().to_string();
        assert_eq!(error, "these services depend on each other in a circle: a.service, b.service");
    }
}
