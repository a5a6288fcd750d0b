//! One graph is captured at a time in a process, and nothing waits for a whole device meanwhile, as opening
//! and closing cuBLAS do: the driver ends every capture in a context that is waited for, whoever waits.

use crate::cuda::driver;
use crate::error::Error;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, CudaStream};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// The memory that a graph uses, by its address.
pub(super) type Used = HashMap<u64, Arc<CudaSlice<u8>>>;

/// The thread that captures.
static CAPTURING: Mutex<Option<ThreadId>> = Mutex::new(None);
static ENDED: Condvar = Condvar::new();

/// Waits until no other thread captures, and keeps them from it until the result is dropped.
pub(super) fn none() -> MutexGuard<'static, Option<ThreadId>> {
    let other = |thread: &mut Option<ThreadId>| thread.is_some_and(|t| t != thread::current().id());
    let capturing = CAPTURING.lock().unwrap_or_else(PoisonError::into_inner);
    ENDED.wait_while(capturing, other).unwrap_or_else(PoisonError::into_inner)
}

/// This thread's right to capture.
struct Turn;

impl Turn {
    fn take() -> Result<Self, Error> {
        let mut capturing = none();
        if capturing.is_some() {
            return Err(Error::argument("graph", "work", "no other capture", "one inside of it"));
        }
        *capturing = Some(thread::current().id());
        Ok(Self)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *CAPTURING.lock().unwrap_or_else(PoisonError::into_inner) = None;
        ENDED.notify_all();
    }
}

/// A capture that goes on. It ends in any case, after a panic too: the stream would stay in it.
pub(super) struct Capture<'a> {
    stream: &'a Arc<CudaStream>,
    used: &'a RefCell<Option<Used>>,
    ended: bool,
    _turn: Turn,
}

impl<'a> Capture<'a> {
    /// Begins a capture of `stream`. What is put into `used` meanwhile is the memory that the graph needs.
    pub(super) fn begin(
        stream: &'a Arc<CudaStream>,
        used: &'a RefCell<Option<Used>>,
    ) -> Result<Self, Error> {
        let turn = Turn::take()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(driver("beginning a capture"))?;
        used.replace(Some(Used::new()));
        Ok(Self { stream, used, ended: false, _turn: turn })
    }

    pub(super) fn end(mut self) -> Result<(Option<CudaGraph>, Used), Error> {
        self.ended = true;
        let used = self.used.take().unwrap_or_default();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        Ok((graph.map_err(driver("ending a capture"))?, used))
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        self.used.take();
        if !self.ended {
            let _ = self.stream.end_capture(CUgraphInstantiate_flags(0));
        }
    }
}
