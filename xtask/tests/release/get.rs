//! Files of a release, fetched and verified by a technician from a directory and from a web server, up to a card.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;
use std::time::{Duration, Instant};

use camino::Utf8Path;
use xtask::artifact::hash_file;
use xtask::store::client::ServerTimeouts;
use xtask::store::format::object_path;
use xtask::store::{FileStore, StoreOptions, open_files};

use super::programs::{program_name, released};
use super::support::Bench;
use crate::common::archive::Server;
use crate::slipway::Machine;

/// A machine that trusts the keys of the bench.
pub fn machine(bench: &Bench) -> Machine {
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
        let printed = machine.good(&get);
        assert!(printed.starts_with("shop 1.0.0 (development), channel nightly\n"), "{printed}");
        let here = machine.dir.join("here");
        for name in
            ["shop-1.0.0-sample.img.zst", "shop-1.0.0-sample.img.bmap", "shop-1.0.0-sample.bundle"]
        {
            assert!(printed.contains(name) && here.join(name).is_file(), "{name}: {printed}");
        }
        assert_eq!(printed.lines().count(), 4, "{printed}");
        machine.good(&["verify", "shop-1.0.0-sample.bundle"]);
        let card = fs::File::create(here.join("card")).unwrap();
        card.set_len(64 << 20).unwrap();
        machine.good(&["flash", "shop-1.0.0-sample.img.zst", "card", "--yes"]);
        let printed =
            machine.good(&[&get[..], &["--role", "program", "--into", "programs"]].concat());
        assert!(printed.contains(&program_name()), "{printed}");
        let program = here.join("programs").join(program_name());
        assert!(program.metadata().unwrap().permissions().mode() & 0o111 == 0o111);
        // What is there already is not fetched again.
        let before = server.log().len();
        machine.good(&[&get[..], &["--role", "bundle"]].concat());
        let asked = server.log().split_off(before);
        assert!(asked.iter().all(|path| !path.contains("/objects/")), "{asked:?}");
        let board = [&get[..], &["--board", "other"]].concat();
        machine.refused(
            &board,
            1,
            &["no files for other", "help: choose one of these boards: sample"],
        );
        let none = [&get[..], &["--role", "image", "--board", "sample", "--into", "card"]].concat();
        machine.refused(&none, 1, &["card"]);
    }
    let empty = format!("{}/empty", server.address);
    let message = bench.refused(&["publish", &empty, "--from", "dist/releases"]);
    assert!(message.contains("can only be read") && message.contains("help: "), "{message}");
}

/// What a technician trusts does not depend on where a command is typed, and a mistyped store is an error.
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
        assert_eq!(names(&machine.dir.join("here")), [""; 0]);
    }
}

/// What is in a directory.
fn names(dir: &Utf8Path) -> Vec<String> {
    let entries = dir.read_dir_utf8().unwrap().map(|entry| entry.unwrap().file_name().to_owned());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

fn make_fifo(path: &Utf8Path) {
    use rustix::fs::{CWD, FileType, mknodat};
    mknodat(CWD, path.as_std_path(), FileType::Fifo, 0o644.into(), 0).unwrap();
}

fn mode(path: &Utf8Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

#[test]
fn what_is_in_the_target_directory_is_neither_followed_nor_shared() {
    let bench = Bench::new();
    let store = bench.store("store");
    bench.release(&store, "robot", "1.0.0");
    let server = Server::start(&bench.dir).unwrap();
    let machine = machine(&bench);
    let here = machine.dir.join("here");
    let name = "robot-1.0.0-notes";
    let web = format!("{}/store", server.address);
    let get = |store| {
        ["release", "get", "1.0.0", "--product", "robot", "--role", "notes", "--store", store]
    };
    // A directory of that name is noticed before anything is fetched.
    fs::create_dir(here.join(name)).unwrap();
    machine.refused(&get(&web), 1, &[name, "is a directory", "help: "]);
    assert!(server.log().iter().all(|path| !path.contains("/objects/")));
    fs::remove_dir(here.join(name)).unwrap();
    // Another's unfinished file, a link, a FIFO.
    let unfinished = here.join(format!("{name}.partial"));
    fs::write(here.join("victim"), "mine").unwrap();
    symlink(here.join("victim"), &unfinished).unwrap();
    for store in [store.root().as_str(), &web] {
        make_fifo(&here.join(name));
        machine.good(&get(store));
        assert!(here.join(name).symlink_metadata().unwrap().is_file());
        assert_eq!(names(&here), [name, &format!("{name}.partial"), "victim"]);
        assert_eq!(fs::read_to_string(here.join("victim")).unwrap(), "mine");
        fs::remove_file(here.join(name)).unwrap();
    }
    // Several at once: each gives the name to what it has verified.
    let mut children = Vec::new();
    for _ in 0..4 {
        let mut command = machine.command(&get(&web));
        children.push(command.stdout(std::process::Stdio::null()).spawn().unwrap());
    }
    children.into_iter().for_each(|mut child| assert!(child.wait().unwrap().success()));
    assert_eq!(names(&here).len(), 3);
}

/// A process that was killed leaves its unfinished file. It has no lock, unlike one that another process is writing.
#[test]
fn what_an_interrupted_get_has_left_is_removed_by_the_next() {
    let bench = Bench::new();
    let store = bench.store("store");
    bench.release(&store, "robot", "1.0.0");
    let machine = machine(&bench);
    let here = machine.dir.join("here");
    let name = "robot-1.0.0-notes";
    let [left, live, link, others] = ["aB3dE6", "aB3dE7", "aB3dE8", "mine.txt"]
        .map(|end| here.join(format!("{name}.partial-{end}")));
    let another = here.join("robot-1.0.0-part-0.partial-aB3dE6");
    for path in [&left, &live, &others, &another] {
        fs::write(path, "half").unwrap();
    }
    symlink(&others, &link).unwrap();
    let lock = fs::File::open(&live).unwrap();
    lock.lock().unwrap();
    let get = ["release", "get", "1.0.0", "--product", "robot", "--role", "notes", "--store"];
    let get = [&get[..], &[store.root().as_str()]].concat();
    machine.good(&get);
    assert!(!left.exists(), "{:?}", names(&here));
    assert!([&live, &link, &others, &another].iter().all(|path| path.exists()));
    drop(lock);
    // Also when the file is there already.
    machine.good(&get);
    assert!(!live.exists());
}

#[test]
fn the_mode_is_that_of_the_role_and_the_umask_not_that_of_the_store() {
    let bench = Bench::new();
    released(&bench);
    bench.good(&["publish", "stick", "--from", "dist/releases"]);
    let stick = bench.dir.join("stick");
    for folder in stick.join("objects").read_dir_utf8().unwrap() {
        for object in folder.unwrap().path().read_dir_utf8().unwrap() {
            fs::set_permissions(object.unwrap().path(), fs::Permissions::from_mode(0o6555))
                .unwrap();
        }
    }
    let machine = machine(&bench);
    let here = machine.dir.join("here");
    let get = |umask: &str| {
        let script = format!("umask {umask}; exec \"$0\" \"$@\"");
        let of = ["release", "get", "1.0.0", "--product", "shop", "--role", "bundle"];
        let given =
            machine.command(&[&of[..], &["--role", "program", "--store", stick.as_str()]].concat());
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script]).arg(given.get_program()).args(given.get_args());
        shell.env_clear().env("HOME", machine.dir.join("home"));
        crate::common::good(shell.current_dir(&here).output().unwrap());
        [program_name().as_str(), "shop-1.0.0-sample.bundle"].map(|name| mode(&here.join(name)))
    };
    assert_eq!(get("027"), [0o750, 0o640]);
    // What is there already gets the mode, too; less for others may be meant.
    for name in names(&here) {
        fs::set_permissions(here.join(name), fs::Permissions::from_mode(0o4666)).unwrap();
    }
    assert_eq!(get("022"), [0o755, 0o644]);
    assert_eq!(get("077"), [0o755, 0o644]);
}

#[test]
fn what_is_no_file_in_a_store_is_refused_and_does_not_block() {
    let bench = Bench::new();
    let store = bench.store("store");
    bench.release(&store, "robot", "1.0.0");
    let machine = machine(&bench);
    let get = ["release", "get", "1.0.0", "--product", "robot", "--role", "notes"];
    let get = [&get[..], &["--store", store.root().as_str()]].concat();
    let notes = format!("# robot 1.0.0\n{}\n", super::support::HARM);
    let object = store.object(&xtask::artifact::hash_bytes(notes.as_bytes()));
    for path in [object, store.root().join("channels/nightly.json")] {
        fs::remove_file(&path).unwrap();
        make_fifo(&path);
        machine.refused(&get, 1, &[path.as_str(), "not a regular file", "help: "]);
        assert_eq!(names(&machine.dir.join("here")), [""; 0]);
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

/// A server that sends this, and then this every few milliseconds until the client closes the connection. Its address.
fn serve(head: Vec<u8>, then: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let asked = BufReader::new(stream.try_clone().unwrap());
            assert!(asked.lines().map_while(Result::ok).any(|line| line.is_empty()));
            let mut sent = stream.write_all(&head);
            while sent.is_ok() {
                std::thread::sleep(Duration::from_millis(20));
                sent = stream.write_all(then);
            }
        }
    });
    address
}

/// A silent server, one with a byte now and then, and one whose few bytes decompress to many.
#[test]
fn a_server_that_never_ends_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let into = Utf8Path::from_path(dir.path()).unwrap().join("object");
    let timeouts = ServerTimeouts {
        silence: Duration::from_millis(500),
        rate: 1000,
        ..ServerTimeouts::default()
    };
    let open = |address: &str| {
        let options = StoreOptions { timeouts, ..StoreOptions::default() };
        open_files(address, &options).unwrap()
    };
    let ok = b"HTTP/1.1 200 OK\r\n".to_vec();
    let body = [&ok[..], b"Content-Length: 1000000\r\n\r\n"].concat();
    for (head, then) in [(ok.clone(), &b""[..]), (body.clone(), b""), (body, b"x")] {
        let address = serve(head, then);
        let store: Box<dyn FileStore + Send + Sync> = open(&address);
        let started = Instant::now();
        let read = store.read("channels/stable.json").map(|_| ());
        for error in [read, store.get(&"0".repeat(64), 1 << 20, &into, &|_| ())] {
            let message = format!("{:#}", error.unwrap_err());
            for word in [address.as_str(), "0.5 s", "help: "] {
                assert!(message.contains(word), "no `{word}` in {message}");
            }
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(&vec![b' '; 17 << 20]).unwrap();
    let packed = packed.finish().unwrap();
    let head = format!("Content-Encoding: gzip\r\nContent-Length: {}\r\n\r\n", packed.len());
    let address = serve([&ok[..], head.as_bytes(), &packed].concat(), b"");
    let message = format!("{:#}", open(&address).read("channels/stable.json").unwrap_err());
    assert!(
        message.contains("more than 16777216 bytes") && message.contains("help: "),
        "{message}"
    );
}
