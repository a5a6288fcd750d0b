//! Ctrl-C: the first ends the run after its step, the second at once.

use super::say;
use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

static ASKED: AtomicBool = AtomicBool::new(false);

/// The exit status of a program that a signal ended, as shells report SIGINT.
pub const STATUS: u8 = 130;

/// Listens from now on (to SIGTERM and SIGHUP too).
pub fn listen() -> Result<()> {
    let asked_again = || ASKED.swap(true, SeqCst);
    ctrlc::set_handler(move || {
        if asked_again() {
            std::process::exit(i32::from(STATUS));
        }
        say::warn(format_args!("\nending after this step (Ctrl-C again: at once)"));
    })
    .context("cannot listen to Ctrl-C")
}

/// Whether the run should end.
pub fn asked() -> bool {
    ASKED.load(SeqCst)
}
