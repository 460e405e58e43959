//! Bundles over https: a real server (nginx) with generated certificates (openssl), known and unknown authorities,
//! expired and future certificates, and connections that break.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bundle::bootstate::Slot;
use common::{Plan, Robot, answer, bundle_of, new_system, old_system};

const MIB: u64 = 1 << 20;

/// The configuration of `openssl ca`.
const AUTHORITY: &str = "\
[req]\ndistinguished_name = name\n[name]\n\
[authority]\nbasicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign\n\
[here]\nbasicConstraints = CA:FALSE\nsubjectAltName = IP:127.0.0.1\n\
[elsewhere]\nbasicConstraints = CA:FALSE\nsubjectAltName = DNS:elsewhere.test\n\
[ca]\ndatabase = index.txt\nserial = serial\nnew_certs_dir = .\ndefault_md = sha256\nunique_subject = no\npolicy = any\n\
[any]\ncommonName = supplied\n";

fn openssl(dir: &Path, words: &str) {
    let output = Command::new("openssl")
        .args(words.split(' '))
        .current_dir(dir)
        .output()
        .expect("this test needs openssl");
    assert!(output.status.success(), "{words}: {output:?}");
}

/// Makes an authority, and certificates of it for servers: a name, what is in it, from when, until when.
fn authority(dir: &Path, called: &str, servers: &[(&str, &str, &str, &str)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("openssl.cnf"), AUTHORITY).unwrap();
    fs::write(dir.join("index.txt"), "").unwrap();
    let key = "-config openssl.cnf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(
        dir,
        &format!(
            "req -x509 {key} -extensions authority -subj /CN={called} -days 30 -keyout ca.key -out ca.pem"
        ),
    );
    for (name, extensions, from, until) in servers {
        openssl(dir, &format!("req {key} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
        openssl(
            dir,
            &format!(
                "ca -batch -notext -rand_serial -config openssl.cnf -name ca -cert ca.pem -keyfile ca.key \
                 -extensions {extensions} -startdate {from} -enddate {until} -in {name}.csr -out {name}.pem"
            ),
        );
    }
}

/// A running web server; it ends with this value.
struct Nginx {
    child: Child,
    dir: tempfile::TempDir,
    /// The port of each certificate, in the order in which they were given.
    ports: Vec<u16>,
}

impl Nginx {
    /// Serves a bundle once with each certificate: the directory of its authority, and its name.
    fn start(dir: tempfile::TempDir, bundle: &[u8], certificates: &[(&str, &str)]) -> Self {
        let top = dir.path();
        fs::create_dir(top.join("www")).unwrap();
        fs::write(top.join("www/update.bundle"), bundle).unwrap();
        let free: Vec<TcpListener> =
            certificates.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<u16> = free.iter().map(|l| l.local_addr().unwrap().port()).collect();
        drop(free);
        let shown = top.display();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path '{shown}/tmp-{name}';\n"));
        let servers = ports.iter().zip(certificates).map(|(port, (folder, name))| {
            format!(
                "server {{ listen 127.0.0.1:{port} ssl; root '{shown}/www';\n\
                 ssl_certificate '{shown}/{folder}/{name}.pem';\n\
                 ssl_certificate_key '{shown}/{folder}/{name}.key';\n\
                 location = /plain {{ return 302 http://127.0.0.1:{port}/update.bundle; }}\n\
                 location = /moved {{ return 302 /update.bundle; }} }}\n"
            )
        });
        let config = format!(
            "daemon off;\nmaster_process off;\npid '{shown}/nginx.pid';\nerror_log stderr;\nevents {{}}\nhttp {{\n\
             log_format requests '$status $http_range';\naccess_log '{shown}/access.log' requests;\n{}{}}}\n",
            temporary.concat(),
            servers.collect::<String>()
        );
        fs::write(top.join("nginx.conf"), config).unwrap();
        let log = fs::File::create(top.join("nginx.log")).unwrap();
        let child = Command::new("nginx")
            .args(["-e", "stderr", "-c"])
            .arg(top.join("nginx.conf"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("this test needs nginx");
        let server = Self { child, dir, ports };
        let started = Instant::now();
        while !server.ports.iter().all(|port| TcpStream::connect(("127.0.0.1", *port)).is_ok()) {
            let log = fs::read_to_string(server.dir.path().join("nginx.log")).unwrap();
            assert!(started.elapsed() < Duration::from_secs(30), "nginx does not start: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn address(&self, certificate: usize) -> String {
        format!("https://127.0.0.1:{}/update.bundle", self.ports[certificate])
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The master process ends its workers.
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap_or_default();
        drop(self.child.wait());
    }
}

/// Forwards connections to the ports in order, then always to the last one, and breaks each after this many bytes.
/// Returns its own port, and a count of the connections.
fn breaking(to: Vec<u16>, after: u64) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    std::thread::spawn(move || {
        for client in listener.incoming().map(Result::unwrap) {
            let number = counted.fetch_add(1, Ordering::Relaxed).min(to.len() - 1);
            let server = TcpStream::connect(("127.0.0.1", to[number])).unwrap();
            let (mut asking, mut asked) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || drop(std::io::copy(&mut asking, &mut asked)));
            std::thread::spawn(move || {
                let mut client = client;
                drop(std::io::copy(&mut (&server).take(after), &mut client));
                drop(client.flush());
                drop(client.shutdown(Shutdown::Both));
                drop(server.shutdown(Shutdown::Both));
            });
        }
    });
    (port, count)
}

const NOW: (&str, &str) = ("20200101000000Z", "20491231000000Z");

fn refusal(robot: &Robot, address: &str) -> (i32, String, String, String) {
    let output = robot.command(&["install", address]).output().unwrap();
    let refused = answer(&output)["refused"].clone();
    let word = |name: &str| refused[name].as_str().unwrap().to_owned();
    (output.status.code().unwrap(), word("code"), word("message"), word("help"))
}

#[test]
fn only_servers_of_a_known_authority_are_believed() {
    let dir = tempfile::tempdir().unwrap();
    let servers = [
        ("good", "here", NOW.0, NOW.1),
        ("old", "here", "20100101000000Z", "20110101000000Z"),
        // As on a robot whose clock is in the past.
        ("later", "here", "20480101000000Z", NOW.1),
        ("other", "elsewhere", NOW.0, NOW.1),
    ];
    authority(&dir.path().join("lab"), "lab", &servers);
    authority(&dir.path().join("stranger"), "stranger", &servers[..1]);
    authority(&dir.path().join("namesake"), "lab", &servers[..1]);
    let certificates = [
        ("lab", "good"),
        ("lab", "old"),
        ("lab", "later"),
        ("lab", "other"),
        ("stranger", "good"),
        ("namesake", "good"),
    ];
    let new = new_system(MIB, 1);
    let nginx = Nginx::start(dir, &bundle_of(&new), &certificates);
    let lab = fs::read(nginx.dir.path().join("lab/ca.pem")).unwrap();
    let robot = Plan { size: MIB, ..Plan::default() }.make();
    let check = |certificate: usize, message: &str, help: &str| {
        let (exit, code, printed, advice) = refusal(&robot, &nginx.address(certificate));
        assert_eq!((exit, code.as_str()), (5, "bad-certificate"), "{printed}");
        assert!(printed.contains(message), "{printed}");
        assert!(advice.contains(help) && advice.contains("by its own signature"), "{advice}");
        assert_eq!(robot.slot(Slot::B), old_system(Slot::B, MIB), "something was written");
        assert_eq!(robot.state().trial, None);
    };
    // Mozilla's list has neither of them.
    check(0, "not issued by an authority", "/data/identity/ca.d");
    robot.file("data/identity/ca.d/lab.pem", &lab);
    check(1, "expired", "clock");
    check(2, "not valid yet", "clock");
    check(3, "not valid for name", "use the server name");
    check(4, "not issued by an authority", "/data/identity/ca.d");
    check(5, "not issued by an authority", "/data/identity/ca.d");
    robot.run(&["verify", &nginx.address(0)]);
    // A request over https is never redirected to http.
    robot.run(&["verify", &nginx.address(0).replace("update.bundle", "moved")]);
    let (exit, code, printed, _) =
        refusal(&robot, &nginx.address(0).replace("update.bundle", "plain"));
    assert_eq!((exit, code.as_str()), (5, "source"));
    assert!(printed.contains("from https to http://127.0.0.1:"), "{printed}");
    robot.run(&["install", "--no-restart", &nginx.address(0)]);
    assert_eq!(robot.slot(Slot::B), new);
    robot.run(&["roll-back"]);

    // An authority of the image; several in one file; other files are ignored.
    fs::remove_file(robot.path("data/identity/ca.d/lab.pem")).unwrap();
    robot.file("data/identity/ca.d/README", "not a certificate");
    let stranger = fs::read(nginx.dir.path().join("stranger/ca.pem")).unwrap();
    robot.file("etc/slotd/ca.d/both.crt", [stranger, lab].concat());
    robot.run(&["verify", &nginx.address(0)]);
    robot.run(&["verify", &nginx.address(4)]);

    // An invalid file is reported, not ignored.
    for text in ["", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        robot.file("data/identity/ca.d/broken.pem", text);
        let (exit, code, printed, _) = refusal(&robot, &nginx.address(0));
        assert_eq!((exit, code.as_str()), (5, "bad-certificate"));
        assert!(printed.contains("data/identity/ca.d/broken.pem"), "{printed}");
    }
}

#[test]
fn a_broken_connection_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let good = [("good", "here", NOW.0, NOW.1)];
    authority(&dir.path().join("lab"), "lab", &good);
    authority(&dir.path().join("stranger"), "stranger", &good);
    let new = new_system(4 * MIB, 2);
    let certificates = [("lab", "good"), ("stranger", "good")];
    let nginx = Nginx::start(dir, &bundle_of(&new), &certificates);
    let robot = Plan::default().make();
    let lab = fs::read(nginx.dir.path().join("lab/ca.pem")).unwrap();
    robot.file("data/identity/ca.d/lab.pem", lab);
    // Another server answers the second request: the install stops and can be resumed later.
    let (port, connections) = breaking(nginx.ports.clone(), 600_000);
    let (exit, code, ..) = refusal(&robot, &format!("https://127.0.0.1:{port}/update.bundle"));
    assert_eq!((exit, code.as_str()), (5, "bad-certificate"));
    assert_eq!((connections.load(Ordering::Relaxed), robot.state().trial), (2, None));

    let (port, connections) = breaking(vec![nginx.ports[0]], 600_000);
    robot.run(&["install", &format!("https://127.0.0.1:{port}/update.bundle")]);
    assert_eq!(robot.slot(Slot::B), new);
    let count = connections.load(Ordering::Relaxed);
    assert!(count > 3, "{count} connections");
    // Nothing was requested from the unknown server.
    let log = fs::read_to_string(nginx.dir.path().join("access.log")).unwrap();
    assert!(log.lines().count() <= count + 1, "{log}");
    let ranges = log.lines().filter(|line| line.starts_with("206 bytes=")).count();
    assert!(ranges > 2, "{log}");
}
