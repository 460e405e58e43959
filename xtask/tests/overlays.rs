//! Unintended files in overlays and configuration directories: pipes, links out of them, junk of
//! editors, pointers of git-lfs, line ends of Windows. Each is rejected with the file's name, or
//! ignored; nothing hangs.

use crate::fixture_support;

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use fixture_support::Workspace;
use xtask::config;
use xtask::render::OverlayContent;

const FOLDER: &str = "overlays/plain/etc";

/// What is placed on the robot, by its path.
fn targets(workspace: &Workspace) -> Vec<String> {
    let rendered = workspace.render().expect("it renders");
    rendered.overlay.into_iter().map(|entry| entry.target).collect()
}

#[test]
fn what_is_no_file_is_refused_and_not_opened() {
    let workspace = Workspace::new();
    let path = workspace.at(&format!("{FOLDER}/strange"));
    let fifo = || assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo").success());
    let socket = || drop(UnixListener::bind(&path).expect("a socket"));
    let device = || {
        // Only root makes devices.
        let made = Command::new("mknod").args([path.as_str(), "c", "1", "3"]).output();
        if !made.is_ok_and(|output| output.status.success()) {
            fifo();
        }
    };
    let makers: [&dyn Fn(); 3] = [&fifo, &socket, &device];
    for make in makers {
        make();
        let began = Instant::now();
        let error = workspace.refused();
        assert!(
            error.contains(&format!("{FOLDER}/strange: a pipe, a socket or a device")),
            "{error}"
        );
        assert!(error.contains("help: remove it"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(60), "the build waits for a writer");
        fs::remove_file(&path).expect("removed");
    }
    // Where files are listed by name.
    assert!(
        Command::new("mkfifo")
            .arg(workspace.at("configs/pipe.toml"))
            .status()
            .expect("mkfifo")
            .success()
    );
    assert_eq!(config::list_products(&workspace.dir).expect("listed"), ["shop"]);
}

#[test]
fn links_stay_links_and_lead_nowhere_else() {
    let workspace = Workspace::new();
    let path = workspace.at(&format!("{FOLDER}/link"));
    let own = workspace.at("configs/shop.toml");
    for (target, allowed) in [
        ("/data/x", true),
        ("hostname", true),
        ("../usr/lib/x", true),
        ("../../usr", false),
        ("../../../../configs/shop.toml", false),
        ("../a/../../b", false),
        (own.as_str(), false),
    ] {
        symlink(target, &path).expect("linked");
        match allowed {
            true => {
                let rendered =
                    workspace.render().unwrap_or_else(|error| panic!("{target}: {error:#}"));
                let entry = rendered.overlay.iter().find(|entry| entry.target == "etc/link");
                let content = &entry.expect("the link").content;
                assert!(matches!(content, OverlayContent::Symlink(to) if to == target), "{target}");
            }
            false => {
                let error = workspace.refused();
                assert!(
                    error.contains(&format!("{FOLDER}/link: the link points to {target}")),
                    "{error}"
                );
            }
        }
        fs::remove_file(&path).expect("removed");
    }
    // An overlay that is a link is not in the repository, whatever its target is.
    fs::rename(workspace.at("overlays/plain"), workspace.at("elsewhere")).expect("moved");
    symlink("../elsewhere", workspace.at("overlays/plain")).expect("linked");
    assert!(workspace.refused().contains("the overlay `plain` is a symbolic link"));
}

#[test]
fn junk_is_passed_over_and_named() {
    let workspace = Workspace::new();
    let before = targets(&workspace);
    let junk =
        [".DS_Store", "._hostname", "hostname.j2~", "#hostname.j2#", ".hostname.j2.swp", "x.pyc"];
    for name in junk {
        workspace.put(&format!("{FOLDER}/{name}"), "x\n");
    }
    workspace.put(&format!("{FOLDER}/__pycache__/a.cpython-311.pyc"), "x");
    // A lock of Emacs leads to nothing.
    symlink("me@host.12:34", workspace.at(&format!("{FOLDER}/.#hostname.j2"))).expect("linked");
    // What a submodule has in it.
    workspace.put("overlays/plain/.git", "gitdir: ../../.git/modules/plain\n");
    assert_eq!(targets(&workspace), before);
    let config = config::load(&workspace.dir, Some("shop"), None).expect("loaded");
    assert_eq!(config.overlays[0].junk.len(), junk.len() + 2, "{:?}", config.overlays[0].junk);
    for name in [".#shop.toml", "._shop.toml", "#shop.toml#"] {
        symlink("me@host.12:34", workspace.at(&format!("configs/{name}"))).expect("linked");
    }
    assert_eq!(config::list_products(&workspace.dir).expect("listed"), ["shop"]);
}

#[test]
fn a_pointer_is_not_the_file() {
    let workspace = Workspace::new();
    let pointer = format!(
        "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 9\n",
        "0".repeat(64)
    );
    workspace.put("overlays/plain/srv/model.bin", pointer);
    let error = workspace.refused();
    assert!(
        error.contains("overlays/plain/srv/model.bin: the file is a pointer of git-lfs"),
        "{error}"
    );
    assert!(
        error.contains("help: fetch the file itself: `git lfs install && git lfs pull`"),
        "{error}"
    );
}

#[test]
fn no_line_ends_of_windows_reach_their_readers() {
    for (path, content) in [
        ("overlays/plain/usr/lib/slipway/step", "#!/bin/sh\r\necho\r\n"),
        ("overlays/plain/opt/tool", "#!/usr/bin/python3\r\n"),
        ("overlays/plain/opt/tool.j2", "#!/bin/sh\r\necho {{ product.name }}\r\n"),
        ("overlays/plain/etc/systemd/system/a.service", "[Service]\r\nExecStart=/bin/true\r\n"),
        ("overlays/plain/usr/lib/systemd/system-preset/1.preset", "enable a.service\r\n"),
        ("overlays/plain/etc/fstab", "\u{feff}/dev/root / ext4 ro 0 0\n"),
        ("board/common/boot.scr.j2", "echo a\r\necho b\r\n"),
        ("board/common/init", "#!/bin/busybox sh\r\n"),
    ] {
        let workspace = Workspace::new();
        workspace.render().expect("before");
        workspace.put(path, content);
        let error = workspace.refused();
        assert!(
            error.contains(path) && error.contains("help: save the file with Unix line ends"),
            "{path}: {error}"
        );
        workspace.put(path, content.replace(['\r', '\u{feff}'], ""));
        workspace.render().unwrap_or_else(|error| panic!("{path}: {error:#}"));
    }
}

#[test]
fn a_mistake_in_the_default_product_is_what_is_told() {
    let workspace = Workspace::new();
    let text = fs::read_to_string(workspace.at("configs/shop.toml")).expect("read");
    workspace.put("configs/other.toml", text.replace("name = \"shop\"", "name = \"other\""));
    let text = format!("default = true\n{text}");
    workspace.put("configs/shop.toml", &text);
    assert_eq!(config::default_product(&workspace.dir).expect("found"), "shop");
    let refused =
        || format!("{:#}", config::default_product(&workspace.dir).expect_err("a mistake"));
    workspace.put("configs/shop.toml", text.replace("\"1.2.0\"", "\"1.2\""));
    let error = refused();
    assert!(error.contains("configs/shop.toml:") && error.contains("version = \"1.2\""), "{error}");
    let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    workspace.put("configs/shop.toml", wide);
    assert!(refused().contains("reading configs/shop.toml"), "{}", refused());
    // Another one's mistakes are not the default's.
    workspace.put("configs/shop.toml", &text);
    workspace.put("configs/other.toml", "version = = 1\n");
    assert_eq!(config::default_product(&workspace.dir).expect("found"), "shop");
    // Without any, there is none.
    workspace.put("configs/shop.toml", text.replace("default = true\n", ""));
    fs::remove_file(workspace.at("configs/other.toml")).expect("removed");
    assert!(
        refused().contains("no product was given, and there is no default product"),
        "{}",
        refused()
    );
}

/// Values of people, in the files that a shell, systemd and agetty read.
#[test]
fn generated_files_keep_any_title() {
    let workspace = Workspace::new();
    let product = fs::read_to_string(workspace.at("configs/shop.toml")).expect("read");
    let shipped = camino::Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../overlays/base/etc");
    for name in ["os-release.j2", "issue.j2"] {
        workspace.put(&format!("{FOLDER}/{name}"), fs::read(shipped.join(name)).expect("read"));
    }
    for title in
        ["Shop robot", "The \"Bench\" $HOME robot", "`id` $(id) \\n 'a'; b # c", "Zoë's {{ 1 }}"]
    {
        let line = format!("title = {}", toml::Value::String(title.to_owned()));
        workspace.put("configs/shop.toml", product.replace("title = \"Shop robot\"", &line));
        let rendered = workspace.render().unwrap_or_else(|error| panic!("{title}: {error:#}"));
        let file = |target: &str| {
            let entry = rendered.overlay.iter().find(|entry| entry.target == target).expect(target);
            let OverlayContent::File(bytes) = &entry.content else { panic!("{target}: no file") };
            String::from_utf8(bytes.clone()).expect("UTF-8")
        };
        let path = workspace.at("os-release");
        fs::write(&path, file("etc/os-release")).expect("written");
        let printed = Command::new("sh")
            .args([
                "-eu",
                "-c",
                ". \"$1\"; printf '%s\\n%s\\n' \"$NAME\" \"$PRETTY_NAME\"",
                "sh",
                path.as_str(),
            ])
            .output()
            .expect("sh");
        assert_eq!(String::from_utf8_lossy(&printed.stdout), format!("{title}\n{title} 1.2.0\n"));
        // agetty(8) reads `\n` as the host's name, and `\\` as a backslash.
        let issue = file("etc/issue");
        assert!(issue.starts_with(&format!("{} 1.2.0 ", title.replace('\\', "\\\\"))), "{issue}");
    }
}
