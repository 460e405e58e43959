//! Which users may log in with a key on `data`: the shipped settings and the shipped step that makes the
//! host key, with the real sshd on the loopback address. sshd reads the keys with the rights of the user
//! who logs in, so the modes of the directories matter.

use crate::common::rights::is_root;
use crate::common::{find, root};
use crate::overlay_support;

use std::fs::{self, Permissions};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use overlay_support::{Robot, plans};
use xtask::plan::{Plan, UserPlan};

const SETTINGS: &str = "etc/ssh/sshd_config.d/10-slipway.conf";
const LONG: Duration = Duration::from_secs(60);

/// sshd, whose `/data` is a robot's: all directories above are root's, as sshd wants them.
struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().expect("sshd runs until now");
        self.child.wait().expect("it ended");
    }
}

impl Server {
    fn new(robot: &Robot) -> Self {
        let port = xtask::qemu::free_port(0).expect("a port");
        // The robot's directory as /mnt, in a private mount namespace: sshd does not trust files
        // below /tmp.
        let settings =
            robot.read(SETTINGS).replace(" /data/", " /mnt/data/").replace(" /etc/", " /mnt/etc/");
        let sshd = find("sshd");
        let mut more = format!("Port {port}\nListenAddress 127.0.0.1\nPidFile none\nUsePAM no\n");
        // From OpenSSH 9.8 on, a source whose logins fail is turned away for a while (sshd_config(5)); here they fail on purpose.
        let penalties = "PerSourcePenalties=no";
        let known = Command::new(&sshd).args(["-t", "-f", "/dev/null", "-o", penalties]).output();
        let known = known.expect("sshd runs");
        if !String::from_utf8_lossy(&known.stderr).contains("Bad configuration option") {
            more += "PerSourcePenalties no\n";
        }
        robot.put("sshd_config", &(more + &settings));
        fs::set_permissions(robot.at(""), Permissions::from_mode(0o755)).expect("a mode");
        let log = fs::File::create(robot.at("sshd.log")).expect("a log");
        let mut child = Command::new("unshare")
            .args([
                "--mount",
                "--",
                "sh",
                "-c",
                // sshd wants a directory below /run, which may be another user's. Where shadow cannot be read, nss-systemd
                // says that these accounts are locked.
                "mount --bind \"$1\" /mnt && mount -t tmpfs -o mode=755 none /run && \
                 mkdir -m 755 /run/sshd && \
                 printf '%s:*:1::::::\\n' root nobody sshd >/run/shadow && \
                 mount --bind /run/shadow /etc/shadow && shift && exec \"$@\"",
                "sh",
            ])
            .args([robot.at("").as_str(), sshd.as_str(), "-D", "-e", "-f", "/mnt/sshd_config"])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("unshare runs");
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = robot.read("sshd.log");
            assert!(child.try_wait().expect("a child").is_none(), "sshd ended: {log}");
            assert!(began.elapsed() < LONG, "sshd does not listen: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, port }
    }

    /// Whether a key is taken. What the user's shell does then is another matter: `nobody` has none.
    fn takes(&self, robot: &Robot, user: &str, key: &str) -> bool {
        let count =
            || robot.read("sshd.log").matches(&format!("Accepted publickey for {user} ")).count();
        let before = count();
        let output = Command::new("ssh")
            .args(["-T", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"])
            .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", "-p"])
            .args([&self.port.to_string(), "-i", robot.at(key).as_str()])
            .args([&format!("{user}@127.0.0.1"), "true"])
            .stdin(Stdio::null())
            .output()
            .expect("ssh runs");
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        // The home directory may be closed, too: that is said in other words.
        let denied = printed.contains("Permission denied (");
        assert!(denied != (count() > before), "{printed}{}", robot.read("sshd.log"));
        !denied
    }
}

fn mode(robot: &Robot, path: &str) -> u32 {
    fs::metadata(robot.at(path)).expect(path).permissions().mode() & 0o7777
}

fn chmod(robot: &Robot, path: &str, mode: u32) {
    fs::set_permissions(robot.at(path), Permissions::from_mode(mode)).expect(path);
}

/// What the page says about who may log in.
const PAGE: &str = "docs/reference/robot.md";

/// One line of the page's table, from what the product is and what its sshd answers.
fn row(robot: &Robot, plan: &Plan, user: &UserPlan) -> String {
    let name = &user.name;
    let console = "etc/systemd/system/serial-getty@.service.d/10-autologin.conf";
    let by_itself = robot.at(console).exists()
        && robot.read(console).contains(&format!(" --autologin {name} "));
    let console = match (by_itself, user.password.as_str()) {
        (true, _) => "logs in by itself, on the serial console",
        (false, "locked") => "no",
        (false, _) => "with a password",
    };
    let output = Command::new(find("sshd"))
        .args(["-T", "-C", &format!("user={name},host=laptop,addr=169.254.7.7"), "-f"])
        .arg(robot.at("sshd_config"))
        .output()
        .expect("sshd runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    let setting = |key: &str| {
        let line = printed.lines().find_map(|line| line.strip_prefix(&format!("{key} ")));
        line.unwrap_or_else(|| panic!("no {key}: {printed}"))
    };
    let may = name != "root" || setting("permitrootlogin") != "no";
    let with_key = setting("pubkeyauthentication") == "yes";
    let with_word = setting("passwordauthentication") != "no" && user.password != "locked";
    let mut ssh = match (may, with_key, with_word) {
        (true, true, false) => "with a key".to_owned(),
        (true, _, true) => "with a password".to_owned(),
        _ => "no".to_owned(),
    };
    if setting("forcecommand") == "/usr/bin/slotd door" {
        ssh += ", for `slotd door` only";
    }
    let (product, kind) = (&plan.product.name, plan.product.kind);
    format!("| `{name}` | `{product}` ({kind}) | {console} | {ssh} |")
}

#[test]
fn the_table_of_who_may_log_in_is_true() {
    // Root's sshd wants it.
    if rustix::process::geteuid().is_root() {
        fs::create_dir_all("/run/sshd").expect("made");
    }
    let (folder, mut rows) = (tempfile::tempdir().expect("a directory"), Vec::new());
    let key = folder.path().join("key");
    let mut keygen = Command::new("ssh-keygen");
    keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key);
    assert!(keygen.status().expect("ssh-keygen runs").success());
    for plan in plans() {
        let robot = Robot::new(&plan);
        // Only asked what it would do: with a host key of this machine.
        let kept = "/data/identity/ssh/ssh_host_ed25519_key";
        let key = key.to_str().expect("UTF-8");
        robot.put("sshd_config", &robot.read(SETTINGS).replace(kept, key));
        rows.extend(plan.users.iter().map(|user| row(&robot, &plan, user)));
    }
    let page = fs::read_to_string(root().join(PAGE)).expect(PAGE);
    let (_, table) = page.split_once("| user | product | console | SSH |\n").expect("the table");
    let mut told: Vec<&str> =
        table.lines().skip(1).take_while(|line| line.starts_with('|')).collect();
    rows.sort();
    told.sort_unstable();
    assert_eq!(rows, told, "left: the products; right: {PAGE}");
}

const FOLDER: &str = "data/identity/ssh";

/// A robot as earlier versions have left it: the directory is root's alone, and there are keys of
/// two users.
fn robot() -> Robot {
    let robot = Robot::development();
    for user in ["root", "nobody"] {
        let path = robot.at(user);
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"])
            .arg(&path)
            .status()
            .expect("ssh-keygen runs");
        assert!(made.success());
        let public = robot.read(&format!("{user}.pub"));
        robot.put(&format!("{FOLDER}/authorized_keys.d/{user}"), &public);
        chmod(&robot, &format!("{FOLDER}/authorized_keys.d/{user}"), 0o600);
    }
    chmod(&robot, FOLDER, 0o700);
    chmod(&robot, "data", 0o755);
    robot
}

#[test]
fn the_modes_that_sshd_needs_are_set_in_each_start() {
    let robot = robot();
    for _ in 0..2 {
        assert_eq!(robot.step("ssh-keys", &[]), "");
        for folder in ["data/identity", FOLDER, &format!("{FOLDER}/authorized_keys.d")] {
            assert_eq!(mode(&robot, folder), 0o755, "{folder}");
        }
        for (file, expected) in [
            ("ssh_host_ed25519_key", 0o600),
            ("ssh_host_ed25519_key.pub", 0o644),
            ("authorized_keys.d/root", 0o644),
            ("authorized_keys.d/nobody", 0o644),
        ] {
            assert_eq!(mode(&robot, &format!("{FOLDER}/{file}")), expected, "{file}");
        }
        let made = robot.read(&format!("{FOLDER}/ssh_host_ed25519_key"));
        assert!(made.contains("PRIVATE KEY"));
        // As a restored backup or a user may leave them.
        chmod(&robot, &format!("{FOLDER}/authorized_keys.d/nobody"), 0o666);
        chmod(&robot, &format!("{FOLDER}/ssh_host_ed25519_key"), 0o644);
        chmod(&robot, FOLDER, 0o700);
    }
}

#[test]
fn root_and_another_user_log_in_with_keys_on_data() {
    // Only root's sshd serves another user than the one who runs it.
    if !is_root("login::root_and_another_user_log_in_with_keys_on_data") {
        return;
    }
    let robot = robot();
    robot.step("ssh-keys", &[]);
    let server = Server::new(&robot);
    assert!(server.takes(&robot, "root", "root"));
    assert!(server.takes(&robot, "nobody", "nobody"), "a key of a user who is not root");
    // Each key is its user's own.
    assert!(!server.takes(&robot, "root", "nobody"));
    assert!(!server.takes(&robot, "nobody", "root"));
    // A file that others can write is not trusted; and an unreachable file is treated as missing.
    let keys = format!("{FOLDER}/authorized_keys.d/nobody");
    chmod(&robot, &keys, 0o666);
    assert!(!server.takes(&robot, "nobody", "nobody"));
    chmod(&robot, &keys, 0o644);
    assert!(server.takes(&robot, "nobody", "nobody"));
    chmod(&robot, FOLDER, 0o700);
    assert!(!server.takes(&robot, "nobody", "nobody"), "sshd reads keys as the user");
}
