//! The machine's own pip, the resolver and downloader. It brings its own configuration (index,
//! proxy, certificates); no host name is built in.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use super::target::{WheelName, WheelTarget};
use crate::exec::Tool;

/// `install --report` began with pip 22.2; Debian 12 has 23.0.
const OLDEST: (u32, u32) = (22, 2);

/// The user's settings that are kept: the index and the connection. Any other setting, from a file
/// or from a variable, could change which wheels are chosen, so that one commit would give two
/// locks.
const KEPT: [&str; 14] = [
    "cache-dir",
    "cert",
    "client-cert",
    "default-timeout",
    "extra-index-url",
    "find-links",
    "index-url",
    "keyring-provider",
    "no-cache-dir",
    "no-index",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
];

/// A working pip.
#[derive(Debug, Clone)]
pub struct Pip {
    /// The version of pip: `23.0.1`.
    pub version: String,
    /// The Python that runs it.
    python: &'static str,
    /// The user's settings that are kept: the variable and its value.
    settings: Vec<(String, String)>,
    log: Option<Utf8PathBuf>,
}

impl Pip {
    /// Looks for the pip of the machine's `python3`, else of the distribution's. Its output is also
    /// written to `log`.
    ///
    /// # Errors
    /// When there is none, or it is older than 22.2.
    pub fn find(log: Option<&Utf8Path>) -> Result<Self> {
        const HELP: &str = "help: install python3-pip (apt-get install python3-pip)";
        // Without any, report the error of the one on the path.
        let python = crate::tools::python_with_pip().unwrap_or("python3");
        let output = Tool::new(python)
            .args(["-m", "pip", "--version"])
            .read()
            .with_context(|| format!("looking for pip, which resolves wheels\n{HELP}"))?;
        let version = output.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
        let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        ensure!(
            found >= OLDEST,
            "pip is {version}, but {}.{} or later is needed\n{HELP}",
            OLDEST.0,
            OLDEST.1
        );
        let listed = Tool::new(python)
            .args(["-m", "pip", "config", "list", "--disable-pip-version-check"])
            // These settings count for this command, too: to say nothing, or to list one file only.
            .env("PIP_QUIET", "0")
            .env("PIP_USER", "0")
            .env("PIP_GLOBAL", "0")
            .env("PIP_SITE", "0")
            .env("LC_ALL", "C.UTF-8")
            .read()
            .context("asking pip for its settings")?;
        let settings = settings_to_keep(&listed);
        Ok(Self { version, python, settings, log: log.map(Utf8Path::to_owned) })
    }

    /// A pip command for wheels of the target; settings of the user that would change what is
    /// installed are switched off, those of the index and the connection are kept.
    pub fn tool(&self, command: &str, target: &WheelTarget) -> Tool {
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
        for (name, _) in std::env::vars_os() {
            if let Some(name) = name.to_str().filter(|name| name.starts_with("PIP_")) {
                tool = tool.env_remove(name);
            }
        }
        // With this, pip reads no configuration file (User Guide, "Configuration").
        tool = tool.env("PIP_CONFIG_FILE", "/dev/null").env("LC_ALL", "C.UTF-8");
        for (name, value) in &self.settings {
            tool = tool.env(name, value);
        }
        match &self.log {
            Some(log) => tool.log(log),
            None => tool,
        }
    }

    /// All wheels that the machine's indexes have for a requirement's distribution, of every
    /// version and tag, sorted. pip has no command for that; its debug output lists each link that
    /// it considers and skips.
    ///
    /// # Errors
    /// When pip cannot be run at all; that it finds no candidate is expected.
    pub fn wheels_of(&self, requirement: &str, target: &WheelTarget) -> Result<Vec<WheelName>> {
        let scratch = tempfile::tempdir().context("making a temporary directory")?;
        let Some(dir) = scratch.path().to_str() else {
            bail!("the temporary directory is not UTF-8")
        };
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
        // No wheel at all may mean that no index answered: then pip's error is the reason.
        if found.is_empty() {
            result?;
        }
        found.sort_by(|a, b| (&a.version, &a.tags).cmp(&(&b.version, &b.tags)));
        found.dedup();
        Ok(found)
    }
}

/// The settings to keep from the output of `pip config list`, as variables: `global.index-url='…'`,
/// of a command such as `download.no-index='1'`, of the environment `:env:.proxy='…'`. Later ones
/// in this order override earlier ones.
fn settings_to_keep(listed: &str) -> Vec<(String, String)> {
    let mut found: BTreeMap<&str, (u8, String)> = BTreeMap::new();
    for line in listed.lines() {
        let setting = line.split_once('=').and_then(|(name, value)| {
            let (section, key) = name.rsplit_once('.')?;
            Some((section, key, value))
        });
        let Some((section, key, value)) = setting else { continue };
        let rank = match section {
            "global" => 0,
            "install" => 1,
            "download" => 2,
            ":env:" => 3,
            _ => continue,
        };
        let known = found.get(key).is_some_and(|(known, _)| *known > rank);
        if let (true, false, Some(text)) = (KEPT.contains(&key), known, parse_python_string(value))
        {
            found.insert(key, (rank, text));
        }
    }
    let variable = |key: &str| format!("PIP_{}", key.to_uppercase().replace('-', "_"));
    found.into_iter().map(|(key, (_, value))| (variable(key), value)).collect()
}

/// Parses a string in the form of Python's `repr`.
fn parse_python_string(text: &str) -> Option<String> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
    let mut plain = String::with_capacity(inner.len());
    let mut rest = inner.chars();
    while let Some(c) = rest.next() {
        let escaped = match c {
            '\\' => rest.next()?,
            other => {
                plain.push(other);
                continue;
            }
        };
        let digits = match escaped {
            'n' => Err('\n'),
            't' => Err('\t'),
            'r' => Err('\r'),
            'x' => Ok(2),
            'u' => Ok(4),
            'U' => Ok(8),
            other => Err(other),
        };
        match digits {
            Err(c) => plain.push(c),
            Ok(count) => {
                let code: String = rest.by_ref().take(count).collect();
                plain.push(char::from_u32(u32::from_str_radix(&code, 16).ok()?)?);
            }
        }
    }
    Some(plain)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_pips_settings_only_those_of_its_sources_are_kept() {
        // The output of pip 23.0.
        let listed = "global.index-url='https://us\\'er@h.example/simple'\n\
                      global.extra-index-url='\\nhttps://a\\nhttps://b'\n\
                      global.require-hashes='true'\nglobal.constraint='/etc/c.txt'\n\
                      install.no-deps='yes'\ndownload.timeout='60'\nglobal.timeout='5'\n\
                      :env:.abi='cp39'\n:env:.proxy=\"http://o'h:1\"\nlist.format='json'\n";
        let kept: Vec<String> =
            settings_to_keep(listed).iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(
            kept,
            [
                "PIP_EXTRA_INDEX_URL=\nhttps://a\nhttps://b",
                "PIP_INDEX_URL=https://us'er@h.example/simple",
                "PIP_PROXY=http://o'h:1",
                "PIP_TIMEOUT=60",
            ]
        );
        assert_eq!(parse_python_string(r"'\x41\u00e4\\'"), Some("Aä\\".to_owned()));
    }
}
