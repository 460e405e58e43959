//! How slowly a bundle may come. Who sends it holds the agent's lock meanwhile, be it a web server or a pipe: each must
//! bring something all the time, so that nobody can hold it for ever by waiting.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes a second that a connection must bring: one time slot of GPRS at its lowest coding scheme has 9.05 kbit/s
/// (3GPP TS 43.064, 6.5.5.1), a slow but honest modem two to five of them.
const SLOWEST: u32 = 1024;

/// How long a connection may bring less, broken ones and pauses included: a modem that registers anew, an access point
/// that restarts.
pub(super) const GRACE: Duration = Duration::from_secs(300);

/// What the other side may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes a second that it must bring on average.
    pub slowest: u32,
    /// How long it may bring less.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { slowest: SLOWEST, grace: GRACE }
    }
}

/// What is left of the time that the other side may be slow: each byte earns some, up to all of it. Only waiting for it
/// spends it, not the robot's own work.
#[derive(Debug)]
pub struct Pace {
    limits: Limits,
    left: Duration,
}

impl Pace {
    /// With all of the grace.
    pub fn new(limits: Limits) -> Self {
        Self { limits, left: limits.grace }
    }

    /// How long it may be waited for now.
    pub fn left(&self) -> Duration {
        self.left
    }

    /// Bytes a second.
    pub(super) fn slowest(&self) -> u32 {
        self.limits.slowest
    }

    /// Counts a wait, and what it brought.
    ///
    /// # Errors
    /// `TimedOut`: nothing is left.
    pub fn count(&mut self, waited: Duration, bytes: u64) -> io::Result<()> {
        let earned = Duration::from_secs(1).as_nanos() * u128::from(bytes)
            / u128::from(self.limits.slowest.max(1));
        let earned = Duration::from_nanos(u64::try_from(earned).unwrap_or(u64::MAX));
        let whole = self.left.saturating_add(earned);
        self.left = whole.saturating_sub(waited).min(self.limits.grace);
        if whole > waited { Ok(()) } else { Err(self.too_slow()) }
    }

    fn too_slow(&self) -> io::Error {
        let Limits { slowest, grace } = self.limits;
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!(
                "for {} s the other side has moved less than {slowest} bytes a second",
                grace.as_secs_f32()
            ),
        )
    }
}

/// A pipe, terminal or socket that keeps the pace.
pub struct Paced<R> {
    input: R,
    pace: Pace,
}

impl<R> fmt::Debug for Paced<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paced").field("pace", &self.pace).finish_non_exhaustive()
    }
}

impl<R: Read + AsFd> Paced<R> {
    /// `input` holds nothing back in a buffer of its own.
    pub fn new(input: R, limits: Limits) -> Self {
        Self { input, pace: Pace::new(limits) }
    }
}

impl<R: Read + AsFd> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let started = Instant::now();
        let waits = Timespec::try_from(self.pace.left()).map_err(io::Error::other)?;
        let ready = poll(&mut [PollFd::new(&self.input, PollFlags::IN)], Some(&waits))?;
        if ready == 0 {
            return Err(self.pace.too_slow());
        }
        // There is something, or its end: this waits for nothing.
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

    /// Seconds until a server is given up that brings `bytes` each time after `every`; `None`: not within a week.
    fn given_up(bytes: u64, every: Duration) -> Option<u64> {
        let mut pace = Pace::new(Limits::default());
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
        // A byte every two seconds, or nothing at all: as long as the grace.
        assert!((300..=302).contains(&given_up(1, SECOND * 2).unwrap()));
        assert_eq!(given_up(0, SECOND * 30), Some(300));
        // Just too slow.
        assert!(given_up(900, SECOND).is_some_and(|after| after < 3600));
        // One time slot of GPRS, in packets; a link that is there for a minute and away for four.
        assert_eq!(given_up(1131, SECOND), None);
        assert_eq!(given_up(1 << 20, SECOND * 240), None);
        // What came fast before buys no more than the grace.
        let mut pace = Pace::new(Limits::default());
        pace.count(SECOND, 1 << 30).unwrap();
        assert!(pace.count(GRACE + SECOND, 0).is_err());
    }

    #[test]
    fn a_pipe_that_stalls_or_dribbles_has_an_end_and_a_fast_one_comes_whole() {
        let limits = Limits { slowest: 1000, grace: Duration::from_millis(300) };
        // Nothing, and the other end stays open.
        let (_silent, input) = UnixStream::pair().unwrap();
        let mut said = Vec::new();
        let error = Paced::new(input, limits).read_to_end(&mut said).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        // A byte now and then, more often than the grace is long.
        let (mut dribbling, input) = UnixStream::pair().unwrap();
        let dribbles = std::thread::spawn(move || {
            while dribbling.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let error = Paced::new(input, limits).read_to_end(&mut said).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        dribbles.join().unwrap();
        // What the robot's own work takes is nobody's delay.
        let (mut fast, input) = UnixStream::pair().unwrap();
        fast.write_all(&[7; 3000]).unwrap();
        drop(fast);
        let mut paced = Paced::new(input, limits);
        let mut first = [0; 1000];
        paced.read_exact(&mut first).unwrap();
        std::thread::sleep(Duration::from_millis(600));
        let mut rest = Vec::new();
        paced.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), 2000);
    }
}
