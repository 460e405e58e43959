//! One invalid input for every rule of the configuration, with its message. The messages are in
//! `golden/bad-input`; `SLIPWAY_BLESS=1 cargo test` rewrites them, and the diff is the review.

use crate::fixture_support;

use camino::{Utf8Path, Utf8PathBuf};
use std::process::Command;

use fixture_support::{Workspace, locks};
use xtask::config;
use xtask::plan::CheckoutFacts;
use xtask::{plan, render};

const PRODUCT: &str = "configs/shop.toml";
const BOARD: &str = "board/sample/board.toml";

/// A further archive of the product, as text before and after what a case says of it.
macro_rules! source {
    ($text:literal) => {
        concat!("[[rootfs.sources]]\n", $text, "\n\n[api]\n")
    };
}

/// Rule, file, original text, replacement.
const CASES: &[(&str, &str, &str, &str)] = &[
    ("not-toml", PRODUCT, "version = \"1.2.0\"", "version = = \"1.2.0\""),
    ("unknown-key", PRODUCT, "title = ", "titel = "),
    ("unknown-key-in-table", BOARD, "first-partition = ", "first-partiton = "),
    ("missing-key", PRODUCT, "kind = \"release\"\n", ""),
    ("wrong-type", PRODUCT, "uid = 1000", "uid = \"1000\""),
    ("size-without-unit", BOARD, "size = \"1GiB\"", "size = \"1\""),
    ("size-as-number", BOARD, "size = \"1GiB\"", "size = 1073741824"),
    ("size-with-wrong-unit", BOARD, "size = \"64MiB\"", "size = \"64MB\""),
    ("percent", PRODUCT, "\"90%\"", "\"190%\""),
    ("version", PRODUCT, "version = \"1.2.0\"", "version = \"1.2\""),
    ("version-leading-zero", PRODUCT, "version = \"1.2.0\"", "version = \"1.02.0\""),
    ("name", PRODUCT, "hostname = \"shop\"", "hostname = \"Shop Robot\""),
    (
        "name-too-long",
        PRODUCT,
        "\"shop\"\n\n[update]",
        "\"a123456789b123456789c123456789d123456789e\"\n\n[update]",
    ),
    ("product-name-differs", PRODUCT, "name = \"shop\"", "name = \"shpo\""),
    ("board-name-differs", BOARD, "name = \"sample\"", "name = \"simple\""),
    ("kind", PRODUCT, "kind = \"release\"", "kind = \"beta\""),
    ("engine", PRODUCT, "engine = \"debian\"", "engine = \"yocto\""),
    ("engine-needs-suite", PRODUCT, "suite = \"bookworm\"\n", ""),
    ("engine-needs-lock", PRODUCT, "lock = \"configs/shop.packages.lock\"\n", ""),
    ("engine-does-not-know-board", BOARD, "[debian]\npackages = [\"u-boot-sample\"]\n", ""),
    ("buildroot-needs-its-table", PRODUCT, "engine = \"debian\"", "engine = \"buildroot\""),
    (
        "buildroot-fragments",
        PRODUCT,
        "engine = \"debian\"\nsuite = \"bookworm\"",
        "engine = \"buildroot\"\nbuildroot = { url = \"u\", release = \"2025/02\", commit = \"135af\", \
         python = \"3.12\", libc = \"glibc 2.40\", fragments = [\"configs/shop.fragment\", \
         \"configs/none.fragment\"] }",
    ),
    ("boot-flow", BOARD, "boot-flow = \"uboot\"", "boot-flow = \"grub\""),
    ("eeprom-day", BOARD, "arch = ", "eeprom-since = \"2024-13-01\"\narch = "),
    ("eeprom-without-tryboot", BOARD, "arch = ", "eeprom-since = \"2024-05-13\"\narch = "),
    ("tryboot-without-eeprom", BOARD, "boot-flow = \"uboot\"", "boot-flow = \"tryboot\""),
    (
        "kernel-arguments",
        BOARD,
        "cmdline = [\"ro\"]",
        "cmdline = [\"ro\", 'dyndbg=\"module a +p; module b +p\"', \"root=/dev/sda\"]",
    ),
    ("table", BOARD, "table = \"mbr\"", "table = \"apm\""),
    ("disk-bus", BOARD, "bus = \"mmc\"", "bus = \"usb\""),
    ("path-leaves-workspace", PRODUCT, "configs/shop.wheels.lock", "../shop.wheels.lock"),
    ("missing-file", PRODUCT, "configs/shop.wheels.lock", "configs/other.wheels.lock"),
    ("missing-template", BOARD, "boot.scr.j2", "boot.cmd.j2"),
    ("missing-overlay", PRODUCT, "[\"plain\"]", "[\"plain\", \"fancy\"]"),
    (
        "default-board-not-listed",
        PRODUCT,
        "default-board = \"sample\"",
        "default-board = \"other\"",
    ),
    ("unknown-board-listed", PRODUCT, "boards = [\"sample\"]", "boards = [\"sample\", \"smaple\"]"),
    ("floor-above-version", PRODUCT, "\"1.0.0\"", "\"2.0.0\""),
    ("warning-above-limit", PRODUCT, "\"80%\"", "\"95%\""),
    ("api-floor", PRODUCT, "thing==1.0\"", "thing==1.0\"\nminimum-version = \"new\""),
    ("api-floor-above", PRODUCT, "thing==1.0\"", "thing==1.0\"\nminimum-version = \"1.1\""),
    ("api-without-version", PRODUCT, "thing==1.0", "thing>=1.0"),
    ("api-with-a-range", PRODUCT, "thing==1.0", "thing==1.*"),
    (
        "package-pattern",
        PRODUCT,
        "packages = [\"systemd\"]",
        "packages = [\"systemd\", \"python3-*\"]",
    ),
    (
        "package-option",
        PRODUCT,
        "packages = [\"systemd\"]",
        "packages = [\"-less\", \"Less\", \"less \"]",
    ),
    ("release-with-passwords", PRODUCT, "authentication = false", "authentication = true"),
    (
        "release-without-password",
        PRODUCT,
        "uid = 1000\npassword = \"locked\"",
        "uid = 1000\npassword = \"empty\"",
    ),
    (
        "password-in-clear",
        PRODUCT,
        "uid = 1000\npassword = \"locked\"",
        "uid = 1000\npassword = \"hunter2\"",
    ),
    ("user-twice", PRODUCT, "name = \"robot\"\nuid = 1000", "name = \"root\"\nuid = 1000"),
    ("uid-twice", PRODUCT, "uid = 1000", "uid = 0"),
    ("uid-of-the-system", PRODUCT, "uid = 1000", "uid = 33"),
    ("uid-out-of-range", PRODUCT, "uid = 1000", "uid = 60000"),
    ("key-epoch-out-of-range", PRODUCT, "\"1.0.0\"", "\"1.0.0\"\nkey-epoch = -1"),
    ("baud-out-of-range", BOARD, "\"ttyS0\"", "\"ttyS0\"\nbaud = 0"),
    ("size-out-of-range", BOARD, "size = \"1GiB\"", "size = \"16777216TiB\""),
    ("address-out-of-range", BOARD, "\"0x0c000000\"", "\"0x10000000000000000\""),
    (
        "qemu-out-of-range",
        BOARD,
        "[memory]",
        "[qemu]\nmachine = \"virt\"\nmemory = \"1GiB\"\ncpus = 0\nbootloader = \"bios\"\n\
         drive = \"virtio\"\nserial-port = 8\nboot-timeout = 1e3\n\n[memory]",
    ),
    (
        "mode-out-of-range",
        "overlays/plain/overlay.toml",
        "\"0755\"",
        "\"10000\"\nuid = 4294967295\ngid = -1",
    ),
    ("percent-out-of-range", PRODUCT, "\"80%\"", "\"101%\""),
    (
        "keys-that-are-none",
        PRODUCT,
        "uid = 1000\n",
        "uid = 1000\nauthorized-keys = [\"configs/shop.toml\", \"configs/shop.wheels.lock\"]\n",
    ),
    ("home-of-the-system", PRODUCT, "uid = 1000\n", "uid = 1000\nhome = \"/var/lib\"\n"),
    ("home-is-the-root", PRODUCT, "uid = 1000\n", "uid = 1000\nhome = \"/\"\n"),
    ("home-is-no-path", PRODUCT, "uid = 1000\n", "uid = 1000\nhome = \"/data/../etc\"\n"),
    (
        "account-with-a-colon",
        PRODUCT,
        "uid = 1000\npassword = \"locked\"\n",
        "uid = 1000\nshell = \"/bin/sh:x\"\ngroups = [\"a,b\"]\npassword = \"$6$hunter2:0\"\n",
    ),
    ("title-of-two-lines", PRODUCT, "\"Shop robot\"", "\"Shop\\nrobot\""),
    ("arch", BOARD, "arch = \"arm64\"", "arch = \"riscv64\""),
    (
        "partition-missing",
        BOARD,
        "role = \"data\"\nfilesystem = \"ext4\"\nsize = \"64MiB\"",
        "role = \"root-c\"\nfilesystem = \"ext4\"\nsize = \"64MiB\"",
    ),
    (
        "wrong-filesystem",
        BOARD,
        "role = \"data\"\nfilesystem = \"ext4\"",
        "role = \"data\"\nfilesystem = \"vfat\"",
    ),
    (
        "slots-differ",
        BOARD,
        "role = \"root-b\"\nfilesystem = \"ext4\"\nsize = \"256MiB\"",
        "role = \"root-b\"\nfilesystem = \"ext4\"\nsize = \"128MiB\"",
    ),
    ("partition-oversized", BOARD, "size = \"1GiB\"", "size = \"512MiB\""),
    ("partitions-overlap", BOARD, "role = \"root-b\"\n", "role = \"root-b\"\nstart = \"100MiB\"\n"),
    ("boot-state-missing", BOARD, "offsets = [\"8MiB\", \"16MiB\"]", "offsets = [\"8MiB\"]"),
    ("boot-state-in-partition", BOARD, "\"16MiB\"", "\"40MiB\""),
    ("boot-state-copies-together", BOARD, "\"16MiB\"", "\"8196KiB\""),
    ("boot-state-beside-the-table", BOARD, "\"8MiB\"", "\"1MiB\""),
    ("boot-state-beside-a-partition", BOARD, "\"16MiB\"", "\"28MiB\""),
    (
        "trust-beside-the-boot-state",
        BOARD,
        "[disk.boot-state]",
        "[disk.trust]\noffsets = [\"12MiB\", \"24MiB\"]\n\n[disk.boot-state]",
    ),
    ("address-beyond-the-smallest", BOARD, "\"0x0c000000\"", "\"0x18000000\""),
    ("addresses-overlap", BOARD, "\"0x0c000000\"", "\"0x09100000\""),
    ("address", BOARD, "\"0x0c000000\"", "\"12M\""),
    ("memory-start", BOARD, "start = \"0x00000000\"", "start = 0"),
    (
        "source-key-of-the-file",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"acme\"\nadress = \"https://a.example/debian\"\nsuite = \"stable\"\n\
             components = [\"main\"]\nkey = \"configs/acme.asc\"\npackages = [\"acme-kernel\"]"
        ),
    ),
    (
        "source-rules",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"security\"\naddress = \"https://a.example/debian\"\nsuite = \"stable\"\n\
             key = \"configs/none.asc\""
        ),
    ),
    (
        "source-twice",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"acme\"\naddress = \"https://a.example/debian/\"\nsuite = \"stable\"\n\
             components = [\"main\"]\nkey = \"configs/acme.asc\"\npackages = [\"acme-*\"]\n\n\
             [[rootfs.sources]]\n\
             name = \"acme\"\naddress = \"http://b.example/x\"\nsuite = \"stable\"\n\
             components = [\"main\"]\nkey = \"configs/acme.asc\"\npackages = [\"acme-*\"]"
        ),
    ),
    (
        "source-with-a-secret-key",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"acme\"\naddress = \"https://a.example/debian\"\nsuite = \"stable\"\n\
             components = [\"main\"]\nkey = \"configs/secret.asc\"\npackages = [\"acme-kernel\"]"
        ),
    ),
    (
        "source-without-a-key",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"acme\"\naddress = \"https://a.example/debian\"\nsuite = \"stable\"\n\
             components = [\"main\"]\nkey = \"configs/shop.toml\"\npackages = [\"acme-kernel\"]"
        ),
    ),
    (
        "source-with-a-password",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"acme\"\naddress = \"https://me:hunter2@a.example/debian\"\nsuite = \"stable\"\n\
             components = [\"main\"]\nkey = \"configs/acme.asc\"\npackages = [\"acme-kernel\"]"
        ),
    ),
    (
        "source-words",
        PRODUCT,
        "[api]\n",
        source!(
            "name = \"acme\"\naddress = \"ftp://a.example/debian\"\nsuite = \"[trusted=yes] x\"\n\
             components = [\"main contrib\"]\nkey = \"../acme.asc\"\npackages = [\"*\", \"Acme\"]"
        ),
    ),
    (
        "source-for-buildroot",
        PRODUCT,
        "engine = \"debian\"\nsuite = \"bookworm\"",
        "engine = \"buildroot\"\nsources = [{ name = \"acme\", address = \"http://a.example\", \
         suite = \"stable\", components = [\"main\"], key = \"configs/acme.asc\", packages = [\"a\"] }]",
    ),
    (
        "kernel-of-the-vendor",
        BOARD,
        "packages = [\"u-boot-sample\"]",
        "packages = [\"u-boot-sample\"]\nkernels = [\"linux-image-acme\"]",
    ),
    ("included-file-missing", BOARD, "arch = ", "include = [\"board/common/none.toml\"]\narch = "),
    ("included-twice", BOARD, "arch = ", "include = [\"board/sample/board.toml\"]\narch = "),
    ("included-board", BOARD, "arch = ", "include = [\"board/other/board.toml\"]\narch = "),
    ("country-that-is-none", PRODUCT, "[network]", "[network]\ncountry = \"UK\""),
    ("console-in-the-line", BOARD, "cmdline = [", "cmdline = [\"console=ttyS3,9600\", "),
    ("console-device", PRODUCT, "kind = ", "console = \"com1\"\nkind = "),
    ("country", PRODUCT, "[network]", "[network]\ncountry = \"Germany\""),
    ("boot-script-missing", BOARD, "compile = \"boot-script\"\n", ""),
    ("boot-script-kind", BOARD, "\"boot-script\"", "\"gzip\""),
    ("boot-file-without-source", BOARD, "template = \"boot.scr.j2\"\n", ""),
    ("boot-file-partition", BOARD, "compile =", "partition = \"data\"\ncompile ="),
    ("template-undefined", "overlays/plain/etc/hostname.j2", "hostname", "hostnmae"),
    // Jinja2 takes methods of Python's; these templates have filters.
    ("template-method", "overlays/plain/etc/hostname.j2", " }}", ".upper() }}"),
    ("template-syntax", "overlays/plain/etc/hostname.j2", " }}", ""),
    (
        "many-at-once",
        PRODUCT,
        "kind = \"release\"\nboards",
        "knd = \"release\"\nkind = \"beta\"\nboards",
    ),
];

fn here() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn resolve(root: &Utf8Path) -> anyhow::Result<()> {
    let config = config::load(root, Some("shop"), None)?;
    let facts = CheckoutFacts { commit: None, modified: false, epoch: 1_700_000_000 };
    let plan = plan::resolve(&config, &facts)?;
    render::render(root, &plan)?;
    Ok(())
}

#[test]
fn the_fixture_itself_is_accepted() {
    resolve(&here().join("fixture")).expect("the fixture resolves and renders");
}

#[test]
fn every_rule_has_its_message() {
    let bless = std::env::var_os("SLIPWAY_BLESS").is_some();
    let mut wrong = Vec::new();
    for (rule, file, find, replace) in CASES {
        let workspace = Workspace::new();
        let root = &workspace.dir;
        let path = root.join(file);
        let text = std::fs::read_to_string(&path).expect("read");
        assert!(text.contains(find), "{rule}: the fixture no longer has {find:?}");
        std::fs::write(&path, text.replacen(find, replace, 1)).expect("written");
        let message = match resolve(root) {
            Ok(()) => {
                wrong.push(format!("{rule}: was accepted"));
                continue;
            }
            Err(error) => format!("{error:#}\n").replace(root.as_str(), "ROOT"),
        };
        assert!(!message.contains("hunter2"), "{rule}: a secret is repeated: {message}");
        let golden = here().join(format!("golden/bad-input/{rule}.txt"));
        if bless {
            std::fs::write(&golden, &message).expect("written");
        }
        let expected = std::fs::read_to_string(&golden).unwrap_or_default();
        if message != expected {
            wrong.push(format!("{rule}: expected\n{expected}but found\n{message}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// As editors of Windows save files.
#[test]
fn a_mark_of_utf_8_and_line_ends_of_windows_change_nothing() {
    let workspace = Workspace::new();
    for path in [PRODUCT, BOARD, "overlays/plain/overlay.toml"] {
        let text = std::fs::read_to_string(workspace.at(path)).expect("read");
        workspace.put(path, format!("\u{feff}{}", text.replace('\n', "\r\n")));
    }
    resolve(&workspace.dir).expect("the same configuration");
    // Places are those that the editor shows.
    let text = std::fs::read_to_string(workspace.at(PRODUCT)).expect("read");
    workspace.put(PRODUCT, text.replace("\"90%\"", "\"190%\""));
    assert!(workspace.refused().starts_with("configs/shop.toml:16: "), "{}", workspace.refused());
}

/// `plan` compares the locks with the product as a build does, after it has shown the plan.
#[test]
fn a_plan_tells_that_a_lock_was_made_for_something_else() {
    let workspace = Workspace::new();
    let plan = |format: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.args(["plan", "--product", "shop", "--format", format]);
        command.env("SOURCE_DATE_EPOCH", "1700000000").current_dir(&workspace.dir);
        let output = command.output().expect("the tool");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let reset = || locks().into_iter().for_each(|(path, text)| workspace.put(path, text));
    let change = |path: &str, from: &str, to: &str| {
        let text = std::fs::read_to_string(workspace.at(path)).expect("read");
        assert!(text.contains(from), "{path} has no {from}");
        workspace.put(path, text.replace(from, to));
    };
    let (code, empty, printed) = plan("text");
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("shop.packages.lock is empty"), "{printed}");
    assert!(printed.ends_with("help: cargo xtask lock --product shop\n"), "{printed}");
    reset();
    let (code, good, printed) = plan("text");
    assert_eq!(code, Some(0), "{printed}");
    assert!(good.contains("inputs") && empty.contains("inputs"), "{empty}");
    const PACKAGES: &str = "configs/shop.packages.lock";
    const WHEELS: &str = "configs/shop.wheels.lock";
    const ONLY_PACKAGES: &str = "help: cargo xtask lock --product shop --only packages\n";
    const ONLY_WHEELS: &str =
        "help: run `cargo xtask lock --product shop --only wheels` and commit the result\n";
    for (path, from, to, expected, help) in [
        (
            PRODUCT,
            "[\"systemd\"]",
            "[\"systemd\", \"less\"]",
            "not in it: package less",
            ONLY_PACKAGES,
        ),
        (
            BOARD,
            "[\"u-boot-sample\"]",
            "[]",
            "only in it: extra package u-boot-sample",
            ONLY_PACKAGES,
        ),
        (PACKAGES, "\"bookworm\"", "\"trixie\"", "not in it: suite bookworm", ONLY_PACKAGES),
        (PRODUCT, "thing==1.0", "thing==1.1", "was made for thing==1.0, the product", ONLY_WHEELS),
        (WHEELS, "3.11.2", "3.12", "the base is ", ONLY_WHEELS),
    ] {
        let before = std::fs::read_to_string(workspace.at(path)).expect("read");
        change(path, from, to);
        for format in ["text", "json"] {
            let (code, shown, printed) = plan(format);
            assert_eq!(code, Some(1), "{to}: {printed}");
            assert!(printed.contains(expected) && printed.ends_with(help), "{to}: {printed}");
            // The plan is whole all the same.
            assert!(shown.contains("inputs"), "{shown}");
        }
        workspace.put(path, before);
    }
    // Both at once, with one command.
    change(PRODUCT, "[\"systemd\"]", "[\"less\"]");
    change(PRODUCT, "thing==1.0", "thing==2");
    let (_, _, printed) = plan("text");
    assert!(
        printed.contains("not in it: package less") && printed.contains("thing==2"),
        "{printed}"
    );
    assert!(printed.ends_with("help: cargo xtask lock --product shop\n"), "{printed}");
}
