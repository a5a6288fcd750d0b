//! Allocations and copies, as the driver orders them.

use super::{Device, Op};
use crate::codes::*;
use crate::thread::Caller;

impl Device {
    /// Memory, now; what was freed and waits for its stream is freed first where there is not enough.
    fn allocate_now(&mut self, caller: Caller, bytes: usize) -> Result<u64> {
        if bytes > self.memory.free_bytes() {
            self.drain_context(caller.context);
            self.sound()?;
        }
        self.memory.allocate(caller.context, bytes)
    }

    pub fn allocate(&mut self, caller: Caller, bytes: usize) -> Result<u64> {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.allocate_now(caller, bytes)
    }

    pub fn allocate_on(&mut self, caller: Caller, bytes: usize, handle: usize) -> Result<u64> {
        self.check(caller)?;
        let key = self.own_stream(caller, handle)?;
        if let Some(capture) = self.streams[&key].capture {
            self.invalidate(capture); // it would make an allocation of the graph's own
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.no_implicit_dependency(key)?;
        self.allocate_now(caller, bytes)
    }

    /// Waits for the device, as the driver does.
    pub fn free(&mut self, caller: Caller, address: u64) -> Result {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.drain_context(caller.context);
        self.sound()?;
        self.memory.free(address)
    }

    pub fn free_on(&mut self, caller: Caller, address: u64, handle: usize) -> Result {
        self.check(caller)?;
        if !self.memory.starts_at(address) {
            return Err(INVALID_VALUE);
        }
        self.submit(caller, handle, Op::Free { address })
    }

    pub fn allocate_host(&mut self, caller: Caller, bytes: usize) -> Result<usize> {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        let memory = vec![u128::MAX; bytes.div_ceil(16).max(1)].into_boxed_slice();
        let address = memory.as_ptr() as usize;
        self.pinned.insert(address, memory);
        Ok(address)
    }

    pub fn free_host(&mut self, caller: Caller, address: usize) -> Result {
        self.check(caller)?;
        self.unsafe_call(caller)?;
        self.drain_context(caller.context);
        self.pinned.remove(&address).map(drop).ok_or(INVALID_VALUE)
    }

    fn is_pinned(&self, host: usize, bytes: usize) -> bool {
        self.pinned.iter().any(|(&start, memory)| {
            host >= start && host + bytes <= start + size_of_val(&memory[..])
        })
    }

    /// A copy from the host. Pageable memory is read now, page-locked memory when the stream gets there.
    pub fn write(
        &mut self,
        caller: Caller,
        to: u64,
        host: usize,
        bytes: usize,
        stream: usize,
    ) -> Result {
        self.check(caller)?;
        if !self.memory.holds(to, bytes) {
            return Err(INVALID_VALUE);
        }
        if self.is_pinned(host, bytes) {
            return self.submit(caller, stream, Op::FromHost { to, host, bytes });
        }
        // SAFETY: the caller of the driver waits for this answer, and gave so many bytes to read.
        let values = unsafe { std::slice::from_raw_parts(host as *const u8, bytes) };
        self.submit(caller, stream, Op::Write { to, values: values.into() })
    }

    /// A copy to the host. One to pageable memory is done when this returns.
    pub fn read(
        &mut self,
        caller: Caller,
        host: usize,
        from: u64,
        bytes: usize,
        stream: usize,
    ) -> Result {
        self.check(caller)?;
        if !self.memory.holds(from, bytes) {
            return Err(INVALID_VALUE);
        }
        let pinned = self.is_pinned(host, bytes);
        let key = self.own_stream(caller, stream)?;
        if let (Some(capture), false) = (self.streams[&key].capture, pinned) {
            self.invalidate(capture);
            return Err(CAPTURE_UNSUPPORTED);
        }
        self.submit(caller, stream, Op::ToHost { host, from, bytes })?;
        if !pinned {
            self.drain(key);
        }
        self.sound()
    }
}
