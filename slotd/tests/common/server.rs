//! A web server with one file, which can break connections.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// How the server behaves.
#[derive(Clone, Default)]
pub struct Manners {
    /// Bytes after which each connection breaks.
    pub break_after: Option<usize>,
    /// Whether range requests are supported.
    pub no_ranges: bool,
    /// Whether the answers say that ranges are not supported.
    pub says_so: bool,
    /// After this many connections the file changes to another version.
    pub changes_after: Option<usize>,
    /// Sends no length and no version; the connection's end is the file's end.
    pub says_nothing: bool,
}

/// A running server; it ends with the test.
pub struct Server {
    pub address: String,
    /// Bytes of bodies that were sent.
    pub sent: Arc<AtomicU64>,
    /// The header lines of each request.
    pub requests: Arc<Mutex<Vec<Vec<String>>>>,
}

impl Server {
    pub fn start(file: Vec<u8>, manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/update.bundle", listener.local_addr().unwrap());
        let (sent, requests) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let server = Self { address, sent: sent.clone(), requests: requests.clone() };
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (manners, sent) = (manners.clone(), sent.clone());
                let stream = stream.unwrap();
                let lines = read_request(&stream);
                requests.lock().unwrap().push(lines.clone());
                // A client that disconnects is ignored.
                drop(answer(stream, &lines, &file, &manners, number, &sent));
            }
        });
        server
    }
}

fn read_request(stream: &TcpStream) -> Vec<String> {
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.take_while(|line| !line.is_empty()).collect()
}

fn answer(
    mut stream: TcpStream,
    lines: &[String],
    file: &[u8],
    manners: &Manners,
    number: usize,
    sent: &AtomicU64,
) -> std::io::Result<()> {
    if !lines.first().is_some_and(|line| line.contains("/update.bundle")) {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    }
    let header = |name: &str| {
        lines.iter().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then(|| value.to_owned())
        })
    };
    let changed = manners.changes_after.is_some_and(|after| number >= after);
    let tag = if changed { "\"two\"" } else { "\"one\"" };
    let range = header("range").filter(|_| !manners.no_ranges);
    let range = range.filter(|_| header("if-range").is_none_or(|known| known == tag));
    let start = range.map(|range| {
        range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().unwrap()
    });
    let body = &file[start.unwrap_or(0)..];
    let mut head = match start {
        Some(start) => format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{}/{}\r\n",
            file.len() - 1,
            file.len()
        ),
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    if !manners.says_nothing {
        head.push_str(&format!("Content-Length: {}\r\nETag: {tag}\r\n", body.len()));
    }
    if manners.says_so {
        head.push_str("Accept-Ranges: none\r\n");
    }
    head.push_str("Connection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let until = manners.break_after.unwrap_or(body.len()).min(body.len());
    for part in body[..until].chunks(1 << 14) {
        stream.write_all(part)?;
        sent.fetch_add(part.len() as u64, Ordering::Relaxed);
    }
    stream.flush()
}
