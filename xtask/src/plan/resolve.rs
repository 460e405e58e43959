//! From the configuration to the plan: all rules that need more than one value.

use std::collections::BTreeMap;

use anyhow::Context as _;
use camino::Utf8Path;

use super::boards;
use super::fragment;
use super::{
    ApiPlan, BootFilePlan, BuildrootPlan, CheckoutFacts, DiskIdentifiers, OverlayPlan, Plan,
    ProductPlan, RootfsPlan, UpdatePlan, UserPlan, must_exist,
};
use crate::config::Config;
use crate::config::board::BoardConfig;
use crate::config::product::{BuildKind, Engine, ProductConfig, UserConfig};
use crate::config::reader::{ConfigFinding, ConfigFindings, Located};
use crate::ssh_keys;

/// Resolves one build. Pure.
///
/// # Errors
/// Everything that is wrong, each with file, line and text.
pub fn resolve(config: &Config, facts: &CheckoutFacts) -> anyhow::Result<Plan> {
    let mut findings = Vec::new();
    let (product, board) = (&config.product, &config.board);
    check_product(config, &mut findings);
    check_users(product, &mut findings);
    boards::check_board(product, board, &mut findings);
    check_engine(product, board, &mut findings);
    let buildroot = plan_buildroot(config, &mut findings);
    let (sources, wrong) = super::plan_sources(config);
    findings.extend(wrong);
    let disk = boards::place_board_partitions(&board.disk, &board.partitions, &mut findings);
    let earlier = boards::plan_earlier_cards(board, &mut findings);
    let overlay = merge_overlays(config);
    let boot_files = boot_files(config, &mut findings);
    ConfigFindings(findings).check()?;
    let disk = disk.context("the disk was rejected without a finding")?;
    let rootfs = &product.rootfs;
    Ok(Plan {
        schema: 1,
        product: ProductPlan {
            name: product.name.value.0.clone(),
            title: product.title.clone(),
            version: product.version.value.clone(),
            kind: product.kind.value,
        },
        board: boards::plan_board(product, board, earlier),
        commit: facts.commit.clone(),
        modified: facts.modified,
        epoch: facts.epoch,
        identifiers: DiskIdentifiers::derive(
            &product.name.value.0,
            product.version.value.as_str(),
            &board.name.value.0,
        ),
        disk,
        rootfs: RootfsPlan {
            engine: rootfs.engine.value,
            suite: rootfs.suite.as_ref().map_or(String::new(), |s| s.value.0.clone()),
            components: rootfs.components.iter().map(|l| l.value.clone()).collect(),
            packages: rootfs.packages.iter().map(|l| l.value.clone()).collect(),
            extra_packages: config.extra_packages.clone(),
            lock: rootfs.lock.as_ref().map(|l| l.value.clone()),
            sources,
            buildroot,
            fill_limit: rootfs.fill_limit.0,
            fill_warning: rootfs.fill_warning.0,
            prune: rootfs.prune.clone(),
            keep: rootfs.keep.clone(),
        },
        overlay,
        directories: config.overlays.iter().flat_map(|o| o.directories.clone()).collect(),
        api: product.api.as_ref().map(|api| ApiPlan {
            package: api.package.value.clone(),
            lock: api.lock.value.clone(),
            minimum_version: api.minimum_version.as_ref().map(|version| version.value.clone()),
        }),
        users: product
            .users
            .iter()
            .map(|user| UserPlan {
                name: user.name.value.0.clone(),
                uid: user.uid.value,
                groups: user.groups.clone(),
                shell: user.shell.clone(),
                home: user.home.clone(),
                password: user.password.value.clone(),
                authorized_keys: user.authorized_keys.iter().map(|k| k.value.clone()).collect(),
            })
            .collect(),
        ssh: product.ssh.clone(),
        network: product.network.clone(),
        update: UpdatePlan {
            minimum_version: product.update.minimum_version.value.clone(),
            key_epoch: product.update.key_epoch,
        },
        boot_files,
        inputs: config.inputs.clone(),
    })
}

fn check_product(config: &Config, out: &mut Vec<ConfigFinding>) {
    let product = &config.product;
    let (board, file) = (&config.board, &config.product.place);
    for (title, place) in [(&product.title, file), (&board.title, &board.place)] {
        if title.chars().any(char::is_control) {
            let message = "`title` contains a control character, such as a line break";
            out.push(ConfigFinding::new(place, message, "write it as one line of text"));
        }
    }
    for board in product.boards.iter().filter(|b| !config.boards.contains(&b.value.0)) {
        let message = format!("there is no board {}", board.value.0);
        out.push(ConfigFinding::new(
            &board.place,
            message,
            format!("known boards: {}", config.boards.join(", ")),
        ));
    }
    let floor = &product.update.minimum_version;
    if floor.value > product.version.value {
        let message = format!(
            "`minimum-version` is {}, above the product's own version {}",
            floor.value, product.version.value
        );
        out.push(ConfigFinding::new(&floor.place, message, "a robot would reject this bundle"));
    }
    if product.rootfs.fill_warning > product.rootfs.fill_limit {
        let message = format!(
            "`fill-warning` ({}%) is above `fill-limit` ({}%)",
            product.rootfs.fill_warning.0, product.rootfs.fill_limit.0
        );
        out.push(ConfigFinding::new(
            &product.rootfs.engine.place,
            message,
            "with these values, the build would never warn",
        ));
    }
    let lock_help = format!("run `cargo xtask lock --product {}`", product.name.value.0);
    if let Some(path) = &product.rootfs.lock {
        must_exist(config, &path.place, &path.value, &lock_help, out);
    }
    let keys = product.users.iter().flat_map(|user| &user.authorized_keys);
    for path in keys.clone() {
        let help = "create the file with a public key, as ssh-keygen writes it";
        must_exist(config, &path.place, &path.value, help, out);
    }
    for path in keys {
        let file = config.authorized_keys.iter().find(|(file, _)| *file == path.value);
        if let Some(Err(bad)) = file.map(|(_, bytes)| ssh_keys::parse_keys(bytes)) {
            let line = bad.line.map_or(String::new(), |line| format!(":{line}"));
            let message = format!("{}{line}: {}", path.value, bad.message);
            out.push(ConfigFinding::new(&path.place, message, bad.help));
        }
    }
    if let Some(api) = &product.api {
        must_exist(config, &api.lock.place, &api.lock.value, &lock_help, out);
        let exact = api.package.value.split_once("==").is_some_and(|(name, version)| {
            !name.is_empty() && !version.is_empty() && !version.contains(['*', '=', ';', ',', ' '])
        });
        if !exact {
            let message =
                format!("`package`: expected `name==version`, found \"{}\"", api.package.value);
            out.push(ConfigFinding::new(&api.package.place, message, "name one exact version"));
        }
        if let Some(floor) = &api.minimum_version {
            let own = api.package.value.split("==").nth(1).unwrap_or_default();
            let parsed = |text: &str| text.trim().parse::<pep508_rs::pep440_rs::Version>().ok();
            // A floor without a package version to compare is reported above.
            let above = match (parsed(&floor.value), parsed(own)) {
                (None, _) => {
                    Some(format!("`minimum-version` is not a version: \"{}\"", floor.value))
                }
                (Some(floor), Some(own)) if floor > own => Some(format!(
                    "`minimum-version` is {floor}, above the package's own version {own}"
                )),
                _ => None,
            };
            let help = "lower it: the image's own API must not be below it";
            out.extend(above.map(|message| ConfigFinding::new(&floor.place, message, help)));
        }
    }
    if product.kind.value == BuildKind::Release {
        if product.ssh.password_authentication {
            let message = "a release product must not accept passwords over SSH";
            let help = "set `password-authentication = false` and use `authorized-keys`";
            out.push(ConfigFinding::new(&product.ssh.place, message, help));
        }
        for user in product.users.iter().filter(|u| u.password.value == "empty") {
            let message =
                format!("the account {} of a release product has no password", user.name.value.0);
            out.push(ConfigFinding::new(
                &user.password.place,
                message,
                "write \"locked\" or a hash",
            ));
        }
    }
}

fn check_users(product: &ProductConfig, out: &mut Vec<ConfigFinding>) {
    for (i, user) in product.users.iter().enumerate() {
        let (name, uid) = (&user.name.value.0, user.uid.value);
        if let Some(other) = product.users[..i].iter().find(|u| u.name.value == user.name.value) {
            let message = format!("the account {name} is listed twice");
            let help = format!("the first entry is in line {}", other.name.place.line);
            out.push(ConfigFinding::new(&user.name.place, message, help));
        } else if let Some(other) = product.users[..i].iter().find(|u| u.uid.value == uid) {
            let message = format!("{name} and {} both have uid {uid}", other.name.value.0);
            out.push(ConfigFinding::new(
                &user.uid.place,
                message,
                "give each account a different id",
            ));
        }
        // 0 is root; below 1000 the distribution hands out ids; 60000 is login.defs' UID_MAX.
        if !(uid == 0 && name == "root" || (1000..60000).contains(&uid)) {
            let message = format!(
                "`users.uid` of {name}: expected a whole number from 1000 to 59999, found {uid}"
            );
            let help = "0 is root's, those up to 999 are the system's own accounts'";
            out.push(ConfigFinding::new(&user.uid.place, message, help));
        }
        check_account(user, out);
        let password = &user.password.value;
        if !(password == "locked" || password == "empty" || password.starts_with('$')) {
            let message =
                format!("`password` of {name} is neither \"locked\", \"empty\" nor a crypt hash");
            let mut place = user.password.place.clone();
            // The value may be a plain-text password: do not show it.
            place.text = "password = …".to_owned();
            out.push(ConfigFinding::new(&place, message, "create a hash with `openssl passwd -6`"));
        }
    }
}

/// Values for passwd(5) and group(5), which do not support quoting.
fn check_account(user: &UserConfig, out: &mut Vec<ConfigFinding>) {
    let (name, place) = (&user.name.value.0, &user.name.place);
    let mut find = |message: String, help: &str| out.push(ConfigFinding::new(place, message, help));
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._+-@".contains(c);
    let is_path = |path: &str| {
        let parts = path.split('/').skip(1).collect::<Vec<_>>();
        path.starts_with('/')
            && path.chars().all(plain)
            && (path == "/" || parts.iter().all(|part| !matches!(*part, "" | "." | "..")))
    };
    for (key, path) in [("home", &user.home), ("shell", &user.shell)] {
        if !is_path(path) {
            find(
                format!("`{key}` of {name} is not a valid path: \"{path}\""),
                "write an absolute path of letters, digits and /._+-@, without `.` and `..`",
            );
        }
    }
    if name != "root" && SYSTEM_FOLDERS.contains(&user.home.as_str()) {
        find(
            format!("the home {} of {name} is a system directory", user.home),
            "the account would own it, and exclude all others: use a separate directory, such as \
             \"/data/home/NAME\"",
        );
    }
    let group = |group: &&String| {
        group.is_empty() || !group.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
    };
    for wrong in user.groups.iter().filter(group) {
        find(format!("\"{wrong}\" in `groups` of {name} is not a valid group name"), "");
    }
    // Do not show a hash.
    if user.password.value.contains(|c: char| c == ':' || c.is_control()) {
        find(format!("`password` of {name} contains a colon or a control character"), "");
    }
}

/// Directories of the Filesystem Hierarchy Standard 3.0 (chapters 3 to 5), and others that exist on
/// robots.
const SYSTEM_FOLDERS: [&str; 34] = [
    "/",
    "/bin",
    "/boot",
    "/data",
    "/data/home",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/local",
    "/usr/sbin",
    "/usr/share",
    "/var",
    "/var/cache",
    "/var/lib",
    "/var/log",
    "/var/mail",
    "/var/opt",
    "/var/run",
    "/var/spool",
    "/var/tmp",
];

const PACKAGE_HELP: &str = "write it in apt's form: `nginx`, `nginx=1.22.1-9`, \
 `nginx/bookworm-backports` or \
                            `libc6:arm64`; a name has lower-case letters, digits, `+`, `-` and `.`";

/// Whether a text names one package, in the forms of apt-get(8): a name (Debian Policy, 5.6.1),
/// perhaps with its architecture, and a version or a suite. What apt would read as a pattern, an
/// option or a removal (a `-` at the end) is rejected.
fn is_package(text: &str) -> bool {
    let (text, suite) = text.split_once('/').map_or((text, None), |(t, s)| (t, Some(s)));
    let (text, version) = text.split_once('=').map_or((text, None), |(t, v)| (t, Some(v)));
    let (name, arch) = text.split_once(':').map_or((text, None), |(t, a)| (t, Some(a)));
    let made_of = |part: &str, more: &str| {
        part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || more.contains(c))
    };
    let is_word = |part: Option<&str>, more: &str| {
        part.is_none_or(|part| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && made_of(&part.to_ascii_lowercase(), more)
        })
    };
    name.len() > 1
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && made_of(name, "+-.")
        && !name.ends_with('-')
        && is_word(arch, "-")
        && is_word(version, "+-.:~")
        && is_word(suite, "-.")
        && !(version.is_some() && suite.is_some())
}

/// What is wrong with the names of packages, of a product and a board.
pub fn check_package_names(product: &ProductConfig, board: &BoardConfig) -> Vec<ConfigFinding> {
    let boards = board.debian.iter().flat_map(|debian| &debian.packages);
    let all = product.rootfs.packages.iter().chain(&product.rootfs.unpacked).chain(boards);
    let finding = |package: &Located<String>| {
        let message = format!("\"{}\" does not name a package of Debian", package.value);
        ConfigFinding::new(&package.place, message, PACKAGE_HELP)
    };
    all.filter(|package| !is_package(&package.value)).map(finding).collect()
}

fn check_engine(product: &ProductConfig, board: &BoardConfig, out: &mut Vec<ConfigFinding>) {
    let rootfs = &product.rootfs;
    let place = &rootfs.engine.place;
    let mut needs = |present: bool, key: &str| {
        if !present {
            let message = format!("the engine needs `rootfs.{key}`");
            out.push(ConfigFinding::new(place, message, format!("add `{key} = …` to [rootfs]")));
        }
    };
    match rootfs.engine.value {
        Engine::Debian => {
            needs(rootfs.suite.is_some(), "suite");
            needs(rootfs.lock.is_some(), "lock");
            needs(!rootfs.components.is_empty(), "components");
            needs(!rootfs.packages.is_empty(), "packages");
            out.extend(check_package_names(product, board));
            if board.debian.is_none() {
                let message =
                    format!("the engine debian does not support the board {}", board.name.value.0);
                let help = format!(
                    "add a [debian] table to {}, or use the engine buildroot",
                    board.place.file
                );
                out.push(ConfigFinding::new(place, message, help));
            }
        }
        Engine::Buildroot => {
            needs(rootfs.buildroot.is_some(), "buildroot");
            if let Some(package) = rootfs.packages.first() {
                let message = "`packages` lists Debian packages, but this engine uses fragments";
                let help = format!(
                    "write BR2_PACKAGE_{}=y into a fragment",
                    package.value.to_uppercase().replace(['-', '.'], "_")
                );
                out.push(ConfigFinding::new(&package.place, message, help));
            }
            if board.buildroot.is_none() {
                let message = format!(
                    "the engine buildroot does not support the board {}",
                    board.name.value.0
                );
                let help = format!("add a [buildroot] table to {}", board.place.file);
                out.push(ConfigFinding::new(place, message, help));
            }
        }
    }
}

/// The defconfig of the engine `buildroot`, merged from board and product.
fn plan_buildroot(config: &Config, out: &mut Vec<ConfigFinding>) -> Option<BuildrootPlan> {
    let rootfs = &config.product.rootfs;
    let pinned = rootfs.buildroot.as_ref().filter(|_| rootfs.engine.value == Engine::Buildroot)?;
    let board = config.board.buildroot.iter().flat_map(|b| &b.fragments);
    for path in board.chain(&pinned.fragments) {
        must_exist(config, &path.place, &path.value, "create the file, or correct the path", out);
    }
    let texts = config.fragments.iter().map(|(path, text)| (path.as_path(), text.as_str()));
    let (defconfig, findings) = fragment::merge_fragments(texts);
    out.extend(findings);
    let release = pinned.release.value.as_str();
    let plain = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    // The tag is used as a directory name and as an argument of git.
    if !release.starts_with(|c: char| c.is_ascii_alphanumeric()) || !release.bytes().all(plain) {
        let message = format!("`release`: \"{release}\" is not a valid tag name");
        out.push(ConfigFinding::new(
            &pinned.release.place,
            message,
            "write a release such as 2025.02.16",
        ));
    }
    let commit = &pinned.commit;
    if commit.value.len() != 40 || !commit.value.bytes().all(|b| b.is_ascii_hexdigit()) {
        let message =
            format!("`commit`: expected 40 hexadecimal digits, found \"{}\"", commit.value);
        let help = "`git rev-parse <tag>^{commit}` prints the commit";
        out.push(ConfigFinding::new(&commit.place, message, help));
    }
    Some(BuildrootPlan {
        url: pinned.url.value.clone(),
        release: release.to_owned(),
        commit: commit.value.clone(),
        python: pinned.python.value.clone(),
        libc: pinned.libc.value.clone(),
        defconfig,
        overrides: Vec::new(),
    })
}

fn merge_overlays(config: &Config) -> Vec<OverlayPlan> {
    let mut merged = BTreeMap::new();
    for file in config.overlays.iter().flat_map(|o| &o.files) {
        let planned = OverlayPlan {
            source: file.source.clone(),
            target: file.target.clone(),
            kind: file.kind,
            attributes: file.attributes,
        };
        merged.insert(file.target.clone(), planned);
    }
    merged.into_values().collect()
}

fn boot_files(config: &Config, out: &mut Vec<ConfigFinding>) -> Vec<BootFilePlan> {
    let board = &config.board;
    let dir = Utf8Path::new("board").join(&board.name.value.0);
    let mut files = Vec::new();
    let engine = config.product.rootfs.engine.value;
    for file in board.boot_files.iter().filter(|f| f.engine.is_none_or(|only| only == engine)) {
        let source = file.source.map_template(|name| {
            let path = config.templates.get(&name.value).unwrap_or(&name.value).clone();
            let help = format!("looked in {dir} and board/common");
            must_exist(config, &name.place, &path, &help, out);
            path
        });
        let roles: &[&str] = match file.partition.value.0.as_str() {
            "boot-slot" => &["boot-a", "boot-b"],
            "boot" => &["boot"],
            other => {
                let message = format!("boot files cannot go to the partition `{other}`");
                out.push(ConfigFinding::new(
                    &file.partition.place,
                    message,
                    "use \"boot\" or \"boot-slot\"",
                ));
                continue;
            }
        };
        for role in roles {
            if !board.partitions.iter().any(|p| p.role.value.0 == *role) {
                let message = format!(
                    "the boot file {} targets the partition `{role}`, but this board does not \
                     define it",
                    file.path
                );
                out.push(ConfigFinding::new(&file.partition.place, message, ""));
                continue;
            }
            files.push(BootFilePlan {
                source: source.clone(),
                path: file.path.clone(),
                partition: (*role).to_owned(),
                aliases: file.aliases.clone(),
            });
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_as_apt_names_one() {
        for good in [
            "nginx",
            "libstdc++6",
            "g++",
            "libc6:arm64",
            "vim=2:9.0.1378-2+deb12u2",
            "linux-image-arm64/bookworm-backports",
        ] {
            assert!(is_package(good), "{good}");
        }
        for bad in [
            "",
            "a",
            "-less",
            "less-",
            "Less",
            "less ",
            "python3-*",
            "vim=2:9*",
            "a b",
            "vim=1/x",
            "?essential",
        ] {
            assert!(!is_package(bad), "{bad}");
        }
    }
}
