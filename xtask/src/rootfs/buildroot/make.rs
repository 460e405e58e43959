//! Calls of Buildroot's make: always out of tree, with our external tree, and with an environment
//! that does not depend on the caller's shell.

use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::hash_bytes;
use crate::exec::Tool;
use crate::fetch::url_without_login;
use crate::plan::OverridePlan;
use crate::progress::say;
use crate::variable;

/// Variables of the caller that are passed to Buildroot: user, directories, proxies, keys.
const KEPT: [&str; 18] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TERM",
    "TMPDIR",
    "DISPLAY",
    "SSH_AUTH_SOCK",
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "SSL_CERT_FILE",
];

/// The directories for one product and board.
#[derive(Debug, Clone)]
pub struct BuildrootSetup {
    /// The Buildroot tree.
    pub tree: Utf8PathBuf,
    /// Our BR2_EXTERNAL tree.
    pub external: Utf8PathBuf,
    /// The output directory (`O=`).
    pub output: Utf8PathBuf,
    /// The download directory, shared by all products.
    pub downloads: Utf8PathBuf,
    /// The compiler cache, shared by all products.
    pub ccache: Utf8PathBuf,
    /// Packages that are built from a source directory.
    pub overrides: Vec<OverridePlan>,
}

/// The machine's sources of downloads and compiled objects; they do not change any result.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildrootSite {
    /// A mirror that is tried first (`BR2_PRIMARY_SITE`).
    pub mirror: Option<String>,
    /// Use only the mirror.
    pub offline: bool,
    /// ccache's `remote_storage`.
    pub remote_ccache: Option<String>,
}

/// The machine's mirror of downloads: a URL, or a directory as `file:///…`.
pub const MIRROR: &str = "SLIPWAY_BUILDROOT_MIRROR";
/// ccache's remote storage, such as `redis://cache.local` or `http://cache.local:8080`.
pub const REMOTE_CCACHE: &str = "SLIPWAY_CCACHE_REMOTE";

impl BuildrootSite {
    /// The settings of this machine's environment.
    ///
    /// # Errors
    /// When a variable is not UTF-8, or make cannot use the mirror's address.
    pub fn of_machine(offline: bool) -> Result<Self> {
        let (mirror, remote_ccache) = (variable::find(MIRROR)?, variable::find(REMOTE_CCACHE)?);
        mirror.as_deref().map_or(Ok(()), check_mirror_address)?;
        Ok(Self { mirror, offline, remote_ccache })
    }
}

/// Buildroot hands an address through make and a shell, which take some characters apart.
fn check_mirror_address(address: &str) -> Result<()> {
    let shown = url_without_login(address);
    ensure!(
        address.contains("://"),
        "{MIRROR}={shown}: this is not an address\n\
         help: a directory is written as file:///srv/mirror"
    );
    let splits =
        |c: &char| c.is_whitespace() || c.is_control() || "$'\"`\\|&;<>(){}#*?!^".contains(*c);
    if let Some(odd) = address.chars().find(splits) {
        bail!(
            "{MIRROR}={shown}: Buildroot cannot use an address that contains {odd:?}\n\
             help: rename the directory, or use a link to it; in a password, write %XX"
        );
    }
    Ok(())
}

impl BuildrootSetup {
    /// The layout in the cache; `name` is the output directory's.
    ///
    /// # Errors
    /// When the cache's directory cannot be made.
    pub fn new(
        cache: &Utf8Path,
        tree: &Utf8Path,
        workspace: &Utf8Path,
        name: &str,
    ) -> Result<Self> {
        let base = cache.join("buildroot");
        std::fs::create_dir_all(&base).with_context(|| format!("creating {base}"))?;
        // Buildroot restarts itself when a path is not canonical.
        let base = base.canonicalize_utf8().with_context(|| format!("looking up {base}"))?;
        Ok(Self {
            tree: tree.to_owned(),
            external: workspace.join("external"),
            output: base.join("output").join(name),
            downloads: base.join("dl"),
            ccache: base.join("ccache"),
            overrides: Vec::new(),
        })
    }

    /// The cache's own directory.
    pub(super) fn cache_root(&self) -> &Utf8Path {
        let above = self.ccache.parent().and_then(Utf8Path::parent);
        above.unwrap_or(&self.ccache)
    }

    /// A directory for checks only, one for each tree, so that a check never changes the output of
    /// a build. The lock guard in the value grants exclusive use.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn for_check(
        cache: &Utf8Path,
        tree: &Utf8Path,
        workspace: &Utf8Path,
    ) -> Result<(Self, File)> {
        let id = hash_bytes(format!("{tree}\n{workspace}").as_bytes());
        let name = format!("check-{}", id.get(..12).unwrap_or(&id));
        let setup = Self::new(cache, tree, workspace, &name)?;
        let lock = setup.lock()?;
        Ok((setup, lock))
    }

    /// Waits until no other process uses the output directory. Every program that is started
    /// inherits the lock: a make that outlives us (when we are killed) still holds it.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn lock(&self) -> Result<File> {
        let path = Utf8PathBuf::from(format!("{}.lock", self.output));
        std::fs::create_dir_all(&self.output)
            .with_context(|| format!("creating {}", self.output))?;
        let lock = File::create(&path).with_context(|| format!("creating {path}"))?;
        if lock.try_lock().is_err() {
            say("base", format!("waiting for another build in {}", self.output));
            lock.lock().with_context(|| format!("locking {path}"))?;
        }
        rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty())
            .with_context(|| format!("sharing the lock {path}"))?;
        Ok(lock)
    }

    /// `make` in the tree for this output directory.
    pub fn make(&self) -> Tool {
        // Buildroot restarts itself when the umask differs, which would hide what its first process
        // does; with Buildroot's own umask it does not.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let mut make = Tool::new("make").env_only(&KEPT);
        if rustix::process::geteuid().is_root() {
            // As in a container. Otherwise the configure script of host-tar refuses to run, which is
            // built where the machine's tar is older than 1.35 (Buildroot, `check-host-tar.sh`).
            make = make.env("FORCE_UNSAFE_CONFIGURE", "1");
        }
        make.env("LC_ALL", "C")
            .env("BR2_DL_DIR", &self.downloads)
            .env("BR2_CCACHE_DIR", &self.ccache)
            .args(["--no-print-directory", "-C"])
            .arg(&self.tree)
            .arg(format!("O={}", self.output))
            .arg(format!("BR2_EXTERNAL={}", self.external))
    }

    /// `make` that may download: uses the machine's mirror, and gives up quickly.
    pub fn fetching(&self, site: &BuildrootSite) -> Tool {
        let mut tool = self.make();
        if let Some(remote) = &site.remote_ccache {
            tool = tool.env("CCACHE_REMOTE_STORAGE", remote);
        }
        // A missing directory acts as an empty mirror: without a network and without a mirror only
        // earlier downloads are used.
        let nothing = || format!("file://{}/none", self.downloads);
        let mirror = site.mirror.clone().or_else(|| site.offline.then(nothing));
        if let Some(mirror) = mirror {
            let setting = format!("BR2_PRIMARY_SITE={mirror}");
            // Messages show the command, and logs of CI show messages.
            tool = match url_without_login(&mirror) == mirror {
                true => tool.arg(setting),
                false => tool.args_unshown([setting]),
            };
        }
        if site.offline {
            tool = tool.args(["BR2_PRIMARY_SITE_ONLY=y", "BR2_BACKUP_SITE="]);
        }
        // One attempt for each site; Buildroot's own default waits three times ten seconds.
        tool.arg("BR2_WGET=wget -nd -t 1 --connect-timeout=5 --dns-timeout=5 --read-timeout=30")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_s_address_is_one_that_make_can_use() {
        for good in [
            "https://a.example/m",
            "http://u:p%24@[::1]:80/m",
            "file:///srv/br+1~x",
            "scp://u@h:/m",
        ] {
            check_mirror_address(good).expect(good);
        }
        for (bad, expected) in [
            (
                "/srv/mirror",
                "/srv/mirror: this is not an address\nhelp: a directory is written as file://",
            ),
            ("file:///srv/my mirror", "contains ' '\nhelp: "),
            (
                "http://u:secret@h/$(x)",
                "=http://h/$(x): Buildroot cannot use an address that contains '$'",
            ),
        ] {
            let error = check_mirror_address(bad).expect_err(bad).to_string();
            assert!(error.contains(expected) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn the_login_of_a_mirror_is_in_no_message() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = Utf8PathBuf::try_from(dir.path().to_owned()).expect("UTF-8");
        let setup = BuildrootSetup::new(&dir, Utf8Path::new("/t"), Utf8Path::new("/w"), "o");
        let shown = |mirror: &str| {
            let site =
                BuildrootSite { mirror: Some(mirror.to_owned()), ..BuildrootSite::default() };
            setup.as_ref().expect("directories").fetching(&site).command_line()
        };
        assert!(shown("http://h/m").contains("BR2_PRIMARY_SITE=http://h/m"));
        assert!(!shown("http://u:secret@h/m").contains("secret"));
    }
}
