//! Source directories instead of releases, built by the real Buildroot: a package for the host
//! with two files and a Makefile, which needs no toolchain and no download.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use camino::{Utf8Path, Utf8PathBuf};
use xtask::cmd::plan::describe_plan;
use xtask::config::product::BuildKind;
use xtask::exec::Tool;
use xtask::plan::fragment::merge_fragments;
use xtask::plan::{self, BuildrootPlan, CheckoutFacts, OverridePlan, Plan};
use xtask::rootfs::buildroot::engine::{self, BuildrootRequest};
use xtask::rootfs::buildroot::info::BuildrootInfo;
use xtask::rootfs::buildroot::make::{BuildrootSetup, BuildrootSite};
use xtask::rootfs::buildroot::overrides::{self, LOCAL_FILE, SourceOverride, apply_overrides};
use xtask::rootfs::buildroot::rebuild::{
    OutputState, OverrideState, RebuildAction, compare_states,
};
use xtask::rootfs::buildroot::tree::BuildrootTree;

use super::workspace::root;
use super::{setup, tree};

/// Two parts, each made of one file; `built` counts how often each was made.
const MAKEFILE: &str = "include config.mk\n.NOTPARALLEL:\n\
    all: one two\n\
    %: %.txt\n\tcat $< > $@\n\techo $@ >> built\n\
    install:\n\tmkdir -p $(PREFIX)/bin\n\tcat one two > $(PREFIX)/bin/parts\n";
const CONFIGURE: &str = "#!/bin/sh\n\
    for word; do case $word in --prefix=*) echo \"PREFIX = ${word#--prefix=}\";; esac; done \
    > config.mk\n";

fn folder(dir: &tempfile::TempDir) -> Utf8PathBuf {
    let path = Utf8PathBuf::try_from(dir.path().to_owned()).expect("UTF-8");
    path.canonicalize_utf8().expect("a directory")
}

/// The robot's plan, which is a release product's or not.
fn robot(kind: BuildKind) -> Plan {
    let config = xtask::config::load(&root(), Some("robot"), Some("qemu-arm64")).expect("loaded");
    let facts = CheckoutFacts { commit: None, modified: false, epoch: 0 };
    let mut plan = plan::resolve(&config, &facts).expect("a plan");
    plan.product.kind = kind;
    plan
}

/// A workspace with a source directory that its settings name.
struct Workspace {
    _dir: tempfile::TempDir,
    root: Utf8PathBuf,
    cache: Utf8PathBuf,
}

impl Workspace {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, cache) = (folder(&dir).join("work"), folder(&dir).join("cache"));
        let workspace = Self { _dir: dir, root, cache };
        for (name, text) in [
            ("parts/configure", CONFIGURE),
            ("parts/Makefile", MAKEFILE),
            ("parts/one.txt", "first\n"),
            ("parts/two.txt", "second\n"),
            (LOCAL_FILE, "[buildroot.override]\npatchelf = \"parts\"\n"),
        ] {
            workspace.write(name, text);
        }
        Tool::new("chmod").arg("+x").arg(workspace.root.join("parts/configure")).run().expect("x");
        workspace
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.root.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, text).expect("written");
    }

    fn apply(&self, asked: &[SourceOverride]) -> anyhow::Result<Plan> {
        let mut plan = robot(BuildKind::Release);
        apply_overrides(&mut plan, &self.root, || Ok(self.cache.clone()), asked)?;
        Ok(plan)
    }

    fn error(&self, asked: &str) -> String {
        let asked: SourceOverride = asked.parse().expect("a package and a directory");
        format!("{:#}", self.apply(&[asked]).expect_err("refused"))
    }
}

/// One build of the real package: what is built again, and what is then installed.
struct Build {
    setup: BuildrootSetup,
    tree: BuildrootTree,
    /// Whether the package has a source directory, and what Buildroot said for it.
    known: Option<(bool, (BuildrootInfo, String))>,
}

impl Build {
    fn run(&mut self, workspace: &Workspace) -> (RebuildAction, BuildrootInfo) {
        let pinned = workspace.apply(&[]).expect("applied").rootfs.buildroot.expect("a pin");
        self.setup.overrides.clone_from(&pinned.overrides);
        let text = "BR2_aarch64=y\nBR2_PER_PACKAGE_DIRECTORIES=y\nBR2_PACKAGE_HOST_PATCHELF=y\n";
        let (defconfig, findings) = merge_fragments([(Utf8Path::new("a.fragment"), text)]);
        assert!(findings.is_empty(), "{findings:?}");
        let (plan, log) =
            (BuildrootPlan { defconfig, ..pinned }, self.setup.output.join("make.log"));
        let request = BuildrootRequest {
            plan: &plan,
            title: "a case",
            tree: &self.tree,
            setup: &self.setup,
            site: &BuildrootSite::default(),
            log: &log,
            yes: true,
        };
        // The content of a directory changes neither the configuration nor the list of packages.
        let named = !self.setup.overrides.is_empty();
        let (info, config) = match self.known.take() {
            Some((was_named, known)) if was_named == named => known,
            _ => engine::configure(&request).expect("configured"),
        };
        let new = OutputState::describe(&self.setup, &self.tree, &config, &info).expect("read");
        let action = match OutputState::load(&self.setup.output).expect("read") {
            Some(old) => compare_states(&old, &new, &info),
            None => RebuildAction::Nothing,
        };
        let images = self.setup.output.join("images");
        fs::create_dir_all(&images).expect("a directory");
        fs::write(images.join("stale"), "").expect("written");
        engine::prepare_output(&request, &new, &info).expect("prepared");
        // Nothing of before is in it, and it is there: a package that is finished installs into it.
        let is_kept = action == RebuildAction::Nothing;
        assert_eq!((images.is_dir(), images.join("stale").exists()), (true, is_kept));
        if named {
            self.setup.make().arg("host-patchelf").log(&log).run().expect("built");
        }
        self.known = Some((named, (info.clone(), config)));
        (action, info)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.setup.output.join(path)).expect(path)
    }

    fn installed(&self) -> String {
        self.read("per-package/host-patchelf/host/bin/parts")
    }

    fn made(&self) -> String {
        self.read("build/host-patchelf-custom/built").replace('\n', " ")
    }
}

/// The goals of an action, each with its reasons.
fn goals(action: RebuildAction) -> Vec<(String, String)> {
    match action {
        RebuildAction::Nothing => Vec::new(),
        RebuildAction::Everything(why) => vec![("everything".to_owned(), why)],
        RebuildAction::Targets(targets) => targets
            .into_iter()
            .map(|(goal, why)| (goal, why.into_iter().collect::<Vec<_>>().join("; ")))
            .collect(),
    }
}

#[test]
fn a_source_directory_is_built_and_what_changes_in_it_is_built_again() {
    let Some(tree) = tree("a_source_directory_is_built_and_what_changes_in_it_is_built_again")
    else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let mut workspace = Workspace::new();
    let setup = setup(&tree, &output);
    workspace.cache = folder(&output);
    let tree = BuildrootTree {
        path: tree,
        commit: "a commit".into(),
        changes: String::new(),
        changed: BTreeMap::new(),
    };
    let mut build = Build { setup, tree, known: None };
    let parts = workspace.root.join("parts");

    let (_, info) = build.run(&workspace);
    assert_eq!(build.installed(), "first\nsecond\n");
    // Nothing is downloaded for it, and its version is not the release's.
    let entry = &info.0["host-patchelf"];
    assert!(entry.downloads.is_empty() && entry.cpe.is_none(), "{entry:#?}");
    assert!(entry.custom.as_ref().is_some_and(|v| v.starts_with("custom (parts with content ")));
    assert!(info.missing(Utf8Path::new("/none")).iter().all(|(name, ..)| *name != "host-patchelf"));

    // A file has another time and the same content.
    workspace.write("parts/configure", CONFIGURE);
    assert_eq!(build.run(&workspace).0, RebuildAction::Nothing);
    assert_eq!(build.made(), "one two ");

    // A changed file and a new one: make continues, and makes only what depends on them.
    workspace.write("parts/two.txt", "changed\n");
    workspace.write("parts/deep/new.txt", "new\n");
    let why = format!("files in {parts} changed");
    let again = goals(build.run(&workspace).0);
    assert_eq!(again, [("host-patchelf-reconfigure".to_owned(), why.clone())]);
    assert_eq!(build.installed(), "first\nchanged\n");
    assert_eq!(build.made(), "one two two ");
    assert!(build.setup.output.join("build/host-patchelf-custom/deep/new.txt").is_file());

    // A file that is older than what was made of its former content: Buildroot would not copy it.
    workspace.write("parts/two.txt", "restored\n");
    let past = SystemTime::now() - Duration::from_secs(86_400);
    File::options()
        .append(true)
        .open(parts.join("two.txt"))
        .and_then(|file| file.set_modified(past))
        .expect("an old file");
    let again = goals(build.run(&workspace).0);
    assert_eq!(again, [("host-patchelf-dirclean".to_owned(), why.clone())]);
    assert_eq!(build.installed(), "first\nrestored\n");

    // A removed file must not remain in the build directory.
    fs::remove_dir_all(parts.join("deep")).expect("removed");
    let again = goals(build.run(&workspace).0);
    assert_eq!(again, [("host-patchelf-dirclean".to_owned(), why)]);
    assert!(!build.setup.output.join("build/host-patchelf-custom/deep").exists());

    // A change while it is built is not lost.
    overrides::require_unchanged(&build.setup).expect("as it was");
    workspace.write("parts/one.txt", "late\n");
    let error = overrides::require_unchanged(&build.setup).expect_err("changed").to_string();
    assert!(error.contains(parts.as_str()) && error.contains("\nhelp: "), "{error}");

    // The release again.
    fs::remove_file(workspace.root.join(LOCAL_FILE)).expect("removed");
    let (action, info) = build.run(&workspace);
    let released = "its source is the release again".to_owned();
    assert_eq!(goals(action), [("host-patchelf-dirclean".to_owned(), released)]);
    assert_eq!(info.0["host-patchelf"].version, "0.13");
    assert!(!build.setup.output.join("local.mk").exists());
}

#[test]
fn a_name_that_buildroot_does_not_have_is_refused() {
    let Some(tree) = tree("a_name_that_buildroot_does_not_have_is_refused") else { return };
    let output = tempfile::tempdir().expect("a directory");
    let (workspace, mut setup) = (Workspace::new(), setup(&tree, &output));
    assert!(super::losses(&setup, "BR2_PACKAGE_HOST_PATCHELF=y").is_empty());
    let info = BuildrootInfo::read(&setup, &BuildrootSite::default()).expect("packages");
    let mut check = |package: &str| {
        let asked =
            SourceOverride { package: package.to_owned(), directory: workspace.root.join("parts") };
        let plan = workspace.apply(&[asked]).expect("applied");
        setup.overrides = plan.rootfs.buildroot.expect("a pin").overrides;
        overrides::require_known(&info, &setup)
    };
    check("patchelf").expect("it is built");
    // They exist, and another board may build them.
    for package in ["linux", "uboot", "zlib", "xapp_xclock", "slipway-base"] {
        check(package).expect(package);
    }
    let error = check("patchelff").expect_err("unknown").to_string();
    assert!(error.contains("no package patchelff") && error.contains("mean patchelf?"), "{error}");
}

#[test]
fn a_kernel_of_a_source_directory_leaves_the_headers_of_the_c_library() {
    let Some(tree) = tree("a_kernel_of_a_source_directory_leaves_the_headers_of_the_c_library")
    else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let (workspace, mut setup) = (Workspace::new(), setup(&tree, &output));
    fs::remove_file(workspace.root.join(LOCAL_FILE)).expect("removed");
    let lost = super::losses(
        &setup,
        "BR2_LINUX_KERNEL=y\nBR2_LINUX_KERNEL_USE_ARCH_DEFAULT_CONFIG=y\n\
         BR2_KERNEL_HEADERS_AS_KERNEL=y",
    );
    assert!(lost.is_empty(), "{lost:#?}");
    let mut read = |packages: &[&str]| {
        let directory = workspace.root.join("parts");
        let asked: Vec<SourceOverride> = packages
            .iter()
            .map(|name| SourceOverride { package: (*name).into(), directory: directory.clone() })
            .collect();
        let plan = workspace.apply(&asked).expect("applied");
        setup.overrides = plan.rootfs.buildroot.expect("a pin").overrides;
        overrides::write_local_mk(&setup).expect("written");
        let info = BuildrootInfo::read(&setup, &BuildrootSite::default()).expect("packages");
        engine::require_hashes(&info, &tree).expect("a hash for each download");
        let dir = |name: &str| info.0[name].stamp_dir.clone();
        assert_eq!(dir("linux"), "build/linux-custom");
        assert!(info.0["linux"].downloads.is_empty());
        (dir("linux-headers"), info.0["linux-headers"].downloads.len())
    };
    let (dir, downloads) = read(&["linux"]);
    assert!(dir.starts_with("build/linux-headers-6.") && downloads == 1, "{dir}, {downloads}");
    // Both, where that is wanted.
    assert_eq!(read(&["linux", "linux-headers"]), ("build/linux-headers-custom".to_owned(), 0));
}

#[test]
fn a_build_from_source_directories_is_marked_and_is_no_release() {
    let workspace = Workspace::new();
    let mut plan = workspace.apply(&[]).expect("applied");
    assert_eq!(plan.product.kind, BuildKind::Development);
    let directory = workspace.root.join("parts");
    let shown = describe_plan(&plan);
    assert!(shown.contains("override   patchelf custom (parts with content "), "{shown}");
    assert!(shown.contains(directory.as_str()) && shown.contains("(development)"), "{shown}");
    // The path of this machine reaches no result.
    let json = serde_json::to_value(&plan).expect("JSON");
    let listed = &json["rootfs"]["buildroot"]["overrides"][0];
    assert_eq!(listed["package"], "patchelf");
    assert!(!json.to_string().contains(directory.as_str()));

    // As `git` has it.
    let git = |args: &[&str]| {
        let ids = ["-c", "user.name=a", "-c", "user.email=a@example.org"];
        Tool::new("git").args(ids).args(args).current_dir(&directory).read().expect("git")
    };
    git(&["init", "--quiet"]);
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "a"]);
    let commit = git(&["rev-parse", "HEAD"]);
    let version =
        |plan: &Plan| plan.rootfs.buildroot.as_ref().expect("a pin").overrides[0].version();
    let before = plan.rootfs.buildroot.as_ref().expect("a pin").overrides[0].content.clone();
    plan = workspace.apply(&[]).expect("applied");
    assert_eq!(version(&plan), format!("custom (parts at {})", &commit[..12]));
    // Buildroot does not copy `.git`.
    assert_eq!(plan.rootfs.buildroot.as_ref().expect("a pin").overrides[0].content, before);
    workspace.write("parts/one.txt", "changed");
    plan = workspace.apply(&[]).expect("applied");
    let start = format!("custom (parts at {}, modified to ", &commit[..12]);
    assert!(version(&plan).starts_with(&start), "{}", version(&plan));

    // Without any, the product is what it was.
    fs::remove_file(workspace.root.join(LOCAL_FILE)).expect("removed");
    let plan = workspace.apply(&[]).expect("applied");
    assert_eq!(plan.product.kind, BuildKind::Release);
    let json = serde_json::to_value(&plan).expect("JSON");
    assert!(json["rootfs"]["buildroot"].get("overrides").is_none());
}

#[test]
fn the_wheels_are_compared_with_the_python_of_a_source_directory() {
    let workspace = Workspace::new();
    workspace.write("parts/Include/patchlevel.h", "#define PY_VERSION      \t\"3.13.1+\"\n");
    let asked: SourceOverride =
        format!("python3={}/parts", workspace.root).parse().expect("a package and a directory");
    let plan = workspace.apply(&[asked]).expect("applied").rootfs.buildroot.expect("a pin");
    let python = plan.overrides.iter().find(|source| source.package == "python3").expect("one");
    let entry = |kind: &str, name: &str| {
        format!(
            r#""{name}": {{ "type": "{kind}", "stamp_dir": "build/{name}-custom",
            "version": "3.12.13", "cpe-id": "cpe:2.3:a:python:python:custom:*:*:*:*:*:*:*",
            "downloads": [{{ "source": "Python-3.12.13.tar.xz", "uris": [] }}] }}"#
        )
    };
    let entries = [entry("target", "python3"), entry("host", "host-python3"), entry("target", "a")];
    let text = format!("{{ {} }}", entries.join(", "));
    let mut info = BuildrootInfo::parse(&text).expect("a list of packages");
    info.mark_custom(python);
    for name in ["python3", "host-python3"] {
        let found = &info.0[name];
        assert_eq!(found.version, "3.13.1+", "{name}");
        assert_eq!(found.custom, Some(python.version()));
        assert!(found.downloads.is_empty() && found.cpe.is_none(), "{found:#?}");
    }
    assert_eq!(info.missing(Utf8Path::new("/none")).len(), 1, "another package's own");
}

#[test]
fn source_directories_that_cannot_be_used_are_refused() {
    let workspace = Workspace::new();
    let error = workspace.error("linux=/nonexistent/linux");
    assert!(error.contains("source directory of linux, /nonexistent/linux"), "{error}");
    assert!(error.contains("\nhelp: "), "{error}");
    let error = workspace.error(&format!("linux={}/parts/Makefile", workspace.root));
    assert!(error.contains("is not a directory"), "{error}");
    workspace.write("a b/x", "");
    let error = workspace.error(&format!("linux={}/a b", workspace.root));
    assert!(error.contains("it contains ' '"), "{error}");
    // The results of builds are in the checkout and in the cache, also before the first build.
    let above = workspace.root.parent().expect("a directory");
    assert!(!workspace.cache.exists());
    for dir in [workspace.root.as_str(), above.as_str()] {
        let error = workspace.error(&format!("linux={dir}"));
        assert!(error.contains("contains build output or is inside of it"), "{error}");
    }
    let output = workspace.cache.join("buildroot/output/robot/build/linux-custom");
    fs::create_dir_all(&output).expect("a directory");
    for dir in [output.as_str(), workspace.cache.as_str()] {
        let error = workspace.error(&format!("linux={dir}"));
        assert!(error.contains("contains build output or is inside of it"), "{error}");
    }
    assert!("linux".parse::<SourceOverride>().is_err() && "=x".parse::<SourceOverride>().is_err());

    workspace.write(LOCAL_FILE, "[buildroot.overide]\nlinux = \"x\"\n");
    let error = format!("{:#}", workspace.apply(&[]).expect_err("a mistake"));
    assert!(error.contains(&format!("{LOCAL_FILE}:1")) && error.contains("`override`"), "{error}");

    workspace.write(LOCAL_FILE, "[buildroot.override]\nlinux = \"\"\n");
    let error = format!("{:#}", workspace.apply(&[]).expect_err("no directory"));
    assert!(error.contains("no directory is named for linux\nhelp: "), "{error}");

    // An option counts more than the settings.
    workspace
        .write(LOCAL_FILE, "[buildroot.override]\npatchelf = \"../none\"\nlinux = \"parts\"\n");
    let asked =
        SourceOverride { package: "patchelf".to_owned(), directory: workspace.root.join("parts") };
    let plan = workspace.apply(&[asked]).expect("applied");
    let named: BTreeMap<String, String> = plan
        .rootfs
        .buildroot
        .expect("a pin")
        .overrides
        .into_iter()
        .map(|source| (source.package, source.name))
        .collect();
    assert_eq!(
        named.into_iter().collect::<Vec<_>>(),
        [("linux".to_owned(), "parts".to_owned()), ("patchelf".to_owned(), "parts".to_owned())]
    );
}

#[test]
fn a_local_mk_of_another_author_is_kept() {
    let output = tempfile::tempdir().expect("a directory");
    let workspace = Workspace::new();
    let tree = Utf8Path::new("/nonexistent");
    let mut setup =
        BuildrootSetup::new(&folder(&output), tree, &workspace.root, "out").expect("set");
    fs::create_dir_all(&setup.output).expect("a directory");
    let path = setup.output.join("local.mk");
    fs::write(&path, "LINUX_OVERRIDE_SRCDIR = /src\n").expect("written");
    let error = overrides::write_local_mk(&setup).expect_err("by hand").to_string();
    assert!(error.contains(path.as_str()) && error.contains(LOCAL_FILE), "{error}");
    assert_eq!(fs::read_to_string(&path).expect("kept"), "LINUX_OVERRIDE_SRCDIR = /src\n");
    fs::remove_file(&path).expect("removed");
    let asked = SourceOverride {
        package: "arm-trusted-firmware".to_owned(),
        directory: workspace.root.join("parts"),
    };
    let plan = workspace.apply(&[asked]);
    setup.overrides = plan.expect("applied").rootfs.buildroot.expect("a pin").overrides;
    overrides::write_local_mk(&setup).expect("written");
    let text = fs::read_to_string(&path).expect("a file");
    let line = format!("ARM_TRUSTED_FIRMWARE_OVERRIDE_SRCDIR = {}/parts\n", workspace.root);
    assert!(text.contains(&line), "{text}");
}

#[test]
fn what_make_built_from_a_source_directory_is_not_kept_by_a_release() {
    let output = tempfile::tempdir().expect("a directory");
    let (a, b) = (Workspace::new(), Workspace::new());
    let sources = |workspace: &Workspace| {
        workspace.apply(&[]).expect("applied").rootfs.buildroot.expect("a pin").overrides
    };
    let (release, a, b) = (Vec::new(), sources(&a), sources(&b));
    let info = r#"{"host-patchelf": {"type": "host", "stamp_dir": "build/host-patchelf-custom"}}"#;
    let info = BuildrootInfo::parse(info).expect("a list");
    let tree = Utf8Path::new("/nonexistent");
    let mut setup =
        BuildrootSetup::new(&folder(&output), tree, &root(), "out").expect("directories");
    fs::create_dir_all(&setup.output).expect("a directory");
    let state_of = |sources: &[OverridePlan]| {
        let state = |source: &OverridePlan| OverrideState {
            directory: source.directory.clone(),
            content: source.content.clone(),
            can_continue: true,
        };
        let overrides = sources.iter().map(|s| (s.package.clone(), state(s))).collect();
        OutputState { overrides, ..OutputState::default() }
    };
    // Without a record of a build there is nothing to mark.
    setup.overrides.clone_from(&a);
    OutputState::mark_sources(&setup).expect("marked");
    assert_eq!(OutputState::load(&setup.output).expect("read"), None);
    let clean = "host-patchelf-dirclean";
    for (built, by_make, next, expected) in [
        (&release, &release, &release, None),
        (&release, &a, &release, Some(clean)),
        (&release, &a, &a, Some("host-patchelf-reconfigure")),
        (&release, &a, &b, Some(clean)),
        (&a, &release, &release, Some(clean)),
        (&a, &release, &a, Some("host-patchelf-reconfigure")),
        (&a, &b, &a, Some(clean)),
        (&a, &b, &b, Some(clean)),
    ] {
        state_of(built).save(&setup.output).expect("saved");
        setup.overrides.clone_from(by_make);
        OutputState::mark_sources(&setup).expect("marked");
        let old = OutputState::load(&setup.output).expect("read").expect("a state");
        let action = compare_states(&old, &state_of(next), &info);
        match (expected, action) {
            (None, action) => assert_eq!(action, RebuildAction::Nothing),
            (Some(target), RebuildAction::Targets(targets)) => {
                assert_eq!(targets.keys().collect::<Vec<_>>(), [target]);
            }
            (Some(target), action) => panic!("{target}: {action:?}"),
        }
    }
}

#[test]
fn the_question_what_is_built_again_includes_source_directories() {
    let test = "the_question_what_is_built_again_includes_source_directories";
    let Some(_tree) = tree(test) else { return };
    let workspace = Workspace::new();
    // A name that Buildroot does not have is only refused where the directories are used.
    let asked = format!("busybx={}", workspace.root.join("parts"));
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["buildroot", "why", "--product", "robot", "--board", "qemu-arm64"])
        .args(["--override", &asked])
        .current_dir(root())
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("did you mean busybox?"), "{said}");
}
