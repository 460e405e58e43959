//! From results to a release, builds that differ, and what a commit affects. The results are small, and
//! made by the same code as real ones.

use crate::common::{find, good, partition};
use crate::disk::mke2fs;

use std::fs;
use std::process::Command;

use bundle::{BuildKind, CompressionLevel, Version};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use uuid::Uuid;
use xtask::artifact::Artifact;
use xtask::disk::{DiskRequest, Filesystem};
use xtask::disk::{
    DiskSpec, FatFile, FileSource, PartitionContent, PartitionSpec, TableKind, assemble,
    lay_out_disk, sum_image,
};
use xtask::ext4::{self, Ext4Request};
use xtask::release::check::compare_builds;
use xtask::update::{ComponentRequest, PackRequest, PayloadRequest, pack_bundle};

use super::support::Bench;

const MIB: u64 = 1 << 20;

/// A root filesystem with a file that says when it was made.
fn filesystem(dir: &Utf8Path, stamp: &str) -> Utf8PathBuf {
    let (tar, out) = (dir.join("root.tar"), dir.join("root.ext4"));
    let mut builder = tar::Builder::new(fs::File::create(&tar).unwrap());
    let mut add = |name: &str, kind, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    };
    add("./etc/", tar::EntryType::Directory, b"");
    add("./etc/os-release", tar::EntryType::Regular, b"PRETTY_NAME=\"Shop\"\n");
    add("./etc/built", tar::EntryType::Regular, format!("built at {stamp}\n").as_bytes());
    builder.finish().unwrap();
    let request = Ext4Request {
        tar: Some(&tar),
        size: 16 * MIB,
        label: "root",
        uuid: Uuid::from_u128(7),
        hash_seed: Uuid::from_u128(8),
        epoch: 1_700_000_000,
        journal: false,
        grows_to: None,
        size_key: "partitions.root.size",
    };
    ext4::make_image(&mke2fs(), &request, &out).unwrap();
    out
}

/// What `build-image` leaves for a board: image, block map, bundle, bill of materials, report, plan.
pub fn results(bench: &Bench, dir: &Utf8Path, version: &str, stamp: &str, commit: &str) {
    fs::create_dir_all(dir).unwrap();
    let root = filesystem(&bench.dir, stamp);
    let layout = lay_out_disk(&DiskRequest {
        table: TableKind::Gpt,
        size: 64 * MIB,
        first_partition: 4 * MIB,
        alignment: MIB,
        states: vec![MIB, 2 * MIB],
        trust: Vec::new(),
        partitions: vec![
            partition("boot", 8, Filesystem::Vfat),
            partition("root-a", 16, Filesystem::Ext4),
            partition("root-b", 16, Filesystem::Ext4),
        ],
    });
    let config =
        FatFile { path: "config.txt".to_owned(), source: FileSource::Bytes(b"x=1\n".to_vec()) };
    let boot = PartitionContent::Fat {
        label: "boot".to_owned(),
        volume_id: 1,
        placed: true,
        files: vec![config],
    };
    let slot = || PartitionContent::Image(sum_image(&root).unwrap());
    let contents = [boot, slot(), slot()].into_iter().zip(1u128..);
    let spec = DiskSpec {
        layout: layout.unwrap(),
        disk_guid: Uuid::from_u128(1),
        mbr_signature: 2,
        epoch: 1_700_000_000,
        states: vec![b"seq=1".to_vec()],
        partitions: contents
            .map(|(content, n)| PartitionSpec {
                guid: Uuid::from_u128(n << 64),
                content,
                size_key: "a size".to_owned(),
            })
            .collect(),
    };
    let stem = dir.join(format!("shop-{version}-sample"));
    assemble(&spec, &Utf8PathBuf::from(format!("{stem}.img"))).unwrap();
    let signers = [xtask::keys::KeyDirectory::open(&bench.dir.join("keys"))
        .unwrap()
        .signer(BuildKind::Development)
        .unwrap()];
    let version = Version::parse(version).unwrap();
    let payloads = vec![PayloadRequest { role: "root".to_owned(), path: root }];
    let request = PackRequest {
        product: "shop".to_owned(),
        version: version.clone(),
        kind: BuildKind::Development,
        boards: vec!["sample".to_owned()],
        minimum_version: Version::parse("0.1.0").unwrap(),
        key_epoch: None,
        epoch: 1_700_000_000,
        components: vec![ComponentRequest {
            name: "system".to_owned(),
            version: version.clone(),
            payloads,
        }],
        level: CompressionLevel::Fast,
        workers: None,
        signers: &signers,
    };
    let packed = pack_bundle(&request, &Utf8PathBuf::from(format!("{stem}.bundle"))).unwrap();
    let write = |name: &str, value: Value| {
        fs::write(dir.join(name), serde_json::to_string_pretty(&value).unwrap()).unwrap();
    };
    let package = json!({ "name": "lib|c", "version": version.to_string() });
    write("sbom.cdx.json", json!({ "bomFormat": "CycloneDX", "components": [package] }));
    write("plan.json", json!({ "modified": false }));
    let bundle = packed.artifact;
    let text = fs::read_to_string(
        Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/report/realistic.json"),
    );
    let mut report: Value = serde_json::from_str(&text.unwrap()).unwrap();
    report["product"] = json!({
        "name": "shop", "title": "Shop", "version": version.to_string(), "kind": "development",
    });
    report["board"] = json!("sample");
    report["commit"] = json!(commit);
    report["outputs"] = json!([{
        "name": "bundle", "path": bundle.path, "size": bundle.size, "on-disk-size": bundle.size,
        "sha256": bundle.sha256,
    }]);
    let digest =
        Artifact::from_file(request.components[0].payloads[0].path.clone()).unwrap().sha256;
    report["components"] =
        json!([{ "name": "system", "version": version.to_string(), "digest": digest }]);
    write("report.json", report);
}

/// The fixture's workspace, as a repository with one commit.
pub fn workspace(bench: &Bench) -> String {
    let fixture = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixture/.");
    let copy = Command::new("cp").args(["-r", fixture.as_str(), bench.dir.as_str()]).output();
    good(copy.unwrap());
    // As the results here say of themselves: what a release is made of must be of the product's kind.
    let product = bench.dir.join("configs/shop.toml");
    let text = fs::read_to_string(&product).unwrap();
    assert!(text.contains("kind = \"release\""));
    fs::write(&product, text.replace("kind = \"release\"", "kind = \"development\"")).unwrap();
    fs::write(bench.dir.join(".gitignore"), "*\n!/board/**\n!/configs/**\n!/overlays/**\n")
        .unwrap();
    git(bench, &["init", "--quiet"]);
    commit(bench, "The first")
}

fn git(bench: &Bench, words: &[&str]) -> String {
    let mut git = Command::new(find("git"));
    let who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"];
    git.args(["-C", bench.dir.as_str()]).args(who).args(words);
    good(git.output().unwrap()).trim().to_owned()
}

fn commit(bench: &Bench, subject: &str) -> String {
    git(bench, &["add", "--all", "--force", "board", "configs", "overlays"]);
    git(bench, &["commit", "--quiet", "--allow-empty", "-m", subject]);
    git(bench, &["rev-parse", "HEAD"])
}

#[test]
fn a_release_is_made_of_verified_results_and_says_what_changed() {
    let bench = Bench::new();
    let first = workspace(&bench);
    let dist = bench.dir.join("dist/shop/sample");
    let create = ["release", "create", "--channel", "nightly", "--product", "shop"];
    let message = bench.refused(&create);
    assert!(message.contains("help: cargo xtask build-image --product shop"), "{message}");
    results(&bench, &dist, "1.0.0", "noon", &first);
    // A package from a source directory of one machine cannot be built on another one.
    let plan = fs::read_to_string(dist.join("plan.json")).unwrap();
    let overrides = json!([{ "package": "linux", "name": "linux", "modified": false }]);
    let custom =
        json!({ "modified": false, "rootfs": { "buildroot": { "overrides": overrides } } });
    fs::write(dist.join("plan.json"), custom.to_string()).unwrap();
    for allow in [&[][..], &["--allow-changes"]] {
        let message = bench.refused(&[&create[..], allow].concat());
        assert!(message.contains("instead of releases: linux\nhelp: "), "{message}");
    }
    fs::write(dist.join("plan.json"), plan).unwrap();
    let printed = bench.good(&create);
    assert!(printed.contains("shop 1.0.0 for sample: made"), "{printed}");
    assert!(bench.good(&create).contains("is there already"));
    // Another content under the same version is refused.
    results(&bench, &dist, "1.0.0", "later", &first);
    let message = bench.refused(&create);
    assert!(message.contains("with other content") && message.contains("--nightly"), "{message}");
    let second = commit(&bench, "A [better] thing");
    results(&bench, &dist, "1.0.1", "evening", &second);
    bench.good(&create);
    let notes = bench.good(&["release", "show", "latest", "--notes", "--product", "shop"]);
    for line in [
        "What changed since 1.0.0:",
        &format!("- A \\[better\\] thing ({})", &second[..12]),
        "| sample | system | 1.0.0 (",
        "- lib\\|c 1.0.0 → 1.0.1",
    ] {
        assert!(notes.contains(line), "no `{line}` in {notes}");
    }
    let diff = ["release", "diff", "1.0.0", "1.0.1", "--product", "shop", "--files"];
    let printed = bench.good(&diff);
    assert!(printed.contains("~ /etc/built  content"), "{printed}");
    assert!(printed.contains("files: 0 added, 0 removed, 1 changed"), "{printed}");
    // One flipped bit in the first MiB of a slot, of which every block is mapped.
    let image = dist.join("shop-1.0.1-sample.img");
    let mut bytes = fs::read(&image).unwrap();
    bytes[(12 << 20) + 5000] ^= 1;
    fs::write(&image, bytes).unwrap();
    let message = bench.refused(&create);
    assert!(message.contains("verifying the results of shop for sample"), "{message}");
}

#[test]
fn a_time_in_a_file_is_found_in_that_file() {
    let bench = Bench::new();
    workspace(&bench);
    let [one, same, other] = ["dist/shop/sample", "same", "other"].map(|name| bench.dir.join(name));
    results(&bench, &one, "1.0.0", "12:00:00", "c");
    results(&bench, &same, "1.0.0", "12:00:00", "c");
    results(&bench, &other, "1.0.0", "12:00:07", "c");
    // The remains of an earlier version are not outputs of this build.
    fs::write(one.join("shop-0.9.0-sample.img"), "old").unwrap();
    assert!(compare_builds(&one, &same).unwrap().equal);
    let against = ["release", "check", "--product", "shop", "--board", "sample", "--against"];
    let printed = bench.good(&[&against[..], &[same.as_str()]].concat());
    assert_eq!(printed.matches(" equal ").count(), 4, "{printed}");
    let output = bench.xtask(&[&against[..], &[other.as_str()]].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let printed = String::from_utf8(output.stdout).unwrap();
    let found = "root-a /etc/built: content, +0 B; differs from byte 16: \"0\\n\" and \"7\\n\"";
    assert!(printed.contains(found), "{printed}");
    assert!(printed.contains("root-b : differs as root-a does"), "{printed}");
    assert!(printed.contains("system/root : different content: see the image"), "{printed}");
    assert!(!printed.contains("config.txt"), "{printed}");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("3 of 4 outputs differ"), "{error}");
}

#[test]
fn a_commit_affects_what_is_made_of_its_files_and_nothing_else() {
    let bench = Bench::new();
    let first = workspace(&bench);
    let since = |revision: &str| -> Value {
        let words = ["plan", "--changed-since", revision, "--format", "json"];
        serde_json::from_str(&bench.good(&words)).unwrap()
    };
    let names = |builds: &Value| -> Vec<String> {
        let components = builds[0]["components"].as_array().cloned().unwrap_or_default();
        components.iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
    };
    let all: Value =
        serde_json::from_str(&bench.good(&["plan", "--all", "--format", "json"])).unwrap();
    assert_eq!(all[0]["product"], "shop");
    assert_eq!(all[0]["board"], "sample");
    assert_eq!(since(&first), json!([]), "nothing changed");
    fs::write(bench.dir.join("README.md"), "words").unwrap();
    assert_eq!(since(&first), json!([]), "a text that no build reads");
    let overlay = bench.dir.join("overlays/plain/etc/hostname.j2");
    let text = fs::read_to_string(&overlay).unwrap();
    fs::write(&overlay, format!("{text}# more\n")).unwrap();
    let found = since(&first);
    assert_eq!(names(&found), ["system", "card"], "{found}");
    let reasons = &found[0]["components"][0]["reasons"];
    assert_eq!(*reasons, json!(["overlays/plain/etc/hostname.j2"]));
    assert_eq!(found[0]["components"][1]["reasons"], json!(["component system"]));
    // A removed file is a change, like a new one.
    fs::write(&overlay, text).unwrap();
    fs::write(bench.dir.join("overlays/plain/etc/more"), "x").unwrap();
    let second = commit(&bench, "One more");
    fs::remove_file(bench.dir.join("overlays/plain/etc/more")).unwrap();
    assert_eq!(names(&since(&second)), ["system", "card"]);
    // A setting of the product, by its meaning; a comment beside it is not a change.
    let product = bench.dir.join("configs/shop.toml");
    let text = fs::read_to_string(&product).unwrap();
    fs::write(&product, format!("# A comment.\n{text}")).unwrap();
    git(&bench, &["checkout", "--quiet", "--", "overlays"]);
    assert_eq!(since(&second), json!([]));
    let version = text.lines().find(|l| l.starts_with("version")).unwrap();
    fs::write(&product, text.replace(version, "version = \"7.7.7\"")).unwrap();
    let found = since(&second);
    assert_eq!(names(&found), ["system", "card"], "{found}");
    let reasons = found[0]["components"][0]["reasons"].to_string();
    assert!(reasons.contains("configs/shop.toml: product"), "{reasons}");
    let message = bench.refused(&["plan", "--changed-since", "no-such-commit"]);
    assert!(message.contains("no-such-commit") && message.contains("fetch-depth"), "{message}");
}
