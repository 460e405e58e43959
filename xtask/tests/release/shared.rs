//! The cache that a team shares: machines (copies of this test) that build a small stage and fetch
//! a download, with a real web server (nginx), a real S3 protocol (moto) and a directory between
//! them; and all that can be wrong there.

use crate::common::{find, folder_on_disk, noise};

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use bundle::BuildKind;
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use xtask::artifact::{Artifact, hash_bytes};
use xtask::cache::{Cache, CacheKey};
use xtask::fetch::{Download, DownloadOutcome, Downloader};
use xtask::keys::{self, KeyDirectory};
use xtask::shared::record::{
    FORMAT, ObjectCompression, PackedObject, StageFile, StageRecord, record_path,
};
use xtask::shared::{attach_shared_cache, trusted_keys};
use xtask::store::format::object_path;

use super::support::{Server, free_port};

/// Bytes of the large file of the stage: some packets, and time to be killed in.
const LARGE: usize = 24 << 20;
/// How often a writer is killed.
const KILLS: u32 = 4;
/// Tells a copy of this test what to build.
const TASK: &str = "MACHINE_TASK";
/// The test that a machine is.
const MACHINE: &str = "release::shared::a_machine_that_is_told_of_no_shared_cache_has_its_own_only";

#[derive(Debug, Serialize, Deserialize)]
struct Task {
    /// Seed of the stage's content; part of its key.
    seed: String,
    release: bool,
    offline: bool,
    /// A download to fetch instead.
    download: Option<(String, String)>,
}

/// What the stage makes: as real ones, paths deep in a value.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Made {
    tar: Artifact,
    tool: Utf8PathBuf,
    more: BTreeMap<String, Artifact>,
}

fn outputs(made: &Made) -> Vec<Utf8PathBuf> {
    let more = made.more.values().map(|artifact| artifact.path.clone());
    [made.tar.path.clone(), made.tool.clone()].into_iter().chain(more).collect()
}

fn key(seed: &str) -> String {
    CacheKey::new("base", 1).with("seed", seed).finish()
}

/// The stage's files: packed well, not at all, empty, twice the same.
fn content(seed: &str) -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        (
            "rootfs.tar",
            // Half of it packs well.
            [noise(LARGE / 2, seed), vec![7; LARGE / 2]].concat(),
        ),
        ("bin/tool", noise(64 << 10, seed)),
        ("dtbs/broadcom/one.dtb", b"a device tree ".repeat(1000)),
        ("dtbs/two.dtb", b"a device tree ".repeat(1000)),
        ("empty", Vec::new()),
    ])
}

fn build(dir: &Utf8Path, content: &BTreeMap<&str, Vec<u8>>) -> Made {
    for (path, bytes) in content {
        fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        fs::write(dir.join(path), bytes).unwrap();
    }
    let tool = dir.join("bin/tool");
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let of = |path: &str| Artifact::from_file(dir.join(path)).unwrap();
    let more = ["dtbs/broadcom/one.dtb", "dtbs/two.dtb", "empty"];
    let more = more.map(|path| (path.to_owned(), of(path)));
    Made { tar: of("rootfs.tar"), tool, more: more.into() }
}

/// Also what the machines of all tests start: told of a task, it is one.
#[test]
fn a_machine_that_is_told_of_no_shared_cache_has_its_own_only() {
    if let Ok(task) = std::env::var(TASK) {
        return machine(&task);
    }
    let team = Team::new();
    let alone = |expected: &str| {
        let mut machine = team.machine("alone", true, &task("s"));
        let printed = build_outcome(machine.env_remove("SLIPWAY_SHARED_CACHE").output().unwrap());
        assert_eq!((printed.origin.as_str(), printed.log.contains("shared")), (expected, false));
    };
    alone("Made");
    alone("Kept");
    assert!(!team.dir.join("store").exists(), "something was stored");
}

fn machine(task: &str) {
    let task: Task = serde_json::from_str(task).unwrap();
    let kind = if task.release { BuildKind::Release } else { BuildKind::Development };
    let signer = KeyDirectory::open(&keys::key_directory().unwrap()).unwrap().signer(kind).unwrap();
    let cache = match attach_shared_cache(Cache::locate().unwrap(), kind, &signer, task.offline) {
        Ok(cache) => cache,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::exit(1)
        }
    };
    if let Some((url, sha256)) = task.download {
        let downloader = Downloader::for_cache(&cache, task.offline).unwrap();
        let wanted = Download { name: "x.deb".into(), url, size: None, sha256: sha256.clone() };
        let outcomes = downloader.fetch("fetch", "packages", &[wanted]).unwrap();
        let DownloadOutcome::Ready(artifact) = &outcomes[0] else { panic!("it is gone") };
        assert_eq!(hash_bytes(&fs::read(&artifact.path).unwrap()), sha256);
        return;
    }
    let content = content(&task.seed);
    let staged = cache.stage("base", &key(&task.seed), outputs, |dir| Ok(build(dir, &content)));
    let staged = staged.unwrap();
    // From every source, it is the requested file, and it is in this machine's cache.
    let made = staged.value;
    for output in outputs(&made) {
        assert!(output.starts_with(&cache.root), "{output}");
        let (_, name) = output.as_str().split_once("/base/").unwrap();
        let (_, name) = name.split_once('/').unwrap();
        assert_eq!(fs::read(&output).unwrap(), content[name], "{name}");
        let mode = fs::metadata(&output).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & 0o111 != 0, name == "bin/tool", "{name}: {mode:o}");
    }
    assert_eq!(Artifact::from_file(&made.tar.path).unwrap(), made.tar);
    println!("\norigin={:?}", staged.origin);
}

/// What a machine said.
struct BuildOutput {
    origin: String,
    log: String,
}

impl BuildOutput {
    fn warnings(&self) -> usize {
        self.log.lines().filter(|line| line.starts_with("warning: ")).count()
    }
}

/// Machines and what is between them.
struct Team {
    dir: Utf8PathBuf,
    address: String,
    _keep: tempfile::TempDir,
    _server: Option<Server>,
}

impl Team {
    /// Around a directory.
    fn new() -> Self {
        let (_keep, dir) = folder_on_disk();
        let address = dir.join("store").into_string();
        Self { dir, address, _keep, _server: None }
    }

    /// Around nginx, whose files are in the directory `store`. `more`: further lines of its
    /// location.
    fn web(more: &str) -> Self {
        let mut team = Self::new();
        let (dir, port) = (&team.dir, free_port());
        fs::create_dir_all(dir.join("store")).unwrap();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|name| format!("{name}_temp_path '{dir}/tmp-{name}';\n"))
            .collect();
        let text = format!(
            "daemon off;\nmaster_process off;\npid '{dir}/nginx.pid';\nerror_log stderr;\nevents {{}}\nhttp {{\n\
             access_log '{dir}/access.log';\n{temporary}server {{\nlisten 127.0.0.1:{port};\n\
             root '{dir}/store';\nclient_max_body_size 0;\n\
             location / {{\n{more}\n}}\n}}\n}}\n"
        );
        let config = dir.join("nginx.conf");
        fs::write(&config, text).unwrap();
        let mut nginx = Command::new(find("nginx"));
        nginx.args(["-e", "stderr", "-c", config.as_str()]);
        let server = Server::start(nginx, port, &dir.join("nginx.log"));
        team.address = format!("http://127.0.0.1:{port}");
        team._server = Some(server);
        team
    }

    fn machine(&self, name: &str, writes: bool, task: &Task) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", MACHINE, "--nocapture"])
            .env("SLIPWAY_SHARED_CACHE", &self.address)
            .env("SLIPWAY_SHARED_CACHE_WRITE", if writes { "1" } else { "0" })
            .env("SLIPWAY_CACHE", self.dir.join(name))
            .env("SLIPWAY_KEYS", self.dir.join("keys"))
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "a secret of tests")
            .env(TASK, serde_json::to_string(task).unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn builds(&self, name: &str, writes: bool, seed: &str) -> BuildOutput {
        build_outcome(self.machine(name, writes, &task(seed)).output().unwrap())
    }

    /// A machine with nothing in its cache that only reads.
    fn reads(&self, seed: &str) -> BuildOutput {
        let fresh = format!("reader-{}", hash_bytes(format!("{:?}", Instant::now()).as_bytes()));
        self.builds(&fresh, false, seed)
    }

    /// The record of a stage in the directory of the store, by the only key of the team.
    fn record(&self, seed: &str) -> Utf8PathBuf {
        let set = trusted_keys(&self.dir.join("keys"), BuildKind::Development).unwrap();
        self.dir.join("store").join(record_path(&key(seed), &set.keys[0].id))
    }

    /// The record in the store.
    fn read_record(&self, seed: &str) -> StageRecord {
        let set = trusted_keys(&self.dir.join("keys"), BuildKind::Development).unwrap();
        let file = fs::read(self.record(seed)).unwrap();
        StageRecord::open(&file, &set, "base", &key(seed)).unwrap().0
    }

    /// The object of a file of a stage.
    fn object(&self, seed: &str, name: &str) -> Utf8PathBuf {
        let record = self.read_record(seed);
        let file = record.files.iter().find(|file| file.path == name).unwrap();
        self.dir.join("store").join(object_path(&file.object.sha256))
    }
}

fn task(seed: &str) -> Task {
    Task { seed: seed.to_owned(), release: false, offline: false, download: None }
}

fn build_outcome(output: Output) -> BuildOutput {
    let log = String::from_utf8(output.stderr).unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{out}\n{log}");
    assert!(!log.contains("a secret of tests") && !log.contains("X-Amz"), "{log}");
    let origin = out.lines().find_map(|line| line.strip_prefix("origin="));
    BuildOutput { origin: origin.unwrap_or_default().to_owned(), log }
}

const DAV: &str = "dav_methods PUT; create_full_put_path on;";

/// One machine builds and stores, the next one has nothing to do.
fn round_trip(team: &Team) {
    let writer = team.builds("writer", true, "s");
    assert_eq!(writer.origin, "Made", "{}", writer.log);
    assert!(writer.log.contains("is read and written") && writer.log.contains("base stored"));
    assert_eq!(writer.warnings(), 0, "{}", writer.log);
    let again = team.builds("writer", true, "s");
    assert_eq!((again.origin.as_str(), again.warnings()), ("Kept", 0));
    assert!(!again.log.contains("base stored"), "{}", again.log);
    let reader = team.builds("reader", false, "s");
    assert_eq!((reader.origin.as_str(), reader.warnings()), ("Shared", 0), "{}", reader.log);
    assert_eq!(team.builds("reader", false, "s").origin, "Kept");
    // What a machine made before it had a shared cache is stored as well.
    let mut alone = team.machine("late", true, &task("t"));
    assert_eq!(
        build_outcome(alone.env_remove("SLIPWAY_SHARED_CACHE").output().unwrap()).origin,
        "Made"
    );
    let late = team.builds("late", true, "t");
    assert_eq!(late.origin, "Kept");
    assert!(late.log.contains("base stored"), "{}", late.log);
    assert_eq!(team.reads("t").origin, "Shared");
}

#[test]
fn a_folder_a_web_server_and_a_bucket_serve_a_team() {
    round_trip(&Team::new());
    round_trip(&Team::web(DAV));
    let mut team = Team::new();
    let (_server, endpoint) = Server::s3(&team.dir);
    ureq::put(format!("{endpoint}/team")).send_empty().unwrap();
    team.address = "s3://team/cache".to_owned();
    // As all S3 tools find it.
    let with = |mut command: Command| {
        build_outcome(command.env("AWS_ENDPOINT_URL_S3", &endpoint).output().unwrap())
    };
    let writer = with(team.machine("writer", true, &task("s")));
    assert_eq!((writer.origin.as_str(), writer.warnings()), ("Made", 0), "{}", writer.log);
    let reader = with(team.machine("reader", false, &task("s")));
    assert_eq!((reader.origin.as_str(), reader.warnings()), ("Shared", 0), "{}", reader.log);
    team.address = "s3://no-such-bucket/cache".to_owned();
    let nobody = with(team.machine("nobody", true, &task("s")));
    assert_eq!(nobody.origin, "Made");
    assert!(nobody.warnings() > 0, "{}", nobody.log);
}

#[test]
fn what_is_damaged_there_is_not_used_and_a_writer_puts_it_right() {
    let team = Team::web(DAV);
    team.builds("writer", true, "s");
    for name in ["rootfs.tar", "bin/tool"] {
        let object = team.object("s", name);
        let good = fs::read(&object).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let longer = [good.clone(), b"more".to_vec()].concat();
        let cut = good[..good.len() / 2].to_vec();
        let bad = [Some(flipped), Some(longer), Some(cut), Some(Vec::new()), None];
        for (turn, bad) in bad.into_iter().enumerate() {
            match &bad {
                Some(bad) => fs::write(&object, bad).unwrap(),
                None => fs::remove_file(&object).unwrap(),
            }
            let reader = team.reads("s");
            assert_eq!(reader.origin, "Made", "{}", reader.log);
            assert!(reader.log.contains("from the shared cache"), "{}", reader.log);
            assert_eq!(reader.log.contains("is damaged"), bad.is_some(), "{}", reader.log);
            let writer = team.builds(&format!("{turn}-{}", name.len()), true, "s");
            assert_eq!(writer.origin, "Made");
            assert_eq!(fs::read(&object).unwrap(), good, "{}", writer.log);
            assert_eq!(team.reads("s").origin, "Shared");
        }
        // A writer that has the stage looks whether all is there.
        fs::remove_file(&object).unwrap();
        assert_eq!(team.builds("writer", true, "s").origin, "Kept");
        assert_eq!(fs::read(&object).unwrap(), good);
    }
}

#[test]
fn a_record_counts_only_with_the_signature_of_a_key_that_counts() {
    let mut team = Team::web(DAV);
    team.builds("writer", true, "s");
    let (file, id) = (team.record("s"), trusted_id(&team.dir.join("keys")));
    let good = fs::read_to_string(&file).unwrap();
    // Another stage's record in its place, one digit of a hash, no signature, no record at all.
    team.builds("writer", true, "other");
    let moved = fs::read_to_string(team.record("other")).unwrap();
    let digit = good.replacen("sha256\\\": \\\"", "sha256\\\": \\\"0", 1);
    for bad in [moved, digit, good.replacen("signature", "nothing", 1), "{".to_owned()] {
        assert_ne!(bad, good);
        fs::write(&file, bad).unwrap();
        let reader = team.reads("s");
        assert_eq!((reader.origin.as_str(), reader.warnings()), ("Made", 1), "{}", reader.log);
        assert!(reader.log.contains("from the shared cache"), "{}", reader.log);
    }
    fs::write(&file, &good).unwrap();
    // Another machine trusts the key of the team only when it is configured.
    let own = team.dir.join("own-keys");
    let stranger = |name: &str| {
        let mut command = team.machine(name, false, &task("s"));
        build_outcome(command.env("SLIPWAY_KEYS", &own).output().unwrap())
    };
    let alone = stranger("stranger");
    assert_eq!((alone.origin.as_str(), alone.warnings()), ("Made", 0), "{}", alone.log);
    let listed = own.join(keys::CACHE_SIGNERS);
    fs::create_dir_all(&listed).unwrap();
    let public = team.dir.join("keys").join(format!("development-1-{id}.pub"));
    fs::copy(&public, listed.join("ci.pub")).unwrap();
    assert_eq!(stranger("friend").origin, "Shared");
    // It is no longer valid, here and in fetched results, once the key is not listed any more.
    assert_eq!(stranger("friend").origin, "Kept");
    fs::remove_file(listed.join("ci.pub")).unwrap();
    assert_eq!(stranger("friend").origin, "Made");
    // And never for a release: neither fetched nor kept.
    fs::copy(&public, listed.join("ci.pub")).unwrap();
    assert_eq!(stranger("strict").origin, "Shared");
    let mut release = team.machine("strict", false, &Task { release: true, ..task("s") });
    release.env("SLIPWAY_KEYS", &own).env("SLIPWAY_KEY_PASSWORD", "a password of tests");
    let mut first = Command::new(env!("CARGO_BIN_EXE_xtask"));
    first.args(["keys", "new"]).env("SLIPWAY_KEYS", &own);
    crate::common::good(first.env("SLIPWAY_KEY_PASSWORD", "a password of tests").output().unwrap());
    let release = build_outcome(release.output().unwrap());
    assert_eq!(release.origin, "Made", "{}", release.log);
    fs::write(listed.join("bad.pub"), "untrusted comment: x\nno key\n").unwrap();
    let mut bad = team.machine("bad", false, &task("s"));
    let bad = bad.env("SLIPWAY_KEYS", &own).output().unwrap();
    assert!(!bad.status.success());
    let errors = String::from_utf8(bad.stderr).unwrap();
    assert!(errors.contains("bad.pub") && errors.contains("help: "), "{errors}");
    team.address = "ftp://host/x".to_owned();
    for (address, what) in [
        ("ftp://host/x", "invalid address of a shared cache"),
        ("relative/folder", "invalid address of a shared cache"),
        ("https://me:secret-word@host/x", "contains a user or a password"),
        ("https://host/a?b", "letters, digits"),
        ("https://host/../x", "letters, digits"),
    ] {
        team.address = address.to_owned();
        let output = team.machine("bad", false, &task("s")).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && errors.contains(what), "{address}: {errors}");
        assert!(errors.contains("help: ") && !errors.contains("secret-word"), "{errors}");
    }
}

fn trusted_id(dir: &Utf8Path) -> String {
    trusted_keys(dir, BuildKind::Development).unwrap().keys[0].id.clone()
}

#[test]
fn a_record_that_is_signed_and_hostile_writes_nothing_elsewhere() {
    let team = Team::web(DAV);
    team.builds("writer", true, "s");
    let signer =
        KeyDirectory::open(&team.dir.join("keys")).unwrap().signer(BuildKind::Development).unwrap();
    let good = team.read_record("s");
    let put = |bytes: &[u8]| {
        let sha256 = hash_bytes(bytes);
        let path = team.dir.join("store").join(object_path(&sha256));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        (sha256, bytes.len() as u64)
    };
    let file = |path: &str, size: u64| {
        let (sha256, stored) = put(b"hello");
        let object = PackedObject {
            sha256: sha256.clone(),
            size: stored,
            compression: ObjectCompression::None,
        };
        StageFile { path: path.into(), size, sha256, executable: false, object }
    };
    let with = |path: &str, size: u64| {
        let mut record = good.clone();
        record.files.push(file(path, size));
        record
    };
    // A gigabyte of zeros that claims to be a file of a hundred bytes.
    let mut encoder = zstd::Encoder::new(Vec::new(), 19).unwrap();
    (0..1024).for_each(|_| encoder.write_all(&[0; 1 << 20]).unwrap());
    let (sha256, size) = put(&encoder.finish().unwrap());
    let bomb = PackedObject { sha256, size, compression: ObjectCompression::Zstd };
    let mut bombs = good.clone();
    bombs.files[0].object = bomb;
    bombs.files[0].size = bombs.files[0].size.max(size + 1);
    let mut pointing = good.clone();
    pointing.value = json!({ "tar": { "path": "/etc/passwd", "size": 1, "sha256": "" },
                             "tool": "/etc/passwd", "more": {} });
    pointing.paths.clear();
    let mut other = good.clone();
    other.value = Value::String("no such value".to_owned());
    other.paths.clear();
    let mut lacking = good.clone();
    lacking.files.remove(0);
    let outside = team.dir.join("escaped");
    let up = format!("{}{outside}", "../".repeat(40).trim_end_matches('/'));
    let hostile = [
        ("above", with(&up, 5)),
        ("absolute", with(outside.as_str(), 5)),
        ("stamp", with("stage.json", 5)),
        ("huge", with("huge", 1 << 60)),
        ("another size", with("x", 6)),
        ("file as directory", with("rootfs.tar/x", 5)),
        ("bomb", bombs),
        ("pointing", pointing),
        ("other", other),
        ("lacking", lacking),
        ("format", StageRecord { format: FORMAT + 1, ..good.clone() }),
        ("key", StageRecord { key: key("t"), ..good.clone() }),
        ("stage", StageRecord { stage: "api".to_owned(), ..good.clone() }),
    ];
    for (name, record) in hostile {
        fs::write(team.record("s"), record.sign(&signer).unwrap()).unwrap();
        let reader = team.reads("s");
        assert_eq!(
            (reader.origin.as_str(), reader.warnings()),
            ("Made", 1),
            "{name}: {}",
            reader.log
        );
        assert!(!outside.exists(), "{name}");
    }
    fs::write(team.record("s"), good.sign(&signer).unwrap()).unwrap();
    assert_eq!(team.reads("s").origin, "Shared");
}

#[test]
fn a_server_that_fails_costs_a_warning_and_no_build() {
    let mut team = Team::new();
    team.address = format!("http://127.0.0.1:{}", free_port());
    // Takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silence = format!("http://{}", silent.local_addr().unwrap());
    for address in [team.address.clone(), silence, "http://no-such-host.invalid".to_owned()] {
        team.address = address;
        let started = Instant::now();
        let lonely = team.builds(&hash_bytes(team.address.as_bytes()), true, "s");
        assert_eq!((lonely.origin.as_str(), lonely.warnings()), ("Made", 1), "{}", lonely.log);
        assert!(lonely.log.contains("continuing without the shared cache"), "{}", lonely.log);
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    }
    for answer in ["return 500;", "return 503;", "return 403;", "return 401;"] {
        let team = Team::web(answer);
        let lonely = team.builds("writer", true, "s");
        assert_eq!((lonely.origin.as_str(), lonely.warnings()), ("Made", 1), "{}", lonely.log);
    }
    // Reading continues where writing is refused.
    let team = Team::web(DAV);
    team.builds("writer", true, "s");
    let locked = Team::web("limit_except GET { deny all; }");
    for part in ["objects", "stages"] {
        fs::rename(team.dir.join("store").join(part), locked.dir.join("store").join(part)).unwrap();
    }
    fs::create_dir_all(locked.dir.join("keys")).unwrap();
    for entry in fs::read_dir(team.dir.join("keys")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), locked.dir.join("keys").join(entry.file_name().to_str().unwrap()))
            .unwrap();
    }
    let both = locked.builds("both", true, "new");
    assert_eq!((both.origin.as_str(), both.warnings()), ("Made", 1), "{}", both.log);
    assert!(both.log.contains("no longer writing to the shared cache"), "{}", both.log);
    assert_eq!(locked.builds("both", true, "s").origin, "Shared");
}

#[test]
fn credentials_are_sent_and_never_shown() {
    let check = "if ($http_authorization != \"Bearer letmein\") { return 401; }";
    let team = Team::web(&format!("{check} {DAV}"));
    let with = |mut command: Command| {
        command.env("SLIPWAY_SHARED_CACHE_AUTHORIZATION", "Bearer letmein");
        build_outcome(command.output().unwrap())
    };
    let writer = with(team.machine("writer", true, &task("s")));
    assert_eq!((writer.origin.as_str(), writer.warnings()), ("Made", 0), "{}", writer.log);
    let reader = with(team.machine("reader", false, &task("s")));
    assert_eq!(reader.origin, "Shared", "{}", reader.log);
    let nobody = team.reads("s");
    assert_eq!((nobody.origin.as_str(), nobody.warnings()), ("Made", 1), "{}", nobody.log);
    assert!(nobody.log.contains("SLIPWAY_SHARED_CACHE_AUTHORIZATION"), "{}", nobody.log);
    // Not even to a server that fails, and not in clear over a network.
    let failing = Team::web("return 500;");
    let failed = with(failing.machine("writer", true, &task("s")));
    for printed in [&writer, &reader, &nobody, &failed] {
        assert!(!printed.log.contains("letmein"), "{}", printed.log);
    }
    let mut far = Team::new();
    far.address = "http://cache.example.org".to_owned();
    let mut command = far.machine("far", false, &task("s"));
    let output = command.env("SLIPWAY_SHARED_CACHE_AUTHORIZATION", "Bearer letmein").output();
    let output = output.unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && errors.contains("help: use https"), "{errors}");
}

#[test]
fn writers_and_readers_may_be_killed_and_may_meet() {
    for team in [Team::web(DAV), Team::new()] {
        let started = Instant::now();
        team.builds("first", true, "whole");
        let whole = started.elapsed();
        for kill in 1..=KILLS {
            let seed = format!("killed-{kill}");
            let mut child = team.machine("killed", true, &task(&seed)).spawn().unwrap();
            std::thread::sleep(whole.mul_f64(f64::from(kill) / f64::from(KILLS + 1)));
            child.kill().unwrap();
            child.wait().unwrap();
            // Whether its record is there or not: what is read is whole.
            let reader = team.reads(&seed);
            assert_eq!(reader.warnings(), 0, "{}", reader.log);
            assert_eq!(reader.origin == "Shared", team.record(&seed).exists(), "{}", reader.log);
            // The same machine resumes.
            assert_eq!(team.builds("killed", true, &seed).warnings(), 0);
            assert_eq!(team.reads(&seed).origin, "Shared");
        }
        let pair = ["one", "two"]
            .map(|name| team.machine(name, true, &task("both")).spawn().unwrap())
            .map(|child| build_outcome(child.wait_with_output().unwrap()));
        for writer in pair {
            assert_eq!(writer.warnings(), 0, "{}", writer.log);
        }
        assert_eq!(team.reads("both").origin, "Shared");
        // A reader that is killed leaves nothing that it takes for a stage.
        for kill in 1..=KILLS {
            let mut child = team.machine("hasty", false, &task(&format!("killed-{kill}"))).spawn();
            std::thread::sleep(whole.mul_f64(f64::from(kill) / f64::from(2 * KILLS)));
            child.as_mut().unwrap().kill().unwrap();
            child.unwrap().wait().unwrap();
            let again = team.builds("hasty", false, &format!("killed-{kill}"));
            assert!(["Shared", "Kept"].contains(&again.origin.as_str()), "{}", again.log);
            assert_eq!(again.warnings(), 0, "{}", again.log);
        }
    }
}

#[test]
fn downloads_come_from_there_before_the_mirror_and_without_it() {
    let mirror = Team::web("");
    let (team, bytes) = (Team::web(DAV), noise(3 << 20, "a package"));
    fs::write(mirror.dir.join("store/x.deb"), &bytes).unwrap();
    let sha256 = hash_bytes(&bytes);
    let fetches = |name: &str, writes: bool, offline: bool, mirror: &str| {
        let download = Some((format!("{mirror}/x.deb"), sha256.clone()));
        let output = team.machine(name, writes, &Task { download, offline, ..task("") }).output();
        output.unwrap()
    };
    let good = |output: Output| build_outcome(output).log;
    let log = good(fetches("writer", true, false, &mirror.address));
    assert!(log.contains("packages stored: 3.0 MiB in 1 objects"), "{log}");
    let asked = || fs::read_to_string(mirror.dir.join("access.log")).unwrap().lines().count();
    let before = asked();
    good(fetches("reader", false, false, &mirror.address));
    assert_eq!(asked(), before, "the mirror was asked");
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    good(fetches("without-mirror", false, false, &nowhere));
    // Neither is asked offline.
    let output = fetches("offline", false, true, &mirror.address);
    assert!(!output.status.success());
    // Damaged there: the mirror's is taken, and a writer puts it right.
    let object = team.dir.join("store").join(object_path(&sha256));
    fs::write(&object, &bytes[1..]).unwrap();
    let log = good(fetches("wary", false, false, &mirror.address));
    assert!(log.contains("is damaged"), "{log}");
    good(fetches("wary-writer", true, false, &mirror.address));
    assert_eq!(fs::read(&object).unwrap(), bytes);
    // An offline build asks for no stage either.
    team.builds("writer", true, "s");
    let alone = team.machine("alone", true, &Task { offline: true, ..task("s") }).output().unwrap();
    let alone = build_outcome(alone);
    assert_eq!((alone.origin.as_str(), alone.warnings()), ("Made", 0), "{}", alone.log);
    assert!(alone.log.contains("is not used because of --offline"), "{}", alone.log);
}
