//! Malicious web servers: they send single bytes, break each connection, redirect for ever or never end their headers.
//! Each is given up in the end; a slow but honest server is not. The limits are small here: times are those of
//! [`PaceLimits`], and a busy machine only makes a server slower.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may fail by panicking")]

mod common;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bundles::noise;
use common::bundles;
use common::server::{Manners, Server};
use slotd::RootDir;
use slotd::source::{HttpStream, PaceLimits};

/// Limits that no server here can meet.
const STRICT: PaceLimits = PaceLimits { slowest: 1 << 30, grace: Duration::from_millis(500) };

/// Limits that every server here can meet.
const MILD: PaceLimits = PaceLimits { slowest: 1, grace: Duration::from_secs(120) };

fn open(address: &str, limits: PaceLimits) -> slotd::Result<HttpStream> {
    HttpStream::open_with(address, &RootDir::new("/nonexistent"), limits)
}

/// Answers each connection by `answer`, which gets its number. Returns the address, and a count of connections.
fn server(answer: impl Fn(usize, TcpStream) + Send + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/update.bundle", listener.local_addr().unwrap());
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let lines = BufReader::new(&stream).lines().map_while(Result::ok);
            assert!(lines.take_while(|line| !line.is_empty()).count() > 0);
            answer(counted.fetch_add(1, Ordering::Relaxed), stream);
        }
    });
    (address, count)
}

/// Sends a file slowly, byte by byte.
fn drips(length: usize) -> String {
    let (address, _) = server(move |_, mut stream| {
        let head = format!("HTTP/1.1 200 OK\r\nETag: \"a\"\r\nContent-Length: {length}\r\n\r\n");
        let mut sent = stream.write_all(head.as_bytes());
        for _ in 0..length {
            std::thread::sleep(Duration::from_millis(5));
            sent = sent.and_then(|()| stream.write_all(b"x"));
            if sent.is_err() {
                return;
            }
        }
    });
    address
}

#[test]
fn a_server_that_drips_is_given_up() {
    let mut http = open(&drips(1 << 30), STRICT).unwrap();
    let mut bytes = Vec::new();
    let error = http.read_to_end(&mut bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("less than 1073741824 bytes per second"), "{error}");
    assert!(!bytes.is_empty() && http.reconnections == 0);
}

#[test]
fn a_slow_but_honest_server_is_read_to_its_end() {
    let mut bytes = Vec::new();
    open(&drips(300), MILD).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, [b'x'; 300]);
}

#[test]
fn a_byte_on_each_connection_is_no_progress() {
    let file = noise(1 << 20, 5);
    let server = Server::start(file, Manners { break_after: Some(1), ..Manners::default() });
    let mut http = open(&server.address, STRICT).unwrap();
    let error = http.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(http.reconnections > 8, "{}", http.reconnections);
}

#[test]
fn a_server_that_always_begins_again_is_given_up() {
    // One more byte with each connection, from the file's beginning.
    let file = noise(1 << 20, 6);
    let start = 900_000;
    let (address, _) = server(move |number, mut stream| {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", file.len());
        let sent = stream.write_all(head.as_bytes());
        drop(sent.and_then(|()| stream.write_all(&file[..start + number])));
    });
    let mut http = open(&address, MILD).unwrap();
    let error = http.read_to_end(&mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("does not support resuming"), "{error}");
    assert!(http.reconnections < 20, "{}", http.reconnections);
}

#[test]
fn redirects_and_heads_are_bounded() {
    let (address, count) = server(|_, mut stream| {
        let head = "HTTP/1.1 302 Found\r\nLocation: /update.bundle\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        drop(stream.write_all(head.as_bytes()));
    });
    let refusal = open(&address, MILD).unwrap_err();
    assert!(refusal.code == "source" && refusal.message.contains("redirects"), "{refusal}");
    assert!((2..=6).contains(&count.load(Ordering::Relaxed)), "{count:?}");

    let (address, _) = server(|_, mut stream| {
        let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\n");
        while sent.is_ok() {
            sent = stream.write_all(b"X-More: and more and more and more and more\r\n");
        }
    });
    let refusal = open(&address, MILD).unwrap_err();
    assert!(refusal.code == "source" && refusal.message.contains("header"), "{refusal}");
}
