//! What tests of the configuration share: the fixture's workspace, in a directory of the test's
//! own.
#![allow(dead_code)]

use crate::common::{copy, folder};

use std::fs;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::config;
use xtask::plan;
use xtask::plan::CheckoutFacts;
use xtask::render::{self, RenderedFiles};

/// The path of the fixture.
pub fn fixture() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture")
}

/// Locks that are made for the fixture's product, for tests that ask the tool itself for its plan: of packages, of wheels.
pub fn locks() -> [(&'static str, String); 2] {
    let sha256 = "0".repeat(64);
    let package = |name: &str, version: &str| {
        format!(
            "\n[[package]]\nrole = \"root\"\nname = \"{name}\"\narch = \"arm64\"\nversion = \"{version}\"\n\
             archive = \"debian\"\nfilename = \"pool/main/{name}.deb\"\nsize = 1\nsha256 = \"{sha256}\"\n"
        )
    };
    let packages = format!(
        "version = 1\nepoch = 1700000000\n\n[request]\nsuite = \"bookworm\"\ncomponents = [\"main\"]\n\
         arch = \"arm64\"\npackages = [\"systemd\"]\nextra = [\"u-boot-sample\"]\n{}{}",
        package("libc6", "2.36-9+deb12u9"),
        package("python3", "3.11.2-1+b1")
    );
    let wheels = format!(
        "format = 1\nrequirement = \"thing==1.0\"\n\n[target]\npython = \"3.11.2\"\n\
         implementation = \"cp\"\narch = \"aarch64\"\nlibc = \"glibc 2.36\"\n\n[[wheel]]\n\
         name = \"thing\"\nversion = \"1.0\"\nfile = \"thing-1.0-py3-none-any.whl\"\nsize = 1\n\
         sha256 = \"{sha256}\"\nneeded-by = []\n"
    );
    [("configs/shop.packages.lock", packages), ("configs/shop.wheels.lock", wheels)]
}

/// The fixture's workspace, copied.
pub struct Workspace {
    _keep: tempfile::TempDir,
    pub dir: Utf8PathBuf,
}

impl Workspace {
    pub fn new() -> Self {
        let (_keep, dir) = folder();
        copy(&fixture(), &dir).expect("copied");
        Self { _keep, dir }
    }

    pub fn at(&self, path: &str) -> Utf8PathBuf {
        self.dir.join(path)
    }

    pub fn put(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.at(path);
        fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs::write(path, content).expect("written");
    }

    /// Plans and renders the product.
    pub fn render(&self) -> anyhow::Result<RenderedFiles> {
        let config = config::load(&self.dir, Some("shop"), None)?;
        let facts = CheckoutFacts { commit: None, modified: false, epoch: 1_700_000_000 };
        render::render(&self.dir, &plan::resolve(&config, &facts)?)
    }

    /// What is wrong with it.
    pub fn refused(&self) -> String {
        format!("{:#}", self.render().expect_err("it is accepted"))
    }
}
