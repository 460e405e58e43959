//! `slipway`: flashes, verifies, inspects and pushes on machines without a checkout and without Rust. `release create` makes it
//! as one static binary.

use std::process::ExitCode;

use anyhow::{Result, bail};
use xtask::cli::{Command, CommandLine, slipway};
use xtask::{cmd, program};

fn main() -> ExitCode {
    program::set_standalone();
    #[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
    names::use_built_in_modules();
    program::exit_code(run(&slipway::parse(version())))
}

fn run(cli: &CommandLine) -> Result<()> {
    program::check_temporary_directory()?;
    match &cli.command {
        Command::Flash(options) => cmd::flash::flash(options),
        Command::Verify(options) => cmd::verify::verify(options),
        Command::Inspect(options) => cmd::inspect::inspect(options),
        Command::Push(options) => cmd::push::push(options),
        Command::Release(verb) => cmd::release::release(verb),
        Command::Keys(verb) => cmd::keys::keys(verb),
        Command::Completions { shell } => {
            let mut command = slipway::command(version());
            cmd::print_completions(*shell, &mut command, program::STANDALONE);
            Ok(())
        }
        other => bail!("this verb needs a checkout of Slipway: {other:?}"),
    }
}

/// The version, and the commit that it was compiled from.
fn version() -> &'static str {
    const COMMIT: Option<&str> = option_env!("SLIPWAY_COMMIT");
    match COMMIT {
        None => concat!(env!("CARGO_PKG_VERSION"), " (compiled by hand)"),
        Some(commit) => format!("{} (commit {commit})", env!("CARGO_PKG_VERSION")).leak(),
    }
}

/// How a static program finds the address of a host.
#[cfg(all(target_env = "gnu", target_feature = "crt-static"))]
#[expect(
    unsafe_code,
    reason = "libc offers no other way to choose the modules, and no crate has its function"
)]
mod names {
    use std::ffi::{CStr, c_char, c_int};

    // glibc, nss/nss.h.
    unsafe extern "C" {
        fn __nss_configure_lookup(database: *const c_char, services: *const c_char) -> c_int;
    }

    /// What getaddrinfo(3) and its relatives look up, with the modules that are part of libc.a since glibc 2.34 ("files" and
    /// "dns": its NEWS).
    const DATABASES: [(&CStr, &CStr); 4] = [
        (c"hosts", c"files dns"),
        (c"services", c"files"),
        (c"passwd", c"files"),
        (c"group", c"files"),
    ];

    /// Makes libc ignore nsswitch.conf(5). It would load the modules that are listed there (mdns, resolve, sss) as shared
    /// libraries, each with the C library of this machine's distribution, which is another one than ours: that crashes.
    pub(super) fn use_built_in_modules() {
        for (database, services) in DATABASES {
            // SAFETY: both are strings with a NUL, which libc copies; no other thread runs yet.
            let result = unsafe { __nss_configure_lookup(database.as_ptr(), services.as_ptr()) };
            assert_eq!(result, 0, "libc refuses its own modules");
        }
    }
}
