//! The environment variables that another program gets: those that it is known to need, by name.
//! Passwords of signing keys, keys of object stores and tokens of registries are never passed on,
//! whatever their names are.

use std::ffi::OsString;

/// Every program: paths, language and time zone.
const EVERYBODY: &[&str] = &[
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM",
    "COLUMNS", "NO_COLOR", "TMPDIR",
];
/// Programs that fetch: proxies and certificates.
const NETWORK: &[&str] = &[
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
];
/// What git needs to call ssh(1): the agent, and how it asks for a password.
const SSH: &[&str] = &[
    "SSH_AUTH_SOCK",
    "SSH_ASKPASS",
    "SSH_ASKPASS_REQUIRE",
    "DISPLAY",
    "WAYLAND_DISPLAY",
    "XAUTHORITY",
];
/// git(1), except for variables that select another repository than the one it is called for.
const GIT: &[&str] = &[
    "XDG_CONFIG_HOME",
    "GIT_SSH",
    "GIT_SSH_COMMAND",
    "GIT_SSL_CAINFO",
    "GIT_SSL_CAPATH",
    "GIT_CONFIG_*",
];
/// Python and its pip, which its user configures: Slipway does not decide where wheels come from.
const PYTHON: &[&str] = &[
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "PIP_*",
    "NETRC",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUSERBASE",
    "PYTHONNOUSERSITE",
];
/// Cargo, rustc, and the C compiler that build scripts call (the crates `cc` and `pkg-config`).
const CARGO: &[&str] = &[
    "CARGO",
    "CARGO_*",
    "RUSTUP_*",
    "RUSTC",
    "RUSTC_*",
    "RUSTFLAGS",
    "RUSTDOCFLAGS",
    "RUST_*",
    "CC",
    "CC_*",
    "CXX",
    "CXX_*",
    "AR",
    "AR_*",
    "CFLAGS",
    "CFLAGS_*",
    "CXXFLAGS",
    "CXXFLAGS_*",
    "LDFLAGS",
    "PKG_CONFIG*",
    "CCACHE_DIR",
    "SCCACHE_DIR",
];
/// apt(8).
const APT: &[&str] = &["APT_CONFIG", "DEBIAN_FRONTEND"];
/// This program itself, which starts all of the above.
const OWN: &[&str] = &["SLIPWAY_*", "XDG_*", "CCACHE_*", "SOURCE_DATE_EPOCH", "BR2_*"];

/// Words that a name must not contain where only its prefix is known: cargo needs a private
/// registry's token, but every build script could read it.
const SECRETS: [&str; 5] = ["TOKEN", "SECRET", "PASSWORD", "PASSPHRASE", "AUTHORIZATION"];

/// The groups of variables for a program, by its file's name.
fn variable_groups(program: &str) -> &'static [&'static [&'static str]] {
    match program.rsplit('/').next().unwrap_or(program) {
        "git" => &[NETWORK, SSH, GIT],
        "python3" => &[NETWORK, PYTHON],
        "cargo" | "rustc" => &[NETWORK, CARGO],
        "apt-get" | "apt-config" | "apt-cache" | "mmdebstrap" | "sudo" => &[NETWORK, APT],
        "xtask" => &[NETWORK, SSH, GIT, PYTHON, CARGO, APT, OWN],
        _ => &[],
    }
}

/// Whether a program reads its user's own settings, which may refer to any variable: `${NAME}` in
/// ssh_config(5), and what a `ProxyCommand` or `Match exec` of it calls.
fn is_its_users(program: &str) -> bool {
    matches!(program.rsplit('/').next(), Some("ssh" | "sftp"))
}

/// Whether a variable is a secret, or a setting of Slipway, of cargo or of an object store, which
/// no login needs.
fn is_ours(name: &str) -> bool {
    const OTHERS: [&str; 6] = ["SLIPWAY_", "CARGO_", "AWS_", "LD_", "GIT_", "PIP_"];
    OTHERS.iter().any(|start| name.starts_with(start))
        || SECRETS.iter().any(|word| name.to_ascii_uppercase().contains(word))
}

/// A pattern is a name, or a prefix followed by `*`.
fn matches_pattern(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start) && !SECRETS.iter().any(|word| name.contains(word)),
        None => name == pattern,
    }
}

/// Our variables that this program gets. This program itself also gets the password of the signing
/// keys, so that it does not ask for it again.
pub(super) fn variables_for(program: &str) -> Vec<(String, OsString)> {
    let own = program.rsplit('/').next() == Some("xtask");
    let groups = variable_groups(program);
    if is_its_users(program) {
        return filter_variables(|name| !is_ours(name));
    }
    let given = |name: &str| {
        EVERYBODY.iter().chain(groups.iter().copied().flatten()).any(|p| matches_pattern(p, name))
            || (own && name == crate::keys::PASSWORD_VARIABLE)
    };
    filter_variables(given)
}

/// Our variables whose names a test of the workspace may need: all that this program gets, but no password.
pub(super) fn of_tests() -> Vec<(String, OsString)> {
    let groups = variable_groups("xtask");
    filter_variables(|name| {
        groups.iter().copied().flatten().any(|pattern| matches_pattern(pattern, name))
    })
}

/// Our variables that fetching needs, for programs that start one that fetches.
pub(super) fn of_network() -> Vec<(String, OsString)> {
    filter_variables(|name| NETWORK.contains(&name))
}

fn filter_variables(given: impl Fn(&str) -> bool) -> Vec<(String, OsString)> {
    let all =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
    all.filter(|(name, _)| given(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_do_not_let_secrets_through() {
        assert!(matches_pattern("LC_*", "LC_ALL") && !matches_pattern("LC_*", "LCX"));
        assert!(matches_pattern("CARGO_*", "CARGO_HOME") && !matches_pattern("PATH", "PATHS"));
        for name in ["CARGO_REGISTRY_TOKEN", "CARGO_REGISTRIES_OURS_TOKEN", "CARGO_X_SECRET_KEY"] {
            assert!(!matches_pattern("CARGO_*", name), "{name}");
        }
        assert!(!matches_pattern("SLIPWAY_*", crate::keys::PASSWORD_VARIABLE));
        for name in [crate::keys::PASSWORD_VARIABLE, "AWS_ACCESS_KEY_ID", "npm_token", "GIT_DIR"] {
            assert!(is_ours(name), "{name}");
        }
        for name in ["XDG_RUNTIME_DIR", "KRB5CCNAME", "SSH_AUTH_SOCK", "https_proxy", "MY_JUMP"] {
            assert!(!is_ours(name), "{name}");
        }
    }
}
