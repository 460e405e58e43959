//! What all uses of the system's `ssh` have in common.

use anyhow::{Result, ensure};

/// Rejects invalid options of ssh_config(5).
///
/// # Errors
/// Names the invalid option.
pub(crate) fn check_options(options: &[String]) -> Result<()> {
    for option in options {
        let key = option.split_once('=').map(|(key, _)| key).unwrap_or_default();
        ensure!(
            !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric()),
            "invalid option of ssh: `{option}`\n\
             help: KEY=VALUE as in ssh_config(5), such as Port=2222"
        );
    }
    Ok(())
}
