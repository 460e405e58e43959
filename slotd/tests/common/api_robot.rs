//! A robot on files whose image has an API; the package is synthetic, and must never be imported.
#![allow(dead_code)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use slotd::RootDir;
use slotd::events::EventLog;
use slotd::provision::{ProvisionOutcome, ProvisionReport, provision_at_start, run};

use crate::crash::{Snapshot, snapshot};

pub const SITE: &str = "usr/lib/python3.11/site-packages";
pub const ON_DATA: &str = "data/apps/api/current/site";

/// A robot on files whose image has an API.
pub struct Robot {
    pub dir: tempfile::TempDir,
}

impl Robot {
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let robot = Self { dir: tempfile::tempdir_in(place).unwrap() };
        robot.file(
            "usr/lib/slipway/api.toml",
            "package = 'robotapi'\nmodule = 'robotapi'\nversion = '1.0'\npython = '3.11'\n\
             site-packages = '/usr/lib/python3.11/site-packages'\nlater = 1\n",
        );
        robot.file("usr/lib/slipway/api.env", "# fixed\nPYTHONPATH=/data/apps/api/current/site\n");
        robot.file("usr/lib/slipway/base-id", "one\n");
        robot.file(&format!("{SITE}/robotapi/__init__.py"), "raise SystemExit(1)\n");
        fs::create_dir_all(robot.path("data")).unwrap();
        robot
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub fn root(&self) -> RootDir {
        RootDir::new(self.dir.path())
    }

    pub fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    pub fn resource(&self, path: &str, text: &str) -> &Self {
        self.file(&format!("{SITE}/robotapi/resources/{path}"), text)
    }

    /// A package with all kinds of files.
    pub fn resources(&self) -> &Self {
        self.resource("nginx.conf", "server {}\n").resource("scripts/start", "#!/bin/sh\nexit 0\n");
        self.resource("scripts/deep/tool", "\x7fELF and more").resource("empty", "");
        symlink("../nginx.conf", self.path(&format!("{SITE}/robotapi/resources/scripts/link")))
            .unwrap();
        self
    }

    pub fn mode(&self, path: &str, mode: u32) {
        fs::set_permissions(self.path(path), Permissions::from_mode(mode)).unwrap();
    }

    pub fn run(&self) -> slotd::Result<ProvisionReport> {
        run(&self.root(), &EventLog::new(&self.root()))
    }

    pub fn boot(&self) -> slotd::Result<ProvisionOutcome> {
        provision_at_start(&self.root(), &EventLog::new(&self.root())).map(|done| done.outcome)
    }

    pub fn system(&self) -> Snapshot {
        snapshot(&self.path("data/system"))
    }

    pub fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.path("data")).unwrap();
        let names = names.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with('.')).collect()
    }

    pub fn events(&self) -> Vec<String> {
        EventLog::new(&self.root()).read().unwrap().into_iter().map(|e| e.event).collect()
    }
}

/// The tree that [`Robot::resources`] requires.
pub fn complete() -> Snapshot {
    let entries = [
        ("", "755 directory"),
        ("nginx.conf", "644 server {}\n"),
        ("empty", "644 "),
        ("scripts", "755 directory"),
        ("scripts/start", "755 #!/bin/sh\nexit 0\n"),
        ("scripts/deep", "755 directory"),
        ("scripts/deep/tool", "755 \x7fELF and more"),
        ("scripts/link", "-> ../nginx.conf"),
    ];
    entries.into_iter().map(|(path, text)| (path.into(), text.to_owned())).collect()
}

/// The old tree, for cuts: different content, different modes, files more and less.
pub fn old_tree(robot: &Robot) -> Snapshot {
    robot.file("data/system/nginx.conf", "old").file("data/system/gone/x", "old");
    robot.file("data/system/scripts/start", "old").mode("data/system/scripts/start", 0o700);
    robot.system()
}
