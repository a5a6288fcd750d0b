//! Ctrl-C: the first ends the run after its step, the second at once.

use super::say;
use anyhow::{Context, Result};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

static ASKED: AtomicBool = AtomicBool::new(false);

/// The exit status of a program that a signal ended, as shells report SIGINT.
pub const STATUS: u8 = 130;

/// Signals so close to each other are one: some programs send theirs to a process and to its group.
const ONE: Duration = Duration::from_millis(500);

/// Listens from now on (to SIGTERM and SIGHUP too).
pub fn listen() -> Result<()> {
    let mut first: Option<Instant> = None;
    ctrlc::set_handler(move || match first {
        None => {
            first = Some(Instant::now());
            ASKED.store(true, SeqCst);
            say::warn(format_args!("\nending after this step (Ctrl-C again: at once)"));
        }
        Some(first) if first.elapsed() > ONE => std::process::exit(i32::from(STATUS)),
        Some(_) => {}
    })
    .context("cannot listen to Ctrl-C")
}

/// Whether the run should end.
pub fn asked() -> bool {
    ASKED.load(SeqCst)
}
