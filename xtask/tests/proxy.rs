//! The robot's proxy on a hostile network: the real nginx with the shipped configuration, in which only the addresses are
//! changed. Clients send as little and as slowly as possible, from one address and from many. Health checks are still
//! answered, and the memory and connections of all clients together stay within bounds.

use crate::common::find;
use crate::overlay_support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use overlay_support::{Robot, plans};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

/// Where a stranger's patience and a slow machine's ends: nothing here waits for it when all is well.
const LONG: Duration = Duration::from_secs(120);
/// What the configuration promises, docs/reference/robot.md "Bounds".
const OF_ONE: usize = 16;
const OF_ALL: usize = 96;
const BODIES: u64 = 32 << 20;
const MEMORY_KIB: u64 = 128 << 10;

/// nginx, and an API server behind it that answers at once. Both end with this value.
struct Proxy {
    robot: Robot,
    nginx: Child,
    port: u16,
    api: u16,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.nginx.kill().expect("nginx runs until now");
        self.nginx.wait().expect("it ended");
    }
}

impl Proxy {
    /// `locations`: what an overlay would add.
    fn new(locations: &str) -> Self {
        let robot = Robot::development();
        let run = robot.at("run/slipway-proxy");
        fs::create_dir_all(&run).expect("made");
        let api = serve();
        let port = xtask::qemu::free_port(0).expect("a port");
        let config = "usr/lib/slipway/proxy/nginx.conf";
        let text = robot
            .read(config)
            .replace("/run/slipway-proxy", run.as_str())
            .replace("/usr/lib/slipway/proxy", robot.at("usr/lib/slipway/proxy").as_str())
            .replace("listen 80 ", &format!("listen 127.0.0.1:{port} "))
            .replace("listen [::]:80 ", &format!("listen [::1]:{port} "))
            .replace("127.0.0.1:31950", &format!("127.0.0.1:{api}"));
        robot.put(config, &text);
        robot.put("usr/lib/slipway/proxy/locations.d/90-test.conf", locations);
        // As systemd starts it: with a file system for bodies, as a user other than root.
        let unit = robot.read("usr/lib/systemd/system/slipway-proxy.service");
        let line = unit.lines().find_map(|l| l.strip_prefix("TemporaryFileSystem="));
        let (folder, options) = line.and_then(|l| l.split_once(':')).expect("a place for bodies");
        let folder = robot.at(folder.trim_start_matches('/'));
        fs::create_dir_all(&folder).expect("made");
        let script = "mount -t tmpfs -o \"$1\" bodies \"$2\" && shift 2 && exec unshare --user --map-user=1000 \
                      --map-group=1000 -- \"$@\"";
        let program = find("nginx");
        let log = fs::File::create(robot.at("nginx.log")).expect("a log");
        // One process, which ends with its parent.
        let nginx = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "--", "sh", "-c", script, "sh"])
            .args([options, folder.as_str(), program.as_str(), "-e", "stderr", "-c"])
            .arg(robot.at(config))
            .args(["-g", "master_process off;"])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("unshare runs");
        let mut proxy = Self { robot, nginx, port, api };
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = proxy.robot.read("nginx.log");
            assert!(proxy.nginx.try_wait().expect("a child").is_none(), "nginx ended: {log}");
            assert!(began.elapsed() < LONG, "nginx does not listen: {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        proxy
    }

    /// A stranger from 127.0.0.`last`.
    fn stranger(&self, last: u8, says: &[u8]) -> TcpStream {
        let from = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, last), 0);
        let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, self.port);
        let fd = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        bind(&fd, &from).expect("bound");
        connect(&fd, &to).expect("connected");
        let mut stream = TcpStream::from(fd);
        // The proxy may have closed it already: that is its right.
        drop(stream.write_all(says));
        stream
    }

    /// What is in the proxy's file system of bodies, which only it sees: used bytes.
    fn bodies(&self) -> u64 {
        let inside = self.robot.at("run/slipway-proxy/body");
        let path = Utf8PathBuf::from(format!("/proc/{}/root{inside}", self.nginx.id()));
        let about = rustix::fs::statvfs(path.as_str()).expect("its file system");
        assert_eq!(about.f_blocks * about.f_frsize, BODIES, "it is not the unit's");
        (about.f_blocks - about.f_bfree) * about.f_frsize
    }

    /// What nginx has at most taken, KiB.
    fn memory(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.nginx.id())).expect("status");
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("a peak");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

/// An API server that reads a request and answers it.
fn serve() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
                // All of it, body included: what is closed with bytes unread is reset.
                while !complete(&text) {
                    match client.read(&mut buffer) {
                        Ok(n @ 1..) => text.extend_from_slice(&buffer[..n]),
                        _ => return,
                    }
                }
                // The client may be gone.
                drop(client.write_all(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nwell\n",
                ));
            });
        }
    });
    port
}

/// Whether it is a whole request.
fn complete(text: &[u8]) -> bool {
    let Some(end) = text.windows(4).position(|w| w == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&text[..end]);
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    text.len() - end - 4 >= length.map_or(0, |length| length.parse().expect("a length"))
}

/// The status of a first answer; `None` when the other side closes without one.
fn answer(stream: &mut TcpStream) -> Option<u16> {
    stream.set_read_timeout(Some(LONG)).expect("set");
    let mut text = Vec::new();
    let mut buffer = [0; 1024];
    while !text.windows(2).any(|w| w == b"\r\n") {
        match stream.read(&mut buffer) {
            Ok(n @ 1..) => text.extend_from_slice(&buffer[..n]),
            Ok(0) => return None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("no answer: {error}"),
        }
    }
    String::from_utf8_lossy(&text).split(' ').nth(1)?.parse().ok()
}

/// Whether something was answered so far.
fn answered(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("set");
    let printed = stream.peek(&mut [0; 1]);
    stream.set_nonblocking(false).expect("set");
    !matches!(printed, Err(error) if error.kind() == ErrorKind::WouldBlock)
}

fn get(port: u16, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: robot\r\nConnection: close\r\n\r\n").ok()?;
    answer(&mut stream)
}

fn post(path: &str, length: u64) -> Vec<u8> {
    format!("POST {path} HTTP/1.1\r\nHost: robot\r\nContent-Length: {length}\r\n\r\nx").into_bytes()
}

/// Waits until something holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LONG, "{what}: not in {LONG:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn one_address_keeps_nobody_out_and_takes_no_memory() {
    let proxy = Proxy::new("");
    // 256 requests, each with one byte of its body, and 12 of 16 MiB that stall before their end.
    let mut slow: Vec<TcpStream> =
        (0..256).map(|_| proxy.stranger(9, &post("/labware/x", 60_000))).collect();
    let part = vec![b'x'; 15 << 20];
    let large = post("/labware/x", 16 << 20);
    let mut large: Vec<TcpStream> = (0..12).map(|_| proxy.stranger(10, &large)).collect();
    for stream in &mut large {
        assert_eq!(answer(stream), Some(413), "an unexpected body of 16 MiB");
        // It sends all the same, as far as it is let.
        stream.set_write_timeout(Some(Duration::from_secs(1))).expect("set");
        drop(stream.write_all(&part));
    }
    until("all but the first of one address are refused", || {
        slow.iter().filter(|stream| answered(stream)).count() >= slow.len() - OF_ONE
    });
    assert_eq!(get(proxy.port, "/health"), Some(200), "another address is kept out");
    assert_eq!(get(proxy.api, "/health"), Some(200));
    let mut refused = 0;
    for stream in slow.iter_mut().filter(|stream| answered(stream)) {
        // The first ones are refused in their time: 408, or closed.
        refused += usize::from(answer(stream) == Some(429));
    }
    assert!(refused >= slow.len() - OF_ONE, "{refused} of {} were refused", slow.len());
    assert_eq!(proxy.bodies(), 0, "a body was written down");
    assert!(proxy.memory() < MEMORY_KIB / 4, "{} KiB", proxy.memory());
}

#[test]
fn many_addresses_do_not_reach_what_asks_for_health() {
    let proxy = Proxy::new("");
    // More than it has connections: half of them in the midst of a header, half in the midst of a body.
    let strangers: Vec<TcpStream> = (2..66)
        .flat_map(|last| (0..10).map(move |n| (last, n)))
        .map(|(last, n)| match n % 2 {
            0 => proxy.stranger(last, b"G"),
            _ => proxy.stranger(last, &post("/labware/x", 60_000)),
        })
        .collect();
    // Health is asked of the API server itself, and of systemd (units in health.d).
    for _ in 0..20 {
        assert_eq!(get(proxy.api, "/health"), Some(200));
    }
    // Those that say nothing more are gone in their time, and everybody is served again.
    until("the proxy answers again", || get(proxy.port, "/health") == Some(200));
    assert!(proxy.memory() < MEMORY_KIB / 4, "{} KiB", proxy.memory());
    assert_eq!(proxy.bodies(), 0, "a body was written down");
    drop(strangers);
}

#[test]
fn of_all_addresses_together_so_many_requests_are_under_way() {
    let proxy = Proxy::new("");
    let mut strangers: Vec<TcpStream> = (2..32)
        .flat_map(|last| std::iter::repeat_n(last, 10))
        .map(|last| proxy.stranger(last, &post("/labware/x", 60_000)))
        .collect();
    until("those beyond the bound are refused", || {
        strangers.iter().filter(|stream| answered(stream)).count() >= strangers.len() - OF_ALL
    });
    let first = strangers.iter_mut().filter(|stream| answered(stream));
    let codes: Vec<Option<u16>> = first.map(answer).collect();
    let refused = codes.iter().filter(|code| **code == Some(429)).count();
    assert!(refused >= strangers.len() - OF_ALL, "{codes:?}");
}

#[test]
fn bodies_that_a_location_takes_lie_in_a_place_of_their_own() {
    let upload =
        "location = /upload { client_max_body_size 16m; proxy_pass http://slipway_api; }\n";
    let proxy = Proxy::new(upload);
    let part = vec![b'x'; 15 << 20];
    let strangers: Vec<std::thread::JoinHandle<TcpStream>> = (20..32)
        .map(|last| {
            let mut stream = proxy.stranger(last, &post("/upload", 16 << 20));
            let part = part.clone();
            // It is refused at some byte when there is no more room.
            std::thread::spawn(move || {
                drop(stream.write_all(&part));
                stream
            })
        })
        .collect();
    let strangers: Vec<TcpStream> =
        strangers.into_iter().map(|thread| thread.join().expect("it ends")).collect();
    until("bodies that do not fit are refused", || strangers.iter().any(answered));
    assert!(proxy.bodies() <= BODIES);
    // Other files in /run are not affected: the same directory takes more than is left for bodies.
    fs::write(proxy.robot.at("run/slipway-proxy/other"), &part).expect("room for others");
    assert_eq!(get(proxy.port, "/health"), Some(200));
    assert!(proxy.memory() < MEMORY_KIB / 4, "{} KiB", proxy.memory());
    drop(strangers);
    until("room is given back", || proxy.bodies() == 0);
    // And one that is whole passes.
    let mut stream = proxy.stranger(40, &post("/upload", 1 << 20));
    stream.write_all(&vec![b'x'; (1 << 20) - 1]).expect("sent");
    assert_eq!(answer(&mut stream), Some(200));
}

#[test]
fn no_health_check_asks_where_strangers_can_crowd_it_out() {
    let mut asked = 0;
    for plan in plans() {
        let robot = Robot::new(&plan);
        let nginx = robot.read("usr/lib/slipway/proxy/nginx.conf");
        let ports: Vec<&str> = nginx
            .lines()
            .filter_map(|line| line.trim().strip_prefix("listen "))
            .filter_map(|rest| rest.split([' ', ';']).next()?.rsplit(':').next())
            .collect();
        assert_eq!(ports, ["80", "80"], "the proxy's own");
        for entry in fs::read_dir(robot.at("etc/slotd/health.d")).expect("checks") {
            let path = Utf8PathBuf::from_path_buf(entry.expect("one").path()).expect("UTF-8");
            let check: toml::Table =
                fs::read_to_string(&path).expect("read").parse().expect("TOML");
            let Some(url) = check.get("http").and_then(|http| http.get("url")) else { continue };
            asked += 1;
            let url = url.as_str().expect("an address");
            let port =
                url.strip_prefix("http://127.0.0.1:").and_then(|rest| rest.split('/').next());
            let port = port.unwrap_or_else(|| panic!("{path}: {url} is not on this robot"));
            assert!(!ports.contains(&port), "{path} asks through the proxy: {url}");
        }
    }
    assert!(asked > 0, "no product asks its API");
}
