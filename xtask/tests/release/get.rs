//! Files of a release, fetched and verified by a technician from a directory and from a web server, up to a card.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use xtask::artifact::hash_file;
use xtask::store::format::object_path;

use super::programs::{program_name, released};
use super::support::Bench;
use crate::common::archive::Server;
use crate::slipway::Machine;

/// A machine that trusts the keys of the bench.
fn machine(bench: &Bench) -> Machine {
    let machine = Machine::new();
    let keys = machine.dir.join("home/.config/slipway/keys");
    fs::create_dir_all(&keys).unwrap();
    fs::copy(bench.dir.join("keys/keyset.json"), keys.join("keyset.json")).unwrap();
    machine
}

#[test]
fn what_is_fetched_becomes_a_card_and_an_update() {
    let bench = Bench::new();
    released(&bench);
    bench.good(&["publish", "stick", "--from", "dist/releases"]);
    let server = Server::start(&bench.dir).unwrap();
    let web = format!("{}/stick", server.address);
    let stick = bench.dir.join("stick");
    for store in [stick.as_str(), &web] {
        let machine = machine(&bench);
        assert!(machine.good(&["release", "list", "--store", store]).contains("shop 1.0.0"));
        let get = ["release", "get", "latest", "--product", "shop", "--store", store];
        machine.refused(&get, 1, &["which channel", "help: add --channel stable"]);
        let get = [&get[..], &["--channel", "nightly"]].concat();
        let said = machine.good(&get);
        assert!(said.starts_with("shop 1.0.0 (development), channel nightly\n"), "{said}");
        let here = machine.dir.join("here");
        for name in
            ["shop-1.0.0-sample.img.zst", "shop-1.0.0-sample.img.bmap", "shop-1.0.0-sample.bundle"]
        {
            assert!(said.contains(name) && here.join(name).is_file(), "{name}: {said}");
        }
        assert_eq!(said.lines().count(), 4, "{said}");
        machine.good(&["verify", "shop-1.0.0-sample.bundle"]);
        let card = fs::File::create(here.join("card")).unwrap();
        card.set_len(64 << 20).unwrap();
        machine.good(&["flash", "shop-1.0.0-sample.img.zst", "card", "--yes"]);
        let said = machine.good(&[&get[..], &["--role", "program", "--into", "programs"]].concat());
        assert!(said.contains(&program_name()), "{said}");
        let program = here.join("programs").join(program_name());
        assert!(program.metadata().unwrap().permissions().mode() & 0o111 == 0o111);
        // What is there already is not fetched again.
        let before = server.log().len();
        machine.good(&[&get[..], &["--role", "bundle"]].concat());
        let asked = server.log().split_off(before);
        assert!(asked.iter().all(|path| !path.contains("/objects/")), "{asked:?}");
        let board = [&get[..], &["--board", "other"]].concat();
        machine.refused(&board, 1, &["no files for other", "help: it has files for sample"]);
        let none = [&get[..], &["--role", "image", "--board", "sample", "--into", "card"]].concat();
        machine.refused(&none, 1, &["card"]);
    }
    let empty = format!("{}/empty", server.address);
    let message = bench.refused(&["publish", &empty, "--from", "dist/releases"]);
    assert!(message.contains("can only be read") && message.contains("help: "), "{message}");
}

/// What a technician trusts does not depend on where a command is typed, and a mistyped store is no empty one.
#[test]
fn a_directory_like_a_checkout_changes_nothing_and_no_store_is_an_error() {
    let bench = Bench::new();
    let store = bench.store("store");
    bench.release(&store, "robot", "1.0.0");
    let machine = machine(&bench);
    let pins = machine.dir.join("home/.config/slipway/keys/releases.toml");
    fs::write(pins, "[channels]\nnightly = \"release\"\n").unwrap();
    for name in ["here/configs", "here/board"] {
        fs::create_dir(machine.dir.join(name)).unwrap();
    }
    fs::write(machine.dir.join("here/configs/app.toml"), "port = 80\n").unwrap();
    let list = ["release", "list", "--store", store.root().as_str()];
    machine.refused(&list, 1, &["nightly must be signed by a release key"]);
    let typo = bench.dir.join("stroe");
    machine.refused(
        &["release", "list", "--store", typo.as_str()],
        1,
        &["there is no release store at", "channels/stable.json", "help: check the address"],
    );
    let server = Server::start(&bench.dir).unwrap();
    let get = ["release", "get", "1.0.0", "--product", "robot", "--store", &server.address];
    machine.refused(&get, 1, &["there is no release store at"]);
}

#[test]
fn a_damaged_file_gets_no_name() {
    let bench = Bench::new();
    released(&bench);
    bench.good(&["publish", "stick", "--from", "dist/releases"]);
    let store = bench.dir.join("stick");
    let bundle = bench.dir.join("dist/shop/sample/shop-1.0.0-sample.bundle");
    let object = store.join(object_path(&hash_file(&bundle).unwrap().1));
    let mut bytes = fs::read(&object).unwrap();
    bytes[1000] ^= 1;
    fs::set_permissions(&object, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&object, bytes).unwrap();
    let machine = machine(&bench);
    let server = Server::start(&bench.dir).unwrap();
    let web = format!("{}/stick", server.address);
    for store in [store.as_str(), &web] {
        let get =
            ["release", "get", "1.0.0", "--product", "shop", "--store", store, "--role", "bundle"];
        machine.refused(&get, 1, &["fetching shop-1.0.0-sample.bundle"]);
        assert!(!machine.dir.join("here/shop-1.0.0-sample.bundle").exists());
    }
}

#[test]
fn a_role_that_the_release_lacks_is_named() {
    let bench = Bench::new();
    let store = bench.store("store");
    bench.release(&store, "robot", "1.0.0");
    let machine = machine(&bench);
    let get = ["release", "get", "1.0.0", "--product", "robot", "--store", store.root().as_str()];
    // The release has one board, and none of these roles.
    machine.refused(&get, 1, &["no file of the role image or bundle", "help: "]);
    machine.good(&[&get[..], &["--role", "notes"]].concat());
    assert!(machine.dir.join("here/robot-1.0.0-notes").is_file());
}

/// A team may have `beta` signed by release keys, to offer release products there.
#[test]
fn without_a_workspace_the_channels_are_pinned_beside_the_keys() {
    let bench = Bench::new();
    let store = bench.store("store");
    bench.release(&store, "robot", "1.0.0");
    let machine = machine(&bench);
    let list = ["release", "list", "--store", store.root().as_str()];
    assert!(machine.good(&list).contains("robot 1.0.0"));
    let pins = machine.dir.join("home/.config/slipway/keys/releases.toml");
    fs::write(&pins, "[channels]\nnightly = \"release\"\n").unwrap();
    machine.refused(&list, 1, &["nightly must be signed by a release key"]);
    fs::write(&pins, "[channels]\nstable = \"development\"\n").unwrap();
    machine.refused(&list, 1, &["releases.toml", "help: remove the line"]);
}
