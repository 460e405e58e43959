//! Runs checks: of a systemd unit, an address, a program's exit status, a file system.

use std::process::ExitStatus;
use std::time::Duration;

use ureq::Agent;

use super::check::CheckKind;
use crate::condition;
use crate::process::{last_line, run_program};
use crate::reserve;
use crate::root::RootDir;

/// Runs a check once. `Ok` has what was found when it passes, `Err` what was found when it fails.
pub(super) fn run(root: &RootDir, kind: &CheckKind, timeout: Duration) -> Result<String, String> {
    match kind {
        CheckKind::Unit(name) => {
            let words = ["show", "--property=LoadState,ActiveState,SubState,Result", name];
            let (status, output) = run_program("systemctl", &words, None, timeout)?;
            evaluate_unit(name, status, &output)
        }
        CheckKind::Startup => {
            if let Some(why) = condition::unfit_reason(root) {
                return Err(why);
            }
            let (_, output) = run_program("systemctl", &["is-system-running"], None, timeout)?;
            evaluate_startup(output.trim())
        }
        CheckKind::Command(words) => {
            let (name, rest) = words.split_first().ok_or("the check names no program")?;
            let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
            let (status, output) = run_program(name, &rest, None, timeout)?;
            let last = last_line(&output);
            if status.success() { Ok(last) } else { Err(format!("{name}: {status}: {last}")) }
        }
        CheckKind::Http { url, status } => probe_http(url, *status, timeout),
        CheckKind::Space { path, free } => reserve::check_free_space(root, path, *free),
    }
}

/// Evaluates the output of `systemctl show` for a unit.
fn evaluate_unit(name: &str, status: ExitStatus, output: &str) -> Result<String, String> {
    let value = |key: &str| {
        output
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or("unknown")
    };
    let (load, active, sub) = (value("LoadState"), value("ActiveState"), value("SubState"));
    if !status.success() {
        return Err(format!("systemctl: {status}: {}", last_line(output)));
    }
    match (load, active) {
        ("loaded", "active") => Ok(format!("{name} is active ({sub})")),
        ("loaded", "failed") => Err(format!("{name} has failed ({})", value("Result"))),
        ("loaded", _) => Err(format!("{name} is {active} ({sub})")),
        _ => Err(format!("{name} does not exist ({load})")),
    }
}

/// Evaluates the output of `systemctl is-system-running`. `degraded` is a start with a failed unit: whether
/// that unit matters is decided by the declared checks.
fn evaluate_startup(state: &str) -> Result<String, String> {
    match state {
        "running" | "degraded" => Ok(format!("the system is {state}")),
        "" => Err("systemd does not answer".to_owned()),
        other => Err(format!("the system is {other}")),
    }
}

fn probe_http(url: &str, expected: u16, timeout: Duration) -> Result<String, String> {
    let config = Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        // The status of this answer is checked; redirects are not followed.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .build();
    let response = Agent::from(config).get(url).call();
    let status = response.map_err(|error| format!("{url}: {error}"))?.status().as_u16();
    let text = format!("{url} answers {status}");
    if status == expected { Ok(text) } else { Err(format!("{text}, expected {expected}")) }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::os::unix::process::ExitStatusExt;
    use std::time::Instant;

    const SOON: Duration = Duration::from_secs(5);

    fn look(kind: CheckKind) -> Result<String, String> {
        run(&RootDir::default(), &kind, SOON)
    }

    fn command(words: &[&str]) -> CheckKind {
        CheckKind::Command(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn a_programs_end_counts_and_its_last_line_is_told() {
        assert_eq!(look(command(&["sh", "-c", "echo one; echo two"])), Ok("two".to_owned()));
        let failed = look(command(&["sh", "-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(failed.contains("exit status: 3: why"), "{failed}");
        let killed = look(command(&["sh", "-c", "kill -9 $$"])).unwrap_err();
        assert!(killed.contains("signal 9"), "{killed}");
        assert!(look(command(&["/no/such/program"])).unwrap_err().contains("/no/such/program"));
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children() {
        let started = Instant::now();
        let kind = command(&["sh", "-c", "sleep 60 & sleep 60"]);
        let why = run(&RootDir::default(), &kind, Duration::from_millis(200)).unwrap_err();
        assert!(why.contains("has not ended within"), "{why}");
        assert!(started.elapsed() < SOON);
    }

    #[test]
    fn space_is_what_the_file_system_says() {
        let all = CheckKind::Space { path: "/".into(), free: u64::MAX };
        assert!(look(all).unwrap_err().contains("MiB free, expected"));
        look(CheckKind::Space { path: "/".into(), free: 1 }).unwrap();
    }

    #[test]
    fn an_address_must_answer_with_the_status() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/health", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            for answer in ["200 OK", "503 Service Unavailable", "302 Found\r\nLocation: /"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).unwrap() > 0);
                write!(
                    stream,
                    "HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                .unwrap();
            }
        });
        let kind = CheckKind::Http { url: url.clone(), status: 200 };
        assert_eq!(look(kind.clone()), Ok(format!("{url} answers 200")));
        assert!(look(kind.clone()).unwrap_err().contains("answers 503, expected 200"));
        assert!(look(kind.clone()).unwrap_err().contains("answers 302, expected 200"));
        server.join().unwrap();
        // Nothing listens any more.
        assert!(look(kind).unwrap_err().contains(&url));
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let started = Instant::now();
        let kind = CheckKind::Http { url, status: 200 };
        run(&RootDir::default(), &kind, Duration::from_millis(300)).unwrap_err();
        assert!(started.elapsed() < SOON);
    }

    #[test]
    fn what_systemctl_says_is_understood() {
        let good = ExitStatus::from_raw(0);
        let output = |load: &str, active: &str| {
            format!("LoadState={load}\nActiveState={active}\nSubState=x\nResult=exit-code\n")
        };
        assert!(evaluate_unit("a", good, &output("loaded", "active")).is_ok());
        for (load, active, expected) in [
            ("loaded", "failed", "has failed (exit-code)"),
            ("loaded", "activating", "is activating (x)"),
            ("not-found", "inactive", "does not exist (not-found)"),
        ] {
            assert!(
                evaluate_unit("a", good, &output(load, active)).unwrap_err().contains(expected)
            );
        }
        assert!(
            evaluate_unit("a", ExitStatus::from_raw(256), "bus error")
                .unwrap_err()
                .contains("bus error")
        );
        for state in ["running", "degraded"] {
            assert!(evaluate_startup(state).is_ok());
        }
        for state in ["starting", "maintenance", "stopping", ""] {
            assert!(evaluate_startup(state).is_err());
        }
    }
}
