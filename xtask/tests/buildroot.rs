//! The engine `buildroot`, without a Buildroot tree: golden defconfigs, the reading of
//! recorded output, what must be built again, and the fetching of a tree.

use crate::common::{folder, root};

use std::collections::BTreeSet;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::cmd::doctor;
use xtask::exec::Tool;
use xtask::plan::fragment::Defconfig;
use xtask::plan::{BuildrootPlan, Plan};
use xtask::rootfs::buildroot::engine;
use xtask::rootfs::buildroot::failure::{self, BuildrootFailure};
use xtask::rootfs::buildroot::info::BuildrootInfo;
use xtask::rootfs::buildroot::make::BuildrootSetup;
use xtask::rootfs::buildroot::pending::PendingRebuild;
use xtask::rootfs::buildroot::rebuild::{OutputState, RebuildAction, compare_states};
use xtask::rootfs::buildroot::tree::{self, TreeChoice};
use xtask::{config, plan, render, tools};

fn recorded(name: &str) -> String {
    let path = root().join("xtask/tests/fixtures/buildroot").join(name);
    std::fs::read_to_string(&path).expect("a recorded text")
}

fn info() -> BuildrootInfo {
    BuildrootInfo::parse(&recorded("show-info.json")).expect("a list of packages")
}

fn resolved(board: &str) -> Plan {
    let config = config::load(&root(), Some("robot"), Some(board)).expect("the product");
    let facts = xtask::plan::CheckoutFacts { commit: None, modified: false, epoch: 0 };
    plan::resolve(&config, &facts).expect("a plan")
}

#[test]
fn the_defconfig_of_each_board_is_the_golden_one() {
    for board in ["pi3", "pi4", "pi5", "qemu-arm64"] {
        let plan = resolved(board);
        let pinned = plan.rootfs.buildroot.as_ref().expect("a pinned release");
        let text = pinned.defconfig.render(&render::defconfig_title(&plan));
        let golden = root().join(format!("xtask/tests/golden/buildroot/{board}.defconfig"));
        if std::env::var("SLIPWAY_BLESS").is_ok_and(|v| v == "1") {
            std::fs::write(&golden, &text).expect("written");
        }
        let expected = std::fs::read_to_string(&golden).expect("a golden file");
        assert_eq!(text, expected, "{golden}: SLIPWAY_BLESS=1 rewrites it; review the difference");
    }
}

#[test]
fn make_may_configure_as_root() {
    let (_guard, dir) = folder();
    let tree = dir.join("tree");
    std::fs::create_dir(&tree).expect("a directory");
    let text = "show:\n\t@echo $(FORCE_UNSAFE_CONFIGURE)\n";
    std::fs::write(tree.join("Makefile"), text).expect("written");
    let setup = BuildrootSetup::new(&dir, &tree, &root(), "out").expect("directories");
    let printed = setup.make().arg("show").read().expect("made");
    let root = rustix::process::geteuid().is_root();
    assert_eq!(printed.trim(), if root { "1" } else { "" });
}

#[test]
fn a_download_that_failed_is_named_with_its_addresses_and_alternatives() {
    // The recorded list of packages lacks the one that failed first in the recorded log.
    let mut info = info();
    let mut blake3 = info.0["busybox"].clone();
    blake3.stamp_dir = "build/host-blake3-1.5.4".into();
    blake3.dl_dir = "blake3".into();
    blake3.downloads[0].source = "blake3-1.5.4.tar.gz".into();
    info.0.insert("host-blake3".into(), blake3);
    let failure = failure::find_failure(&recorded("no-network.log"), &info);
    let text = failure.to_string();
    assert!(matches!(failure, BuildrootFailure::Download { .. }), "{failure:#?}");
    for words in [
        "host-blake3 1.5.4: a source is missing",
        "https://sources.buildroot.net/busybox/blake3-1.5.4.tar.gz",
        "unable to resolve host address",
        "below blake3/",
        "SLIPWAY_BUILDROOT_MIRROR",
    ] {
        assert!(text.contains(words), "no `{words}` in {text}");
    }
}

#[test]
fn a_source_with_another_hash_is_not_called_a_failed_download() {
    let failure = failure::find_failure(&recorded("wrong-hash.log"), &info());
    let BuildrootFailure::Hash { package, lines } = &failure else { panic!("{failure:#?}") };
    assert_eq!(package, "busybox 1.37.0");
    assert!(lines.iter().any(|l| l.contains("has wrong sha256 hash")), "{lines:?}");
}

#[test]
fn a_step_that_failed_shows_the_lines_of_its_own_package() {
    // Two packages at work, as --output-sync prints them: in whole steps.
    let log = "\x1b[7m>>> zlib 1.3.2 Building\x1b[27m\ngcc -c a.c\na.c:1: error: no\n\
               \x1b[7m>>> kmod 33 Configuring\x1b[27m\nchecking for gcc\n\
               make[1]: *** [Makefile:9: all] Error 1\n\
               make: *** [package/pkg-generic.mk:273: /o/build/kmod-33/.stamp_configured] Error 2\n\
               make: *** Waiting for unfinished jobs....\n";
    let failure = failure::find_failure(log, &info());
    let BuildrootFailure::Step { package, step, lines } = &failure else { panic!("{failure:#?}") };
    assert_eq!((package.as_str(), step.as_str()), ("kmod 33", "configured"));
    assert_eq!(lines.first().map(String::as_str), Some(">>> kmod 33 Configuring"));
    assert!(!failure.to_string().contains("a.c"), "{failure}");
    let other = failure::find_failure("make: *** No rule to make target 'x'.  Stop.\n", &info());
    assert!(other.to_string().contains("No rule to make target"), "{other}");
}

#[test]
fn the_list_of_packages_says_what_is_in_the_image() {
    let info = info();
    assert_eq!(info.packages().count(), info.0.len() - 1, "all but the file system image");
    let needed: Vec<&str> = info.dependents(["libzlib"]).into_iter().collect();
    assert!(needed.contains(&"zlib") && needed.contains(&"libzlib"), "{needed:?}");
    assert!(!needed.contains(&"linux"), "{needed:?}");
    let missing = info.missing(Utf8Path::new("/nonexistent"));
    let files: Vec<&str> = missing.iter().map(|(.., d)| d.source.as_str()).collect();
    assert!(files.contains(&"busybox-1.37.0.tar.bz2"), "{files:?}");
}

/// A state with a configuration and one external file.
fn state(config: &[(&str, &str)], external: &[(&str, &str)]) -> OutputState {
    let pairs = |list: &[(&str, &str)]| {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>()
    };
    OutputState {
        tree: "commit".into(),
        tree_changed: Default::default(),
        config: pairs(config).into_iter().collect(),
        dependencies: info()
            .packages()
            .map(|(name, entry)| (name.to_owned(), entry.dependencies.clone()))
            .collect(),
        files: Default::default(),
        overrides: Default::default(),
        external: pairs(external).into_iter().map(|(a, b)| (a.into(), b)).collect(),
    }
}

fn targets(old: &OutputState, new: &OutputState) -> Vec<String> {
    match compare_states(old, new, &info()) {
        RebuildAction::Targets(targets) => targets.into_keys().collect(),
        RebuildAction::Nothing => Vec::new(),
        RebuildAction::Everything(why) => vec![format!("everything: {why}")],
    }
}

#[test]
fn exactly_what_a_change_reaches_is_built_again() {
    let base = || state(&[("BR2_JLEVEL", "0")], &[("package/slipway-base/slipway-base.mk", "1")]);
    assert_eq!(compare_states(&base(), &base(), &info()), RebuildAction::Nothing);

    // A package's own option: the package, and what holds a copy of its files.
    let mut new = base();
    new.config.insert("BR2_PACKAGE_PYTHON3_SSL".into(), "y".into());
    assert_eq!(targets(&base(), &new), ["python3-dirclean"]);
    let mut new = base();
    new.config.insert("BR2_PACKAGE_LIBZLIB_X".into(), "y".into());
    let reached = targets(&base(), &new);
    assert!(reached.contains(&"libzlib-dirclean".to_owned()), "{reached:?}");
    assert!(reached.contains(&"zlib-dirclean".to_owned()), "{reached:?}");

    // What reaches only the end of a build.
    let mut new = base();
    for symbol in ["BR2_JLEVEL", "BR2_TARGET_GENERIC_HOSTNAME", "BR2_PRIMARY_SITE"] {
        new.config.insert(symbol.into(), "7".into());
    }
    // What Buildroot writes about the workspace and the build machine.
    for symbol in ["BR2_EXTERNAL_SLIPWAY_VERSION", "BR2_VERSION", "BR2_HOST_GCC_AT_LEAST_13"] {
        new.config.insert(symbol.into(), "x".into());
    }
    assert!(targets(&base(), &new).is_empty());

    // A new package is built because it has no stamps; one that is gone is taken away.
    let mut old = base();
    old.dependencies.remove("kmod");
    assert_eq!(targets(&old, &base()), [] as [&str; 0]);
    let mut old = base();
    old.dependencies.insert("nano".into(), BTreeSet::new());
    assert_eq!(targets(&old, &base()), ["nano-dirclean"]);

    // A package that needs something else now.
    let mut old = base();
    old.dependencies.get_mut("busybox").expect("there").insert("nano".into());
    old.dependencies.insert("nano".into(), BTreeSet::new());
    assert_eq!(targets(&old, &base()), ["busybox-dirclean", "nano-dirclean"]);

    // The text of a kernel fragment.
    let with = |hash: &str| {
        let mut state = base();
        let files = [("/e/linux/common.fragment".into(), hash.to_owned())];
        let symbol = "BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES".to_owned();
        state.files.insert(symbol, files.into());
        state
    };
    assert_eq!(targets(&with("1"), &with("2")), ["linux-reconfigure"]);

    // Our own package; a hash, which changes no result; a patch.
    let mut new = base();
    new.external.insert("package/slipway-base/slipway-base.mk".into(), "2".into());
    assert_eq!(targets(&base(), &new), ["slipway-base-dirclean"]);
    let mut new = base();
    new.external.insert("patches/linux/linux.hash".into(), "2".into());
    assert!(targets(&base(), &new).is_empty());
    let mut new = base();
    new.external.insert("patches/linux/0001-x.patch".into(), "2".into());
    assert_eq!(targets(&base(), &new), ["linux-dirclean"]);
}

#[test]
fn what_is_in_everything_is_a_full_rebuild_and_says_why() {
    let base = || state(&[("BR2_aarch64", "y")], &[]);
    let mut new = base();
    new.tree = "another".into();
    assert_eq!(targets(&base(), &new), ["everything: the Buildroot tree changed"]);
    for symbol in ["BR2_cortex_a72", "BR2_TOOLCHAIN_BUILDROOT_CXX", "BR2_INIT_SYSTEMD"] {
        let mut new = base();
        new.config.insert(symbol.into(), "y".into());
        assert_eq!(targets(&base(), &new), [format!("everything: {symbol} changed")]);
    }
    let mut new = base();
    new.config.insert("BR2_PACKAGE_GLIBC_UTILS".into(), "y".into());
    let reached = targets(&base(), &new);
    assert!(reached[0].starts_with("everything: glibc: BR2_PACKAGE_GLIBC_UTILS"), "{reached:?}");
}

#[test]
fn a_changed_recipe_of_one_s_own_tree_rebuilds_its_package() {
    let (_guard, dir) = folder();
    repository(&dir);
    let git = |arguments: &[&str]| {
        let tool = Tool::new("git").args(["-C", dir.as_str(), "-c", "user.name=t"]);
        tool.args(["-c", "user.email=t@localhost"]).args(arguments).run().expect("git");
    };
    let write = |path: &str, text: &str| {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        std::fs::write(path, text).expect("written");
    };
    write("package/python3/python3.mk", "1");
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "two"]);
    let own = TreeChoice { own: Some(dir.clone()), allow_changes: true, ..TreeChoice::default() };
    let obtain = || {
        let plan = pin();
        tree::obtain_tree(&plan, &dir, &own).expect("a tree")
    };
    let (output_guard, output) = folder();
    let state_of = |tree: &tree::BuildrootTree| OutputState {
        tree: format!("{} {}", tree.commit, tree.changes),
        tree_changed: tree.changed.clone(),
        ..state(&[], &[])
    };
    // What was built; then what the tree that is there now would build again.
    let build = || state_of(&obtain()).save(&output).expect("saved");
    let due = || {
        let tree = obtain();
        let found = PendingRebuild::find(&output, &tree, &state_of(&tree), &info()).expect("known");
        match found.action {
            RebuildAction::Targets(targets) => targets.into_keys().collect(),
            RebuildAction::Nothing => Vec::new(),
            RebuildAction::Everything(why) => vec![format!("everything: {why}")],
        }
    };
    build();
    assert!(due().is_empty());
    write("package/python3/python3.mk", "2");
    assert_eq!(due(), ["python3-dirclean"], "a change that is not committed");
    build();
    assert!(due().is_empty());
    git(&["commit", "--quiet", "-a", "-m", "three"]);
    assert!(due().is_empty(), "what was built is committed now");
    build();
    write("package/python3/0001-x.patch", "");
    write("package/python3/python3.hash", "");
    write("package/frobnicate/frobnicate.mk", "not configured");
    write("docs/manual.adoc", "");
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "four"]);
    assert_eq!(due(), ["python3-dirclean"]);
    build();
    write("package/pkg-generic.mk", "");
    assert_eq!(due(), ["everything: Buildroot's package/pkg-generic.mk changed"]);
    std::fs::remove_file(dir.join("package/pkg-generic.mk")).expect("removed");
    write("package/glibc/glibc.mk", "");
    let all = due();
    assert!(all[0].starts_with("everything: glibc: Buildroot's package/glibc/"), "{all:?}");
    // A commit that this checkout does not have.
    let lost = OutputState { tree: format!("{} ", "1".repeat(40)), ..state(&[], &[]) };
    lost.save(&output).expect("saved");
    assert_eq!(due(), ["everything: the Buildroot tree changed"]);
    drop(output_guard);
}

#[test]
fn an_older_c_library_than_the_wheels_need_is_refused_before_the_build() {
    for (locked, found) in [
        ("glibc 2.40", "2.41-143-gfc7a48bc9e999c0f"),
        ("glibc 2.41", "2.41"),
        ("glibc 2.9", "2.41"),
    ] {
        engine::require_libc(locked, found).expect(found);
    }
    for (locked, found) in
        [("glibc 2.42", "2.41-143-gfc7a"), ("musl 1.2", "2.41"), ("glibc 2.1", "x")]
    {
        let error = engine::require_libc(locked, found).expect_err(found).to_string();
        assert!(error.contains(&format!("has glibc {found}, but")), "{error}");
    }
    let mut plan = resolved("qemu-arm64").rootfs.buildroot.expect("a pinned release");
    plan.libc = "glibc 2.99".into();
    let mut info = info();
    info.0.retain(|name, _| name == "glibc");
    info.0.values_mut().for_each(|entry| entry.hashes.clear());
    info.0.values_mut().for_each(|entry| entry.downloads.clear());
    let error = engine::require_packages(&info, Utf8Path::new("/none"), &plan).expect_err("old");
    assert!(error.to_string().contains("rootfs.buildroot.libc"), "{error}");
    info.0.values_mut().for_each(|entry| entry.version = "custom".into());
    engine::require_packages(&info, Utf8Path::new("/none"), &plan).expect("read after the build");
}

/// A git repository that looks like a Buildroot release, with an annotated tag as upstream's.
fn repository(dir: &Utf8Path) -> (String, String) {
    std::fs::create_dir_all(dir.join("package")).expect("made");
    std::fs::write(dir.join("Makefile"), "all:\n").expect("written");
    std::fs::write(dir.join("package/Config.in"), "").expect("written");
    let git = |arguments: &[&str]| {
        Tool::new("git")
            .args(["-C", dir.as_str(), "-c", "user.name=t", "-c", "user.email=t@localhost"])
            .args(arguments)
            .read()
            .expect("git")
    };
    git(&["init", "--quiet"]);
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "release"]);
    git(&["tag", "-a", "2025.02.99", "-m", "2025.02.99"]);
    (format!("file://{dir}"), git(&["rev-parse", "HEAD"]).trim().to_owned())
}

/// A release that no tree has yet.
fn pin() -> BuildrootPlan {
    BuildrootPlan {
        url: String::new(),
        release: "2025.02.99".into(),
        commit: "0".repeat(40),
        python: "3.12".into(),
        libc: "glibc 2.40".into(),
        defconfig: Defconfig::default(),
        overrides: Vec::new(),
    }
}

#[test]
fn the_pinned_tree_is_cloned_by_tag_and_checked_against_the_commit() {
    let (_guard, dir) = folder();
    let (url, commit) = repository(&dir.join("upstream"));
    let cache = dir.join("cache");
    let mut plan = BuildrootPlan { url, ..pin() };
    let choice = TreeChoice::default();

    let offline = TreeChoice { offline: true, ..TreeChoice::default() };
    let error = tree::obtain_tree(&plan, &cache, &offline).expect_err("no network").to_string();
    assert!(error.contains("--offline forbids downloads"), "{error}");

    let error = tree::obtain_tree(&plan, &cache, &choice).expect_err("another commit").to_string();
    assert!(error.contains(&commit) && error.contains(&plan.commit), "{error}");
    let path = tree::pinned_path(&cache, &plan.release);
    assert!(!path.exists() && !Utf8PathBuf::from(format!("{path}.partial")).exists());

    plan.commit.clone_from(&commit);
    let made = tree::obtain_tree(&plan, &cache, &choice).expect("cloned");
    assert_eq!((made.commit, made.changes), (commit, String::new()));
    tree::obtain_tree(&plan, &cache, &offline).expect("needs no network any more");

    std::fs::write(path.join("Makefile"), "changed:\n").expect("written");
    let error = tree::obtain_tree(&plan, &cache, &choice).expect_err("changed").to_string();
    assert!(error.contains("has local changes") && error.contains("M Makefile"), "{error}");
    let own = TreeChoice { own: Some(path.clone()), ..TreeChoice::default() };
    tree::obtain_tree(&plan, &cache, &own).expect_err("one's own must be clean, too");
    let own = TreeChoice { allow_changes: true, ..own };
    let one = tree::obtain_tree(&plan, &cache, &own).expect("told otherwise").changes;
    std::fs::write(path.join("new-file"), "x").expect("written");
    let two = tree::obtain_tree(&plan, &cache, &own).expect("told otherwise").changes;
    assert!(!one.is_empty() && one != two, "changes are part of the key");

    plan.url = format!("file://{dir}/nowhere");
    plan.release = "2025.02.98".into();
    let error =
        format!("{:#}", tree::obtain_tree(&plan, &cache, &choice).expect_err("no such place"));
    assert!(
        error.contains("cloning Buildroot 2025.02.98") && error.contains("--buildroot"),
        "{error}"
    );
    let error =
        tree::obtain_tree(&plan, &cache, &TreeChoice { own: Some(dir), ..TreeChoice::default() });
    let error = error.expect_err("no tree").to_string();
    assert!(error.contains("is not a Buildroot tree"), "{error}");
}

#[test]
fn the_container_has_exactly_what_doctor_asks_for() {
    let text = std::fs::read_to_string(root().join("ci/Containerfile")).expect("a definition");
    let between = text.split_once("# doctor:").expect("the list's begin").1;
    let list = between.split_once("# end").expect("the list's end").0;
    let words = list.split_whitespace().filter(|w| !["\\", "&&"].contains(w));
    let packages: Vec<&str> = words
        .skip_while(|w| *w != "--no-install-recommends")
        .skip(1)
        .take_while(|w| *w != "rm")
        .collect();
    let mut expected: Vec<&str> =
        tools::requirements_for(&doctor::required_purposes(true)).map(|r| r.package).collect();
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(packages, expected, "left: ci/Containerfile; right: tools.rs");
}
