//! Runs the crate's CUDA kernels on the host, without a GPU: the same `kernels/*.cu`, compiled by the
//! machine's C++ compiler, a block's threads as fibers. For tests, not for speed.
//!
//! Tensors are slices, arrays and vectors in host memory. A launch works on copies of them that lie
//! between guard zones and inaccessible pages, at the same address modulo 128; what was written is
//! copied back when the operator returns, also after a fault. Caught, and returned as
//! [`Error::Fault`] with the kernel, block and thread:
//!
//! - an access through the kernels' accessors that is not inside one of the launch's tensors, that
//!   writes to one which is only read, or that is not aligned to its width;
//! - the same by any other access: the compiler's instrumentation (`-fsanitize=thread`, without its
//!   library) announces every load and store to `kernels/emulator/watch.cpp`. Code that it does not
//!   see is still stopped by the guard zones, if it writes: they are looked at after every block;
//! - in shared memory, a read of what nobody in the block has written, and two accesses by different
//!   threads, one of them a write, without a barrier between them (Linux only);
//! - a barrier that a thread of the block never reaches, or a warp collective that a lane of its mask
//!   never reaches (a thread that has ended reaches none); threads that meet at different barriers; a
//!   shuffle from a lane that the mask does not name;
//! - an index beyond the end of an array of known length, and a shift by more bits than the type has.
//!
//! A thread runs until it ends or waits, so a missing barrier between accesses to tensors shows as a
//! result that depends on the order of the threads: [`Emulator::order`]. Not noticed: two blocks that
//! depend on each other, if no order of the blocks tells; a load that the compiler removed.

use crate::device::{Address, Device, Kernel};
use crate::error::Error;
use crate::ops::AsDropout;
use crate::pass::{Backend, Pass};
use crate::tensor::{Readable, Writable, host_tensors};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard};
use std::thread::{self, ThreadId};

mod runtime;

/// Accesses to tensors, by width.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// How many accesses of 1, 2, 4, 8 and 16 bytes.
    pub by_width: [u64; 5],
}

impl Accesses {
    /// How many accesses.
    pub fn count(&self) -> u64 {
        self.by_width.iter().sum()
    }

    /// How many bytes they moved.
    pub fn bytes(&self) -> u64 {
        self.by_width.iter().enumerate().map(|(log, count)| count << log).sum()
    }

    /// How many accesses of `bytes` bytes: 1, 2, 4, 8 or 16; 0 of any other width.
    pub fn of_width(&self, bytes: u32) -> u64 {
        if !bytes.is_power_of_two() {
            return 0;
        }
        self.by_width.get(bytes.trailing_zeros() as usize).copied().unwrap_or(0)
    }

    fn add(&mut self, counts: &[u64; 5]) {
        self.by_width.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
}

/// What the kernels of an [`Emulator`] read and wrote. Counted are accesses to tensors; parameters
/// and shared memory are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Launches.
    pub launches: u64,
    /// Loads.
    pub reads: Accesses,
    /// Stores.
    pub writes: Accesses,
}

/// Runs kernels on the host. Any number of threads may use one at the same time; a launch sees the
/// tensors of its own thread.
#[derive(Default)]
pub struct Emulator {
    order: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tensors: Vec<Tensor>,
    next: u64,
    traffic: Traffic,
}

/// A tensor that is held for a launch of `thread`.
struct Tensor {
    id: u64,
    thread: ThreadId,
    guarded: runtime::Guarded,
    is_workspace: bool,
}

impl Emulator {
    /// An emulator that runs blocks, and threads within a block, in ascending order.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with another order of blocks and threads: 0 ascending, 1 descending, any other
    /// number a random order that is drawn anew at every block, barrier and warp collective.
    ///
    /// A correct kernel gives the same bits in every order.
    pub fn order(self, seed: u64) -> Self {
        Self { order: seed, ..self }
    }

    /// Runs one pass of an operator: [`Backend::run`].
    ///
    /// # Errors
    /// As [`Backend::run`]; [`Error::Fault`] where a kernel does what no kernel may do.
    pub fn run<'a, P: Pass<'a, Self>>(
        &self,
        dropout: &impl AsDropout<Self>,
        pass: P,
    ) -> Result<(), Error> {
        Backend::run(self, dropout, pass)
    }

    /// What all launches since the last [`reset_traffic`](Self::reset_traffic) moved.
    pub fn traffic(&self) -> Traffic {
        self.lock().traffic
    }

    /// Starts counting from zero.
    pub fn reset_traffic(&self) {
        self.lock().traffic = Traffic::default();
    }

    // A panic elsewhere leaves the list of tensors and the counts whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Copies `source` to where kernels see it. `target` is where the copy goes back to, null for a
    /// tensor that does not; otherwise it points to `source`, borrowed for `'a` to be written.
    fn hold<'a, T: bytemuck::Pod>(
        &'a self,
        source: &[T],
        writable: bool,
        target: *mut T,
    ) -> Result<Address<'a, Self>, Error> {
        let bytes = size_of_val(source);
        let guarded = runtime::Guarded::new(source, writable).ok_or_else(|| {
            let reason = format!("no memory for a copy of {bytes} bytes");
            Error::Unavailable { backend: "emulator", reason }
        })?;
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        let is_workspace = writable && target.is_null();
        state.tensors.push(Tensor { id, thread: thread::current().id(), guarded, is_workspace });
        let target = target.cast();
        let hold = Hold { device: self, id, guarded, target, bytes, tensor: PhantomData };
        Ok(Address { pointer: guarded.start as u64, hold: Some(hold) })
    }
}

/// A tensor's copy, which kernels see. Dropping it writes the copy back to a tensor that was held for
/// writing.
pub struct Hold<'a> {
    device: &'a Emulator,
    id: u64,
    guarded: runtime::Guarded,
    /// Null for a tensor that is only read, and for a workspace.
    target: *mut u8,
    bytes: usize,
    tensor: PhantomData<&'a mut [u8]>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.device.lock().tensors.retain(|tensor| tensor.id != self.id);
        // SAFETY: `hold` made the copy with `bytes` bytes, and `target` is the tensor of as many
        // bytes that `Writable::write` has borrowed exclusively for as long as this value lives. The
        // copy is in no list any more, and this thread, which owns the value, runs no launch now.
        unsafe {
            if !self.target.is_null() {
                std::ptr::copy_nonoverlapping(self.guarded.start, self.target, self.bytes);
            }
            self.guarded.free();
        }
    }
}

impl Device for Emulator {
    type Hold<'a> = Hold<'a>;

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: *const c_void,
    ) -> Result<(), Error> {
        let found = runtime::find(kernel.name).ok_or_else(|| Error::Unavailable {
            backend: "emulator",
            reason: format!("there is no kernel {} in {}.cu", kernel.name, kernel.operator),
        })?;
        let fault = |fault: String| Err(Error::Fault { kernel: kernel.name, fault });
        if blocks == 0 || blocks > i32::MAX as u32 || threads == 0 || threads > 1024 {
            return fault(format!("a GPU launches no {blocks} blocks of {threads} threads"));
        }
        let own = thread::current().id();
        let tensors: Vec<_> = self
            .lock()
            .tensors
            .iter()
            .filter(|tensor| tensor.thread == own)
            .map(|tensor| tensor.guarded)
            .collect();
        let mut launch = runtime::Launch {
            kernel: found,
            params,
            blocks,
            threads,
            tensors: tensors.as_ptr(),
            tensor_count: tensors.len(),
            order: self.order,
            counts: Default::default(),
            message: [0; 512],
        };
        // SAFETY: the caller vouches for `params`; `tensors` lives through the call, and its copies
        // live as long as their holds, which this thread owns and does not drop meanwhile.
        let completed = unsafe { runtime::fused_dropout_emulator_launch(&mut launch) };
        let traffic = &mut self.lock().traffic;
        traffic.launches += 1;
        traffic.reads.add(&launch.counts.reads);
        traffic.writes.add(&launch.counts.writes);
        if completed { Ok(()) } else { fault(runtime::message(&launch)) }
    }

    /// NaN in every element: what lies in a workspace must not matter. A thread has one at a time, as a stream has: with a GPU
    /// it would wait for itself.
    fn workspace(&self, elements: usize) -> Result<Address<'_, Self>, Error> {
        let own = thread::current().id();
        if self.lock().tensors.iter().any(|tensor| tensor.is_workspace && tensor.thread == own) {
            let fault = "the pass holds a workspace, and asks for another one".to_owned();
            return Err(Error::Fault { kernel: "workspace", fault });
        }
        let mut contents = Vec::new();
        let reserved = contents.try_reserve_exact(elements);
        reserved.map_err(|_| {
            Error::argument("workspace", "elements", "what fits in memory", elements)
        })?;
        contents.resize(elements, f32::NAN);
        self.hold(&contents, true, std::ptr::null_mut())
    }
}

/// Implements [`Readable`], and after `mut` [`Writable`], for a type that dereferences to `[T]`.
macro_rules! host_tensor {
    ([$($generics:tt)*] $tensor:ty) => {
        // SAFETY: a slice's length and elements, copied to where the kernels see them.
        unsafe impl<T: bytemuck::Pod, $($generics)*> Readable<T, Emulator> for $tensor {
            fn elements(&self) -> usize {
                self.len()
            }
            fn read<'a>(&'a self, device: &'a Emulator) -> Result<Address<'a, Emulator>, Error> {
                device.hold(&self[..], false, std::ptr::null_mut())
            }
        }
    };
    (mut [$($generics:tt)*] $tensor:ty) => {
        host_tensor!([$($generics)*] $tensor);
        // SAFETY: as above; the borrow is exclusive, and any bits are a `Pod`.
        unsafe impl<T: bytemuck::Pod, $($generics)*> Writable<T, Emulator> for $tensor {
            fn write<'a>(&'a mut self, device: &'a Emulator) -> Result<Address<'a, Emulator>, Error> {
                let elements = &mut self[..];
                let target = elements.as_mut_ptr();
                device.hold(elements, true, target)
            }
        }
    };
}

host_tensors!(host_tensor);
