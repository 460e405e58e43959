//! Keys and bundles as the command line uses them, with the foreign tools that must accept both.

use crate::common::{folder, tool};

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use bundle::{BuildKind, BundlePolicy, CompressionLevel, KeySet, Version};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::keys::{KEY_SET, KeyDirectory, PASSWORD_VARIABLE, SigningKey};
use xtask::update::{ComponentRequest, PackRequest, PayloadRequest, pack_bundle, verify_bundle};

/// A sparse file of 40 MiB with a little at its front, in the middle and at its very end.
pub fn payload(dir: &Utf8Path) -> Utf8PathBuf {
    let path = dir.join("root.img");
    let mut file = std::fs::File::create(&path).unwrap();
    for (at, text) in [(0, "front"), (21 << 20, "middle"), ((40 << 20) - 1, "z")] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
    path
}

pub fn request<'a>(
    payload: &Utf8Path,
    kind: BuildKind,
    signers: &'a [SigningKey],
) -> PackRequest<'a> {
    let version = Version::parse("0.1.0").unwrap();
    let payload = PayloadRequest { role: "root".to_owned(), path: payload.to_owned() };
    PackRequest {
        product: "robot-test".to_owned(),
        version: version.clone(),
        kind,
        boards: vec!["board-one".to_owned()],
        minimum_version: version.clone(),
        key_epoch: None,
        epoch: 1_700_000_000,
        components: vec![ComponentRequest {
            name: "system".to_owned(),
            version,
            payloads: vec![payload],
        }],
        level: CompressionLevel::Fast,
        workers: None,
        signers,
    }
}

fn run(program: &str, args: &[&str], dir: &Utf8Path) -> Vec<u8> {
    tool(program).args(args).current_dir(dir).read_bytes().unwrap()
}

#[test]
fn a_bundle_is_made_the_same_twice_and_foreign_tools_read_it() {
    let (_keep, dir) = folder();
    let mut keys = KeyDirectory::open(&dir.join("keys")).unwrap();
    let signers = [keys.signer(BuildKind::Development).unwrap()];
    let root = payload(&dir);
    let first =
        pack_bundle(&request(&root, BuildKind::Development, &signers), &dir.join("a.bundle"))
            .unwrap();
    let other =
        PackRequest { workers: Some(1), ..request(&root, BuildKind::Development, &signers) };
    let second = pack_bundle(&other, &dir.join("deep/er/b.bundle")).unwrap();
    assert_eq!(first.artifact.sha256, second.artifact.sha256);
    assert_eq!(xtask::artifact::Artifact::from_file(dir.join("a.bundle")).unwrap(), first.artifact);
    assert_eq!((first.payloads[0].size, first.payloads[0].used), (40 << 20, 3 * 4096));
    assert_eq!(first.signed_by[0].kind, BuildKind::Development);
    assert!(!dir.join("a.bundle.partial").exists());

    let verified =
        verify_bundle(&dir.join("a.bundle"), keys.set(), &BundlePolicy::default()).unwrap();
    assert_eq!(verified.manifest, first.manifest);
    run("tar", &["-xf", "a.bundle"], &dir);
    let public = &keys.list()[0].public_file;
    run("minisign", &["-V", "-m", "manifest.json", "-p", public.as_str()], &dir);
    assert!(run("zstd", &["-dc", "system/root.zst"], &dir) == std::fs::read(&root).unwrap());
}

#[test]
fn a_damaged_bundle_is_refused_with_its_code_and_help() {
    let (_keep, dir) = folder();
    let mut keys = KeyDirectory::open(&dir.join("keys")).unwrap();
    let signers = [keys.signer(BuildKind::Development).unwrap()];
    let path = dir.join("a.bundle");
    pack_bundle(&request(&payload(&dir), BuildKind::Development, &signers), &path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[700] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = verify_bundle(&path, keys.set(), &BundlePolicy::default()).unwrap_err();
    let shown = format!("{error:#}");
    assert!(shown.contains("(bad-signature)\nhelp: "), "{shown}");
    let typed = error.chain().find_map(|cause| cause.downcast_ref::<bundle::Error>());
    assert_eq!(typed.map(bundle::Error::code), Some("bad-signature"));
}

#[test]
fn the_minisign_tool_signs_with_our_key_what_we_accept() {
    let (_keep, dir) = folder();
    let mut keys = KeyDirectory::open(&dir.join("keys")).unwrap();
    keys.signer(BuildKind::Development).unwrap();
    let listed = keys.list().remove(0);
    std::fs::write(dir.join("text"), "something").unwrap();
    let secret = listed.secret.unwrap();
    run("minisign", &["-S", "-m", "text", "-s", secret.as_str()], &dir);
    run("minisign", &["-V", "-m", "text", "-p", listed.public_file.as_str()], &dir);
    let by_tool = std::fs::read_to_string(dir.join("text.minisig")).unwrap();
    let ours = keys.signer(BuildKind::Development).unwrap().sign(b"something", "x").text;
    // Algorithm, key number and signature are the tool's own, byte for byte.
    assert_eq!(by_tool.lines().nth(1), ours.lines().nth(1));
    assert_eq!(by_tool.lines().next(), ours.lines().next());
}

#[test]
fn keys_are_made_once_kept_private_and_rotated() {
    let (_keep, dir) = folder();
    let at = dir.join("keys");
    let mut keys = KeyDirectory::open(&at).unwrap();
    assert!(keys.list().is_empty());
    let message = format!("{:#}", keys.signer(BuildKind::Release).unwrap_err());
    assert!(message.contains("finding the release key: no release key in"), "{message}");
    let message = format!("{:#}", keys.rotate(BuildKind::Development, false).unwrap_err());
    assert!(message.contains("`cargo xtask keys new` makes the first"), "{message}");

    let first = keys.signer(BuildKind::Development).unwrap().key().clone();
    assert_eq!(keys.signer(BuildKind::Development).unwrap().key(), &first);
    let message = format!("{:#}", keys.new_key(BuildKind::Development).unwrap_err());
    assert!(message.contains("of epoch 1 exists already"), "{message}");
    let mode = |path: &Utf8Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&at), 0o700);
    assert_eq!(mode(keys.list()[0].secret.as_ref().unwrap()), 0o600);

    // Until a key is revoked it signs beside its successor: robots of before know no other.
    let alone = format!("{:#}", keys.revoke(&first.id).unwrap_err());
    assert!(alone.contains("without another development key"), "{alone}");
    let second = keys.rotate(BuildKind::Development, false).unwrap();
    assert_eq!(second.epoch, 2);
    let ids = |keys: &mut KeyDirectory| -> Vec<String> {
        let signers = keys.signers(BuildKind::Development).unwrap();
        signers.iter().map(|signer| signer.key().id.clone()).collect()
    };
    assert_eq!(ids(&mut keys), [second.id.clone(), first.id.clone()]);
    let out = dir.join("both.bundle");
    let signers = keys.signers(BuildKind::Development).unwrap();
    pack_bundle(&request(&payload(&dir), BuildKind::Development, &signers), &out).unwrap();
    for known in [&first, &second] {
        let set = KeySet { keys: vec![known.clone()], ..KeySet::default() };
        let policy = BundlePolicy { product: None, board: None, floor: None, key_epoch: 0 };
        let verified = xtask::update::verify_bundle(&out, &set, &policy).unwrap();
        assert_eq!(verified.signed_by[0].id, known.id);
        assert_eq!(verified.manifest.key_epoch, 1, "the older key still counts");
    }
    assert_eq!(keys.revoke(&first.id).unwrap().id, first.id);
    assert_eq!(ids(&mut keys), std::slice::from_ref(&second.id));
    assert!(keys.revoke(&first.id).is_err() && keys.revoke("0").is_err());
    assert_eq!(keys.signer(BuildKind::Development).unwrap().key(), &second);
    drop(keys);
    let keys = KeyDirectory::open(&at).unwrap();
    let states: Vec<(u32, bool)> = keys.set().keys.iter().map(|k| (k.epoch, k.revoked)).collect();
    assert_eq!(states, [(1, true), (2, false)]);
    assert!(keys.set_for(BuildKind::Release).keys.is_empty());
    assert_eq!(keys.set_for(BuildKind::Development).keys.len(), 2);
    assert!(at.join(KEY_SET).is_file());
}

#[test]
fn a_release_refuses_the_development_key() {
    let (_keep, dir) = folder();
    let mut keys = KeyDirectory::open(&dir.join("keys")).unwrap();
    let signers = [keys.signer(BuildKind::Development).unwrap()];
    let out = dir.join("a.bundle");
    let error =
        pack_bundle(&request(&payload(&dir), BuildKind::Release, &signers), &out).unwrap_err();
    let shown = format!("{error:#}");
    assert!(shown.contains("is a release, but the key"), "{shown}");
    assert!(shown.contains("help: sign it with a release key"), "{shown}");
    assert!(!out.exists());
    let error = pack_bundle(&request(&payload(&dir), BuildKind::Release, &[]), &out).unwrap_err();
    assert!(format!("{error:#}").contains("no signing key: the bundle would be unsigned"));
}

#[test]
fn a_missing_payload_leaves_nothing_behind() {
    let (_keep, dir) = folder();
    let mut keys = KeyDirectory::open(&dir.join("keys")).unwrap();
    let signers = [keys.signer(BuildKind::Development).unwrap()];
    let out = dir.join("out/a.bundle");
    let error = pack_bundle(&request(&dir.join("none"), BuildKind::Development, &signers), &out)
        .unwrap_err();
    assert!(format!("{error:#}").contains("opening"), "{error:#}");
    assert_eq!(std::fs::read_dir(dir.join("out")).unwrap().count(), 0);
}

#[test]
fn ssh_keys_beside_the_signing_keys_are_public_ones() {
    let (_keep, dir) = folder();
    let read = || xtask::keys::authorized_keys(&dir);
    assert_eq!(read().unwrap(), "");
    let key = |path: &str| {
        run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", path], &dir);
        std::fs::read_to_string(dir.join(format!("{path}.pub"))).unwrap()
    };
    let (one, two) = (key("one"), key("two"));
    let file = dir.join("authorized_keys");
    std::fs::write(&file, format!("# mine\n\n{one}restrict,pty {}", two.trim_end())).unwrap();
    assert_eq!(read().unwrap(), format!("{one}restrict,pty {two}"));
    // The other file of the pair must never reach an image.
    std::fs::copy(dir.join("one"), &file).unwrap();
    let error = format!("{:#}", read().unwrap_err());
    assert!(error.contains("authorized_keys: the file is a secret key"), "{error}");
    assert!(!error.contains("PRIVATE") && error.contains("ssh-keygen -y"), "{error}");
}

/// Set for the process that signs: the key directory.
const SIGNS: &str = "TEST_UPDATE_SIGNS";

/// As CI mounts its secrets.
#[test]
fn a_read_only_key_directory_is_read_and_signs() {
    let (_keep, dir) = folder();
    let folder = dir.join("keys");
    let signers = [KeyDirectory::open(&folder).unwrap().signer(BuildKind::Development).unwrap()];
    let out = dir.join("a.bundle");
    pack_bundle(&request(&payload(&dir), BuildKind::Development, &signers), &out).unwrap();
    std::fs::remove_file(folder.join(".lock")).unwrap();
    let mount = "mount --bind \"$1\" \"$1\" && mount -o remount,ro,bind \"$1\" && ! touch \"$1/x\" 2>/dev/null && shift && exec \"$@\"";
    let in_mount = |program: &str, words: &[&str]| {
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command.args(["--mount", "--", "sh", "-c", mount, "sh", folder.as_str(), program]);
        command.args(words).env("SLIPWAY_KEYS", &folder).env(SIGNS, &folder);
        command.env(PASSWORD_VARIABLE, "for the test");
        let output = command.output().unwrap();
        let printed = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
    };
    let xtask = env!("CARGO_BIN_EXE_xtask");
    let id = signers[0].key().id.clone();
    let (good, printed) = in_mount(xtask, &["keys", "list"]);
    assert!(good && printed.contains(&id), "{printed}");
    let (good, printed) = in_mount(xtask, &["verify", out.as_str()]);
    assert!(good, "{printed}");
    let own = std::env::current_exe().unwrap();
    let words = ["--exact", "--nocapture", "update::in_a_child_that_signs"];
    let (good, printed) = in_mount(own.to_str().unwrap(), &words);
    assert!(good && printed.contains(&format!("signed by {id}")), "{printed}");
    // What would have to be written fails, and says where.
    let (good, printed) = in_mount(xtask, &["keys", "new"]);
    assert!(!good && printed.contains("Read-only file system"), "{printed}");
}

/// Run by the test above.
#[test]
fn in_a_child_that_signs() {
    let Ok(dir) = std::env::var(SIGNS) else { return };
    let signer =
        KeyDirectory::open(Utf8Path::new(&dir)).unwrap().signer(BuildKind::Development).unwrap();
    println!("signed by {}", signer.sign(b"x", "a comment").key);
}

/// The environment belongs to the whole process, so the password's cases run in a child.
#[test]
fn a_release_key_needs_its_password() {
    let case = |password: Option<&str>, at: &Utf8Path| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--nocapture", "update::in_a_child_with_a_password"]);
        command.env("SLIPWAY_TEST_DIR", at).env_remove(PASSWORD_VARIABLE);
        command.stdin(std::process::Stdio::null());
        if let Some(password) = password {
            command.env(PASSWORD_VARIABLE, password);
        }
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (_keep, dir) = folder();
    let (ok, text) = case(None, &dir);
    assert!(!ok && text.contains("help: set SLIPWAY_KEY_PASSWORD"), "{text}");
    let (ok, text) = case(Some(""), &dir);
    assert!(!ok && text.contains("SLIPWAY_KEY_PASSWORD is empty"), "{text}");
    let (ok, text) = case(Some("correct horse"), &dir);
    assert!(ok, "{text}");
    let (ok, text) = case(Some("wrong"), &dir);
    assert!(!ok && text.contains("opening the secret key"), "{text}");
    assert!(!text.contains("correct horse"));
    // One variable opens all of them, so a new one does not get another.
    let rotate = |password: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["keys", "rotate"]).env("SLIPWAY_KEYS", dir.join("keys"));
        let output = command.env(PASSWORD_VARIABLE, password).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (ok, text) = rotate("wrong");
    assert!(!ok && text.contains("the new key must have the same password"), "{text}");
    assert_eq!(KeyDirectory::open(&dir.join("keys")).unwrap().list().len(), 1);
    let (ok, text) = rotate("correct horse");
    assert!(ok, "{text}");
    // A key that others may read is told.
    for key in KeyDirectory::open(&dir.join("keys")).unwrap().list() {
        let secret = key.secret.unwrap();
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
    }
    let (ok, text) = rotate("correct horse");
    assert!(ok && text.contains("is readable by other users (mode 644)"), "{text}");
}

/// The other half of `a_release_key_needs_its_password`, which names the directory.
#[test]
fn in_a_child_with_a_password() {
    let Ok(dir) = std::env::var("SLIPWAY_TEST_DIR") else { return };
    let dir = Utf8PathBuf::from(dir);
    let work = || -> anyhow::Result<()> {
        let mut keys = KeyDirectory::open(&dir.join("keys"))?;
        if keys.list().is_empty() {
            keys.new_key(BuildKind::Release)?;
        }
        let signers = [keys.signer(BuildKind::Release)?];
        let out = dir.join("a.bundle");
        pack_bundle(&request(&payload(&dir), BuildKind::Release, &signers), &out)?;
        verify_bundle(&out, &keys.set_for(BuildKind::Release), &BundlePolicy::default())?;
        Ok(())
    };
    if let Err(error) = work() {
        println!("{error:#}");
        panic!("refused");
    }
}

/// The payloads of a component `api` with one wheel, whose tree has these files.
fn component_of(files: &[(&str, &str)], dir: &Utf8Path) -> ComponentRequest {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, text) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, text.as_bytes()).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let hash = xtask::artifact::hash_bytes(&tar);
    let lock = bundle::component::ComponentLock {
        format: bundle::component::LOCK_FORMAT,
        package: "foo".into(),
        module: "foo".into(),
        version: "1.0".into(),
        python: "3.11".into(),
        arch: "aarch64".into(),
        libc: "glibc 2.36".into(),
        base: vec![],
        wheels: vec![bundle::component::ComponentWheel {
            role: "foo".into(),
            name: "foo".into(),
            version: "1.0".into(),
            sha256: "0".repeat(64),
            tree: hash,
            size: tar.len() as u64,
            files: files.len() as u64,
            bytes: files.iter().map(|(_, text)| text.len() as u64).sum(),
            requires: vec![],
            scripts: vec![],
        }],
    };
    let payloads = [("component.json", lock.to_json().unwrap()), ("foo", tar)];
    let payloads = payloads.map(|(role, bytes)| {
        let path = dir.join(role);
        std::fs::write(&path, bytes).unwrap();
        PayloadRequest { role: role.to_owned(), path }
    });
    let version = Version::parse("1.0.0").unwrap();
    ComponentRequest { name: "api".to_owned(), version, payloads: payloads.to_vec() }
}

/// What every robot refuses is not called good, however well it is signed.
#[test]
fn an_api_that_no_robot_takes_is_not_good() {
    let (_keep, dir) = folder();
    let mut keys = KeyDirectory::open(&dir.join("keys")).unwrap();
    let signers = [keys.signer(BuildKind::Development).unwrap()];
    let out = dir.join("api.bundle");
    let verdict = |files: &[(&str, &str)], lock: Option<&str>| {
        let component = component_of(files, &dir);
        if let Some(text) = lock {
            std::fs::write(&component.payloads[0].path, text).unwrap();
        }
        let mut request = request(&dir, BuildKind::Development, &signers);
        request.components = vec![component];
        pack_bundle(&request, &out).unwrap();
        verify_bundle(&out, keys.set(), &BundlePolicy::default())
    };
    let deep = format!("site/{}x", "d/".repeat(40));
    verdict(&[("site/foo/__init__.py", "x = 1\n"), ("site/foo/a/b.py", "")], None).unwrap();
    type Case<'a> = (&'a [(&'a str, &'a str)], Option<&'a str>, &'a str);
    let cases: [Case<'_>; 4] = [
        (&[("site/foo/Case.txt", "1"), ("site/foo/case.txt", "2")], None, "(bad-tree)\nhelp: "),
        (&[(deep.as_str(), "x")], None, "at most 32 are allowed (bad-tree)"),
        (&[("component.json", "x")], None, "begins with `component.json` (bad-tree)"),
        (&[("site/foo/a.py", "x")], Some("{}"), "(bad-component)"),
    ];
    for (files, lock, expected) in cases {
        let error = format!("{:#}", verdict(files, lock).unwrap_err());
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
