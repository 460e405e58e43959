//! The minimum pace of a bundle's sender. The agent holds its lock during the transfer, so a web server or a pipe must
//! keep sending: otherwise a sender that waits could block the agent for ever.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Minimum bytes per second of a connection: one time slot of GPRS at its lowest coding scheme has 9.05 kbit/s
/// (3GPP TS 43.064, 6.5.5.1), and a slow modem uses two to five of them.
const SLOWEST: u32 = 1024;

/// How long a connection may be slower, including interruptions and pauses: a modem that registers again, an access
/// point that restarts.
pub(super) const GRACE: Duration = Duration::from_secs(300);

/// The limits for the other side.
#[derive(Debug, Clone, Copy)]
pub struct PaceLimits {
    /// Minimum average bytes per second.
    pub slowest: u32,
    /// How long it may be slower.
    pub grace: Duration,
}

impl Default for PaceLimits {
    fn default() -> Self {
        Self { slowest: SLOWEST, grace: GRACE }
    }
}

/// The remaining time that the other side may be slow. Each byte adds some time, up to the maximum. Only waiting for
/// the other side uses it up, not the robot's own work.
#[derive(Debug)]
pub struct Pace {
    limits: PaceLimits,
    left: Duration,
}

impl Pace {
    /// Starts with the full grace time.
    pub fn new(limits: PaceLimits) -> Self {
        Self { limits, left: limits.grace }
    }

    /// How long to wait at most now.
    pub fn left(&self) -> Duration {
        self.left
    }

    /// Minimum bytes per second.
    pub(super) fn slowest(&self) -> u32 {
        self.limits.slowest
    }

    /// Counts a wait, and the bytes that it yielded.
    ///
    /// # Errors
    /// `TimedOut`: no time is left.
    pub fn count(&mut self, waited: Duration, bytes: u64) -> io::Result<()> {
        let earned = Duration::from_secs(1).as_nanos() * u128::from(bytes)
            / u128::from(self.limits.slowest.max(1));
        let earned = Duration::from_nanos(u64::try_from(earned).unwrap_or(u64::MAX));
        let whole = self.left.saturating_add(earned);
        self.left = whole.saturating_sub(waited).min(self.limits.grace);
        if whole > waited { Ok(()) } else { Err(self.too_slow()) }
    }

    fn too_slow(&self) -> io::Error {
        let PaceLimits { slowest, grace } = self.limits;
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "the other side has transferred less than {slowest} bytes per second for {} s",
                grace.as_secs_f32()
            ),
        )
    }
}

/// A pipe, terminal or socket that must keep the pace.
pub struct PacedStream<R> {
    input: R,
    pace: Pace,
}

impl<R> fmt::Debug for PacedStream<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paced").field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl<R: Read + AsFd> PacedStream<R> {
    /// `input` must not have its own buffer.
    pub fn new(input: R, limits: PaceLimits) -> Self {
        Self { input, pace: Pace::new(limits) }
    }
}

impl<R: Read + AsFd> Read for PacedStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let started = Instant::now();
        let waits = Timespec::try_from(self.pace.left()).map_err(io::Error::other)?;
        let ready = poll(&mut [PollFd::new(&self.input, PollFlags::IN)], Some(&waits))?;
        if ready == 0 {
            return Err(self.pace.too_slow());
        }
        // There is data, or the end: this does not block.
        let count = self.input.read(buffer)?;
        self.pace.count(started.elapsed(), count as u64)?;
        Ok(count)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Seconds until a server that sends `bytes` after every `every` is given up; `None`: not within a week.
    fn given_up(bytes: u64, every: Duration) -> Option<u64> {
        let mut pace = Pace::new(PaceLimits::default());
        let mut passed = Duration::ZERO;
        while passed < SECOND * 7 * 86_400 {
            passed += every;
            if pace.count(every, bytes).is_err() {
                return Some(passed.as_secs());
            }
        }
        None
    }

    #[test]
    fn a_slow_server_has_an_end_and_an_honest_one_has_none() {
        // A byte every two seconds, or nothing at all: given up after the grace time.
        assert!((300..=302).contains(&given_up(1, SECOND * 2).unwrap()));
        assert_eq!(given_up(0, SECOND * 30), Some(300));
        // Just too slow.
        assert!(given_up(900, SECOND).is_some_and(|after| after < 3600));
        // One time slot of GPRS, in packets; a link that works for one minute in five.
        assert_eq!(given_up(1131, SECOND), None);
        assert_eq!(given_up(1 << 20, SECOND * 240), None);
        // Fast transfer before does not extend the grace time.
        let mut pace = Pace::new(PaceLimits::default());
        pace.count(SECOND, 1 << 30).unwrap();
        assert!(pace.count(GRACE + SECOND, 0).is_err());
    }

    #[test]
    fn a_pipe_that_stalls_or_dribbles_has_an_end_and_a_fast_one_comes_whole() {
        let limits = PaceLimits { slowest: 1000, grace: Duration::from_millis(300) };
        // No data, and the other end stays open.
        let (_silent, input) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        let error = PacedStream::new(input, limits).read_to_end(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        // A byte now and then, at intervals shorter than the grace time.
        let (mut dribbling, input) = UnixStream::pair().unwrap();
        let dribbles = std::thread::spawn(move || {
            while dribbling.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let error = PacedStream::new(input, limits).read_to_end(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        dribbles.join().unwrap();
        // The time of the robot's own work does not count as a delay.
        let (mut fast, input) = UnixStream::pair().unwrap();
        fast.write_all(&[7; 3000]).unwrap();
        drop(fast);
        let mut paced = PacedStream::new(input, limits);
        let mut first = [0; 1000];
        paced.read_exact(&mut first).unwrap();
        std::thread::sleep(Duration::from_millis(600));
        let mut rest = Vec::new();
        paced.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), 2000);
    }
}
