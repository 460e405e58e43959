//! The engine `buildroot` against the real, pinned Buildroot tree. Where the tree is not in the
//! cache, each test says so and ends; `cargo xtask test` counts and names them.

#[path = "buildroot_tree/overrides.rs"]
mod overrides;
#[path = "common/skip.rs"]
mod skip;
#[path = "buildroot_tree/sources.rs"]
mod sources;
#[path = "common/workspace.rs"]
mod workspace;

use std::time::Instant;

use camino::{Utf8Path, Utf8PathBuf};
use workspace::root;
use xtask::cache::Cache;
use xtask::exec::Tool;
use xtask::plan::fragment;
use xtask::plan::{BuildrootPlan, CheckoutFacts};
use xtask::rootfs::buildroot::check::{self, LossReason, LostRequest};
use xtask::rootfs::buildroot::expr::KconfigValues;
use xtask::rootfs::buildroot::info::BuildrootInfo;
use xtask::rootfs::buildroot::make::{BuildrootSetup, BuildrootSite};
use xtask::rootfs::buildroot::rebuild::{OutputState, RebuildAction, compare_states};
use xtask::rootfs::buildroot::tree::{BuildrootTree, pinned_path};
use xtask::rootfs::buildroot::{engine, menus};
use xtask::{config, plan};

/// The pinned tree; `None` when it is not in the cache.
fn tree(test: &str) -> Option<Utf8PathBuf> {
    let cache = Cache::locate().expect("a cache");
    let product = xtask::config::read_product(&root(), "robot").expect("the product");
    let pinned = product.rootfs.buildroot.expect("a pin");
    let release = &pinned.release.value;
    let path = pinned_path(&cache.root, release);
    if path.join("Makefile").is_file() {
        return Some(path);
    }
    skip::skip(
        &format!("buildroot_tree::{test}"),
        &format!("{path} does not exist"),
        &format!(
            "clone {} by the tag {release} to that directory, as `cargo xtask build-image --product robot` does",
            pinned.url.value
        ),
    );
    None
}

/// A setup in a directory of its own.
fn setup(tree: &Utf8Path, output: &tempfile::TempDir) -> BuildrootSetup {
    let output = Utf8PathBuf::try_from(output.path().to_owned()).expect("UTF-8");
    let mut setup = BuildrootSetup::new(&output, tree, &root(), "out").expect("folders");
    setup.output = output;
    setup
}

/// The robot's configuration for a board.
fn plan_of(board: &str) -> BuildrootPlan {
    let config = config::load(&root(), Some("robot"), Some(board)).expect("the product");
    let facts = CheckoutFacts { commit: None, modified: false, epoch: 0 };
    let plan = plan::resolve(&config, &facts).expect("a plan");
    plan.rootfs.buildroot.expect("a pinned release")
}

/// What Kconfig makes of lines that are added to an architecture.
fn losses(setup: &BuildrootSetup, lines: &str) -> Vec<LostRequest> {
    let fragments = [
        (Utf8Path::new("arch.fragment"), "BR2_aarch64=y\n"),
        (Utf8Path::new("case.fragment"), lines),
    ];
    let (defconfig, findings) = fragment::merge_fragments(fragments);
    assert!(findings.is_empty(), "{lines}: {findings:?}");
    check::check_defconfig(setup, &defconfig, "a case").expect(lines).losses
}

/// A request that Kconfig loses without failing: its line, class, words of cause and help; and
/// the same intent as it must be written.
struct Case {
    lost: &'static str,
    line: usize,
    class: LossReason,
    says: &'static [&'static str],
    legitimate: &'static str,
}

const CASES: &[Case] = &[
    Case {
        lost: "BR2_PACKAGE_PYHTON3=y",
        line: 1,
        class: LossReason::Unknown,
        says: &["has no symbol BR2_PACKAGE_PYHTON3", "did you mean BR2_PACKAGE_PYTHON3?"],
        legitimate: "BR2_PACKAGE_PYTHON3=y",
    },
    Case {
        lost: "BR2_CCACHE=y\nBR2_PACKAGE_SYSTEMD_NETWORKD=y",
        line: 2,
        class: LossReason::Unmet,
        says: &["depends on `BR2_PACKAGE_SYSTEMD`", "BR2_PACKAGE_SYSTEMD = n"],
        legitimate: "BR2_INIT_SYSTEMD=y\nBR2_PACKAGE_SYSTEMD_NETWORKD=y",
    },
    Case {
        lost: "BR2_PACKAGE_BOOST=y",
        line: 1,
        class: LossReason::Unmet,
        says: &[
            "BR2_INSTALL_LIBSTDCPP = n",
            "BR2_INSTALL_LIBSTDCPP is set by BR2_TOOLCHAIN_BUILDROOT_CXX",
        ],
        legitimate: "BR2_TOOLCHAIN_BUILDROOT_CXX=y\nBR2_PACKAGE_BOOST=y",
    },
    Case {
        lost: "BR2_INIT_BUSYBOX=y\nBR2_INIT_SYSTEMD=y",
        line: 1,
        class: LossReason::Choice,
        says: &["BR2_INIT_SYSTEMD won the choice", "system/Config.in", "case.fragment:2"],
        legitimate: "# BR2_INIT_BUSYBOX is not set\nBR2_INIT_SYSTEMD=y",
    },
    Case {
        lost: "# BR2_INIT_BUSYBOX is not set",
        line: 1,
        class: LossReason::Choice,
        says: &["needs one winner", "request another member: ", "BR2_INIT_SYSTEMD"],
        legitimate: "BR2_INIT_NONE=y",
    },
    Case {
        lost: "BR2_PACKAGE_PYTHON3=y\n# BR2_PACKAGE_LIBFFI is not set",
        line: 2,
        class: LossReason::Selected,
        says: &["selected by BR2_PACKAGE_PYTHON3 (package/python3/Config.in:"],
        legitimate: "# BR2_PACKAGE_LIBFFI is not set",
    },
    Case {
        lost: "BR2_PACKAGE_DVDRW_TOOLS=y",
        line: 1,
        class: LossReason::Retired,
        says: &["is retired: dvdrw-tools removed (Config.in.legacy:", "remove the line"],
        legitimate: "# BR2_PACKAGE_DVDRW_TOOLS is not set",
    },
    Case {
        lost: "BR2_PACKAGE_ERLANG_P1_YAML=y",
        line: 1,
        class: LossReason::Retired,
        says: &["has been renamed", "replace it by BR2_PACKAGE_ERLANG_FAST_YAML"],
        legitimate: "BR2_PACKAGE_ERLANG=y\nBR2_PACKAGE_ERLANG_FAST_YAML=y",
    },
    Case {
        lost: "BR2_PACKAGE_QEMU_CUSTOM_TARGETS=\"x86_64-softmmu\"",
        line: 1,
        class: LossReason::Retired,
        says: &["option has been removed", "list of individual targets"],
        legitimate: "BR2_PACKAGE_QEMU_CUSTOM_TARGETS=\"\"",
    },
    Case {
        lost: "BR2_JLEVEL=\"4\"",
        line: 1,
        class: LossReason::Malformed,
        says: &["of the type int (Config.in:", "write BR2_JLEVEL=4"],
        legitimate: "BR2_JLEVEL=4",
    },
    Case {
        lost: "BR2_CCACHE=\"y\"",
        line: 1,
        class: LossReason::Malformed,
        says: &["of the type bool", "write BR2_CCACHE=y"],
        legitimate: "BR2_CCACHE=y",
    },
    Case {
        lost: "BR2_TARGET_GENERIC_HOSTNAME=7",
        line: 1,
        class: LossReason::Malformed,
        says: &["of the type string", "write BR2_TARGET_GENERIC_HOSTNAME=\"7\""],
        legitimate: "BR2_TARGET_GENERIC_HOSTNAME=\"7 \\\"of\\\" 9\"",
    },
    Case {
        lost: "BR2_INSTALL_LIBSTDCPP=y",
        line: 1,
        class: LossReason::Computed,
        says: &["has no prompt", "is set by ", "BR2_TOOLCHAIN_BUILDROOT_CXX"],
        legitimate: "BR2_TOOLCHAIN_BUILDROOT_CXX=y\nBR2_INSTALL_LIBSTDCPP=y",
    },
    Case {
        lost: "BR2_TARGET_ROOTFS_EROFS=y\nBR2_TARGET_ROOTFS_EROFS_LZ4HC=y\n\
               BR2_TARGET_ROOTFS_EROFS_LZ4HC_LEVEL=99",
        line: 3,
        class: LossReason::Malformed,
        says: &["accepts 1 to 12 (fs/erofs/Config.in:"],
        legitimate: "BR2_TARGET_ROOTFS_EROFS=y\nBR2_TARGET_ROOTFS_EROFS_LZ4HC=y\n\
                     BR2_TARGET_ROOTFS_EROFS_LZ4HC_LEVEL=12",
    },
];

#[test]
fn every_silent_loss_is_found_with_class_cause_and_place() {
    let Some(tree) = tree("every_silent_loss_is_found_with_class_cause_and_place") else { return };
    let output = tempfile::tempdir().expect("a directory");
    let setup = setup(&tree, &output);
    for case in CASES {
        let found = losses(&setup, case.lost);
        let [loss] = found.as_slice() else { panic!("{}: {found:#?}", case.lost) };
        assert_eq!(loss.class, case.class, "{loss:#?}");
        assert_eq!(
            (loss.place.file.as_str(), loss.place.line),
            ("case.fragment", case.line),
            "{loss:#?}"
        );
        let text = format!("{} {}", loss.cause, loss.help);
        for words in case.says {
            assert!(text.contains(words), "{}: no `{words}` in {loss:#?}", case.lost);
        }
        let lost = losses(&setup, case.legitimate);
        assert!(lost.is_empty(), "{} must pass: {lost:#?}", case.legitimate);
    }
}

/// Lines that Kconfig drops for their form alone: what is lost, what the finding says, and the line
/// as it must be written.
const FORMS: &[(&str, &str, &str)] = &[
    (
        "BR2_TARGET_GENERIC_HOSTNAME=robot",
        "write BR2_TARGET_GENERIC_HOSTNAME=\"robot\"",
        "BR2_TARGET_GENERIC_HOSTNAME=\"robot\"",
    ),
    ("BR2_CCACHE = y", "write BR2_CCACHE=y", "BR2_CCACHE=y"),
    ("BR2_CCACHE=m", "write BR2_CCACHE=y", "BR2_CCACHE=y"),
    ("#BR2_TARGET_ROOTFS_TAR is not set", "write exactly", "# BR2_TARGET_ROOTFS_TAR is not set"),
    ("BR2_JLEVEL=2\nBR2_JLEVEL=3", "keep one of the two", "BR2_JLEVEL=3\nBR2_JLEVEL=3"),
    (
        "CONFIG_EXT4_FS=y",
        "to its own fragment",
        "BR2_LINUX_KERNEL=y\nBR2_LINUX_KERNEL_USE_ARCH_DEFAULT_CONFIG=y",
    ),
];

#[test]
fn what_kconfig_drops_for_its_form_is_refused_before_it_runs() {
    let Some(tree) = tree("what_kconfig_drops_for_its_form_is_refused_before_it_runs") else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let setup = setup(&tree, &output);
    for (lost, says, written) in FORMS {
        let file = Utf8Path::new("case.fragment");
        let (_, findings) = fragment::merge_fragments([(file, *lost)]);
        let [finding] = findings.as_slice() else { panic!("{lost}: {findings:?}") };
        assert_eq!(finding.place.line, lost.lines().count(), "{finding:?}");
        assert!(finding.help.contains(says), "{lost}: {finding:?}");
        assert!(losses(&setup, written).is_empty(), "{written} must pass");
        // The claim itself: Kconfig ends with success and has lost something.
        let raw = setup.output.join("raw_defconfig");
        std::fs::write(&raw, format!("BR2_aarch64=y\n{lost}\n")).expect("written");
        let make = setup.make().arg("-s").arg(format!("BR2_DEFCONFIG={raw}")).arg("defconfig");
        make.run().expect("Kconfig says that all is well");
        let config = std::fs::read_to_string(setup.output.join(".config")).expect("a .config");
        for line in lost.lines().take(1) {
            assert!(!config.lines().any(|l| l == line), "Kconfig took {line}");
        }
    }
}

#[test]
fn kconfig_takes_every_line_of_every_board_in_time() {
    let Some(tree) = tree("kconfig_takes_every_line_of_every_board_in_time") else { return };
    let output = tempfile::tempdir().expect("a directory");
    let setup = setup(&tree, &output);
    for board in ["pi3", "pi4", "pi5", "qemu-arm64"] {
        let started = Instant::now();
        let pinned = plan_of(board);
        let verdict = check::check_defconfig(&setup, &pinned.defconfig, board).expect(board);
        verdict.require().expect(board);
        let seconds = started.elapsed().as_secs();
        println!("{board}: {} symbols, {seconds} s", verdict.compared);
        assert!(seconds < 30, "{board}: {seconds} s");
        assert!(verdict.compared > 40, "{board}: only {} symbols compared", verdict.compared);
        // Asks with Buildroot's check of dependencies that are used and not selected.
        let info = BuildrootInfo::read(&setup, &BuildrootSite::default()).expect(board);
        engine::require_hashes(&info, &tree).expect(board);
        assert!(info.packages().count() > 80, "{board}: few packages");
        // Sandboxes of services; `import xml`. No keyboard maps.
        let needs = |name: &str, other: &str| info.0[name].dependencies.contains(other);
        assert!(needs("systemd", "libseccomp") && needs("python3", "expat"), "{board}");
        assert!(!info.0.contains_key("kbd"), "{board}");
        assert_eq!(info.0["python3"].version.split('.').take(2).collect::<Vec<_>>(), ["3", "12"]);
    }
}

#[test]
fn a_source_without_a_hash_is_found_before_it_is_downloaded() {
    let Some(tree) = tree("a_source_without_a_hash_is_found_before_it_is_downloaded") else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let setup = setup(&tree, &output);
    let lost = losses(
        &setup,
        "BR2_LINUX_KERNEL=y\nBR2_LINUX_KERNEL_USE_ARCH_DEFAULT_CONFIG=y\n\
         BR2_LINUX_KERNEL_CUSTOM_VERSION=y\nBR2_LINUX_KERNEL_CUSTOM_VERSION_VALUE=\"6.6.1\"\n\
         BR2_PACKAGE_HOST_LINUX_HEADERS_CUSTOM_6_6=y\nBR2_KERNEL_HEADERS_AS_KERNEL=y",
    );
    assert!(lost.is_empty(), "{lost:#?}");
    let info = BuildrootInfo::read(&setup, &BuildrootSite::default()).expect("packages");
    let error = engine::require_hashes(&info, &tree).expect_err("no hash").to_string();
    assert!(error.contains("\n  linux: linux-6.6.1.tar.xz, looked in linux/linux.hash"), "{error}");
    assert!(error.contains("external/patches/<package>/<package>.hash"), "{error}");
}

#[test]
fn the_external_tree_passes_buildroots_own_check() {
    let Some(tree) = tree("the_external_tree_passes_buildroots_own_check") else { return };
    let files = Tool::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "external"])
        .current_dir(&root())
        .read()
        .expect("git");
    let files: Vec<String> = files.lines().map(|file| root().join(file).to_string()).collect();
    assert!(files.len() >= 12, "{files:?}");
    // The distribution's own Python, which has what the script imports.
    let report = Tool::new("/usr/bin/python3")
        .arg(tree.join("utils/check-package"))
        .arg("-b")
        .args(&files)
        .env("PATH", "/usr/bin:/bin")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(&tree)
        .run();
    report.expect("no finding; cargo xtask doctor --buildroot says what the script needs");
}

#[test]
fn what_was_changed_in_the_menus_waits_until_it_is_in_a_fragment() {
    let Some(tree) = tree("what_was_changed_in_the_menus_waits_until_it_is_in_a_fragment") else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let setup = setup(&tree, &output);
    let merge = |text: &str| fragment::merge_fragments([(Utf8Path::new("a.fragment"), text)]).0;
    let defconfig = merge("BR2_aarch64=y\nBR2_JLEVEL=2\n");
    // Kconfig's own tool in the menu's stead: it changes two symbols of the copy.
    let edit = |setup: &BuildrootSetup| {
        let file = setup.output.join("edited");
        std::fs::write(&file, "BR2_aarch64=y\nBR2_CCACHE=y\n")?;
        let make = setup.make().arg("-s").arg(format!("BR2_DEFCONFIG={file}"));
        make.arg("defconfig").run()
    };
    let found = menus::edit_menu(&setup, &defconfig, "a test", edit).expect("edited");
    let shown: Vec<_> = found.iter().map(|c| (c.symbol.as_str(), c.line.as_deref())).collect();
    assert_eq!(shown, [("BR2_CCACHE", Some("BR2_CCACHE=y")), ("BR2_JLEVEL", None)]);
    // The menu is opened again and closed: what waited is still there.
    let again = menus::edit_menu(&setup, &defconfig, "a test", |_| Ok(())).expect("opened again");
    assert!(again.iter().any(|c| c.symbol == "BR2_CCACHE"), "{again:?}");
    let done = merge("BR2_aarch64=y\nBR2_CCACHE=y\n");
    let config = check::check_defconfig(&setup, &done, "a test").expect("resolved").config;
    assert!(menus::advise_changes(&found, &done, &KconfigValues::parse(&config)).is_empty());
}

#[test]
fn every_symbol_that_a_missing_command_names_exists() {
    let Some(tree) = tree("every_symbol_that_a_missing_command_names_exists") else { return };
    let read = |path: &str| std::fs::read_to_string(tree.join(path)).expect(path);
    let busybox = read("package/busybox/busybox.config");
    let known = |option: &str| {
        let forms = [format!("{option}=y"), format!("# {option} is not set")];
        busybox.lines().any(|line| forms.iter().any(|form| form == line))
    };
    let (options, symbols) = xtask::compose::commands::named_symbols();
    let unknown: Vec<_> = options.iter().filter(|option| !known(option)).collect();
    assert!(unknown.is_empty(), "not options of busybox: {unknown:?}");
    let menus = Tool::new("grep")
        .args(["-rhE", "^\\s*(menu)?config BR2_PACKAGE_"])
        .arg(tree.join("package"));
    let menus = menus.read().expect("symbols");
    let found: std::collections::HashSet<&str> =
        menus.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    let unknown: Vec<_> = symbols.iter().filter(|symbol| !found.contains(**symbol)).collect();
    assert!(unknown.is_empty(), "not symbols of Buildroot: {unknown:?}");
}

#[test]
fn a_commit_in_the_workspace_rebuilds_nothing_but_what_it_changed() {
    let Some(tree) = tree("a_commit_in_the_workspace_rebuilds_nothing_but_what_it_changed") else {
        return;
    };
    let output = tempfile::tempdir().expect("a directory");
    let dir = Utf8PathBuf::try_from(output.path().to_owned()).expect("UTF-8");
    let workspace = dir.join("workspace");
    let copy = |from: &Utf8Path, to: &Utf8Path| {
        std::fs::create_dir_all(to).expect("a directory");
        Tool::new("cp").arg("-r").arg(from).arg(to).run().expect("copied");
    };
    copy(&root().join("external"), &workspace);
    let git = |arguments: &[&str]| {
        Tool::new("git")
            .args(["-C", workspace.as_str(), "-c", "user.name=t", "-c", "user.email=t@localhost"])
            .args(arguments)
            .run()
            .expect("git");
    };
    git(&["init", "--quiet"]);
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "one"]);
    let setup = BuildrootSetup::new(&dir, &tree, &workspace, "out").expect("directories");
    let lines = "BR2_aarch64=y\nBR2_PACKAGE_BUSYBOX_CONFIG_FRAGMENT_FILES=\
                 \"$(BR2_EXTERNAL_SLIPWAY_PATH)/busybox/busybox.fragment\"\n";
    let (defconfig, _) = fragment::merge_fragments([(Utf8Path::new("a.fragment"), lines)]);
    let pinned = BuildrootTree {
        path: tree,
        commit: "c".into(),
        changes: String::new(),
        changed: Default::default(),
    };
    let configure = || check::check_defconfig(&setup, &defconfig, "a case").expect("valid").config;
    let first = configure();
    let info = BuildrootInfo::read(&setup, &BuildrootSite::default()).expect("packages");
    let describe = |config: &str| {
        OutputState::describe(&setup, &pinned, config, &info).expect("a description")
    };
    let built = describe(&first);
    let version = "BR2_EXTERNAL_SLIPWAY_VERSION=";
    let version = |config: &str| {
        config.lines().find(|line| line.starts_with(version)).map(str::to_owned).expect("a version")
    };

    git(&["commit", "--quiet", "--allow-empty", "-m", "two"]);
    let second = configure();
    assert_ne!(version(&second), version(&first), "Buildroot writes the commit to .config");
    assert_eq!(compare_states(&built, &describe(&second), &info), RebuildAction::Nothing);

    let fragment = setup.external.join("busybox/busybox.fragment");
    let text = std::fs::read_to_string(&fragment).expect("a fragment");
    std::fs::write(&fragment, format!("{text}CONFIG_FSYNC=y\n")).expect("written");
    let dirty = configure();
    assert!(version(&dirty).contains("dirty"), "{}", version(&dirty));
    let RebuildAction::Targets(targets) = compare_states(&built, &describe(&dirty), &info) else {
        panic!("the fragment changed");
    };
    assert_eq!(targets.keys().collect::<Vec<_>>(), ["busybox-reconfigure"]);
}
