//! apt in a private state directory: it uses the machine's mirrors and proxies and no other setting
//! of the machine; it verifies the archive's signatures and resolves for the target, without root.

use std::fs;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use super::access::{self, AptLogins};
use super::sources::AptSourceMirror;
use crate::exec::Tool;
use crate::variable;

/// Overrides the archive's address (`…/debian`).
pub const MIRROR_VARIABLE: &str = "SLIPWAY_DEBIAN_MIRROR";
/// Overrides the address of the security archive (`…/debian-security`).
pub const SECURITY_VARIABLE: &str = "SLIPWAY_DEBIAN_SECURITY_MIRROR";
/// Overrides the keyring that the archives must be signed with.
pub const KEYRING_VARIABLE: &str = "SLIPWAY_DEBIAN_KEYRING";

/// The keyring of the package `debian-archive-keyring`.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// This machine's sources of packages. Never written into a lock or an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AptMirrors {
    /// The archive; also for `-updates` and `-backports`. No trailing slash; may contain a login.
    pub archive: String,
    /// The security archive. No trailing slash.
    pub security: String,
    /// The keys that must have signed both.
    pub keyring: Utf8PathBuf,
    /// Additional archives, each with its own key.
    pub sources: Vec<AptSourceMirror>,
}

impl AptMirrors {
    /// The archives from the environment, else those of the machine's own apt.
    ///
    /// # Errors
    /// When neither names a Debian archive, or the keyring is missing.
    pub fn from_host() -> Result<Self> {
        let mut archive = variable::find(MIRROR_VARIABLE)?;
        let mut security = variable::find(SECURITY_VARIABLE)?;
        if archive.is_none() || security.is_none() {
            let listing = Tool::new("apt-get")
                .env("LC_ALL", "C")
                .args(["indextargets", "--format"])
                .arg("$(CREATED_BY)\t$(REPO_URI)\t$(RELEASE)\t$(ORIGIN)\t$(LABEL)")
                .read()
                .unwrap_or_default();
            let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
            let (a, s) = host_mirrors(&listing, &release);
            archive = archive.or(a);
            security = security.or(s);
        }
        let missing = |what: &str, variable: &str| {
            format!(
                "this machine's apt configuration names no Debian {what}\n\
                 help: set {variable} to its address, or build on Debian"
            )
        };
        let Some(archive) = archive else { bail!(missing("archive", MIRROR_VARIABLE)) };
        let Some(security) = security else {
            bail!(missing("security archive", SECURITY_VARIABLE))
        };
        let keyring = variable::find(KEYRING_VARIABLE)?.unwrap_or_else(|| KEYRING.into());
        let keyring = Utf8PathBuf::from(keyring);
        if !keyring.is_file() {
            bail!(
                "the keyring {keyring} that packages are verified with is missing\n\
                 help: sudo apt-get install debian-archive-keyring"
            );
        }
        let logins = AptLogins::of_the_machine();
        let way = |uri: String| logins.with_login(uri.trim_end_matches('/'));
        let (archive, security) = (way(archive), way(security));
        Ok(Self { archive, security, keyring, sources: Vec::new() })
    }

    /// The same with a product's additional archives.
    pub fn with_sources(self, mut sources: Vec<AptSourceMirror>) -> Self {
        if !sources.is_empty() {
            let logins = AptLogins::of_the_machine();
            for source in &mut sources {
                source.address = logins.with_login(&source.address);
            }
        }
        Self { sources, ..self }
    }

    /// An additional archive by its name.
    pub(super) fn source(&self, name: &str) -> Result<&AptSourceMirror> {
        self.sources.iter().find(|source| source.name == name).with_context(|| {
            format!(
                "the package lock refers to the source {name}, but the product does not define it\n\
                 help: cargo xtask lock"
            )
        })
    }
}

/// The archive and the security archive among the targets of the machine's apt.
///
/// Origin and label come from a downloaded Release file; where apt never ran `update`, the names of
/// the suites are used, provided that the machine identifies as Debian.
fn host_mirrors(listing: &str, os_release: &str) -> (Option<String>, Option<String>) {
    let value = |key: &str| {
        os_release
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let codename = if value("ID") == "debian" { value("VERSION_CODENAME") } else { String::new() };
    let (mut archive, mut security) = (None, None);
    for line in listing.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[created_by, uri, release, origin, label] = fields.as_slice() else { continue };
        // Where a Release file has no value, apt leaves the placeholder unchanged.
        let unknown = origin.is_empty() || origin.starts_with("$(");
        if created_by != "Packages" {
            continue;
        }
        let Some(uri) = access::resolve_mirror(uri) else { continue };
        let named = |suite: String| unknown && !codename.is_empty() && release == suite;
        if (origin, label) == ("Debian", "Debian") || named(codename.clone()) {
            archive.get_or_insert(uri);
        } else if (origin, label) == ("Debian", "Debian-Security")
            || named(format!("{codename}-security"))
        {
            security.get_or_insert(uri);
        }
    }
    (archive, security)
}

/// One archive that a private apt may use.
#[derive(Debug, Clone)]
pub(super) struct AptArchive {
    /// Address without a trailing slash.
    pub uri: String,
    /// Suite, as in `bookworm-updates`.
    pub suite: String,
}

/// apt with its own configuration, sources, lists and an empty dpkg status.
#[derive(Debug)]
pub(super) struct PrivateApt {
    config: Utf8PathBuf,
    log: Utf8PathBuf,
}

impl PrivateApt {
    /// Sets up `dir` (kept between runs, so that unchanged indexes are not downloaded again).
    pub fn new(
        dir: &Utf8Path,
        arch: &str,
        sources: &[AptArchive],
        components: &[String],
        keyring: &Utf8Path,
    ) -> Result<Self> {
        for below in [
            "etc/apt/apt.conf.d",
            "etc/apt/preferences.d",
            "state/lists/partial",
            "cache/archives/partial",
        ] {
            let path = dir.join(below);
            fs::create_dir_all(&path).with_context(|| format!("creating {path}"))?;
        }
        let dir = dir.canonicalize_utf8().with_context(|| format!("resolving {dir}"))?;
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            access::write_private(&path, &text).with_context(|| format!("writing {path}"))
        };
        let mut lines = String::new();
        for AptArchive { uri, suite } in sources {
            let components = components.join(" ");
            lines.push_str(&format!("deb [signed-by={keyring}] {uri} {suite} {components}\n"));
        }
        write("etc/apt/sources.list", lines)?;
        write("status", String::new())?;
        write("apt.conf", apt_configuration(&dir, arch, &host_acquire_settings()))?;
        Ok(Self { config: dir.join("apt.conf"), log: dir.join("apt.log") })
    }

    /// Writes the pins (`preferences`); an empty text removes them.
    pub fn pin(&self, text: &str) -> Result<()> {
        let path = self.config.with_file_name("etc/apt/preferences.d/pins");
        fs::write(&path, text).with_context(|| format!("writing {path}"))
    }

    /// Adds a local archive (no signature: its files were checked by hash).
    pub fn add_local(&self, repository: &Utf8Path) -> Result<()> {
        let path = self.config.with_file_name("etc/apt/sources.list");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let text = format!("{}{text}", super::repo::source_line(repository));
        access::write_private(&path, &text).with_context(|| format!("writing {path}"))
    }

    /// Fetches and verifies the indexes.
    ///
    /// # Errors
    /// When a mirror is unreachable or a signature is invalid.
    pub fn update(&self) -> Result<()> {
        let mut output = Vec::new();
        let result = self
            .tool("apt-get")
            // Without this apt exits with 0 and old or no indexes when a mirror is unreachable.
            .args(["-q", "-o", "APT::Update::Error-Mode=any", "update"])
            .log(&self.log)
            .run_lines(|line| output.push(line.to_owned()));
        result.with_context(|| {
            let reasons = fetch_failures(&output);
            let more = if reasons.is_empty() { "" } else { ": " };
            format!("fetching the package indexes{more}{}", reasons.join("; "))
        })
    }

    /// The output of `apt-get` for these arguments.
    pub fn get(&self, args: impl IntoIterator<Item = impl AsRef<str>>) -> Result<String> {
        self.tool("apt-get").args(args).log(&self.log).read()
    }

    /// Why `apt-get install` cannot install these packages: the explanation on apt's standard
    /// output when it is not quiet: which packages conflict or lack a dependency, and what provides
    /// a virtual package.
    pub fn reasons_against(&self, packages: &[&str]) -> Vec<String> {
        let mut output = Vec::new();
        let tool = self.tool("apt-get").args(["-q", "--simulate", "install", "--"]).args(packages);
        // apt is expected to fail here.
        match tool.run_lines(|line| output.push(line.to_owned())) {
            Ok(()) => Vec::new(),
            Err(_) => conflict_paragraphs(&output),
        }
    }

    /// The output of `apt-cache` for these arguments.
    pub fn cache(&self, args: impl IntoIterator<Item = impl AsRef<str>>) -> Result<String> {
        self.tool("apt-cache").args(args).log(&self.log).read()
    }

    fn tool(&self, program: &str) -> Tool {
        Tool::new(program).env("APT_CONFIG", self.config.as_str()).env("LC_ALL", "C")
    }
}

/// What apt could not fetch, each with the reason in the next line, which may be far from apt's
/// last lines. A local archive has each index in one form only, which is not a failure.
fn fetch_failures(output: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for (line, next) in output.iter().zip(output.iter().skip(1)) {
        let Some((_, what)) = line.strip_prefix("Err:").and_then(|rest| rest.split_once(' '))
        else {
            continue;
        };
        let reason = format!("{what}: {}", next.trim());
        if !what.starts_with("copy:") && !found.contains(&reason) {
            found.push(reason);
        }
    }
    found
}

/// The paragraphs of apt's output that explain the conflict.
fn conflict_paragraphs(output: &[String]) -> Vec<String> {
    const BEGIN: [&str; 2] =
        ["The following packages have unmet dependencies", "is a virtual package"];
    /// More lines would not help.
    const MOST: usize = 12;
    let mut found = Vec::new();
    let mut inside = false;
    for line in output {
        if BEGIN.iter().any(|begin| line.contains(begin)) {
            inside = true;
            if line.contains(BEGIN[1]) {
                found.push(line.trim().to_owned());
            }
        } else if inside && line.starts_with(' ') {
            found.push(line.split_whitespace().collect::<Vec<_>>().join(" "));
        } else {
            inside = false;
        }
    }
    found.truncate(MOST);
    found
}

fn apt_configuration(dir: &Utf8Path, arch: &str, acquire: &str) -> String {
    format!(
        r#"// `Dir` is set before apt looks for its other files, so nothing in /etc/apt is read.
Dir "{dir}/";
Dir::State "state";
Dir::State::status "{dir}/status";
Dir::Cache "cache";
Dir::Etc "etc/apt";
Dir::Log "log";
APT::Architecture "{arch}";
#clear APT::Architectures;
APT::Architectures {{ "{arch}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
// apt would drop to the user _apt, who cannot write here.
APT::Sandbox::User "root";
APT::Get::Assume-Yes "true";
Acquire::Languages "none";
{acquire}"#
    )
}

/// The machine's proxies, certificates and the like, in apt's own syntax.
fn host_acquire_settings() -> String {
    let dump = Tool::new("apt-config").args(["dump", "Acquire"]).read().unwrap_or_default();
    let wanted = ["Acquire::http", "Acquire::https", "Acquire::ForceIPv", "Acquire::Retries"];
    let keep = |line: &&str| wanted.iter().any(|prefix| line.starts_with(prefix));
    dump.lines().filter(keep).fold(String::new(), |text, line| text + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::{fetch_failures, host_mirrors};

    const OS: &str = "ID=debian\nVERSION_CODENAME=bookworm\n";

    /// The output of apt 2.6.
    #[test]
    fn what_is_in_the_way_is_found_in_what_apt_says() {
        let output = "Reading package lists...\nThe following information may help to resolve the situation:\n\
                    \n\
                    The following packages have unmet dependencies:\n\
                    \x20chrony : Conflicts: time-daemon\n\
                    \x20systemd-timesyncd : Conflicts: time-daemon\n\
                    E: Unable to correct problems\n\
                    Package awk is a virtual package provided by:\n  mawk 1.3.4\n  gawk 1:5.2\nYou should pick one.\n";
        let output: Vec<String> = output.lines().map(str::to_owned).collect();
        assert_eq!(
            super::conflict_paragraphs(&output),
            [
                "chrony : Conflicts: time-daemon",
                "systemd-timesyncd : Conflicts: time-daemon",
                "Package awk is a virtual package provided by:",
                "mawk 1.3.4",
                "gawk 1:5.2",
            ]
        );
    }

    #[test]
    fn the_hosts_mirrors_are_found_by_origin_and_label() {
        let listing = "Packages\thttps://packages.example/x/\tnodistro\tOther\tOther\n\
            Translations\thttp://no.example/debian/\tbookworm\tDebian\tDebian\n\
            Packages\tfile:/srv/debian/\tbookworm\tDebian\tDebian\n\
            Packages\thttp://a.example/debian/\tbookworm\tDebian\tDebian\n\
            Packages\thttp://s.example/debian-security/\tbookworm-security\tDebian\tDebian-Security\n";
        let (archive, security) = host_mirrors(listing, "");
        assert_eq!(archive.as_deref(), Some("http://a.example/debian/"));
        assert_eq!(security.as_deref(), Some("http://s.example/debian-security/"));
    }

    #[test]
    fn a_debian_that_never_updated_is_understood_by_suite() {
        let listing = "Packages\thttp://a.example/debian/\tbookworm\t$(ORIGIN)\t$(LABEL)\n\
            Packages\thttp://s.example/sec/\tbookworm-security\t\t\n";
        let (archive, security) = host_mirrors(listing, OS);
        assert_eq!(archive.as_deref(), Some("http://a.example/debian/"));
        assert_eq!(security.as_deref(), Some("http://s.example/sec/"));
        assert_eq!(host_mirrors(listing, "ID=other\nVERSION_CODENAME=bookworm\n"), (None, None));
    }

    #[test]
    fn what_cannot_be_fetched_is_told_with_its_reason() {
        let output = "Ign:1 http://a.example/debian bookworm InRelease\n\
            Err:2 http://a.example/debian bookworm Release\n\
            \u{20} 404  Not Found [IP: 127.0.0.1 80]\n\
            Err:3 copy:/cache/kept ./ Packages\n\
            \u{20} Failed to stat - stat (2: No such file or directory)\n\
            Err:2 http://a.example/debian bookworm Release\n\
            \u{20} 404  Not Found [IP: 127.0.0.1 80]\n\
            Reading package lists...";
        let output: Vec<String> = output.lines().map(str::to_owned).collect();
        let expected =
            ["http://a.example/debian bookworm Release: 404  Not Found [IP: 127.0.0.1 80]"];
        assert_eq!(fetch_failures(&output), expected);
        assert!(fetch_failures(&["Reading package lists...".to_owned()]).is_empty());
    }
}
