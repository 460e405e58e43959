//! APIs of synthetic wheels, packed as a builder would, and a robot that accepts them.

use std::fs;

use bundle::component::{ComponentLock, ComponentWheel, LOCK_ROLE, TREE_TIME, WheelScript};
use bundle::index::{sha256, to_hex};
use bundle::{BundleComponent, Version};

use super::bundles::{TestKey, parts};
use super::{Plan, Robot};

/// A wheel's files: path below `site` or `bin`, and content.
#[derive(Clone)]
pub struct Tree {
    pub name: &'static str,
    pub version: String,
    pub files: Vec<(String, String)>,
    pub requires: Vec<String>,
    pub scripts: Vec<WheelScript>,
}

impl Tree {
    pub fn new(name: &'static str, version: &str, text: &str) -> Self {
        let files = vec![
            (format!("site/{name}-{version}.dist-info/METADATA"), format!("Name: {name}\n")),
            (format!("site/{name}/__init__.py"), format!("VERSION = '{version}'\n# {text}\n")),
            (format!("site/{name}/__pycache__/__init__.cpython-311.pyc"), text.repeat(3)),
        ];
        let version = version.to_owned();
        Self { name, version, files, requires: Vec::new(), scripts: Vec::new() }
    }

    pub fn with(mut self, path: &str, text: &str) -> Self {
        self.files.push((path.to_owned(), text.to_owned()));
        self
    }

    pub fn tar(&self) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, text) in &self.files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(if path.starts_with("bin/") { 0o755 } else { 0o644 });
            header.set_mtime(TREE_TIME);
            tar.append_data(&mut header, path, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    pub fn wheel(&self, tar: &[u8]) -> ComponentWheel {
        ComponentWheel {
            role: self.name.to_owned(),
            name: self.name.to_owned(),
            version: self.version.clone(),
            sha256: "0".repeat(64),
            tree: to_hex(&sha256(tar)),
            size: tar.len() as u64,
            files: self.files.len() as u64,
            bytes: self.files.iter().map(|(_, text)| text.len() as u64).sum(),
            requires: self.requires.clone(),
            scripts: self.scripts.clone(),
        }
    }
}

/// A component to be packed: valid until a test breaks it.
pub struct Draft {
    pub lock: ComponentLock,
    pub tars: Vec<Vec<u8>>,
    pub version: &'static str,
    pub json: Option<Vec<u8>>,
    pub more: Vec<(&'static str, Vec<u8>)>,
}

impl Draft {
    pub fn new(trees: &[Tree]) -> Self {
        let tars: Vec<Vec<u8>> = trees.iter().map(Tree::tar).collect();
        let top = trees.iter().find(|tree| tree.name == "robotapi").unwrap();
        let lock = ComponentLock {
            format: 1,
            package: top.name.to_owned(),
            module: top.name.to_owned(),
            version: top.version.clone(),
            python: "3.11".to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            libc: "glibc 2.36".to_owned(),
            base: Vec::new(),
            wheels: trees.iter().zip(&tars).map(|(tree, tar)| tree.wheel(tar)).collect(),
        };
        Self { lock, tars, version: "1.2.3", json: None, more: Vec::new() }
    }

    pub fn edit(mut self, change: impl FnOnce(&mut ComponentLock)) -> Self {
        change(&mut self.lock);
        self
    }

    pub fn bundle(&self) -> Vec<u8> {
        let json = self.json.clone().unwrap_or_else(|| self.lock.to_json().unwrap());
        let mut contents: Vec<&[u8]> = vec![&json];
        contents.extend(self.tars.iter().map(Vec::as_slice));
        contents.extend(self.more.iter().map(|(_, content)| content.as_slice()));
        let mut parts = parts(&contents, 1);
        let mut payloads = std::mem::take(&mut parts.manifest.components[0].payloads);
        let roles = std::iter::once(LOCK_ROLE).chain(self.lock.wheels.iter().map(|w| &*w.role));
        payloads.iter_mut().zip(roles).for_each(|(p, role)| p.role = role.to_owned());
        let others = payloads.split_off(1 + self.tars.len());
        let component = |name: &str, payloads| BundleComponent {
            name: name.to_owned(),
            version: Version::parse("10.0.0").unwrap(),
            payloads,
        };
        parts.manifest.version = Version::parse(self.version).unwrap();
        parts.manifest.minimum_version = Version::parse("0.1.0").unwrap();
        parts.manifest.components = vec![component("api", payloads)];
        for ((name, _), payload) in self.more.iter().zip(others) {
            parts.manifest.components.push(component(name, vec![payload]));
        }
        parts.write(&[TestKey::new(1)])
    }
}

/// The API's own wheel and one that it needs.
pub fn trees(version: &str, text: &str) -> Vec<Tree> {
    let mut top = Tree::new("robotapi", version, text)
        .with("site/robotapi/resources/version.txt", version)
        .with("site/robotapi/cli/main.py", "def main(): return 0\n")
        .with("bin/robotapi", "#!/usr/bin/python3\n");
    top.requires = vec!["helper".to_owned()];
    top.scripts =
        vec![WheelScript { name: "robotapi".to_owned(), module: "robotapi.cli.main".to_owned() }];
    vec![Tree::new("helper", "2.0", "the same in all"), top]
}

pub fn api(version: &str) -> Vec<u8> {
    Draft::new(&trees(version, "fine")).bundle()
}

pub fn robot() -> Robot {
    let robot = Plan { in_memory: true, size: 1 << 20, ..Plan::default() }.make();
    equip(&robot);
    robot
}

/// The built-in API, and a check that fails for a certain file of an API.
pub fn equip(robot: &Robot) {
    base(robot, "minimum-version = '8.0.0'\npython = '3.11'\n");
    robot.file("usr/lib/slipway/api.env", "PYTHONPATH=/data/apps/api/current/site\n");
    robot.file("usr/lib/slipway/base-id", "one\n");
    let site = "usr/lib/python3/dist-packages";
    robot.file(&format!("{site}/robotapi/__init__.py"), "VERSION = '9.0.0'\n");
    robot.file(&format!("{site}/robotapi/resources/version.txt"), "9.0.0");
    robot.file(&format!("{site}/sixseven-1.16.0.dist-info/METADATA"), "Name: sixseven\n");
    let check = format!(
        "[command]\nrun = ['sh', '-c', '! test -e {}/data/apps/api/current/site/robotapi/sick']\n",
        robot.dir.path().display()
    );
    robot.file("etc/slotd/health.d/30-api.toml", check);
    fs::create_dir_all(robot.path("data")).unwrap();
}

pub fn base(robot: &Robot, rest: &str) {
    robot.file(
        "usr/lib/slipway/api.toml",
        format!(
            "package = 'robotapi'\nmodule = 'robotapi'\nversion = '9.0.0'\nlibc = 'glibc 2.36'\n\
             site-packages = '/usr/lib/python3/dist-packages'\n{rest}"
        ),
    );
}
