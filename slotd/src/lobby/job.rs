//! A long operation: its record in `/run/slotd`, for clients that watch it; and its cancellation.
//!
//! The process that runs it holds a lock until it ends, so that the record of a killed process can be distinguished from
//! that of a running one. To cancel a job, a client writes a note. The job finds it when it next reads its bundle, and ends
//! as if the bundle's source had failed, which is safe at any moment. A job that waits for its source, or for it to open, is
//! terminated, which is as safe as a power cut. Once the bundle was read to its end, the job can no longer be cancelled.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bundle::BundleInput;
use contract::answer::{InstallStep, Progress};
use contract::job::{Caller, InstallDone, Job, JobState};
use contract::request::AgentRequest;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::durable;
use crate::lock::private_dir;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// The interval between two records of progress within one step.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a cancelled job may take to end by itself: longer than writing any frame takes.
const PATIENCE: Duration = Duration::from_secs(10);

fn record_path(root: &RootDir) -> PathBuf {
    root.run().join("job.json")
}

/// Held by the process of the recorded job. It contains the record as it was at the beginning of the job, in case
/// `job.json` is damaged.
fn lock_file(root: &RootDir) -> PathBuf {
    root.run().join("job.lock")
}

/// The note that cancels a job, with the job's number. Its name differs from the record's in more than the extension: both
/// are replaced, by different processes, through temporary files that are named after them.
fn cancel_path(root: &RootDir) -> PathBuf {
    root.run().join("cancel.json")
}

fn unwritten(error: &io::Error) -> Refusal {
    let message = format!("writing the job's record in /run/slotd: {error}");
    Refusal::new("io", message, "make space in `/run` (`df /run`); see the kernel's messages")
}

fn unreadable(error: &io::Error) -> Refusal {
    Refusal::new(
        "io",
        format!("reading the job's record /run/slotd/job.json: {error}"),
        "a running job and the next `slotd install` write it again; see `slotd status` and `slotd log`. A restart of the robot ends a running job; this is as safe as a power cut",
    )
}

/// The record in the file; of a running job, if the file is missing or damaged, the one that its lock contains.
fn read_record(root: &RootDir) -> io::Result<Option<Job>> {
    match durable::read_json(&record_path(root)) {
        Ok(Some(job)) => Ok(Some(job)),
        unread if is_running(root) => durable::read_json(&lock_file(root)).or(unread),
        unread => unread,
    }
}

/// The record of the job that is running, or that ran last since the start.
///
/// # Errors
/// `io`: the record cannot be read.
pub fn read(root: &RootDir) -> Result<Option<Job>> {
    let job = read_record(root).map_err(|error| unreadable(&error))?;
    Ok(job.map(|job| match job.state {
        // The record is written before the lock is released: read it again.
        JobState::Runs if !is_running(root) => {
            match durable::read_json::<Job>(&record_path(root)) {
                Ok(Some(again)) if again.state != JobState::Runs => again,
                _ => Job { state: JobState::Lost, cancellable: false, ..job },
            }
        }
        _ => job,
    }))
}

/// Waits for the running job and returns its result; returns at once if it has ended.
///
/// # Errors
/// `no-job`: there was none since the start. The refusal of the job. `io`: it ended without leaving its result.
pub fn watch(root: &RootDir, watcher: &(dyn Fn(Progress) + Sync)) -> Result<InstallDone> {
    let mut last = None;
    loop {
        let job = read(root)?.ok_or_else(|| {
            Refusal::new("no-job", "there was no job since the robot's start", "see `slotd log`")
        })?;
        match job.state {
            JobState::Runs => {}
            JobState::Done(done) => return Ok(done),
            JobState::Refused(refusal) => return Err(refusal),
            JobState::Lost => {
                return Err(Refusal::new(
                    "io",
                    "the job ended without leaving its result: its process was killed, or `/run` is full",
                    "see `slotd status` and `slotd log` before you install the bundle again",
                ));
            }
        }
        if job.progress != last {
            last = job.progress;
            job.progress.into_iter().for_each(watcher);
        }
        std::thread::sleep(PAUSE / 2);
    }
}

/// Whether a process holds the lock of a job.
fn is_running(root: &RootDir) -> bool {
    let Ok(file) = File::open(lock_file(root)) else { return false };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}

/// Cancels the running job, and returns its record when it has ended. A job that ended by itself meanwhile is not an error:
/// its state has the result.
///
/// # Errors
/// `no-job`: no job is running. `too-late`: it has read its bundle to the end and can no longer be cancelled. `io`: its
/// record cannot be read or written, or its process does not end.
pub fn cancel(root: &RootDir) -> Result<Job> {
    let none = || Refusal::new("no-job", "no job is running", "see `slotd job`");
    let read = || match read(root) {
        // It has ended: either it has written its file again, or the file stays damaged.
        Err(_) if !is_running(root) => read(root).or(Ok(None)),
        read => read,
    };
    let job = read()?.filter(|job| job.state == JobState::Runs).ok_or_else(none)?;
    let late = || {
        let what = job.request.verb();
        let message =
            format!("`slotd {what}` has read its whole bundle and can no longer be cancelled");
        Refusal::new("too-late", message, "wait until it has ended: `slotd job --watch`")
    };
    if !job.cancellable {
        return Err(late());
    }
    durable::replace(&cancel_path(root), job.id.to_string().as_bytes())
        .map_err(|error| unwritten(&error))?;
    let started = Instant::now();
    let mut ended = false;
    loop {
        let lost = || Job { state: JobState::Lost, cancellable: false, ..job.clone() };
        let now =
            Some(read()?.unwrap_or_else(lost)).filter(|now| now.id == job.id).ok_or_else(none)?;
        match now.state {
            JobState::Runs if !now.cancellable => return Err(late()),
            JobState::Runs if started.elapsed() >= PATIENCE && !ended => {
                // It waits for its source, possibly for ever. Terminating it is as safe as a power cut.
                let process = i32::try_from(now.process).ok().and_then(Pid::from_raw);
                if let Some(process) = process {
                    // CONT: a process that is stopped ends only when it continues.
                    for signal in [Signal::TERM, Signal::CONT] {
                        match kill_process(process, signal) {
                            // It has just ended.
                            Ok(()) | Err(Errno::SRCH) => {}
                            Err(error) => return Err(not_terminated(&now, &error.to_string())),
                        }
                    }
                }
                ended = true;
            }
            JobState::Runs if started.elapsed() >= PATIENCE * 3 => {
                return Err(not_terminated(&now, "it is still running"));
            }
            JobState::Runs => {}
            // It was not terminated here: its result is not known.
            JobState::Lost if !ended => return Ok(now),
            JobState::Lost => {
                // Do not overwrite the record of a newer job.
                if let Some(_lock) = take_lock(root)? {
                    let ended = Job { state: JobState::Refused(cancelled()), ..now };
                    write(root, &ended).map_err(|error| unwritten(&error))?;
                    return Ok(ended);
                }
            }
            JobState::Done(_) | JobState::Refused(_) => return Ok(now),
        }
        std::thread::sleep(PAUSE / 5);
    }
}

/// The refusal for a job whose process cannot be terminated.
fn not_terminated(job: &Job, why: &str) -> Refusal {
    let (process, what) = (job.process, job.request.verb());
    Refusal::new(
        "io",
        format!("terminating the process {process} of `slotd {what}`: {why}"),
        "see `slotd job` and the kernel's messages",
    )
}

fn cancelled() -> Refusal {
    Refusal::new(
        "cancelled",
        "the job was cancelled; the next install of the same bundle resumes",
        "install the bundle again to resume",
    )
}

fn write(root: &RootDir, job: &Job) -> io::Result<()> {
    private_dir(&root.run())?;
    durable::replace(&record_path(root), &serde_json::to_vec(job)?)
}

/// The lock of a job's process; `None`: another process has it.
fn take_lock(root: &RootDir) -> Result<Option<File>> {
    private_dir(&root.run()).map_err(|error| unwritten(&error))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let lock = options.open(lock_file(root)).map_err(|error| unwritten(&error))?;
    let started = Instant::now();
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(lock)),
            // A process that checks whether a job is running holds it for a moment.
            Err(Errno::WOULDBLOCK) if started.elapsed() < PAUSE => {
                std::thread::sleep(PAUSE / 25);
            }
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(unwritten(&error.into())),
        }
    }
}

/// Stores the first record of the job in its lock.
fn fill_lock(mut lock: &File, job: &Job) -> io::Result<()> {
    lock.set_len(0)?;
    lock.write_all(&serde_json::to_vec(job)?)
}

/// A running job.
pub struct RunningJob<'a> {
    root: &'a RootDir,
    job: Mutex<Job>,
    told: Mutex<Option<(Instant, InstallStep)>>,
    cancelled: AtomicBool,
    looked: Mutex<Instant>,
    lock: File,
}

/// Runs a long operation as a job: it has a record from its beginning, can be watched, and can be cancelled until it has
/// read a [`RunningJob::cancellable`] source to its end.
///
/// # Errors
/// `busy`: another job is running. `cancelled`. The refusal of the operation itself.
pub fn run(
    root: &RootDir,
    request: &AgentRequest,
    caller: &Caller,
    watcher: &(dyn Fn(Progress) + Sync),
    operation: impl FnOnce(&RunningJob<'_>, &(dyn Fn(Progress) + Sync)) -> Result<InstallDone>,
) -> Result<InstallDone> {
    let running = RunningJob::begin(root, request, caller)?;
    let result = operation(&running, &|at| {
        if running.progress(at) {
            watcher(at);
        }
    });
    let result = match result {
        Err(_) if running.cancelled.load(Ordering::SeqCst) => Err(cancelled()),
        result => result,
    };
    running.end(&result);
    result
}

impl<'a> RunningJob<'a> {
    fn begin(root: &'a RootDir, request: &AgentRequest, caller: &Caller) -> Result<Self> {
        let what = request.verb();
        let busy = || {
            Refusal::new(
                "busy",
                format!("`slotd {what}` cannot start: another job is running"),
                "wait until it has ended (`slotd job --watch`), or cancel it (`slotd job --cancel`)",
            )
        };
        let lock = take_lock(root)?.ok_or_else(busy)?;
        // A damaged record is treated as missing: it only gives the job its number.
        let before: Option<Job> = durable::read_json(&record_path(root)).ok().flatten();
        let job = Job {
            id: before.map_or(1, |job| job.id.saturating_add(1)),
            request: request.clone(),
            by: caller.clone(),
            process: std::process::id(),
            cancellable: true,
            progress: None,
            state: JobState::Runs,
        };
        durable::remove(&cancel_path(root)).map_err(|error| unwritten(&error))?;
        let running = Self {
            root,
            job: Mutex::new(job),
            told: Mutex::new(None),
            cancelled: AtomicBool::new(false),
            looked: Mutex::new(Instant::now()),
            lock,
        };
        running.change(|job| {
            // A full `/run` must not end an install.
            drop(fill_lock(&running.lock, job));
        });
        Ok(running)
    }

    /// The bundle's source of this job, which fails once the job is cancelled.
    pub fn cancellable<I: BundleInput>(&self, input: I) -> CancellableSource<'_, I> {
        CancellableSource { input, running: self }
    }

    /// Changes the record. A full `/run` must not end an install: clients then see an older state.
    fn change(&self, change: impl FnOnce(&mut Job)) {
        let mut job = self.job.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut job);
        if let Err(error) = write(self.root, &job) {
            crate::say!("slotd: cannot write the job's record: {error}");
        }
    }

    /// Records the progress, at most twice a second. Returns whether it did.
    fn progress(&self, at: Progress) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let soon =
            |(when, step): &(Instant, InstallStep)| *step == at.step && when.elapsed() < PAUSE;
        if told.as_ref().is_some_and(soon) && at.done != at.total {
            return false;
        }
        *told = Some((Instant::now(), at.step));
        drop(told);
        self.change(|job| job.progress = Some(at));
        true
    }

    /// Whether a client has cancelled it.
    fn is_cancelled(&self) -> bool {
        if self.cancelled.load(Ordering::SeqCst) {
            return true;
        }
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if looked.elapsed() < PAUSE / 5 {
            return false;
        }
        *looked = Instant::now();
        let Ok(text) = fs::read_to_string(cancel_path(self.root)) else { return false };
        let own = self.job.lock().unwrap_or_else(PoisonError::into_inner).id.to_string();
        if text == own {
            self.cancelled.store(true, Ordering::SeqCst);
        }
        text == own
    }

    fn end(&self, result: &Result<InstallDone>) {
        self.change(|job| {
            job.cancellable = false;
            job.state = match result {
                Ok(done) => JobState::Done(done.clone()),
                Err(refusal) => JobState::Refused(refusal.clone()),
            };
        });
    }
}

/// A bundle's source that ends when the job is cancelled.
pub struct CancellableSource<'a, I> {
    input: I,
    running: &'a RunningJob<'a>,
}

impl<I> CancellableSource<'_, I> {
    fn fail_if_cancelled(&self) -> io::Result<()> {
        match self.running.is_cancelled() {
            true => Err(io::Error::other("the job was cancelled")),
            false => Ok(()),
        }
    }
}

impl<I: Read> Read for CancellableSource<'_, I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fail_if_cancelled()?;
        let count = self.input.read(buffer)?;
        if count == 0 && !buffer.is_empty() {
            // The bundle's end: from now on the job cannot be cancelled.
            self.running.change(|job| job.cancellable = false);
        }
        Ok(count)
    }
}

impl<I: BundleInput> BundleInput for CancellableSource<'_, I> {
    fn skip(&mut self, n: u64) -> io::Result<()> {
        self.fail_if_cancelled()?;
        self.input.skip(n)
    }
}
