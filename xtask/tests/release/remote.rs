//! Stores elsewhere: a real `sshd` with and without a shell, a real S3 protocol (moto's server, from the
//! package index), and readers of a real web server with the commands of `docs/reference/release-store.md`.

use crate::common::{find, good, make_program, noise, root};

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use camino::Utf8PathBuf;

use super::support::{Bench, Reader, Server, ended, free_port, killed_anywhere, remote_kills};

/// An `sshd` whose only user is this process's.
struct Host {
    server: Server,
    options: Vec<String>,
    user: String,
}

impl Host {
    /// `more`: further lines of its configuration.
    fn new(bench: &Bench, more: &str) -> Self {
        let dir = &bench.dir;
        for name in ["user", "host"] {
            let mut keygen = Command::new(find("ssh-keygen"));
            let path = dir.join(name);
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path.as_str()]);
            good(keygen.output().unwrap());
        }
        // Root's sshd wants it; a package's own service makes it otherwise.
        if rustix::process::getuid().is_root() {
            fs::create_dir_all("/run/sshd").unwrap();
        }
        let port = free_port();
        let config = dir.join("sshd_config");
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {dir}/host\n\
             AuthorizedKeysFile {dir}/user.pub\nPidFile none\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             PermitRootLogin prohibit-password\nMaxStartups 100\n\
             Subsystem sftp internal-sftp\n{more}\n"
        );
        fs::write(&config, text).unwrap();
        let mut sshd = Command::new(find("sshd"));
        sshd.args(["-D", "-e", "-f", config.as_str()]);
        let server = Server::start(sshd, port, &dir.join("sshd.log"));
        let known = format!("UserKnownHostsFile={dir}/known_hosts");
        let options = [format!("IdentityFile={dir}/user"), "IdentitiesOnly=yes".to_owned(), known];
        let user = good(Command::new("id").arg("-un").output().unwrap());
        Self { server, options: options.into(), user: user.trim().to_owned() }
    }

    fn publish(&self, bench: &Bench, from: &str, to: &str) -> Command {
        let path = bench.dir.join(to);
        let target = format!("ssh://{}@127.0.0.1:{}{path}", self.user, self.server.port);
        let mut command = bench.xtask(&["publish", &target, "--from", from]);
        for option in &self.options {
            command.args(["--ssh-option", option]);
        }
        command
    }
}

#[test]
fn settings_for_people_do_not_stop_publishing() {
    let bench = Bench::new();
    let host = Host::new(&bench, "");
    bench.release(&bench.store("one"), "one", "1.0.0");
    let config = bench.dir.join("ssh_config");
    let text = "Host *\n RemoteCommand tmux\n RequestTTY force\n StdinNull yes\n ForkAfterAuthentication yes\n \
                PermitLocalCommand yes\n LocalCommand echo connected\n";
    fs::write(&config, text).unwrap();
    let bin = bench.dir.join("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["ssh", "sftp"] {
        let real = find(name);
        let script = format!("#!/bin/sh\nexec {real} -F '{config}' \"$@\"\n");
        make_program(&bin.join(name), script);
    }
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    good(host.publish(&bench, "one", "public").env("PATH", path).output().unwrap());
    assert_eq!(Reader::of_folder(bench.keys(), bench.dir.join("public")).read().len(), 1);
}

#[test]
fn over_sftp_publishers_may_be_killed_and_may_meet() {
    let bench = Bench::new();
    let host = Host::new(&bench, "");
    for name in ["one", "two"] {
        bench.release(&bench.store(name), name, "1.0.0");
    }
    let read = |name: &str| Reader::of_folder(bench.keys(), bench.dir.join(name)).read().len();
    let publish = |name: &str| host.publish(&bench, "one", name);
    killed_anywhere(remote_kills(), publish, read, |name| bench.dir.join(name).exists());
    let pair = ["one", "two"].map(|from| host.publish(&bench, from, "target").spawn().unwrap());
    pair.into_iter().for_each(|child| ended(child, false));
    assert_eq!(read("target"), 2);
}

#[test]
fn a_host_without_a_shell_will_do_and_one_that_is_gone_is_named() {
    let bench = Bench::new();
    bench.release(&bench.store("local"), "robot", "1.0.0");
    let host = Host::new(&bench, "ForceCommand internal-sftp");
    good(host.publish(&bench, "local", "target").output().unwrap());
    let printed = good(host.publish(&bench, "local", "target").output().unwrap());
    assert!(printed.contains("nothing new"), "{printed}");
    let reader = Reader::of_folder(bench.keys(), bench.dir.join("target"));
    assert_eq!(reader.read().len(), 1);
    let nobody = format!("ssh://127.0.0.1:{}/srv", free_port());
    let message = bench.refused(&["publish", &nobody, "--from", "local"]);
    assert!(message.contains("Connection refused") && message.contains("help: try"), "{message}");
    for bad in ["ssh://host/a b", "ssh://-oProxyCommand=x/srv", "ftp://host/x", "s3:///x"] {
        let message = bench.refused(&["publish", bad, "--from", "local"]);
        assert!(message.contains("help: "), "{bad}: {message}");
    }
}

/// moto's buckets are private, but any signature will do there.
const SIGNED: &str = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, \
                      SignedHeaders=host, Signature=0";

/// A reader of a web server.
fn get(url: &str) -> Option<Vec<u8>> {
    let mut response = ureq::get(url).header("Authorization", SIGNED).call().ok()?;
    response.body_mut().read_to_vec().ok()
}

#[test]
fn in_a_bucket_publishers_may_be_killed_and_may_meet_while_readers_read() {
    let bench = Bench::new();
    let (_server, endpoint) = Server::s3(&bench.dir);
    ureq::put(format!("{endpoint}/robots")).send_empty().unwrap();
    let publish = |from: &str, to: &str| {
        let target = format!("s3://{to}");
        let mut command =
            bench.xtask(&["publish", &target, "--from", from, "--endpoint", &endpoint]);
        command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "a secret of tests");
        command
    };
    let reader = |place: &str| {
        let base = format!("{endpoint}/{place}");
        Reader::new(bench.keys(), move |path| get(&format!("{base}/{path}")))
    };
    let stores = [("one", bench.store("one")), ("two", bench.store("two"))];
    for (name, store) in &stores {
        bench.release(store, name, "1.0.1");
    }
    // A directory of the bucket for each publisher that is killed (ListObjectsV2 finds out what is
    // there).
    let folder = |name: &str| format!("robots/{name}");
    let begun = |name: &str| {
        let listed = get(&format!("{endpoint}/robots?list-type=2&prefix={name}/")).unwrap();
        !String::from_utf8(listed).unwrap().contains("<KeyCount>0<")
    };
    let read = |name: &str| reader(&folder(name)).read().len();
    killed_anywhere(remote_kills(), |name| publish("one", &folder(name)), read, begun);
    let both = folder("releases");
    let done = AtomicBool::new(false);
    let (keys, base) = (bench.keys(), format!("{endpoint}/{both}"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let reader = Reader::new(keys, |path| get(&format!("{base}/{path}")));
            while !done.load(Ordering::Relaxed) {
                reader.read();
            }
        });
        for round in 2..=3 {
            for (name, store) in &stores {
                bench.release(store, name, &format!("1.0.{round}"));
            }
            let pair = ["one", "two"].map(|from| publish(from, &both).spawn().unwrap());
            pair.into_iter().for_each(|child| ended(child, false));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(reader(&both).read().len(), 2 * 3);
    let again = publish("one", &both).output().unwrap();
    assert!(good(again).contains("nothing new"));
    let mut nobody = publish("one", "no-such-bucket/releases");
    let message = String::from_utf8(nobody.output().unwrap().stderr).unwrap();
    assert!(message.contains("NoSuchBucket") && message.contains("help: "), "{message}");
    assert!(!message.contains("a secret of tests") && !message.contains("X-Amz"), "{message}");
}

/// The commands of the documentation, as they stand there.
fn documented() -> String {
    let page = fs::read_to_string(root().join("docs/reference/release-store.md")).unwrap();
    let (_, rest) = page.split_once("```sh\n").expect("a shell block");
    rest.split_once("\n```").expect("its end").0.to_owned()
}

#[test]
fn a_web_server_and_standard_tools_are_enough_to_read() {
    let bench = Bench::new();
    let local = bench.store("local");
    bench.release(&local, "robot", "1.0.0");
    bench.release(&local, "robot", "1.1.0");
    bench.good(&["publish", "www", "--from", "local"]);
    let (dir, port) = (&bench.dir, free_port());
    let config = dir.join("nginx.conf");
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("{name}_temp_path '{dir}/tmp-{name}';\n"))
        .collect();
    let text = format!(
        "daemon off;\nmaster_process off;\npid '{dir}/nginx.pid';\nerror_log stderr;\nevents {{}}\nhttp {{\n\
         access_log off;\n{temporary}server {{ listen 127.0.0.1:{port}; root '{dir}/www'; }}\n}}\n"
    );
    fs::write(&config, text).unwrap();
    let mut nginx = Command::new(find("nginx"));
    nginx.args(["-e", "stderr", "-c", config.as_str()]);
    let _server = Server::start(nginx, port, &dir.join("nginx.log"));
    let base = format!("http://127.0.0.1:{port}");
    let reader = Reader::new(bench.keys(), |path| get(&format!("{base}/{path}")));
    assert_eq!(reader.read().len(), 2);

    let key = &bench.keys().keys[0];
    let public: Utf8PathBuf = dir.join("keys").join(format!("development-1-{}.pub", key.id));
    let run_in = |name: &str, channel: &str| {
        let work = dir.join(name);
        fs::create_dir_all(&work).unwrap();
        let environment: BTreeMap<_, _> = [
            ("BASE", base.as_str()),
            ("KEY", public.as_str()),
            ("CHANNEL", channel),
            ("PRODUCT", "robot"),
            ("BOARD", "one"),
            ("ROLE", "part-3"),
        ]
        .into();
        let mut shell = Command::new("bash");
        shell.args(["-c", &documented()]).current_dir(&work).envs(environment);
        (work, shell.output().unwrap())
    };
    let run = |name: &str| run_in(name, "nightly");
    // Another channel's index under this one's name, well signed.
    fs::copy(dir.join("www/channels/nightly.json"), dir.join("www/channels/stable.json")).unwrap();
    let (work, output) = run_in("mixed", "stable");
    assert!(!output.status.success() && !work.join("release.json").exists(), "{output:?}");
    let (work, output) = run("good");
    good(output);
    let name = "robot-1.1.0-part-3";
    assert_eq!(fs::read(work.join(name)).unwrap(), noise(64 << 10, "robot1.1.03"));
    // One letter of the index, one byte of the object: each is noticed.
    let index = dir.join("www/channels/nightly.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("1.1.0", "1.1.9")).unwrap();
    let (work, output) = run("forged");
    assert!(!output.status.success() && !work.join(name).exists());
    fs::write(&index, text).unwrap();
    let sha256 = xtask::artifact::hash_bytes(&noise(64 << 10, "robot1.1.03"));
    let object = dir.join("www").join(xtask::store::format::object_path(&sha256));
    fs::write(&object, "something else").unwrap();
    let (work, output) = run("damaged");
    assert!(!output.status.success() && !work.join(name).exists());
}
