//! Finding a module: slotd's search compared with a real interpreter with the same path, for many layouts. Python
//! runs only here, in the test.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;
use slotd::RootDir;
use slotd::python::{Interpreter, PathEntryOrigin, PythonModule, SearchPath, find};

/// A name that is not a module of any library.
const NAME: &str = "robotapi";

/// The finder of an editable install, as setuptools 84 writes it; `@MAPPING@` and `@NAMESPACES@` are its data.
const FINDER: &str = include_str!("fixture/editable_finder.py");

/// The interpreter's own data.
struct Real {
    program: PathBuf,
    version: String,
    /// `sys.path` without site directories.
    library: Vec<PathBuf>,
    /// Suffixes of compiled modules.
    compiled: Vec<String>,
}

fn real() -> &'static Real {
    static REAL: OnceLock<Real> = OnceLock::new();
    REAL.get_or_init(|| {
        let printed = Command::new("python3")
            .args(["-I", "-S", "-c"])
            .arg("import sys, json, importlib.machinery as m, os\nprint(json.dumps([os.path.realpath(sys.executable), '%d.%d' % sys.version_info[:2], sys.path, m.EXTENSION_SUFFIXES]))")
            .output()
            .expect("this test needs python3");
        assert!(printed.status.success(), "{printed:?}");
        let printed: Value = serde_json::from_slice(&printed.stdout).unwrap();
        let list = |value: &Value| -> Vec<String> {
            value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
        };
        Real {
            program: printed[0].as_str().unwrap().into(),
            version: printed[1].as_str().unwrap().to_owned(),
            library: list(&printed[2]).iter().map(PathBuf::from).collect(),
            compiled: list(&printed[3]),
        }
    })
}

/// One layout: `data` is on `PYTHONPATH`, `site` is the interpreter's site directory.
struct Layout {
    dir: tempfile::TempDir,
    /// `PYTHONPATH`.
    first: Vec<String>,
}

impl Layout {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("env");
        fs::create_dir_all(home.join("bin")).unwrap();
        symlink(&real().program, home.join("bin/python3")).unwrap();
        let bin = real().program.parent().unwrap().display().to_string();
        let text = format!("home = {bin}\ninclude-system-site-packages = false\n");
        fs::write(home.join("pyvenv.cfg"), text).unwrap();
        let layout = Self { first: vec![dir.path().join("data").display().to_string()], dir };
        fs::create_dir_all(layout.site()).unwrap();
        fs::create_dir_all(layout.path("data")).unwrap();
        layout
    }

    fn site(&self) -> PathBuf {
        self.dir.path().join(format!("env/lib/python{}/site-packages", real().version))
    }

    /// A path: `site/x` is in the site directory.
    fn path(&self, path: &str) -> PathBuf {
        match path.strip_prefix("site") {
            Some(rest) => self.site().join(rest.trim_start_matches('/')),
            None => self.dir.path().join(path),
        }
    }

    /// Writes a file; `@` in its text is replaced by the layout's directory.
    fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text.replace('@', &self.dir.path().display().to_string())).unwrap();
        self
    }

    fn package(&self, folder: &str) -> &Self {
        self.file(&format!("{folder}/{NAME}/__init__.py"), "raise SystemExit('imported')\n")
    }

    fn folder(&self, path: &str) -> &Self {
        fs::create_dir_all(self.path(path)).unwrap();
        self
    }

    fn link(&self, path: &str, to: &str) -> &Self {
        symlink(to, self.path(path)).unwrap();
        self
    }

    /// Writes an archive; a name that ends with a slash is a directory.
    fn zip(&self, path: &str, members: &[&str], prefix: &[u8], comment: &str) -> &Self {
        let script = "import sys, zipfile\nwith zipfile.ZipFile(sys.argv[1], 'w') as z:\n    z.comment = sys.argv[2].encode()\n    for n in sys.argv[3:]:\n        z.writestr(n, '')\n";
        let path = self.path(path);
        let made = Command::new(&real().program)
            .args(["-I", "-S", "-c", script])
            .arg(&path)
            .arg(comment)
            .args(members)
            .status()
            .unwrap();
        assert!(made.success());
        if !prefix.is_empty() {
            let bytes = [prefix, &fs::read(&path).unwrap()].concat();
            fs::write(path, bytes).unwrap();
        }
        self
    }

    fn editable(&self, mapping: &str, namespaces: &str) -> &Self {
        let place = |text: &str| text.replace('@', &self.dir.path().display().to_string());
        let finder = FINDER
            .replace("@MAPPING@", &place(mapping))
            .replace("@NAMESPACES@", &place(namespaces));
        let module = "__editable___robotapi_1_0_finder";
        // Not by `file`: the finder has decorators.
        fs::write(self.path(&format!("site/{module}.py")), finder).unwrap();
        self.file(
            "site/__editable__.robotapi-1.0.pth",
            &format!("import {module}; {module}.install()"),
        )
    }

    /// Python's answer: its path, and the module in slotd's terms.
    fn theirs(&self) -> (Vec<PathBuf>, Option<PythonModule>) {
        let script = format!(
            "import sys, json, importlib.util\n\
             sys.path[:] = [p for p in sys.path if p]\n\
             spec = importlib.util.find_spec('{NAME}')\n\
             print(json.dumps([sys.path, spec and [spec.origin, spec.submodule_search_locations and list(spec.submodule_search_locations), type(spec.loader).__name__]]))"
        );
        let printed = Command::new(self.path("env/bin/python3"))
            .args(["-c", &script])
            .env_clear()
            .env("PYTHONPATH", self.first.join(":"))
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .output()
            .unwrap();
        assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
        let printed: Value = serde_json::from_slice(&printed.stdout).unwrap();
        let list = |value: &Value| -> Vec<PathBuf> {
            value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().into()).collect()
        };
        let spec = &printed[1];
        let module = (!spec.is_null()).then(|| match (spec[0].as_str(), spec[2].as_str()) {
            (Some(path), Some("zipimporter")) => PythonModule::Archived { path: path.into() },
            (Some(path), _) if spec[1].is_null() => PythonModule::File { path: path.into() },
            (Some(init), _) => {
                let folders = list(&spec[1]);
                assert_eq!(folders.len(), 1);
                PythonModule::Package { folder: folders[0].clone(), init: init.into() }
            }
            (None, _) => PythonModule::Namespace { folders: list(&spec[1]) },
        });
        (list(&printed[0]), module)
    }

    fn ours(&self) -> (SearchPath, Option<PythonModule>) {
        let root = RootDir::default();
        let python = Interpreter::parse(&real().version).unwrap();
        let mut entries: Vec<PathEntryOrigin> =
            self.first.iter().map(|p| PathEntryOrigin::Plain(p.into())).collect();
        entries.extend(real().library.iter().cloned().map(PathEntryOrigin::Plain));
        entries.push(PathEntryOrigin::Site(self.site()));
        let path = SearchPath::new(&root, &python, &entries);
        let found = find(&root, &python, &path, NAME).unwrap();
        (path, found)
    }
}

/// A name, the expected result (the kind and a part of the path, or nothing), and the setup.
type Case = (&'static str, &'static str, fn(&mut Layout));

const CASES: &[Case] = &[
    ("nothing", "", |_| {}),
    ("a regular package", "package site-packages", |l| {
        l.package("site");
    }),
    ("a regular package on data", "package data", |l| {
        l.package("data");
    }),
    ("both copies: the persistent one wins", "package data", |l| {
        l.package("data").package("site");
    }),
    ("a namespace before a regular package", "package site-packages", |l| {
        l.folder("data/robotapi/resources").package("site");
    }),
    ("a namespace over two entries", "namespace data site-packages", |l| {
        l.folder("data/robotapi/a").folder("site/robotapi/b");
    }),
    ("a module file", "file site-packages", |l| {
        l.file("site/robotapi.py", "");
    }),
    ("a package beside a module file", "package data", |l| {
        l.package("data").file("data/robotapi.py", "");
    }),
    ("a module file beside a namespace", "file data", |l| {
        l.folder("data/robotapi").file("data/robotapi.py", "");
    }),
    ("a module file before a package", "file data", |l| {
        l.file("data/robotapi.py", "").package("site");
    }),
    ("a compiled module with its tag", "file site-packages", |l| {
        let name = format!("site/robotapi{}", real().compiled[0]);
        l.file(&name, "").file("site/robotapi.so", "").file("site/robotapi.py", "");
    }),
    ("a compiled module of the stable interface", "file abi3", |l| {
        l.file("site/robotapi.abi3.so", "").file("site/robotapi.so", "");
    }),
    ("a compiled module of another interpreter", "file robotapi.py", |l| {
        l.file("site/robotapi.cpython-27-x86_64-linux-gnu.so", "").file("site/robotapi.py", "");
    }),
    ("a package whose start is compiled", "package .so", |l| {
        l.package("site").file("site/robotapi/__init__.abi3.so", "");
    }),
    ("a package of bytecode only", "package .pyc", |l| {
        l.file("site/robotapi/__init__.pyc", "");
    }),
    ("a module of bytecode only", "file .pyc", |l| {
        l.file("site/robotapi.pyc", "");
    }),
    ("a start that is a directory", "namespace site-packages", |l| {
        l.folder("site/robotapi/__init__.py");
    }),
    ("a module file that is a directory", "", |l| {
        l.folder("site/robotapi.py");
    }),
    ("a relative path in a .pth file", "package extra", |l| {
        l.package("site/extra").file("site/robot.pth", "extra\n");
    }),
    ("comments, blanks and foreign line ends in a .pth file", "package src", |l| {
        l.package("src").file("site/robot.pth", "# @/a\r\n\r\n  \t\r\n@/src \t\x0c\r@/later");
        l.folder("later");
    }),
    ("a .pth file that is indented", "", |l| {
        l.package("src").file("site/robot.pth", " @/src\n");
    }),
    ("a .pth file with a mark of its encoding", "", |l| {
        l.folder("src").file("site/robot.pth", "\u{feff}@/src\n");
    }),
    ("a .pth file on data means nothing", "package site-packages", |l| {
        l.package("src").file("data/robot.pth", "@/src\n").package("site");
    }),
    ("a .pth file in a directory that a .pth file names", "package src", |l| {
        l.folder("first").file("first/more.pth", "@/wrong\n").package("wrong").package("src");
        l.file("site/a.pth", "@/first\n").file("site/b.pth", "@/src\n");
    }),
    ("the site directory before what its .pth files name", "package site-packages", |l| {
        l.package("src").package("site").file("site/a.pth", "@/src\n");
    }),
    ("several .pth files in the order of their names", "package one", |l| {
        l.package("one").package("two");
        l.file("site/b.pth", "@/two\n").file("site/B.pth", "@/one\n").file("site/c.PTH", "@/x\n");
    }),
    ("a .pth file that names what is not there", "package two", |l| {
        l.package("two").file("site/a.pth", "@/gone\n@/two\n");
    }),
    ("a .pth file that names what is on the path", "package data", |l| {
        l.package("data").file("site/a.pth", "@/data\n@/x/../data\n@/site\n");
    }),
    ("a .pth file with steps upwards through a link", "package src", |l| {
        l.package("src").folder("far/away").link("near", "far/away");
        l.file("site/a.pth", "@/near/../src\n");
    }),
    ("a .pth file with a lone word and a NUL", "package import", |l| {
        l.package("site/import").file("site/a.pth", "import\nx\0y\nimport \n");
    }),
    ("a .pth file that leads nowhere", "package site-packages", |l| {
        l.package("site").link("site/a.pth", "gone").folder("site/b.pth");
    }),
    ("a hidden .pth file", "", |l| {
        l.folder("src").file("site/.a.pth", "@/src\n");
    }),
    ("an archive on the path", "archived lib.zip", |l| {
        l.zip("lib.zip", &["robotapi/__init__.py"], b"", "").package("site");
        l.first.insert(0, l.path("lib.zip").display().to_string());
    }),
    ("a directory of an archive, with a comment and bytes before it", "archived lib.zip/in", |l| {
        l.zip("lib.zip", &["in/robotapi.py"], b"#!/bin/sh\n", "a comment");
        l.first.push(l.path("lib.zip/in").display().to_string());
    }),
    ("an archive that a .pth file names", "archived lib.zip", |l| {
        l.zip("lib.zip", &["robotapi.py"], b"", "").file("site/a.pth", "@/lib.zip\n");
    }),
    ("a namespace in an archive and a directory", "namespace lib.zip site-packages", |l| {
        l.zip("lib.zip", &["robotapi/", "robotapi/x.txt"], b"", "").folder("site/robotapi");
        l.first.insert(0, l.path("lib.zip").display().to_string());
    }),
    ("a damaged archive", "package site-packages", |l| {
        l.file("lib.zip", "PK no archive").package("site");
        l.first.insert(0, l.path("lib.zip").display().to_string());
    }),
    ("a package that is a link", "package site-packages", |l| {
        l.package("src").link("site/robotapi", "../../../../src/robotapi");
    }),
    ("an entry that is a link", "package current", |l| {
        l.package("versions/2").link("current", "versions/2").package("site");
        l.first = vec![l.path("current").display().to_string()];
    }),
    ("a start that leads nowhere", "package site-packages", |l| {
        l.folder("data/robotapi").link("data/robotapi/__init__.py", "gone").package("site");
    }),
    ("an entry that is not there", "package site-packages", |l| {
        l.package("site");
        l.first = vec![l.path("gone/site").display().to_string()];
    }),
    ("an entry that is a file", "package site-packages", |l| {
        l.package("site").file("plain", "text");
        l.first = vec![l.path("plain").display().to_string()];
    }),
    ("an entry without read permission", "", |l| {
        l.package("closed");
        fs::set_permissions(l.path("closed"), fs::Permissions::from_mode(0o000)).unwrap();
        l.first = vec![l.path("closed").display().to_string()];
    }),
    ("entries twice, and with slashes", "package data", |l| {
        let data = l.package("data").path("data").display().to_string();
        l.first = vec![format!("{data}//"), format!("{data}/../data"), data];
    }),
    ("another case", "package site-packages", |l| {
        l.file("data/RobotApi/__init__.py", "").file("data/robotAPI.py", "").package("site");
    }),
    ("broken metadata", "package data", |l| {
        l.package("data").package("site").folder("data/robotapi-1.0.dist-info/METADATA");
        l.file("site/robotapi-9.dist-info/RECORD", "\"no, record")
            .file("site/easy-install.pth", "");
    }),
    ("an editable install with a path", "package src", |l| {
        l.package("src").file("site/__editable__.robotapi-1.0.pth", "@/src\n");
    }),
    ("an editable install with a finder", "package src", |l| {
        l.package("src").editable("{'robotapi': '@/src/robotapi', 'other': '@/src/other'}", "{}");
    }),
    ("an editable install with a finder, of one file", "file src", |l| {
        l.file("src/robotapi.py", "").editable("{'robotapi': '@/src/robotapi'}", "{}");
    }),
    ("an editable install with a finder, and an installed copy", "package site-packages", |l| {
        l.package("src").package("site").editable("{'robotapi': '@/src/robotapi'}", "{}");
    }),
    ("an editable install with a finder, of something else", "", |l| {
        l.package("src").editable("{'other': '@/src/robotapi'}", "{}");
    }),
    ("an editable install whose directory is gone", "", |l| {
        l.editable("{'robotapi': '@/src/robotapi'}", "{}");
    }),
];

#[test]
fn a_module_is_found_where_python_finds_it() {
    for (name, expected, make) in CASES {
        let mut layout = Layout::new();
        make(&mut layout);
        let (their_path, theirs) = layout.theirs();
        let (path, found) = layout.ours();
        assert_eq!(path.entries, their_path, "{name}");
        // The result differs between root and other users.
        if !name.contains("without read permission") {
            let place = format!("{found:?}").to_lowercase();
            let kind = expected.split(' ').next().unwrap_or_default();
            let meant = match found {
                None => expected.is_empty(),
                Some(_) => {
                    !expected.is_empty() && expected.split(' ').all(|word| place.contains(word))
                }
            };
            assert!(
                meant && place.starts_with(if kind.is_empty() { "none" } else { "some(" }),
                "{name}: {place}"
            );
        }
        assert_eq!(found, theirs, "{name}");
    }
    println!("{} layouts", CASES.len());
    assert!(CASES.len() >= 50);
}

#[test]
fn what_only_code_knows_is_noted() {
    let layout = Layout::new();
    layout.package("src");
    layout.file("site/a.pth", "import sys; sys.path.append('@/src')\n");
    let (_, theirs) = layout.theirs();
    assert!(matches!(theirs, Some(PythonModule::Package { .. })), "{theirs:?}");
    let (path, found) = layout.ours();
    assert_eq!(found, None);
    let note = path.notes[0].to_string();
    assert!(
        note.ends_with(
            "a.pth:1: the line is code, which is not run: what it adds to the path is unknown"
        ),
        "{note}"
    );

    // A finder that assembles a namespace by code.
    let layout = Layout::new();
    layout.folder("src").editable("{'robotapi': '@/src'}", "{'robotapi': ['@/src']}");
    let (path, found) = layout.ours();
    assert_eq!(found, None);
    assert!(path.notes[0].what.contains("has no readable table"), "{:?}", path.notes);

    // A file that is not text stops Python itself.
    let layout = Layout::new();
    fs::write(layout.path("site/a.pth"), b"\xff\n").unwrap();
    let (path, _) = layout.ours();
    assert!(path.notes[0].what.starts_with("the file is not UTF-8"), "{:?}", path.notes);
}

#[test]
fn only_the_name_of_a_top_level_module_is_looked_for() {
    let layout = Layout::new();
    let python = Interpreter::parse("3.11").unwrap();
    for name in ["", ".", "..", "a.b", "a/b", "/etc", "a\0b"] {
        let found = find(&RootDir::default(), &python, &layout.ours().0, name);
        assert_eq!(found.unwrap_err().code, "misuse", "{name}");
    }
    for version in ["", "3", "3.x", "three.11"] {
        assert_eq!(Interpreter::parse(version), None, "{version}");
    }
}
