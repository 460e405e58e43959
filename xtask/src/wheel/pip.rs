//! The machine's own pip, the resolver and downloader. It brings its own configuration (index,
//! proxy, certificates); nothing here names a host.

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use super::target::{Target, WheelName};
use crate::exec::Tool;

/// `install --report` began with pip 22.2; Debian 12 has 23.0.
const OLDEST: (u32, u32) = (22, 2);

/// A pip that works.
#[derive(Debug, Clone)]
pub struct Pip {
    /// What pip says of itself: `23.0.1`.
    pub version: String,
    /// The Python that has it.
    python: &'static str,
    log: Option<Utf8PathBuf>,
}

impl Pip {
    /// Looks for the pip of the machine's `python3`, else of the distribution's. What it prints goes to `log` too.
    ///
    /// # Errors
    /// When there is none, or it is older than 22.2.
    pub fn find(log: Option<&Utf8Path>) -> Result<Self> {
        const HELP: &str = "help: install python3-pip (apt-get install python3-pip)";
        // Without one, what the path's own says of it.
        let python = crate::tools::python_with_pip().unwrap_or("python3");
        let said = Tool::new(python)
            .args(["-m", "pip", "--version"])
            .read()
            .with_context(|| format!("looking for pip, which resolves wheels\n{HELP}"))?;
        let version = said.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        ensure!(
            found >= OLDEST,
            "pip is {version}, {}.{} or later is needed\n{HELP}",
            OLDEST.0,
            OLDEST.1
        );
        Ok(Self { version, python, log: log.map(Utf8Path::to_owned) })
    }

    /// A pip command for wheels of the target; settings of the user that would change what is
    /// installed are switched off, those that say where from are kept.
    pub fn tool(&self, command: &str, target: &Target) -> Tool {
        let mut tool = Tool::new(self.python)
            .args(["-m", "pip", command, "--no-input", "--no-color", "--progress-bar", "off"])
            .args(["--disable-pip-version-check", "--only-binary=:all:"])
            .args(["--implementation", &target.implementation])
            .args(["--python-version", &target.python.to_string()]);
        // pip derives the older interpreters and `none` itself, but only for ABIs it guesses
        // from the version; naming none keeps abi3 wheels in.
        for platform in target.platforms() {
            tool = tool.args(["--platform", &platform]);
        }
        for setting in ["PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PIP_PRE"] {
            tool = tool.env(setting, "0");
        }
        for setting in ["PIP_CONSTRAINT", "PIP_TARGET", "PIP_PREFIX", "PIP_QUIET", "PIP_LOG"] {
            tool = tool.env_remove(setting);
        }
        tool = tool.env("LC_ALL", "C.UTF-8");
        match &self.log {
            Some(log) => tool.log(log),
            None => tool,
        }
    }

    /// Every wheel that the machine's indexes have for a requirement's distribution, whatever its
    /// version and tags, sorted. pip has no command for that; its debug output names each link that it
    /// looks at and passes over.
    ///
    /// # Errors
    /// When pip cannot be run at all; that it finds no candidate is expected.
    pub fn wheels_of(&self, requirement: &str, target: &Target) -> Result<Vec<WheelName>> {
        let scratch = tempfile::tempdir().context("making a temporary folder")?;
        let Some(dir) = scratch.path().to_str() else { bail!("the temporary folder is not UTF-8") };
        let wanted = super::metadata::parse_requirement(requirement)?.name.to_string();
        let mut found = Vec::new();
        let result = self
            .tool("download", target)
            .args(["-vv", "--no-deps", "--dest", dir, requirement])
            .run_lines(|line| {
                let files = line.split_whitespace().filter_map(wheel_file);
                found.extend(
                    files
                        .filter_map(|file| WheelName::parse(&file).ok())
                        .filter(|wheel| wheel.name == wanted),
                );
            });
        // With no wheel at all the reason may be that no index answered: then pip's error counts.
        if found.is_empty() {
            result?;
        }
        found.sort_by(|a, b| (&a.version, &a.tags).cmp(&(&b.version, &b.tags)));
        found.dedup();
        Ok(found)
    }
}

/// The wheel's file name at the end of a link, with percent signs decoded.
pub fn wheel_file(link: &str) -> Option<String> {
    let path = link.split(['#', '?']).next()?;
    let last = path.rsplit('/').next()?;
    let mut bytes = Vec::new();
    let mut rest = last.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            let digits = std::str::from_utf8(&digits).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok().filter(|file| file.ends_with(".whl"))
}
