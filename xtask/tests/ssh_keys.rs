//! SSH public keys in every form that people keep them in, at every place where they come in, compared with what
//! OpenSSH itself makes of the same files. A secret key gets nowhere.

use crate::common::text;
use crate::fixture_support;

use std::fs;
use std::process::{Command, Output};

use camino::Utf8PathBuf;
use fixture_support::{Workspace, fixture};
use xtask::render::RenderedFiles;
use xtask::{flash, keys, ssh_keys};

/// A workspace, and keys that `ssh-keygen` made.
struct Rig(Workspace);

fn keygen(arguments: &[&str]) -> Output {
    Command::new("ssh-keygen").args(arguments).output().expect("ssh-keygen runs")
}

impl Rig {
    fn new() -> Self {
        Self(Workspace::new())
    }

    fn at(&self, name: &str) -> Utf8PathBuf {
        self.0.at(name)
    }

    /// A pair of keys; the public one.
    fn make(&self, name: &str, kind: &[&str]) -> String {
        let path = self.at(name);
        let made = keygen(&[&["-q", "-N", "", "-C", name, "-f", path.as_str()], kind].concat());
        assert!(made.status.success(), "{}", text(&made.stderr));
        fs::read_to_string(format!("{path}.pub")).expect("the public key")
    }

    /// The workspace with these files as the keys of one account.
    fn render(&self, files: &[&str]) -> anyhow::Result<RenderedFiles> {
        let list: Vec<String> = files.iter().map(|file| format!("\"{file}\"")).collect();
        let product = fs::read_to_string(fixture().join("configs/shop.toml"))?;
        let keys = format!("uid = 1000\nauthorized-keys = [{}]", list.join(", "));
        self.0.put("configs/shop.toml", product.replace("uid = 1000", &keys));
        self.0.render()
    }

    /// How many keys OpenSSH finds in a file.
    fn count(&self, content: &str) -> usize {
        let path = self.at("count");
        fs::write(&path, content).expect("written");
        text(&keygen(&["-l", "-f", path.as_str()]).stdout).lines().count()
    }

    /// What each place says to such a file: the product's list, the key directory, `flash --ssh-key`, an overlay.
    fn everywhere(&self, content: &[u8]) -> [(&'static str, Result<String, String>); 4] {
        let printed = |error: anyhow::Error| format!("{error:#}");
        let file = self.at("configs/tried.pub");
        fs::write(&file, content).expect("written");
        let product = self.render(&["configs/tried.pub"]);
        let product = product.map(|r| r.authorized_keys["robot"].clone()).map_err(printed);
        let folder = self.at("keys");
        fs::create_dir_all(&folder).expect("made");
        fs::write(folder.join(keys::AUTHORIZED_KEYS), content).expect("written");
        let developers = keys::authorized_keys(&folder).map_err(printed);
        let flashed = flash::seed::read_keys(&file);
        let flashed = flashed.map(|keys| keys.join("\n") + "\n").map_err(printed);
        let overlay = self.at("overlays/plain/etc/ssh/authorized_keys.d");
        fs::create_dir_all(&overlay).expect("made");
        fs::write(overlay.join("robot"), content).expect("written");
        let laid = self.render(&[]).map(|_| String::new()).map_err(printed);
        fs::remove_dir_all(&overlay).expect("removed");
        [("product", product), ("key directory", developers), ("flash", flashed), ("overlay", laid)]
    }
}

#[test]
fn what_sshd_reads_is_taken_and_ends_its_lines() {
    let rig = Rig::new();
    let keys = [
        rig.make("ed25519", &["-t", "ed25519"]),
        rig.make("rsa", &["-t", "rsa", "-b", "2048"]),
        rig.make("p256", &["-t", "ecdsa", "-b", "256"]),
        rig.make("p384", &["-t", "ecdsa", "-b", "384"]),
        rig.make("p521", &["-t", "ecdsa", "-b", "521"]),
    ];
    for key in &keys {
        let key = key.trim_end();
        let bare = key.rsplit_once(' ').expect("a comment").0;
        for content in [
            format!("{key}\n"),
            key.to_owned(),
            format!("{key}\r\n"),
            format!("# who\n\n  {key}  \n\t\n"),
            format!("\u{feff}{key}\r\n"),
            bare.to_owned(),
            format!("{bare} Zoë, bench 7 (\"left\")\n"),
            bare.replace(' ', "  "),
        ] {
            for (place, taken) in rig.everywhere(content.as_bytes()) {
                // An overlay's file is copied as it is.
                if place == "overlay" && content.contains(['\r', '\u{feff}']) {
                    assert!(taken.expect_err(place).contains("Unix line ends"));
                    continue;
                }
                let taken = taken.unwrap_or_else(|error| panic!("{place}: {content:?}: {error}"));
                if place != "overlay" {
                    assert!(taken.ends_with('\n') && !taken.contains('\r'), "{place}: {taken:?}");
                    assert_eq!(rig.count(&taken), 1, "{place}: {taken:?}");
                }
            }
        }
    }
    // The two of hardware that no test can make: type, key, application.
    let field = |bytes: &[u8]| [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat();
    let point = [&[4][..], &[7; 64]].concat();
    for (name, parts) in [
        ("sk-ssh-ed25519@openssh.com", vec![vec![7; 32], b"ssh:".to_vec()]),
        ("sk-ecdsa-sha2-nistp256@openssh.com", vec![b"nistp256".to_vec(), point, b"ssh:".to_vec()]),
    ] {
        let blob: Vec<u8> = [field(name.as_bytes())]
            .into_iter()
            .chain(parts.iter().map(|p| field(p)))
            .flatten()
            .collect();
        let line = format!("{name} {} me", bundle::keys::encode_base64(&blob));
        assert_eq!(ssh_keys::keys_as_lines(line.as_bytes()), Ok(format!("{line}\n")));
    }
}

#[test]
fn several_files_stay_several_keys() {
    let rig = Rig::new();
    let alice = rig.make("alice", &["-t", "ed25519"]);
    let bob = rig.make("bob", &["-t", "ed25519"]);
    fs::write(rig.at("configs/alice.pub"), alice.trim_end()).expect("written");
    fs::write(rig.at("configs/bob.pub"), bob.replace('\n', "\r\n")).expect("written");
    let rendered = rig.render(&["configs/alice.pub", "configs/bob.pub"]).expect("it renders");
    let taken = &rendered.authorized_keys["robot"];
    assert_eq!(*taken, format!("{alice}{bob}"));
    assert_eq!(rig.count(taken), 2);
    // With the developers' behind them.
    let folder = rig.at("keys");
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join(keys::AUTHORIZED_KEYS), alice.trim_end()).expect("written");
    let own = keys::authorized_keys(&folder).expect("keys");
    assert_eq!(rig.count(&format!("{taken}{own}")), 3);
    fs::write(folder.join(keys::AUTHORIZED_KEYS), "\n").expect("written");
    assert_eq!(keys::authorized_keys(&folder).expect("none yet"), "");
}

#[test]
fn options_are_those_of_sshd() {
    let rig = Rig::new();
    let key = rig.make("key", &["-t", "ed25519"]);
    let key = key.trim_end();
    for options in [
        "restrict,pty",
        "No-Pty",
        r#"command="echo \"a b\", c",from="10.0.0.0/8,!10.1.0.1""#,
        r#"restrict,permitopen="localhost:80",environment="A=b c""#,
        "cert-authority,principals=\"me\"",
    ] {
        let line = format!("{options} {key}");
        let keys =
            ssh_keys::parse_keys(line.as_bytes()).unwrap_or_else(|bad| panic!("{line}: {bad:?}"));
        assert!(keys[0].has_options && keys[0].text == line, "{line}");
        // They mean nothing to the file of the first boot, and must not get lost.
        let path = rig.at("with-options.pub");
        fs::write(&path, &line).expect("written");
        let error = format!("{:#}", flash::seed::read_keys(&path).expect_err("options"));
        assert!(error.contains("a key has options"), "{error}");
    }
    for (options, expected) in [
        ("robot-7", "sshd does not support the option 1 before the key"),
        ("restrict,no-such-thing", "does not support the option 2 before the key"),
        ("command=ls", "does not support the option 1 before the key"),
        ("command=\"ls", "a quote is not closed"),
        ("restrict, pty", "expected an SSH public key, found something else"),
    ] {
        let bad = ssh_keys::parse_keys(format!("{options} {key}").as_bytes()).expect_err(options);
        assert!(bad.message.contains(expected) && bad.line == Some(1), "{options}: {bad:?}");
    }
}

#[test]
fn a_secret_key_gets_nowhere() {
    let rig = Rig::new();
    let public = rig.make("one", &["-t", "ed25519"]);
    rig.make("old", &["-t", "rsa", "-b", "2048", "-m", "PEM"]);
    rig.make("pkcs8", &["-t", "ecdsa", "-m", "PKCS8"]);
    let locked = rig.at("locked");
    let made = keygen(&["-q", "-t", "ed25519", "-N", "a password", "-f", locked.as_str()]);
    assert!(made.status.success());
    let mut secrets: Vec<Vec<u8>> = ["one", "old", "pkcs8", "locked"]
        .iter()
        .map(|name| fs::read(rig.at(name)).expect("a secret key"))
        .collect();
    secrets.push(
        b"PuTTY-User-Key-File-3: ssh-ed25519\r\nEncryption: none\r\nComment: me\r\n".to_vec(),
    );
    for secret in secrets {
        let windows = text(&secret).replace('\n', "\r\n");
        let wide: Vec<u8> = [0xfeff]
            .into_iter()
            .chain(text(&secret).encode_utf16())
            .flat_map(u16::to_le_bytes)
            .collect();
        let behind = [public.as_bytes(), &secret].concat();
        for content in [secret.clone(), windows.into_bytes(), wide, behind] {
            for (place, taken) in rig.everywhere(&content) {
                let error = taken.expect_err(place);
                assert!(
                    error.contains("secret key") && error.contains("help: "),
                    "{place}: {error}"
                );
                let repeated = text(&secret).lines().any(|l| l.len() > 30 && error.contains(l));
                assert!(!repeated, "{place} repeats the key: {error}");
            }
        }
        // From a template, under any name, in any directory, and on a boot partition.
        for path in [
            "overlays/plain/root/.ssh/id_ed25519",
            "overlays/plain/opt/notes.j2",
            "board/common/boot.scr.j2",
        ] {
            let path = rig.at(path);
            let before = fs::read(&path).ok();
            fs::create_dir_all(path.parent().expect("a directory")).expect("made");
            fs::write(&path, &secret).expect("written");
            let error = format!("{:#}", rig.render(&[]).expect_err("a secret key"));
            assert!(error.contains("the file contains a secret key"), "{path}: {error}");
            match before {
                Some(before) => fs::write(&path, before).expect("written"),
                None => fs::remove_file(&path).expect("removed"),
            }
        }
        rig.render(&[]).expect("without it all is well");
    }
}

#[test]
fn what_is_no_public_key_is_refused_with_a_way_out() {
    let rig = Rig::new();
    let good = rig.make("one", &["-t", "ed25519"]);
    rig.make("rsa", &["-t", "rsa", "-b", "2048"]);
    let exported =
        |form: &str| keygen(&["-e", "-m", form, "-f", rig.at("rsa.pub").as_str()]).stdout;
    let certificate = {
        rig.make("authority", &["-t", "ed25519"]);
        let signed = keygen(&[
            "-q",
            "-s",
            rig.at("authority").as_str(),
            "-I",
            "me",
            rig.at("one.pub").as_str(),
        ]);
        assert!(signed.status.success(), "{}", text(&signed.stderr));
        fs::read(rig.at("one-cert.pub")).expect("a certificate")
    };
    let cut = good.split_at(40).0.to_owned();
    let wide: Vec<u8> = good.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut weak = b"\0\0\0\x07ssh-rsa\0\0\0\x03\x01\0\x01\0\0\0\x60".to_vec();
    weak.extend([0xff; 96]);
    let weak = format!("ssh-rsa {}", bundle::keys::encode_base64(&weak));
    let cases: [(&str, Vec<u8>, &str, &str); 11] = [
        ("PuTTY's", exported("RFC4716"), "format of RFC 4716", "`ssh-keygen -i -f FILE`"),
        ("PKCS #8", exported("PKCS8"), "format of PKCS #8", "`ssh-keygen -i -m PKCS8 -f FILE`"),
        ("PKCS #1", exported("PEM"), "format of PKCS #1", "`ssh-keygen -i -m PEM -f FILE`"),
        ("a certificate", certificate, ":1: the key is a certificate", "cert-authority"),
        ("cut off", cut.into_bytes(), ":1: the key is not", "copy the whole line"),
        ("UTF-16", [vec![0xff, 0xfe], wide].concat(), "not a UTF-8 text", "PowerShell"),
        ("two on a line", good.replacen(' ', " x", 1).into_bytes(), ":1: the key is not", "copy"),
        ("a small one", weak.into_bytes(), ":1: the RSA key has less than 1024 bits", "ed25519"),
        ("DSA", b"ssh-dss AAAAB3NzaC1kc3M= me".to_vec(), ":1: the key is a DSA key", "ed25519"),
        ("words", format!("{good}hello\n").into_bytes(), ":2: expected an SSH public key", ".pub"),
        ("nothing", b"# none yet\n".to_vec(), "the file contains no SSH key", ".pub"),
    ];
    for (name, content, expected, help) in cases {
        for (place, taken) in rig.everywhere(&content) {
            let error = taken.expect_err(name);
            let expected = if place == "overlay" {
                expected.trim_start_matches(|c: char| c == ':' || c.is_ascii_digit())
            } else {
                expected
            };
            assert!(error.contains(expected.trim_start_matches(": ")), "{name}, {place}: {error}");
            assert!(error.contains(help), "{name}, {place}: {error}");
        }
    }
}
