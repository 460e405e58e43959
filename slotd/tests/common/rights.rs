//! Tests that mount file systems or act as several users. They need no special rights: without root they run in a copy of
//! their program that is root in a user namespace. If such a namespace is not possible they fail, because a test that did not
//! run has not passed.
#![allow(dead_code, clippy::unwrap_used)]

use std::process::Command;

/// The unprivileged user `nobody` of Debian.
pub const NOBODY: u32 = 65534;

/// Creates a separate root directory for the namespace: there the files of the machine's root belong to the user `nobody`,
/// and `sshd`, for example, does not trust such a `/`.
const SCRIPT: &str = r#"
set -e
new=$1
shift
mount -t tmpfs -o mode=755 none "$new"
for path in /*; do
  if [ -L "$path" ]; then
    cp -P "$path" "$new$path"
  elif [ "$path" = /run ]; then
    mkdir "$new/run"
  elif [ -d "$path" ]; then
    mkdir "$new$path"
    mount --rbind "$path" "$new$path"
  fi
done
exec chroot "$new" "$@"
"#;

/// Whether the caller is root and must run the test itself. Otherwise a copy of this program has run the test `test` (a name
/// for `--exact`), and it has passed.
///
/// # Panics
/// When the test has failed there, or such a namespace cannot be created.
pub fn is_root(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--map-auto", "--mount", "sh", "-c", SCRIPT, "sh"])
        .arg(folder.path())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.success() && printed.contains("1 passed"),
        "{test}, as root of a user namespace:\n{printed}\n\
         help: run it as root; or let users make namespaces with several users: util-linux 2.38, the package uidmap, \
         and lines for this user in /etc/subuid and /etc/subgid (usermod --add-subuids 100000-165535 --add-subgids \
         100000-165535)"
    );
    false
}
