//! Stores at `https://…`: a real server (nginx) with a generated certificate (openssl).

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use camino::Utf8Path;

use super::get::machine;
use super::support::{Bench, free_port};
use crate::common::archive::Server;
use crate::common::{find, good};

/// nginx; it ends with this value.
struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        self.0.kill().expect("nginx runs until now");
        self.0.wait().expect("it ended");
    }
}

fn openssl(dir: &Utf8Path, words: &str) {
    good(Command::new(find("openssl")).args(words.split(' ')).current_dir(dir).output().unwrap());
}

/// An authority, `ca.pem`, and a certificate of it for 127.0.0.1.
fn certificate(dir: &Utf8Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    let config = "[req]\ndistinguished_name = name\n[name]\n[authority]\nbasicConstraints = critical,CA:TRUE\n\
                  [here]\nbasicConstraints = CA:FALSE\nsubjectAltName = IP:127.0.0.1\n";
    fs::write(dir.join("openssl.cnf"), config).unwrap();
    openssl(
        dir,
        &format!(
            "req -x509 -config openssl.cnf {key} -extensions authority -subj /CN=ca -keyout ca.key -out ca.pem"
        ),
    );
    openssl(
        dir,
        &format!("req -config openssl.cnf {key} -subj /CN=here -keyout here.key -out here.csr"),
    );
    openssl(
        dir,
        "x509 -req -in here.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile openssl.cnf -extensions here \
         -out here.pem",
    );
}

/// Serves a directory. `/plain/…` is moved to `http`, `/moved/…` to the same server.
fn serve(dir: &Utf8Path, http: &str) -> (Nginx, String) {
    certificate(dir);
    let port = free_port();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path '{dir}/tmp-{name}';\n"));
    let config = format!(
        "daemon off;\nmaster_process off;\npid '{dir}/nginx.pid';\nerror_log stderr;\nevents {{}}\nhttp {{\n{}\
         access_log off;\nserver {{ listen 127.0.0.1:{port} ssl; root '{dir}';\n\
         ssl_certificate '{dir}/here.pem';\nssl_certificate_key '{dir}/here.key';\n\
         location ~ ^/plain/(.*)$ {{ return 302 http://me:hunter2@{http}/store/$1?token=hunter3; }}\n\
         location ~ ^/moved/(.*)$ {{ return 302 https://127.0.0.1:{port}/store/$1; }} }} }}\n",
        temporary.concat()
    );
    fs::write(dir.join("nginx.conf"), config).unwrap();
    let log = fs::File::create(dir.join("nginx.log")).unwrap();
    let mut command = Command::new(find("nginx"));
    command.args(["-e", "stderr", "-c", dir.join("nginx.conf").as_str()]);
    let mut server = Nginx(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        let printed = fs::read_to_string(dir.join("nginx.log")).unwrap();
        assert!(server.0.try_wait().unwrap().is_none(), "nginx ended: {printed}");
        assert!(started.elapsed() < Duration::from_secs(120), "nginx does not listen: {printed}");
        std::thread::sleep(Duration::from_millis(20));
    }
    (server, format!("https://127.0.0.1:{port}"))
}

#[test]
fn https_remains_https_and_the_authorities_are_those_that_were_named() {
    let bench = Bench::new();
    bench.release(&bench.store("store"), "robot", "1.0.0");
    let plain = Server::start(&bench.dir).unwrap();
    let host = plain.address.strip_prefix("http://").unwrap();
    let (_nginx, address) = serve(&bench.dir, host);
    let machine = machine(&bench);
    let authority = bench.dir.join("ca.pem");
    let list = |store: &str, authorities: &str| {
        let address = format!("{address}/{store}");
        let mut command = machine.command(&["release", "list", "--store", &address]);
        command.env("SSL_CERT_FILE", authorities).output().unwrap()
    };
    for store in ["store", "moved"] {
        assert!(good(list(store, authority.as_str())).contains("robot 1.0.0"), "{store}");
    }
    let refused = |store: &str, authorities: &str, words: &[&str]| {
        let output = list(store, authorities);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        for word in words {
            assert!(message.contains(word), "no `{word}` in {message}");
        }
        assert!(!message.contains("hunter"), "{message}");
    };
    let from = format!("{address}/plain");
    let to = format!("http://{host}/store/channels/");
    refused("plain", authority.as_str(), &[&from, "redirects to", &to, "not encrypted", "help: "]);
    assert_eq!(plain.log(), [""; 0]);
    // A mistyped file is not the same as none.
    let missing = bench.dir.join("ca.pme");
    refused("store", missing.as_str(), &[missing.as_str(), "help: ", "SSL_CERT_FILE"]);
    refused("store", bench.dir.as_str(), &["is a directory", "SSL_CERT_FILE"]);
    let empty = bench.dir.join("openssl.cnf");
    refused("store", empty.as_str(), &["contains no certificate", "SSL_CERT_FILE"]);
}
