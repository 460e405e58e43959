//! `configs/<product>.toml`: what ships. Only its form is checked here.

pub use bundle::{BuildKind, Version};
use camino::Utf8PathBuf;
use toml::de::DeValue;

use super::reader::{ConfigPlace, ConfigSource, FromToml, Located, TableFields, WholeNumber};
use super::units::{Percent, SafeName};

impl FromToml for BuildKind {
    const EXPECTED: &'static str = "\"development\" or \"release\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("development") => Ok(Self::Development),
            Some("release") => Ok(Self::Release),
            _ => Err(String::new()),
        }
    }
}

/// Which engine builds the base system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Debian packages; a working image in minutes.
    Debian,
    /// Buildroot; the production engine.
    Buildroot,
}

impl FromToml for Engine {
    const EXPECTED: &'static str = "\"debian\" or \"buildroot\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("debian") => Ok(Self::Debian),
            Some("buildroot") => Ok(Self::Buildroot),
            _ => Err(String::new()),
        }
    }
}

/// A product, as written.
#[derive(Debug)]
pub struct ProductConfig {
    /// The file it was read from.
    pub place: ConfigPlace,
    /// Its name; equals the file's name.
    pub name: Located<SafeName>,
    /// Human-readable title.
    pub title: String,
    /// Its version.
    pub version: Located<Version>,
    /// Development or release.
    pub kind: Located<BuildKind>,
    /// Built when no product is named.
    pub default: bool,
    /// Boards that it is built for.
    pub boards: Vec<Located<SafeName>>,
    /// The default board.
    pub default_board: Located<SafeName>,
    /// Overlays, later ones over earlier ones.
    pub overlays: Vec<Located<SafeName>>,
    /// Replaces the board's serial console: a device, or `none`.
    pub console: Option<Located<ConsoleDevice>>,
    /// The base system.
    pub rootfs: RootfsConfig,
    /// The API wheel; `None` for a bare system.
    pub api: Option<ApiConfig>,
    /// Accounts in addition to the system's own.
    pub users: Vec<UserConfig>,
    /// SSH policy.
    pub ssh: SshConfig,
    /// Network defaults.
    pub network: NetworkConfig,
    /// Update policy.
    pub update: UpdateConfig,
}

/// The base system.
#[derive(Debug)]
pub struct RootfsConfig {
    /// Which engine.
    pub engine: Located<Engine>,
    /// Debian suite (engine `debian`).
    pub suite: Option<Located<SafeName>>,
    /// Debian archive components (engine `debian`).
    pub components: Vec<Located<String>>,
    /// Packages (engine `debian`), without their dependencies.
    pub packages: Vec<Located<String>>,
    /// Packages that are unpacked, not installed: the kernel and the initrd's programs.
    pub unpacked: Vec<Located<String>>,
    /// Package lock (engine `debian`).
    pub lock: Option<Located<Utf8PathBuf>>,
    /// Further apt archives (engine `debian`).
    pub sources: Vec<AptSource>,
    /// The pinned Buildroot (engine `buildroot`).
    pub buildroot: Option<BuildrootConfig>,
    /// The build fails when more than this share of the slot is used.
    pub fill_limit: Percent,
    /// The build warns when more than this share of the slot is used.
    pub fill_warning: Percent,
    /// Globs of paths that are removed from the base.
    pub prune: Vec<String>,
    /// Exceptions from `prune`.
    pub keep: Vec<String>,
}

/// An additional apt archive, and the packages that may come from it.
#[derive(Debug)]
pub struct AptSource {
    /// Its name in messages and in the lock.
    pub name: Located<SafeName>,
    /// Its address, without a slash at the end.
    pub address: Located<String>,
    /// Its suite.
    pub suite: Located<AptWord>,
    /// Its components.
    pub components: Vec<Located<AptWord>>,
    /// The OpenPGP public key that it must be signed with: a file, relative to the workspace.
    pub key: Located<Utf8PathBuf>,
    /// The packages that may come from it: names, and patterns with `*`.
    pub packages: Vec<Located<PackagePattern>>,
}

/// A word for apt's `sources.list` that apt cannot misread as an option or as several words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AptWord(pub String);

impl FromToml for AptWord {
    const EXPECTED: &'static str = "a word of letters, digits, `-`, `_`, `.` and `/`";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let word = value.as_str().ok_or(String::new())?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        // A suite that ends with a slash means an archive without components, which has no pool.
        let fits = word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word.chars().all(plain)
            && !word.ends_with('/');
        if fits { Ok(Self(word.to_owned())) } else { Err(String::new()) }
    }
}

/// A package's name, in which `*` stands for any characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackagePattern(pub String);

impl FromToml for PackagePattern {
    const EXPECTED: &'static str =
        "a package's name such as \"raspi-firmware\" or \"linux-image-*\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.*".contains(c);
        if text.is_empty() || !text.chars().all(plain) {
            return Err(String::new());
        }
        // It would allow the archive to replace all of Debian.
        if text.chars().all(|c| c == '*') {
            return Err("it would allow every package to come from this archive".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

/// The pinned Buildroot, and the Python and C library for which wheels are locked.
#[derive(Debug)]
pub struct BuildrootConfig {
    /// The git repository that it is cloned from.
    pub url: Located<String>,
    /// Release, such as `2025.02.16`: the name of its tag.
    pub release: Located<String>,
    /// The commit of its tag.
    pub commit: Located<String>,
    /// Its Python, such as `3.12`.
    pub python: Located<String>,
    /// Its C library, such as `glibc 2.40`.
    pub libc: Located<String>,
    /// Fragments of the defconfig, relative to the workspace.
    pub fragments: Vec<Located<Utf8PathBuf>>,
}

/// The API wheel.
#[derive(Debug)]
pub struct ApiConfig {
    /// Requirement, such as `opentrons==10.1.0`.
    pub package: Located<String>,
    /// Wheel lock.
    pub lock: Located<Utf8PathBuf>,
    /// The lowest version that may run from `data`.
    pub minimum_version: Option<Located<String>>,
}

/// An account.
#[derive(Debug)]
pub struct UserConfig {
    /// Login name.
    pub name: Located<SafeName>,
    /// Numeric id; the group of the same name has it too. The system's `root` is 0.
    pub uid: Located<u32>,
    /// Further groups.
    pub groups: Vec<String>,
    /// Login shell.
    pub shell: String,
    /// Home directory.
    pub home: String,
    /// `locked`, `empty`, or a crypt(5) hash.
    pub password: Located<String>,
    /// Public keys for SSH: files, relative to the workspace.
    pub authorized_keys: Vec<Located<Utf8PathBuf>>,
}

/// sshd_config(5)'s `PermitRootLogin`; `yes` is left out, since it would accept a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootLogin {
    /// Not packed.
    No,
    /// With a key.
    ProhibitPassword,
}

impl FromToml for RootLogin {
    const EXPECTED: &'static str = "\"no\" or \"prohibit-password\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some("no") => Ok(Self::No),
            Some("prohibit-password") => Ok(Self::ProhibitPassword),
            _ => Err(String::new()),
        }
    }
}

/// SSH policy.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SshConfig {
    /// Passwords are accepted; a release product may not.
    pub password_authentication: bool,
    /// Whether root may log in.
    pub permit_root_login: RootLogin,
    /// The place of `password-authentication`, for messages.
    #[serde(skip)]
    pub place: ConfigPlace,
}

/// The serial console of a product: Linux's name of a device, or none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleDevice(pub Option<String>);

impl FromToml for ConsoleDevice {
    const EXPECTED: &'static str = "\"none\" or a device such as \"ttyUSB0\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let name = value.as_str().ok_or(String::new())?;
        let plain = |c: char| c.is_ascii_alphanumeric();
        match name {
            "none" => Ok(Self(None)),
            _ if name.starts_with("tty") && name.len() > 3 && name.chars().all(plain) => {
                Ok(Self(Some(name.to_owned())))
            }
            _ => Err(String::new()),
        }
    }
}

/// A country for the radio's regulatory domain: a two-letter code of ISO 3166-1 in capitals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountryCode(pub String);

impl FromToml for CountryCode {
    const EXPECTED: &'static str = "a country code of two capitals, such as \"DE\"";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let code = value.as_str().unwrap_or_default();
        let fits = code.len() == 2 && code.chars().all(|c| c.is_ascii_uppercase());
        match (fits, code) {
            (false, _) => Err(String::new()),
            (true, "UK") => Err("the code of the United Kingdom is GB".to_owned()),
            (true, _) if !contract::names::is_country(code) => {
                Err("not a country code (ISO 3166-1)".to_owned())
            }
            (true, _) => Ok(Self(code.to_owned())),
        }
    }
}

/// Network defaults.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkConfig {
    /// Host name until the robot gets its own.
    pub hostname: String,
    /// A link-local address when no DHCP server answers.
    pub link_local: bool,
    /// The country whose rules the Wi-Fi radio follows; without one it follows the worldwide rules.
    pub country: Option<String>,
}

/// Update policy.
#[derive(Debug)]
pub struct UpdateConfig {
    /// The robot rejects bundles below this version.
    pub minimum_version: Located<Version>,
    /// The lowest key epoch whose bundles the robot accepts; 0: any.
    pub key_epoch: u32,
}

/// The product of that name's file.
///
/// # Errors
/// All findings of the file at once.
pub fn parse_product(source: ConfigSource, name: &str) -> anyhow::Result<ProductConfig> {
    source.parse(|fields| {
        let product = read_product(fields)?;
        if product.name.value.0 != name {
            let message = format!(
                "`name`: expected \"{name}\" as the file, found \"{}\"",
                product.name.value.0
            );
            fields.reject(
                &product.name.place,
                message,
                "use the same name for the file and the product",
            );
            return None;
        }
        Some(product)
    })
}

/// What a bundle's manifest has room for.
const KEY_EPOCH: WholeNumber = WholeNumber { of: "", from: 0, to: u32::MAX };
/// Root's 0, and those of people: Debian Policy 9.2.2 gives 60000 and above to others.
const UID: WholeNumber = WholeNumber { of: "", from: 0, to: 59_999 };

fn read_product(f: &mut TableFields<'_>) -> Option<ProductConfig> {
    let name = f.required("name");
    let title = f.required::<String>("title");
    let version = f.required("version");
    let kind = f.required("kind");
    let default = f.or("default", false);
    let boards = f.list("boards");
    let default_board = f.required("default-board");
    let overlays = f.list("overlays");
    let console = f.optional("console");
    let rootfs = f.table("rootfs", read_rootfs);
    let api = f.optional_table("api", |f| {
        let package = f.required("package");
        let lock = f.required("lock");
        let minimum_version = f.optional("minimum-version");
        Some(ApiConfig { package: package?, lock: lock?, minimum_version: minimum_version? })
    });
    let users = f.tables("users", read_user);
    let ssh = f.table("ssh", |f| {
        let password_authentication = f.or("password-authentication", false);
        let permit_root_login = f.or("permit-root-login", RootLogin::No);
        Some(SshConfig {
            password_authentication: password_authentication?,
            permit_root_login: permit_root_login?,
            place: f.place(),
        })
    });
    let network = f.table("network", |f| {
        let hostname = f.required::<SafeName>("hostname");
        let link_local = f.or("link-local", true);
        let country = f.optional::<CountryCode>("country");
        Some(NetworkConfig {
            hostname: hostname?.value.0,
            link_local: link_local?,
            country: country?.map(|located| located.value.0),
        })
    });
    let update = f.table("update", |f| {
        let minimum_version = f.required("minimum-version");
        let key_epoch = f.number_or("key-epoch", KEY_EPOCH, 0);
        Some(UpdateConfig { minimum_version: minimum_version?, key_epoch: key_epoch? })
    });
    let place = f.place();
    Some(ProductConfig {
        place,
        name: name?,
        title: title?.value,
        version: version?,
        kind: kind?,
        default: default?,
        boards: boards?,
        default_board: default_board?,
        overlays: overlays?,
        console: console?,
        rootfs: rootfs?,
        api: api?,
        users: users?,
        ssh: ssh?,
        network: network?,
        update: update?,
    })
}

fn read_rootfs(f: &mut TableFields<'_>) -> Option<RootfsConfig> {
    let engine = f.required("engine");
    let suite = f.optional("suite");
    let components = f.list("components");
    let packages = f.list("packages");
    let unpacked = f.list("unpacked");
    let lock = f.optional("lock");
    let sources = f.tables("sources", read_apt_source);
    let buildroot = f.optional_table("buildroot", |f| {
        let url = f.required("url");
        let release = f.required("release");
        let commit = f.required("commit");
        let python = f.required("python");
        let libc = f.required("libc");
        let fragments = f.list("fragments");
        Some(BuildrootConfig {
            url: url?,
            release: release?,
            commit: commit?,
            python: python?,
            libc: libc?,
            fragments: fragments?,
        })
    });
    let fill_limit = f.or("fill-limit", Percent(95));
    let fill_warning = f.or("fill-warning", Percent(85));
    let prune = f.list::<String>("prune");
    let keep = f.list::<String>("keep");
    Some(RootfsConfig {
        engine: engine?,
        suite: suite?,
        components: components?,
        packages: packages?,
        unpacked: unpacked?,
        lock: lock?,
        sources: sources?,
        buildroot: buildroot?,
        fill_limit: fill_limit?,
        fill_warning: fill_warning?,
        prune: prune?.into_iter().map(|l| l.value).collect(),
        keep: keep?.into_iter().map(|l| l.value).collect(),
    })
}

fn read_apt_source(f: &mut TableFields<'_>) -> Option<AptSource> {
    let name = f.required("name");
    let address = f.required("address").and_then(|address| plain_address(f, address));
    let suite = f.required("suite");
    let components = f.list("components");
    let key = f.required("key");
    let packages = f.list("packages");
    Some(AptSource {
        name: name?,
        address: address?,
        suite: suite?,
        components: components?,
        key: key?,
        packages: packages?,
    })
}

/// The address of an archive in apt's form, without trailing slashes.
fn plain_address(f: &TableFields<'_>, mut address: Located<String>) -> Option<Located<String>> {
    let text = address.value.trim_end_matches('/').to_owned();
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    if host.contains('@') {
        // The value may be a password: do not show it.
        address.place.text = "address = …".to_owned();
        let message = "`rootfs.sources.address` contains a user name or a password";
        let help = "product files are public: write the archive's address only";
        f.reject(&address.place, message, help);
        return None;
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._~+/:%".contains(c);
    let bare_host = host.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !bare_host || !text.chars().all(plain) {
        let message = format!(
            "`rootfs.sources.address`: expected an address of http or https, found \"{}\"",
            address.value
        );
        let help = "write it as in \"https://archive.example.com/debian\"";
        f.reject(&address.place, message, help);
        return None;
    }
    address.value = text;
    Some(address)
}

fn read_user(f: &mut TableFields<'_>) -> Option<UserConfig> {
    let name = f.required("name");
    let uid = f.number("uid", UID);
    let groups = f.list::<String>("groups");
    let shell = f.or("shell", "/bin/sh".to_owned());
    let home = f.optional::<String>("home");
    let password = f.required("password");
    let authorized_keys = f.list("authorized-keys");
    let name: Located<SafeName> = name?;
    let home = match home? {
        Some(home) => home.value,
        None if name.value.0 == "root" => "/root".to_owned(),
        None => format!("/home/{}", name.value.0),
    };
    Some(UserConfig {
        uid: uid?,
        groups: groups?.into_iter().map(|l| l.value).collect(),
        shell: shell?,
        home,
        password: password?,
        authorized_keys: authorized_keys?,
        name,
    })
}
