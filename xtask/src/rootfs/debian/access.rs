//! What the machine's apt knows about an archive besides its address: lists of mirrors, and the
//! login of an archive. Both are kept in memory and in files that no other user can read.

use std::fs;

use camino::{Utf8Path, Utf8PathBuf};

use crate::exec::Tool;

/// The address behind `mirror+file:/a/list` (apt-transport-mirror(1)): the preferred mirror of the
/// list. Any other address is returned unchanged; `None` for one that cannot be resolved.
pub(super) fn resolve_mirror(uri: &str) -> Option<String> {
    let Some(list) = uri.strip_prefix("mirror+file:") else {
        let plain = uri.starts_with("http:") || uri.starts_with("https:");
        return plain.then(|| uri.to_owned());
    };
    // apt appends a slash to every address.
    let list = list.trim_end_matches('/');
    let list = list.strip_prefix("//").unwrap_or(list);
    preferred_mirror(&fs::read_to_string(list).ok()?)
}

/// The first mirror of the lowest `priority:`; mirrors without a priority come after all that have
/// one.
fn preferred_mirror(list: &str) -> Option<String> {
    let mirror = |line: &str| {
        let mut words = line.split_whitespace();
        let uri =
            words.next().filter(|uri| uri.starts_with("http:") || uri.starts_with("https:"))?;
        let priority = words.find_map(|word| word.strip_prefix("priority:")?.parse::<u32>().ok());
        Some((priority.unwrap_or(u32::MAX), uri.to_owned()))
    };
    // `min_by_key` returns the first of equal elements.
    list.lines().filter_map(mirror).min_by_key(|(priority, _)| *priority).map(|(_, uri)| uri)
}

/// The logins of apt_auth.conf(5).
#[derive(Clone, Default)]
pub(super) struct AptLogins(Vec<Login>);

#[derive(Clone, Default)]
struct Login {
    /// `http` or `https`; without it https, and everything other than http.
    scheme: Option<String>,
    /// Host, with an optional port.
    host: String,
    /// The prefix of the path.
    path: String,
    login: String,
    password: String,
}

impl AptLogins {
    /// The logins of the machine's apt that this user can read.
    pub fn of_the_machine() -> Self {
        let asked = ["shell", "FILE", "Dir::Etc::netrc/f", "FOLDER", "Dir::Etc::netrcparts/d"];
        let output = Tool::new("apt-config").args(asked).read().unwrap_or_default();
        let value = |name: &str| {
            let line = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.map(|value| Utf8PathBuf::from(value.trim_matches('\'')))
        };
        let mut files: Vec<Utf8PathBuf> = value("FILE").into_iter().collect();
        let dir = value("FOLDER").and_then(|dir| dir.read_dir_utf8().ok());
        let mut parts: Vec<_> = dir
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.into_path()))
            // Like apt (apt.conf(5)): files with this ending, and names without an ending.
            .filter(|path| path.extension().is_none_or(|end| end == "conf"))
            .collect();
        parts.sort();
        files.append(&mut parts);
        let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
        Self(texts.flat_map(|text| parse_logins(&text)).collect())
    }

    /// The address with its login; an address that contains a login is unchanged.
    pub fn with_login(&self, uri: &str) -> String {
        let Some((scheme, rest)) = uri.split_once("://") else { return uri.to_owned() };
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if host.contains('@') {
            return uri.to_owned();
        }
        let bare = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let fits = |login: &&Login| {
            let given = login.scheme.as_deref();
            let host_fits = login.host == host || (login.host == bare && !login.host.contains(':'));
            // A password is not sent unencrypted unless the configuration allows it explicitly.
            given.map_or(scheme == "https", |given| given == scheme)
                && host_fits
                && is_path_below(&login.path, path)
        };
        match self.0.iter().find(fits) {
            Some(Login { login, password, .. }) => {
                format!("{scheme}://{}:{}@{rest}", percent_encode(login), percent_encode(password))
            }
            None => uri.to_owned(),
        }
    }
}

/// Whether a path begins with another, whole names only unless the other path ends with a slash.
fn is_path_below(beginning: &str, path: &str) -> bool {
    let Some(rest) = path.strip_prefix(beginning.trim_end_matches('/')) else { return false };
    rest.is_empty() || rest.starts_with('/')
}

/// The words of a file: `machine NAME`, `login WORD`, `password WORD`, in any order after a
/// machine.
fn parse_logins(text: &str) -> Vec<Login> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut words = lines.flat_map(str::split_whitespace);
    let mut logins: Vec<Login> = Vec::new();
    while let Some(word) = words.next() {
        match (word, logins.last_mut()) {
            ("machine", _) => {
                let name = words.next().unwrap_or_default();
                let (scheme, rest) = match name.split_once("://") {
                    Some((scheme, rest)) => (Some(scheme.to_owned()), rest),
                    None => (None, name),
                };
                let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let (host, path) = (host.to_owned(), path.to_owned());
                logins.push(Login { scheme, host, path, ..Login::default() });
            }
            ("login", Some(last)) => last.login = words.next().unwrap_or_default().to_owned(),
            ("password", Some(last)) => last.password = words.next().unwrap_or_default().to_owned(),
            _ => {}
        }
    }
    logins.retain(|login| !login.host.is_empty() && !login.login.is_empty());
    logins
}

/// RFC 3986, section 2.1: all but unreserved characters.
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Writes a file that only its owner can read from the beginning: an address in it may contain a
/// login.
pub(super) fn write_private(path: &Utf8Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let mut options = fs::OpenOptions::new();
    let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(path)?;
    // It may exist from an earlier version.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_mirrors_are_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let list = Utf8PathBuf::try_from(dir.path().join("debian.list")).expect("UTF-8");
        fs::write(&list, "# ours\nfile:/srv/debian\nhttps://b.example/debian\n").expect("written");
        for uri in [format!("mirror+file:{list}/"), format!("mirror+file://{list}")] {
            assert_eq!(resolve_mirror(&uri).as_deref(), Some("https://b.example/debian"), "{uri}");
        }
        assert_eq!(
            resolve_mirror("http://a.example/debian/").as_deref(),
            Some("http://a.example/debian/")
        );
        assert_eq!(resolve_mirror("mirror+file:/no/such/list/"), None);
        assert_eq!(resolve_mirror("cdrom:[Debian]/"), None);
        let ranked = "http://c.example/ priority:2\nhttp://a.example/\thttp\nhttp://d.example/ arch:arm64 priority:1\n";
        assert_eq!(preferred_mirror(ranked).as_deref(), Some("http://d.example/"));
        assert_eq!(preferred_mirror("# nothing\n"), None);
    }

    #[test]
    fn logins_go_where_apt_would_send_them() {
        let text = "# machine no.example login x password y\n\
            machine a.example login robot password p@ss/word\n\
            machine http://127.0.0.1:8099/debian\n  login me password \"#1\"\n\
            machine b.example/private/ password two login one\n\
            machine c.example\n";
        let logins = AptLogins(parse_logins(text));
        for (uri, expected) in [
            ("https://a.example/debian", "https://robot:p%40ss%2Fword@a.example/debian"),
            ("https://a.example:8443/debian", "https://robot:p%40ss%2Fword@a.example:8443/debian"),
            ("http://127.0.0.1:8099/debian", "http://me:%22%231%22@127.0.0.1:8099/debian"),
            ("http://127.0.0.1:8099/debian-security", "http://127.0.0.1:8099/debian-security"),
            ("https://b.example/private/x", "https://one:two@b.example/private/x"),
            ("https://b.example/public", "https://b.example/public"),
            // Not unencrypted unless allowed; not replacing an existing login; not for other hosts.
            ("http://a.example/debian", "http://a.example/debian"),
            ("https://own:one@a.example/debian", "https://own:one@a.example/debian"),
            ("https://xa.example/debian", "https://xa.example/debian"),
            ("https://c.example/debian", "https://c.example/debian"),
            ("https://no.example/debian", "https://no.example/debian"),
        ] {
            assert_eq!(logins.with_login(uri), expected);
        }
    }

    #[test]
    fn what_holds_a_login_is_nobody_elses() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = Utf8PathBuf::try_from(dir.path().join("sources.list")).expect("UTF-8");
        fs::write(&path, "old").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("a mode");
        write_private(&path, "new").expect("written");
        assert_eq!(fs::read_to_string(&path).expect("read"), "new");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    }
}
