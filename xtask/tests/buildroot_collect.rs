//! Which files the engine takes from a finished Buildroot output directory. The directory has Buildroot's layout and
//! the recorded list of packages; its programs consist of ELF headers only.

use crate::common::folder;

use std::io::Write as _;

use camino::{Utf8Path, Utf8PathBuf};
use xtask::rootfs::BaseSystem;
use xtask::rootfs::buildroot::collect::{CollectRequest, collect_base};
use xtask::rootfs::buildroot::info::BuildrootInfo;
use xtask::rootfs::buildroot::make::BuildrootSetup;
use xtask::rootfs::debian::PruneRules;

/// Seconds since 1970; all files of the base carry it.
const EPOCH: u64 = 1_700_000_000;

struct Made {
    _guard: tempfile::TempDir,
    dir: Utf8PathBuf,
    setup: BuildrootSetup,
    info: BuildrootInfo,
}

/// A 64-bit little-endian ELF with one program header of this type.
fn elf(kind: u8) -> Vec<u8> {
    let mut bytes = vec![0; 64 + 56];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (bytes[32], bytes[54], bytes[56], bytes[64]) = (64, 56, 1, kind);
    bytes
}

fn put(path: Utf8PathBuf, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().expect("a directory")).expect("made");
    std::fs::write(&path, bytes).expect("written");
}

fn rootfs(path: &Utf8Path, busybox: &[u8]) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut file = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(EPOCH);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, bytes).expect("added");
    };
    file("./usr/bin/busybox", busybox);
    file("./usr/bin/python3.12", &elf(3));
    file("./usr/lib/libc.so.6", b"\0GNU C Library (Buildroot) stable release version 2.41.\n");
    let dep = b"kernel/fs/fuse/fuse.ko:\nkernel/sound/core/snd.ko: kernel/sound/soundcore.ko\n\
                kernel/sound/soundcore.ko:\n";
    file("./usr/lib/modules/6.6.78/modules.dep", dep);
    file("./usr/lib/modules/6.6.78/kernel/sound/core/snd.ko", &elf(1));
    file("./usr/lib/modules/6.6.78/kernel/sound/soundcore.ko", &elf(1));
    file("./usr/lib/modules/6.6.78/modules.builtin", b"kernel/fs/ext4/ext4.ko\n");
    file("./usr/lib/modules/6.6.78/kernel/fs/fuse/fuse.ko", &elf(1));
    let metadata = b"Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n\ntext\n";
    file("./usr/lib/python3.12/site-packages/numpy-1.26.4.dist-info/METADATA", metadata);
    file("./usr/share/doc/x/README", b"pruned");
    put(path.to_owned(), tar.into_inner().expect("a tar"));
}

fn made() -> Made {
    let (guard, dir) = folder();
    let here = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/buildroot");
    let recorded = std::fs::read_to_string(here.join("show-info.json")).expect("recorded");
    let mut info = BuildrootInfo::parse(&recorded).expect("a list of packages");
    let setup =
        BuildrootSetup::new(&dir, &dir.join("tree"), &dir.join("ours"), "out").expect("folders");
    for entry in info.0.values_mut() {
        // One hash file for each package, with a line for each of its sources.
        entry.hashes = vec![format!("package/{0}/{0}.hash", entry.name).into()];
        let line = |source: &str| format!("sha256  {}  {source}\n", "ab".repeat(32));
        let lines: String = entry.downloads.iter().map(|d| line(&d.source)).collect();
        put(setup.tree.join(&entry.hashes[0]), lines);
    }
    let out = &setup.output;
    put(
        out.join(".config"),
        "BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES=\"$(BR2_EXTERNAL_SLIPWAY_PATH)/linux/a.fragment\"\n",
    );
    put(setup.external.join("linux/a.fragment"), "# why\nCONFIG_EXT4_FS=y\n");
    put(out.join("build/linux-custom/.config"), "CONFIG_EXT4_FS=y\nCONFIG_RD_ZSTD=y\n");
    put(out.join("build/linux-custom/include/config/kernel.release"), "6.6.78\n");
    put(out.join("build/busybox-1.37.0/.config"), "CONFIG_STATIC=y\n");
    put(out.join("build/uboot-2025.01/.config"), "");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(b"a kernel of 21 bytes.").expect("packed");
    put(out.join("images/Image.gz"), gzip.finish().expect("packed"));
    put(out.join("images/u-boot.bin"), "u-boot");
    put(out.join("images/broadcom/bcm2837-rpi-3-b.dtb"), "dtb");
    put(out.join("images/rpi-firmware/start.elf"), "firmware");
    put(out.join("build/packages-file-list.txt"), "busybox,./usr/bin/busybox\n");
    put(out.join("target/usr/bin/busybox"), elf(1));
    rootfs(&out.join("images/rootfs.tar"), &elf(1));
    Made { _guard: guard, dir, setup, info }
}

fn take(made: &Made, trees: &[&str]) -> anyhow::Result<BaseSystem> {
    take_keeping(made, trees, &[])
}

fn take_keeping(made: &Made, trees: &[&str], modules: &[&str]) -> anyhow::Result<BaseSystem> {
    let modules: Vec<String> = modules.iter().map(|m| (*m).to_owned()).collect();
    let trees: Vec<String> = trees.iter().map(|t| (*t).to_owned()).collect();
    let wants = CollectRequest {
        device_trees: &trees,
        firmware: &["rpi-firmware/start.elf".to_owned()],
        bootloader: Some("u-boot.bin"),
        modules: &modules,
        prune: &PruneRules::standard().expect("rules"),
        arch: "arm64",
        epoch: EPOCH,
    };
    collect_base(&made.setup, &made.info, &wants, &made.dir.join("base"))
}

#[test]
fn a_finished_output_folder_becomes_the_base_that_every_engine_yields() {
    let made = made();
    let base = take(&made, &["broadcom/bcm2837-rpi-3-*.dtb"]).expect("a base");
    assert_eq!((base.engine.as_str(), base.kernel_release.as_str()), ("buildroot", "6.6.78"));
    assert_eq!((base.kernel_unpacked_bytes, base.glibc.as_str()), (21, "2.41"));
    assert_eq!(base.dtbs[0].path, "broadcom/bcm2837-rpi-3-b.dtb");
    assert_eq!(base.python.site_packages, "/usr/lib/python3.12/site-packages");
    assert_eq!(base.python.distributions[0].name, "numpy");
    let package = |name: &str| base.packages.iter().find(|p| p.name == name);
    let busybox = package("busybox").expect("in the image");
    assert_eq!((busybox.installed_bytes, busybox.sha256.as_str()), (120, "ab".repeat(32).as_str()));
    assert_eq!(package("linux").expect("a kernel").version, "6.6.78", "not `custom`");
    assert_eq!(busybox.licences, ["GPL-2.0, bzip2-1.0.4"]);
    assert!(busybox.cpe.as_ref().is_some_and(|c| c.starts_with("cpe:2.3:a:busybox:")));
    // libzlib is reached through zlib, which only stands for it; host packages are not part of it.
    assert!(package("kmod").expect("in the image").needs.contains(&"libopenssl".to_owned()));
    for absent in ["zlib", "host-zlib", "skeleton", "toolchain", "slipway-base"] {
        assert!(package(absent).is_none(), "{absent}");
    }
    let listed = |tar: &Utf8Path| -> Vec<String> {
        let mut archive = tar::Archive::new(std::fs::File::open(tar).expect("open"));
        let entries = archive.entries().expect("a tar").map(|e| e.expect("an entry"));
        entries.map(|e| e.path().expect("a path").to_string_lossy().into_owned()).collect()
    };
    let modules = listed(&base.initrd_parts.modules.path);
    assert!(modules.iter().any(|p| p.ends_with("kernel/fs/fuse/fuse.ko")), "{modules:?}");
    let root = listed(&base.rootfs.path);
    assert!(root.iter().any(|p| p.ends_with("modules/6.6.78/modules.dep")), "{root:?}");
    assert!(!root.iter().any(|p| p.ends_with("README")), "{root:?}");
    for file in base.files() {
        assert!(file.starts_with(made.dir.join("base")), "{file} is in the stage's directory");
    }
}

#[test]
fn only_the_modules_that_the_board_keeps_are_in_the_base() {
    let made = made();
    // Buildroot's own depmod; the machine's need not be there. It writes what it finds, as kmod's does.
    let depmod = made.setup.output.join("host/sbin/depmod");
    let text = "#!/bin/sh\nset -e\ncd \"$2/lib/modules/$3\"\n\
                [ ! -e modules.dep ] || mv modules.dep modules.old\n\
                while IFS= read -r line; do [ ! -e \"${line%%:*}\" ] || echo \"$line\"; done \
                <modules.old >modules.dep\nrm modules.old\n";
    put(depmod.clone(), text);
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&depmod, executable).expect("executable");
    // A module, one that is built in, and one that only another engine's kernel has.
    let keep = ["fs/fuse", "fs/ext4/ext4.ko", "drivers/net/wireless/**/mac80211_hwsim.ko"];
    let base = take_keeping(&made, &[], &keep).expect("a base");
    for tar in [&base.rootfs.path, &base.initrd_parts.modules.path] {
        let tree = xtask::rootfs::tree::RootTree::from_tar(tar).expect("a tar");
        let paths: Vec<&str> = tree.iter().map(|(path, _)| path).collect();
        assert!(paths.iter().any(|path| path.ends_with("kernel/fs/fuse/fuse.ko")), "{paths:?}");
        assert!(!paths.iter().any(|path| path.contains("sound")), "{paths:?}");
        let index = paths.iter().find(|path| path.ends_with("modules.dep")).expect("an index");
        assert_eq!(tree.read(index).expect("an index"), b"kernel/fs/fuse/fuse.ko:\n");
    }
    let sound = take_keeping(&made, &[], &["sound/core"]).expect("a base");
    let tree = xtask::rootfs::tree::RootTree::from_tar(&sound.rootfs.path).expect("a tar");
    assert!(
        tree.get("usr/lib/modules/6.6.78/kernel/sound/soundcore.ko").is_some(),
        "needed by snd"
    );
    let error = take_keeping(&made, &[], &["drivers/none"]).expect_err("keeps nothing").to_string();
    assert!(error.contains("no module of this kernel matches an entry"), "{error}");
}

#[test]
fn what_would_not_boot_is_no_base() {
    let made = made();
    let error = |trees: &[&str]| format!("{:#}", take(&made, trees).expect_err("refused"));
    let text = error(&["broadcom/bcm2712-*.dtb"]);
    assert!(text.contains("no device tree matches 'broadcom/bcm2712-*.dtb'"), "{text}");

    rootfs(&made.setup.output.join("images/rootfs.tar"), &elf(3));
    let text = error(&[]);
    assert!(text.contains("busybox is linked dynamically"), "{text}");

    put(
        made.setup.external.join("linux/a.fragment"),
        "# why\nCONFIG_EXT4_FS=y\nCONFIG_WATCHDOG=y\n",
    );
    let text = error(&[]);
    assert!(text.contains("linux/a.fragment:3: CONFIG_WATCHDOG=y"), "{text}");
    assert!(text.contains("linux has: no symbol of that name"), "{text}");
}
