//! `slipway` in a release: listed, signed, copied with it, and found by a technician who has a web browser and `minisign` alone.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use xtask::artifact::{Artifact, hash_bytes};
use xtask::build::Program;
use xtask::publish::pins::{self, Platform};
use xtask::release::check::{compare_programs, released_programs};
use xtask::release::create::{ReleaseRequest, create_release};
use xtask::store::FileStore;
use xtask::store::format::{Channel, ReleaseManifest};
use xtask::store::index::Retention;

use super::builds::{results, workspace};
use super::support::{Bench, Reader};
use crate::common::{good, root};
use crate::slipway::Machine;

/// Bytes in a program's place: what is compiled is the business of another test.
const PROGRAM: &[u8] = b"#!/bin/sh\necho a program\n";

pub fn program_name() -> String {
    format!("slipway-0.0.0-{}", std::env::consts::ARCH)
}

/// What `releases.toml` would ask for, in a moment.
fn small_program(root: &Utf8Path, commit: Option<&str>, _: bool) -> anyhow::Result<Vec<Program>> {
    assert!(commit.is_some_and(|commit| commit.len() == 40), "{commit:?}");
    let path = root.join("program");
    fs::write(&path, PROGRAM)?;
    let (binary, compiler) = (Artifact::from_file(path)?, "none".to_owned());
    Ok(vec![Program { name: program_name(), binary, compiler }])
}

/// A store with one release that has a program: the path of its manifest.
pub fn released(bench: &Bench) -> String {
    let commit = workspace(bench);
    results(bench, &bench.dir.join("dist/shop/sample"), "1.0.0", "noon", &commit);
    let request = ReleaseRequest {
        root: &bench.dir,
        product: "shop",
        boards: &[],
        channel: Channel::Nightly,
        retention: Retention::default(),
        allow_changes: false,
        programs: small_program,
    };
    let created = create_release(&request, &mut bench.authority()).unwrap();
    assert_eq!(created.manifest.format, 2);
    // Again: nothing is compiled for a release that is there.
    let again = ReleaseRequest { programs: |_, _, _| anyhow::bail!("compiled twice"), ..request };
    assert!(create_release(&again, &mut bench.authority()).unwrap().existed);
    created.entry.manifest.path
}

#[test]
fn a_release_has_programs_that_every_reader_checks() {
    let bench = Bench::new();
    let path = released(&bench);
    let (sha256, name) = (hash_bytes(PROGRAM), program_name());
    let object = xtask::store::format::object_path(&sha256);
    let shown = bench.good(&["release", "show", "latest", "--product", "shop"]);
    assert!(shown.contains(&format!("{name}  {object}")), "{shown}");
    assert!(shown.contains(&format!("manifest {path}")), "{shown}");
    bench.good(&["publish", "stick", "--from", "dist/releases"]);
    assert_eq!(fs::read(bench.dir.join("stick").join(&object)).unwrap(), PROGRAM);
    Reader::of_folder(bench.keys(), bench.dir.join("stick")).read();

    // As a technician without a checkout sees it.
    let machine = Machine::new();
    let home = machine.dir.join("home/.config/slipway/keys");
    fs::create_dir_all(&home).unwrap();
    let set = bench.dir.join("keys/keyset.json");
    let stick = bench.dir.join("stick");
    let list = ["release", "list", "--store", stick.as_str()];
    machine.refused(&list, 1, &["help: "]);
    fs::copy(set, home.join("keyset.json")).unwrap();
    assert!(machine.good(&list).contains("shop 1.0.0"));
    let show = ["release", "show", "1.0.0", "--product", "shop", "--store", stick.as_str()];
    assert!(machine.good(&show).contains(&format!("{name}  {object}")));
    let json: Value =
        serde_json::from_str(&machine.good(&[&show[..], &["--format", "json"]].concat())).unwrap();
    assert_eq!(json["manifest"]["programs"][0]["sha256"], sha256.as_str());
    assert_eq!(json["manifest"]["programs"][0]["role"], "program");

    // A program that was exchanged is neither taken nor passed on.
    let local = bench.dir.join("dist/releases").join(&object);
    fs::set_permissions(&local, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&local, b"#!/bin/sh\necho another\n  \n").unwrap();
    let message = bench.refused(&["publish", "second", "--from", "dist/releases"]);
    assert!(message.contains(&sha256), "{message}");
    assert!(!bench.dir.join("second").join(&object).exists());
    let error = bench.store("dist/releases").get(&sha256, 1 << 20, &bench.dir.join("got"), &|_| ());
    assert!(format!("{:#}", error.unwrap_err()).contains(&sha256));
    // Nor is one that the manifest did not have when it was signed.
    let manifest = stick.join(&path);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::set_permissions(&manifest, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&manifest, text.replace(&sha256, &hash_bytes(b"another"))).unwrap();
    machine.refused(&show, 1, &[&path, "expected"]);
}

/// `release check` compares them as the results of the build.
#[test]
fn the_programs_of_a_release_are_compared_with_those_that_are_made_again() {
    let bench = Bench::new();
    let path = released(&bench);
    let store = bench.store("dist/releases");
    let against = ["release", "check", "--product", "shop", "--board", "sample", "--against"];
    let against = [&against[..], &["dist/shop/sample"]].concat();
    let printed = bench.good(&against);
    assert!(printed.contains(&format!(" equal    {}\n", program_name())), "{printed}");
    let programs = released_programs(&bench.dir, "shop", "sample", &bench.authority()).unwrap();
    let again = |content: &[u8], name: String| {
        let path = bench.dir.join("again");
        fs::write(&path, content).unwrap();
        let made = Program {
            name,
            binary: Artifact::from_file(path).unwrap(),
            compiler: "none".to_owned(),
        };
        let compared = compare_programs(&store, &programs, Some(&[made])).unwrap();
        let [output] = compared.as_slice() else { panic!("{compared:?}") };
        assert_eq!(output.equal, output.differences.is_empty());
        output.differences.iter().map(|found| found.what.clone()).collect::<String>()
    };
    assert_eq!(again(PROGRAM, program_name()), "");
    let other = again(b"#!/bin/sh\necho a pr0gram\n", program_name());
    assert!(other.contains("differs from byte 19"), "{other}");
    assert!(again(PROGRAM, "slipway-0.0.0-other".to_owned()).contains("not made again"));
    // What is in the store is not what was signed.
    let object = store.object(&hash_bytes(PROGRAM));
    fs::set_permissions(&object, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&object, b"another").unwrap();
    let output = bench.xtask(&against).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("7 bytes") && printed.contains(&hash_bytes(b"another")), "{printed}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("1 of 5 outputs differ"));
    fs::remove_file(&object).unwrap();
    let output = bench.xtask(&against).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("is missing"));
    // Nor is a manifest without a valid signature.
    let manifest = bench.dir.join("dist/releases").join(&path);
    fs::set_permissions(&manifest, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&manifest, "{}").unwrap();
    assert!(bench.refused(&against).contains(&path));
}

#[test]
fn an_earlier_reader_refuses_what_it_would_lose() {
    let bench = Bench::new();
    let path = released(&bench);
    let store = bench.dir.join("dist/releases");
    let mut manifest: Value = serde_json::from_slice(&fs::read(store.join(path)).unwrap()).unwrap();
    // A manifest of before has no such field, and is read.
    bench.release(&bench.store("before"), "robot", "1.0.0");
    let before = Reader::of_folder(bench.keys(), bench.dir.join("before")).read();
    assert_eq!(before.len(), 1);
    let parse = |value: &Value| -> anyhow::Result<ReleaseManifest> {
        let text = serde_json::to_vec(value)?;
        let signature = bench.authority();
        let mut signature = signature;
        let manifest: ReleaseManifest = serde_json::from_slice(&text)?;
        let signed = manifest.sign(&text, signature.signer(bundle::BuildKind::Development)?);
        let file = xtask::store::format::StoreFile::manifest("shop", &manifest.version, &text);
        ReleaseManifest::open(&file, &text, &signed, &bench.keys())
    };
    parse(&manifest).unwrap();
    manifest["format"] = 1.into();
    let message = format!("{:#}", parse(&manifest).unwrap_err());
    assert!(message.contains("expected format 2, found 1"), "{message}");
    manifest["format"] = 3.into();
    let message = format!("{:#}", parse(&manifest).unwrap_err());
    assert!(message.contains("help: use a newer version"), "{message}");
    // Files that would overwrite each other, and sizes whose sum overflows.
    manifest["format"] = 2.into();
    parse(&manifest).unwrap();
    let image = manifest["boards"][0]["objects"][0]["name"].as_str().unwrap().to_owned();
    let bad = [
        ("/programs/0/name", Value::from(image.to_uppercase()), "two files have the name"),
        ("/boards/0/objects/1/name", image.clone().into(), "two files have the name"),
        ("/boards/0/objects/0/unpacked/name", image.into(), "two files have the name"),
        ("/notes/name", "notes.partial".into(), "unfinished file"),
        ("/notes/size", u64::MAX.into(), "add up to 2^64"),
    ];
    for (place, value, expected) in bad {
        let mut changed = manifest.clone();
        *changed.pointer_mut(place).unwrap() = value;
        let message = format!("{:#}", parse(&changed).unwrap_err());
        assert!(message.contains(expected), "{place}: {message}");
    }
}

#[test]
fn the_platforms_are_those_of_the_workspace() {
    let bench = Bench::new();
    assert_eq!(pins::programs(&bench.dir).unwrap(), []);
    let both = [Platform::X86_64, Platform::Arm64];
    let write = |text: &str| fs::write(bench.dir.join("releases.toml"), text).unwrap();
    write("programs = [\"arm64\", \"x86-64\", \"arm64\"]\n[channels]\nbeta = \"development\"\n");
    assert_eq!(pins::programs(&bench.dir).unwrap(), both);
    write("programs = [\"riscv64\"]\n");
    let message = format!("{:#}", pins::programs(&bench.dir).unwrap_err());
    assert!(message.contains("releases.toml") && message.contains("riscv64"), "{message}");
    assert_eq!(pins::programs(&root()).unwrap(), both, "this workspace's own");
}

#[test]
fn a_release_of_another_commit_gets_no_programs() {
    let bench = Bench::new();
    workspace(&bench);
    fs::write(bench.dir.join("releases.toml"), "programs = [\"x86-64\"]\n").unwrap();
    let other = "0123456789012345678901234567890123456789";
    let message =
        format!("{:#}", xtask::build::programs(&bench.dir, Some(other), false).unwrap_err());
    assert!(
        message.contains(other) && message.contains("help: check that commit out"),
        "{message}"
    );
}

/// The commands of the guide, as they are written there.
#[test]
fn the_guide_gets_and_checks_a_program() {
    let bench = Bench::new();
    let manifest = released(&bench);
    bench.good(&["publish", "www", "--from", "dist/releases"]);
    let page = fs::read_to_string(root().join("docs/guides/without-a-toolchain.md")).unwrap();
    let (_, rest) = page.split_once("```sh\n").expect("a shell block");
    let script = rest.split_once("\n```").expect("its end").0;
    let public: Utf8PathBuf =
        bench.dir.join("keys").join(format!("development-1-{}.pub", bench.keys().keys[0].id));
    let run = |place: &str| {
        let work = bench.dir.join(place);
        fs::create_dir_all(&work).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).current_dir(&work);
        shell.env("BASE", format!("file://{}/www", bench.dir));
        shell.env("MANIFEST", &manifest).env("KEY", public.as_str());
        (work, shell.output().unwrap())
    };
    let (work, output) = run("good");
    let printed = good(output);
    assert!(printed.contains("slipway release shop 1.0.0"), "{printed}");
    assert_eq!(fs::read(work.join(program_name())).unwrap(), PROGRAM);
    assert!(work.join(program_name()).metadata().unwrap().permissions().mode() & 0o100 != 0);
    let object =
        bench.dir.join("www").join(xtask::store::format::object_path(&hash_bytes(PROGRAM)));
    fs::set_permissions(&object, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&object, b"another program").unwrap();
    let (work, output) = run("damaged");
    assert!(!output.status.success());
    assert!(work.join(program_name()).metadata().unwrap().permissions().mode() & 0o100 == 0);
    let path = bench.dir.join("www").join(&manifest);
    let text = fs::read_to_string(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, text.replace(&hash_bytes(PROGRAM), &hash_bytes(b"another program"))).unwrap();
    let (work, output) = run("forged");
    assert!(!output.status.success() && !work.join(program_name()).exists());
}
