//! Files that two wheels of an API have in common: equal files are shared, different ones are refused.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::wheels::{Draft, robot, trees};
use common::{Robot, write};

/// The `__init__.py` in each part of a namespace package, as on packaging.python.org.
const NAMESPACE: &str = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n";

/// An API of two wheels that both have `site/acme/__init__.py`.
fn bundle(version: &str, first: &str, second: &str) -> Vec<u8> {
    let trees: Vec<_> = trees(version, "fine")
        .into_iter()
        .zip([first, second])
        .map(|(tree, text)| tree.with("site/acme/__init__.py", text))
        .collect();
    Draft::new(&trees).bundle()
}

fn file(robot: &Robot, bundle: &[u8]) -> String {
    write(robot.dir.path(), "api.bundle", bundle)
}

#[test]
fn a_file_that_two_wheels_have_alike_is_both_s() {
    let robot = robot();
    let installed = robot.run(&["install", &file(&robot, &bundle("10.0.0", NAMESPACE, NAMESPACE))]);
    assert_eq!(installed["version"], "10.0.0");
    let shared = robot.path("data/apps/api/current/site/acme/__init__.py");
    assert_eq!(fs::read_to_string(&shared).unwrap(), NAMESPACE);
    assert_eq!(robot.run(&["verify", "--component", "api"])["wheels"], 2);

    // The next version has one of the two wheels; the first version is unchanged.
    let folder = format!("data/apps/api/{}", installed["folder"].as_str().unwrap());
    let inode = || fs::metadata(robot.path(&folder)).unwrap().ino();
    let before = inode();
    let next = robot.run(&["install", &file(&robot, &bundle("10.1.0", NAMESPACE, NAMESPACE))]);
    assert_eq!(next["reused"], 1);
    assert_eq!(inode(), before, "a version that is whole was put together again");
    assert_eq!(robot.run(&["verify", "--component", "api"])["versions"], 2);
}

#[test]
fn a_file_that_two_wheels_have_differently_is_refused() {
    let robot = robot();
    let refused = robot.refused(&["install", &file(&robot, &bundle("10.0.0", NAMESPACE, ""))]);
    assert_eq!(refused, (3, "bad-tree".to_owned()));
    assert_eq!(robot.run(&["status"])["api"]["serves"], "built-in");
}
