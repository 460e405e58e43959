//! What a build records about its commit, under the settings of users, hooks and ignore rules of git: they change nothing
//! in the record, and hide no file that becomes part of an image.

use crate::common::{copy, folder, make_program, root, text};
use crate::fixture_support;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Stdio};

use camino::{Utf8Path, Utf8PathBuf};
use fixture_support::{fixture, locks};
use serde_json::Value;
use xtask::git;

/// Set for the process that makes a second checkout: from where, which commit, to where.
const CHECKOUT: &str = "TEST_GIT_CHECKOUT";

/// A repository with the fixture's workspace, and a home of its own.
struct Rig {
    _keep: tempfile::TempDir,
    dir: Utf8PathBuf,
}

impl Rig {
    fn new() -> Self {
        let (_keep, dir) = folder();
        let rig = Self { _keep, dir };
        fs::create_dir(rig.dir.join("home")).expect("made");
        copy(&fixture(), &rig.work()).expect("copied");
        rig.put("overlays/plain/etc/tool", "#!/bin/sh\n");
        for (path, text) in locks() {
            rig.put(path, &text);
        }
        symlink("hostname", rig.work().join("overlays/plain/etc/link")).expect("linked");
        rig.git(&["init", "--quiet", "--initial-branch=main"]);
        rig.commit();
        rig
    }

    fn work(&self) -> Utf8PathBuf {
        self.dir.join("work")
    }

    fn put(&self, path: &str, content: &str) {
        let path = self.work().join(path);
        fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs::write(path, content).expect("written");
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // The variables of the caller of the tests do not matter.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("GIT_")) {
            command.env_remove(name);
        }
        command.current_dir(self.work()).env("HOME", self.dir.join("home")).stdin(Stdio::null());
        command.env_remove("XDG_CONFIG_HOME").env_remove("SOURCE_DATE_EPOCH");
        command
    }

    fn git(&self, words: &[&str]) -> String {
        let who = ["-c", "user.name=A", "-c", "user.email=a@example.org"];
        let output = self.command("git").args(who).args(words).output().expect("git runs");
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    }

    fn commit(&self) -> String {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "-m", "One"]);
        self.git(&["rev-parse", "HEAD"])
    }

    /// What `plan` says of the commit: its name, whether there are changes, the time.
    fn plan(&self, environment: &[(&str, &str)]) -> (String, bool, u64) {
        self.plan_in(&self.work(), environment)
    }

    /// As [`Rig::plan`], of another checkout of the repository.
    fn plan_in(&self, dir: &Utf8Path, environment: &[(&str, &str)]) -> (String, bool, u64) {
        let mut command = self.command(env!("CARGO_BIN_EXE_xtask"));
        command.args(["plan", "--product", "shop", "--format", "json"]).current_dir(dir);
        let output = command.envs(environment.iter().copied()).output().expect("the tool");
        assert!(output.status.success(), "{environment:?}: {}", text(&output.stderr));
        let plan: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let commit = plan["commit"].as_str().expect("a commit").to_owned();
        (
            commit,
            plan["modified"].as_bool().expect("a word"),
            plan["epoch"].as_u64().expect("a time"),
        )
    }

    /// Adds a submodule of the name `sub`; its one file.
    fn submodule(&self, path: &str) -> Utf8PathBuf {
        let from = self.dir.join("sub");
        fs::create_dir(&from).expect("made");
        fs::write(from.join("file"), "x\n").expect("written");
        self.git(&["-C", from.as_str(), "init", "--quiet", "--initial-branch=main"]);
        self.git(&["-C", from.as_str(), "add", "--all"]);
        self.git(&["-C", from.as_str(), "commit", "--quiet", "-m", "One"]);
        let add = ["-c", "protocol.file.allow=always", "submodule", "--quiet", "add"];
        self.git(&[&add[..], &["--name", "sub", from.as_str(), path]].concat());
        self.work().join(path).join("file")
    }

    fn is_modified(&self) -> bool {
        self.plan(&[]).1
    }

    fn configure(&self, text: &str) {
        fs::write(self.dir.join("home/.gitconfig"), text).expect("written");
    }
}

#[test]
fn settings_of_the_user_change_nothing() {
    let rig = Rig::new();
    let key = rig.dir.join("key");
    let made = rig
        .command("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f", key.as_str()])
        .status();
    assert!(made.expect("ssh-keygen runs").success());
    let signing = format!("user.signingKey={key}");
    rig.git(&[
        "-c",
        "gpg.format=ssh",
        "-c",
        &signing,
        "commit",
        "--quiet",
        "--allow-empty",
        "-S",
        "-m",
        "Signed",
    ]);
    let plain = rig.plan(&[]);
    assert!(!plain.1 && plain.0 == rig.git(&["rev-parse", "HEAD"]), "{plain:?}");
    let everything = rig.dir.join("everything");
    fs::write(&everything, "*\n").expect("written");
    for settings in [
        "[log]\n showSignature = true\n[gpg]\n format = ssh\n".to_owned(),
        "[log]\n showSignature = true\n[gpg \"ssh\"]\n allowedSignersFile = /no/such/file\n"
            .to_owned(),
        "[status]\n showUntrackedFiles = no\n short = true\n branch = true\n".to_owned(),
        "[color]\n ui = always\n[core]\n quotePath = true\n pager = false\n".to_owned(),
        "[format]\n pretty = fuller\n[log]\n date = relative\n decorate = full\n follow = true\n"
            .to_owned(),
        format!(
            "[core]\n excludesFile = {everything}\n fsmonitor = true\n untrackedCache = true\n"
        ),
        "[core]\n autocrlf = true\n eol = crlf\n fileMode = false\n".to_owned(),
        "[diff]\n external = /bin/false\n noprefix = true\n[status]\n renames = false\n".to_owned(),
        "[i18n]\n logOutputEncoding = UTF-16\n".to_owned(),
    ] {
        rig.configure(&settings);
        assert_eq!(rig.plan(&[]), plain, "{settings}");
    }
}

#[test]
fn what_hooks_have_in_their_environment_changes_nothing() {
    let rig = Rig::new();
    let plain = rig.plan(&[]);
    let other = Rig::new();
    other.put("configs/more.fragment", "");
    other.commit();
    let (dir, work) = (other.work().join(".git"), other.work());
    let index = dir.join("index");
    let hook = [
        ("GIT_DIR", dir.as_str()),
        ("GIT_WORK_TREE", work.as_str()),
        ("GIT_INDEX_FILE", index.as_str()),
        ("GIT_COMMON_DIR", dir.as_str()),
        ("GIT_OBJECT_DIRECTORY", "/no/such/objects"),
        ("GIT_PREFIX", "configs/"),
        ("GIT_NAMESPACE", "x"),
        ("GIT_QUARANTINE_PATH", "/no/such/folder"),
    ];
    assert_eq!(rig.plan(&hook), plain);
    let settings = [
        ("GIT_CONFIG_COUNT", "2"),
        ("GIT_CONFIG_KEY_0", "status.showUntrackedFiles"),
        ("GIT_CONFIG_VALUE_0", "no"),
        ("GIT_CONFIG_KEY_1", "log.showSignature"),
        ("GIT_CONFIG_VALUE_1", "true"),
    ];
    assert_eq!(rig.plan(&settings), plain);
    rig.put("overlays/plain/etc/new.conf", "");
    assert!(rig.plan(&settings).1 && rig.plan(&hook).1, "a new file is hidden");
    fs::remove_file(rig.work().join("overlays/plain/etc/new.conf")).expect("removed");
    // A second checkout is made of this repository, and the hook's own stays on its branch.
    let to = rig.dir.join("second");
    let mut command =
        rig.command(std::env::current_exe().expect("this program").to_str().expect("UTF-8"));
    command.args(["--exact", "git::makes_a_second_checkout", "--nocapture"]).envs(hook);
    let output = command
        .env(CHECKOUT, format!("{} {} {to}", rig.work(), plain.0))
        .output()
        .expect("this program");
    assert!(output.status.success(), "{}", text(&output.stdout) + &text(&output.stderr));
    assert_eq!(other.git(&["symbolic-ref", "HEAD"]), "refs/heads/main");
    assert!(to.join("configs/shop.toml").is_file());
    assert!(!to.join("configs/more.fragment").exists());
    assert_eq!(git::changed_files(&to, &plain.0).expect("compared"), Vec::<String>::new());
}

/// Run by the test above, in a process with a hook's variables.
#[test]
fn makes_a_second_checkout() {
    let Ok(words) = std::env::var(CHECKOUT) else { return };
    let words: Vec<&str> = words.split(' ').collect();
    git::create_checkout(words[0].into(), words[1], words[2].into()).expect("a checkout");
}

#[test]
fn nothing_that_a_build_reads_is_hidden() {
    let new = "overlays/plain/etc/new.conf";
    let old = "overlays/plain/etc/tool";
    let append = |rig: &Rig, path: &str, line: &str| {
        let path = rig.work().join(path);
        let text = fs::read_to_string(&path).expect("read");
        fs::write(&path, text + line).expect("written");
    };
    type Change<'a> = (&'static str, &'a dyn Fn(&Rig));
    let changes: [Change<'_>; 20] = [
        ("a new file", &|rig| rig.put(new, "a\n")),
        ("one that is not to be shown", &|rig| {
            rig.put(new, "a\n");
            rig.configure("[status]\n showUntrackedFiles = no\n");
        }),
        ("one that the user ignores", &|rig| {
            rig.put(new, "a\n");
            fs::write(rig.dir.join("ignore"), "*.conf\n").expect("written");
            rig.configure(&format!("[core]\n excludesFile = {}\n", rig.dir.join("ignore")));
        }),
        ("one that this clone ignores", &|rig| {
            rig.put(new, "a\n");
            fs::write(rig.work().join(".git/info/exclude"), "*.conf\n").expect("written");
        }),
        ("one that the repository ignores", &|rig| {
            rig.put(".gitignore", "*.conf\n");
            rig.commit();
            rig.put(new, "a\n");
        }),
        ("one that was added", &|rig| {
            rig.put(new, "a\n");
            rig.git(&["add", new]);
        }),
        ("an edited file", &|rig| append(rig, old, "true\n")),
        ("one that is assumed to be unchanged", &|rig| {
            rig.git(&["update-index", "--assume-unchanged", old]);
            append(rig, old, "true\n");
        }),
        ("one that is skipped", &|rig| {
            rig.git(&["update-index", "--skip-worktree", old]);
            append(rig, old, "true\n");
        }),
        ("a removed file", &|rig| fs::remove_file(rig.work().join(old)).expect("removed")),
        ("a mode that git does not look at", &|rig| {
            rig.git(&["config", "core.fileMode", "false"]);
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(rig.work().join(old), mode).expect("a mode");
        }),
        ("line ends that git takes for its own", &|rig| {
            fs::write(rig.work().join(".git/info/attributes"), "* text eol=crlf\n")
                .expect("written");
            fs::remove_file(rig.work().join("configs/shop.fragment")).expect("removed");
            rig.git(&["checkout", "--", "configs/shop.fragment"]);
            let text = fs::read_to_string(rig.work().join("configs/shop.fragment")).expect("read");
            assert!(text.contains('\r'), "git has made no line ends: {text:?}");
        }),
        ("a filter of git's", &|rig| {
            append(rig, old, "true\n");
            rig.git(&["config", "filter.hide.clean", "sed /true/d"]);
            fs::write(rig.work().join(".git/info/attributes"), "tool filter=hide\n")
                .expect("written");
        }),
        ("a link with another target", &|rig| {
            let link = rig.work().join("overlays/plain/etc/link");
            fs::remove_file(&link).expect("removed");
            symlink("tool", &link).expect("linked");
        }),
        ("a link instead of a file", &|rig| {
            let path = rig.work().join("configs/shop.fragment");
            fs::rename(&path, rig.dir.join("elsewhere")).expect("moved");
            symlink(rig.dir.join("elsewhere"), &path).expect("linked");
        }),
        ("a link that the commit has, to what it does not have", &|rig| {
            fs::write(rig.dir.join("elsewhere"), "").expect("written");
            symlink(rig.dir.join("elsewhere"), rig.work().join("configs/outside")).expect("linked");
            rig.commit();
        }),
        ("one that a file monitor keeps to itself", &|rig| {
            let monitor = rig.dir.join("monitor");
            make_program(&monitor, "#!/bin/sh\nprintf 'token\\0'\n");
            rig.git(&["config", "core.fsmonitor", monitor.as_str()]);
            rig.git(&["status"]);
            append(rig, old, "true\n");
            assert_eq!(rig.git(&["status", "--porcelain"]), "", "git has seen it");
        }),
        ("a file of a submodule that is not to be looked at", &|rig| {
            let file = rig.submodule("overlays/plain/srv/sub");
            rig.git(&["config", "-f", ".gitmodules", "submodule.sub.ignore", "all"]);
            rig.commit();
            assert!(!rig.is_modified(), "a submodule is a change");
            fs::write(file, "other\n").expect("written");
            assert_eq!(rig.git(&["status", "--porcelain"]), "", "git has seen it");
        }),
        ("a file that a submodule's own clone ignores", &|rig| {
            let file = rig.submodule("overlays/plain/srv/sub");
            rig.commit();
            let exclude = rig.work().join(".git/modules/sub/info/exclude");
            fs::write(exclude, "*.conf\n").expect("written");
            fs::write(file.with_file_name("new.conf"), "x\n").expect("written");
        }),
        ("another commit in this one's place", &|rig| {
            let head = rig.git(&["rev-parse", "HEAD"]);
            append(rig, old, "true\n");
            let second = rig.commit();
            rig.git(&["reset", "--quiet", "--soft", &head]);
            rig.git(&["replace", &head, &second]);
        }),
    ];
    for (name, change) in changes {
        let rig = Rig::new();
        assert!(!rig.is_modified(), "{name}: before");
        change(&rig);
        assert!(rig.is_modified(), "{name}: it is called the commit's");
    }
}

#[test]
fn what_no_build_reads_is_no_change() {
    let rig = Rig::new();
    for path in [
        "notes.txt",
        "dist/shop/x",
        "target/y",
        "overlays/plain/etc/.DS_Store",
        "configs/.shop.toml.swp",
    ] {
        rig.put(path, "x\n");
    }
    symlink("me@host.1234", rig.work().join("configs/.#shop.toml")).expect("linked");
    assert!(!rig.is_modified());
    // Latin-1, as old machines name files; git and the disk have the same bytes.
    let name = std::ffi::OsStr::from_bytes(b"notes-\xfc.txt");
    fs::write(rig.work().as_std_path().join(name), "x\n").expect("written");
    rig.commit();
    assert!(!rig.is_modified());
    fs::write(rig.work().as_std_path().join(name), "y\n").expect("written");
    assert!(rig.is_modified());
    rig.git(&["checkout", "--quiet", "."]);
    assert!(!rig.is_modified());
    // A file that git-lfs has fetched: the commit has a pointer with the file's SHA-256.
    rig.put("overlays/plain/srv/model", "weights\n");
    let sum = xtask::artifact::hash_bytes(b"weights\n");
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sum}\nsize 8\n");
    rig.git(&["config", "filter.lfs.clean", &format!("printf '%s' '{pointer}'")]);
    rig.git(&["config", "filter.lfs.smudge", "printf 'weights\\n'"]);
    rig.put(".gitattributes", "srv/model filter=lfs\noverlays/plain/srv/model filter=lfs\n");
    rig.commit();
    assert!(rig.git(&["show", "HEAD:overlays/plain/srv/model"]).starts_with("version https"));
    assert!(!rig.is_modified());
    rig.put("overlays/plain/srv/model", "other\n");
    assert!(rig.is_modified());
}

/// A sparse checkout has less than the commit, and all that a build of its products reads.
#[test]
fn what_a_sparse_checkout_leaves_out_is_no_change_where_no_build_reads_it() {
    let rig = Rig::new();
    for path in ["docs/page.md", "overlays/fancy/etc/x", "board/other/board.toml", "top.txt"] {
        rig.put(path, "x\n");
    }
    rig.commit();
    let there = |path: &str| rig.work().join(path).exists();
    let folders = ["board/common", "board/sample", "configs", "overlays/plain"];
    for index in ["--no-sparse-index", "--sparse-index"] {
        rig.git(&[&["sparse-checkout", "set", "--cone", index][..], &folders].concat());
        assert!(!there("docs") && !there("overlays/fancy") && !there("board/other"), "{index}");
        assert!(there("overlays/plain/etc/tool") && there("top.txt"), "{index}");
        assert!(!rig.is_modified(), "{index}");
        // What comes back with another content is a change again, and so is a file that was removed.
        rig.put("docs/page.md", "y\n");
        assert!(rig.is_modified(), "{index}: a file that was left out and is there");
        fs::remove_dir_all(rig.work().join("docs")).expect("removed");
        fs::remove_file(rig.work().join("top.txt")).expect("removed");
        assert!(rig.is_modified(), "{index}: a removed file");
        rig.git(&["checkout", "--quiet", "--", "top.txt"]);
        assert!(!rig.is_modified(), "{index}");
    }
    // A part of what a build takes whole.
    for pattern in ["!/overlays/plain/etc/tool", "!/configs/shop.fragment", "!*.j2"] {
        rig.git(&["sparse-checkout", "set", "--no-cone", "/*", "!/docs/", pattern]);
        assert!(!there("docs") && there("overlays/fancy"), "{pattern}");
        let changed = git::changed_files(&rig.work(), "HEAD").expect("compared");
        assert!(!changed.is_empty(), "{pattern}: it is called the commit's");
        assert!(!changed.iter().any(|path| path.starts_with("docs")), "{changed:?}");
    }
    rig.git(&["sparse-checkout", "disable"]);
    assert!(there("docs") && !rig.is_modified());
}

#[test]
fn a_linked_worktree_is_compared_with_its_own_commit() {
    let rig = Rig::new();
    let first = rig.plan(&[]);
    let tree = rig.dir.join("tree");
    rig.git(&["worktree", "add", "--quiet", "-b", "other", tree.as_str()]);
    assert_eq!(rig.plan_in(&tree, &[]), first);
    fs::write(tree.join("overlays/plain/etc/tool"), "#!/bin/sh\ntrue\n").expect("written");
    assert!(rig.plan_in(&tree, &[]).1 && !rig.plan(&[]).1);
    rig.git(&["-C", tree.as_str(), "commit", "--quiet", "--all", "-m", "Two"]);
    let second = rig.plan_in(&tree, &[]);
    assert!(second.0 != first.0 && !second.1, "{second:?}");
    assert_eq!(rig.plan(&[]), first);
    // What a worktree's hook has in its environment, git started in the other one.
    let dir = rig.work().join(".git/worktrees/tree");
    let hook = [("GIT_DIR", dir.as_str()), ("GIT_WORK_TREE", tree.as_str())];
    assert_eq!(rig.plan(&hook), first);
    assert_eq!(rig.git(&["-C", tree.as_str(), "symbolic-ref", "HEAD"]), "refs/heads/other");
}

#[test]
fn the_time_of_outputs_is_any_number_of_seconds() {
    let rig = Rig::new();
    for (text, time) in [
        ("0", 0),
        (" 1 ", 1),
        ("4294967296", 1 << 32),
        ("253402300800", 253_402_300_800),
        ("18446744073709551615", u64::MAX),
    ] {
        assert_eq!(rig.plan(&[("SOURCE_DATE_EPOCH", text)]).2, time, "{text}");
    }
    let commits = rig.plan(&[]).2;
    assert_eq!(rig.plan(&[("SOURCE_DATE_EPOCH", " ")]).2, commits);
    for text in ["-1", "1.5", "18446744073709551616", "1e9"] {
        let mut command = rig.command(env!("CARGO_BIN_EXE_xtask"));
        command.args(["plan", "--product", "shop"]).env("SOURCE_DATE_EPOCH", text);
        let output = command.output().expect("the tool");
        let printed = self::text(&output.stderr);
        let expected = format!("expected seconds since 1970, found \"{text}\"");
        assert!(!output.status.success() && printed.contains(&expected), "{printed}");
    }
}

#[test]
fn a_checkout_may_lie_in_a_folder_of_any_name() {
    let rig = Rig::new();
    let plain = rig.plan(&[]);
    let odd = rig.dir.join("it's a \"bot\", 100%25 [x] $HOME; ü:b");
    fs::rename(rig.work(), &odd).expect("moved");
    // What a command starts in.
    fs::create_dir(rig.work()).expect("made");
    assert_eq!(rig.plan_in(&odd, &[]), plain);
    let mut command = rig.command(env!("CARGO_BIN_EXE_xtask"));
    command.args(["plan", "--product", "shop"]).env_remove("HOME").current_dir(&odd);
    let output = command.output().expect("the tool");
    assert!(output.status.success(), "without HOME: {}", text(&output.stderr));
    fs::write(odd.join("overlays/plain/etc/tool"), "").expect("written");
    assert!(rig.plan_in(&odd, &[]).1, "an edited file");
    let to = rig.dir.join("second, it's");
    git::create_checkout(&odd, &plain.0, &to).expect("a checkout");
    assert_eq!(git::changed_files(&to, &plain.0).expect("compared"), Vec::<String>::new());
}

#[test]
fn a_workspace_below_a_repositorys_top_is_compared_there() {
    let rig = Rig::new();
    let top = rig.dir.join("top");
    fs::create_dir(&top).expect("made");
    copy(&fixture(), &top.join("robot")).expect("copied");
    let git = |words: &[&str]| {
        let mut command = rig.command("git");
        command.args(["-c", "user.name=A", "-c", "user.email=a@example.org"]).args(words);
        let output = command.current_dir(&top).output().expect("git runs");
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    git(&["init", "--quiet"]);
    git(&["add", "--all"]);
    git(&["commit", "--quiet", "-m", "One"]);
    let commit = git(&["rev-parse", "HEAD"]);
    let root = top.join("robot");
    assert_eq!(git::changed_files(&root, &commit).expect("compared"), Vec::<String>::new());
    fs::write(root.join("overlays/plain/etc/new"), "x").expect("written");
    assert_eq!(git::changed_files(&root, &commit).expect("compared"), ["overlays/plain/etc/new"]);
}

/// A clone on a machine that is set up for Windows has the same bytes.
#[test]
fn no_checkout_has_other_line_ends() {
    let rig = Rig::new();
    fs::copy(root().join(".gitattributes"), rig.work().join(".gitattributes")).expect("copied");
    rig.commit();
    let clone = rig.dir.join("clone");
    let settings = ["-c", "core.autocrlf=true", "-c", "core.eol=crlf", "clone", "--quiet"];
    rig.git(&[&settings[..], &[rig.work().as_str(), clone.as_str()]].concat());
    for path in ["overlays/plain/etc/tool", "configs/shop.toml", "board/common/boot.scr.j2"] {
        let (ours, theirs) = (fs::read(rig.work().join(path)), fs::read(clone.join(path)));
        assert_eq!(theirs.expect("cloned"), ours.expect("there"), "{path}");
    }
}
