//! The thread that is the device, and those that call it.
//!
//! The emulator shows a launch the tensors of its own thread, so one thread owns everything: a call of
//! the driver is sent there and waits for its answer.

use crate::codes::{Result, UNKNOWN};
use crate::device::Device;
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};
use std::thread;

type Work = Box<dyn FnOnce(&mut Device) + Send>;

static DEVICE: LazyLock<Mutex<mpsc::Sender<Work>>> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::channel::<Work>();
    thread::spawn(move || {
        let mut device = Device::default();
        receiver.into_iter().for_each(|work| work(&mut device));
    });
    Mutex::new(sender)
});

/// Who calls.
#[derive(Clone, Copy)]
pub struct Caller {
    /// The thread.
    pub thread: usize,
    /// The context that is current in it, 0 for none.
    pub context: usize,
}

thread_local! {
    static CONTEXT: Cell<usize> = const { Cell::new(0) };
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

static THREADS: AtomicUsize = AtomicUsize::new(1);

pub fn caller() -> Caller {
    if THREAD.get() == 0 {
        THREAD.set(THREADS.fetch_add(1, Ordering::Relaxed));
    }
    Caller { thread: THREAD.get(), context: CONTEXT.get() }
}

pub fn set_context(context: usize) {
    CONTEXT.set(context);
}

/// What the device answers; an unknown error where its thread has panicked.
pub fn ask<T: Send + 'static>(
    work: impl FnOnce(&mut Device, Caller) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (caller, (sender, answer)) = (caller(), mpsc::channel());
    // Nobody hears an answer that the caller no longer waits for.
    let work = move |device: &mut Device| drop(sender.send(work(device, caller)));
    let sent = DEVICE.lock().unwrap_or_else(PoisonError::into_inner).send(Box::new(work));
    sent.map_err(|_| UNKNOWN)?;
    answer.recv().map_err(|_| UNKNOWN)?
}
