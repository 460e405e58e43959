//! One file for each verb of the command line.

pub mod bench;
pub mod build_image;
pub mod buildroot;
pub mod check;
pub mod clean;
pub mod doctor;
pub mod flash;
pub mod inspect;
pub mod keys;
pub mod lock;
pub mod plan;
pub mod publish;
pub mod push;
pub mod release;
pub mod run;
pub mod verify;

/// Prints the completion script of a shell. `clap_complete` itself would panic when the reader closes the output.
pub fn print_completions(shell: clap_complete::Shell, command: &mut clap::Command, name: &str) {
    let mut script = Vec::new();
    clap_complete::generate(shell, command, name, &mut script);
    crate::out!("{}", String::from_utf8_lossy(&script));
}
