//! What a program says beside its results, which are in files: no training ends because nobody reads on, or for a full disk.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// A line to the standard output, as `println!` takes it.
macro_rules! say {
    () => { $crate::common::say::bytes(b"\n") };
    ($($part:tt)*) => { $crate::common::say::bytes(format!("{}\n", format_args!($($part)*)).as_bytes()) };
}
pub(crate) use say;

/// Bytes to the standard output. That they cannot be written is said once, unless a pipe's reader has gone.
pub fn bytes(bytes: &[u8]) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let mut stdout = io::stdout().lock();
    let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) else { return };
    if error.kind() != ErrorKind::BrokenPipe && !TOLD.swap(true, Relaxed) {
        warn(format_args!("cannot write to the standard output: {error}"));
    }
}

/// A line to the standard error.
pub fn warn(line: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}
