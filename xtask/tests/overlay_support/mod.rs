//! Shared by the tests of the overlays: a directory instead of `/`, with all files of a product's
//! overlays.
#![allow(dead_code)]

use crate::common::{root, tool};

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Output};

use bundle::manifest::BuildKind;
use camino::{Utf8Path, Utf8PathBuf};
use xtask::config;
use xtask::facts;
use xtask::plan::{self, Plan};
use xtask::render::{OverlayContent, render};

/// The plans of all products, for their first boards.
pub fn plans() -> Vec<Plan> {
    let root = root();
    let facts = facts::collect(&root).expect("facts");
    let names = config::list_products(&root).expect("products");
    let load = |name: &String| {
        let config = config::load(&root, Some(name), None).expect("a configuration");
        plan::resolve(&config, &facts).expect("a plan")
    };
    names.iter().map(load).collect()
}

/// A directory instead of `/`, with all files of a product's overlays.
pub struct Robot {
    dir: tempfile::TempDir,
}

impl Robot {
    pub fn new(plan: &Plan) -> Self {
        let robot = Self { dir: tempfile::tempdir().expect("a directory") };
        let written = robot.at("written");
        for file in render(&root(), plan).expect("rendered").overlay {
            let path = written.join(&file.target);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            match &file.content {
                OverlayContent::File(bytes) => {
                    fs::write(&path, bytes).expect("written");
                    let mode = Permissions::from_mode(file.attributes.mode);
                    fs::set_permissions(&path, mode).expect("a mode");
                }
                OverlayContent::Symlink(to) => symlink(to, &path).expect("linked"),
            }
        }
        // A copy runs at once, whatever the children of other tests have open (see `make_program`).
        let dot = written.join(".");
        tool("cp").args(["-a", dot.as_str(), robot.at("").as_str()]).run().expect("copied");
        fs::remove_dir_all(written).expect("removed");
        fs::write(robot.at("etc/machine-id"), format!("{}\n", "0a".repeat(16))).expect("an id");
        robot
    }

    /// The development product's.
    pub fn development() -> Self {
        let plans = plans();
        Self::new(
            plans.iter().find(|plan| plan.product.kind == BuildKind::Development).expect("one"),
        )
    }

    pub fn at(&self, path: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.dir.path()).expect("UTF-8").join(path)
    }

    pub fn put(&self, path: &str, text: &str) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Runs a boot step as the robot would; what it reports.
    pub fn step(&self, name: &str, more: &[&str]) -> String {
        let program = self.at(&format!("usr/lib/slipway/{name}"));
        let output = Command::new(&program).arg(self.at("")).args(more).output().expect("runs");
        assert!(output.status.success(), "{name} would fail the boot: {}", output_text(&output));
        output_text(&output)
    }
}

pub fn output_text(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8(both).expect("UTF-8")
}
