//! Device memory: every allocation is a tensor that the emulator holds, between guard zones.

use crate::codes::{INVALID_VALUE, OUT_OF_MEMORY, Result};
use fused_dropout::Writable;
use fused_dropout::device::Address;
use fused_dropout::emulator::Emulator;
use std::collections::BTreeMap;
use std::env;

pub struct Memory {
    pub emulator: &'static Emulator,
    /// By address.
    allocations: BTreeMap<u64, Allocation>,
    total: usize,
}

struct Allocation {
    context: usize,
    bytes: usize,
    /// What the emulator copied; null after it was given back.
    source: *mut Source,
    held: Option<Address<'static, Emulator>>,
}

/// The bytes from `skip` on, which are at an aligned address.
struct Source {
    bytes: &'static mut [u8],
    whole: *mut [u8],
}

/// The emulator keeps an address modulo this. The driver gives 256 at least.
const ALIGNMENT: usize = 128;

/// NaN in every type, and an index that is in no table.
const FRESH: u8 = 0xff;

impl Default for Memory {
    fn default() -> Self {
        let total = env::var("FUSED_DROPOUT_FAKE_DRIVER_BYTES").ok().and_then(|b| b.parse().ok());
        Self {
            emulator: Box::leak(Box::new(Emulator::new())),
            allocations: BTreeMap::new(),
            total: total.unwrap_or(2 << 30),
        }
    }
}

impl Memory {
    pub fn allocate(&mut self, context: usize, bytes: usize) -> Result<u64> {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if bytes > self.free_bytes() {
            return Err(OUT_OF_MEMORY);
        }
        let whole = Box::into_raw(vec![FRESH; bytes + ALIGNMENT].into_boxed_slice());
        // SAFETY: the box was just leaked; `Drop` takes it back after the last use of this reference.
        let all: &'static mut [u8] = unsafe { &mut *whole };
        let skip = all.as_ptr().align_offset(ALIGNMENT);
        let source = Source { bytes: &mut all[skip..skip + bytes], whole };
        let source = Box::into_raw(Box::new(source));
        let mut allocation = Allocation { context, bytes, source, held: None };
        // SAFETY: as above; nobody but the emulator uses it until then.
        let held = unsafe { (*source).bytes.write(self.emulator) }.map_err(|_| OUT_OF_MEMORY)?;
        let address = held.pointer;
        allocation.held = Some(held);
        self.allocations.insert(address, allocation);
        Ok(address)
    }

    pub fn free(&mut self, address: u64) -> Result {
        self.allocations.remove(&address).map(drop).ok_or(INVALID_VALUE)
    }

    pub fn free_all_of(&mut self, context: usize) {
        self.allocations.retain(|_, allocation| allocation.context != context);
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn free_bytes(&self) -> usize {
        self.total - self.allocations.values().map(|allocation| allocation.bytes).sum::<usize>()
    }

    pub fn starts_at(&self, address: u64) -> bool {
        self.allocations.contains_key(&address)
    }

    /// Whether these bytes lie in one allocation.
    pub fn holds(&self, address: u64, bytes: usize) -> bool {
        let Some((start, allocation)) = self.allocations.range(..=address).next_back() else {
            return false;
        };
        let offset = (address - start) as usize;
        offset.checked_add(bytes).is_some_and(|end| end <= allocation.bytes)
    }

    /// Bytes of one allocation.
    pub fn bytes(&self, address: u64, bytes: usize) -> Result<&[u8]> {
        if !self.holds(address, bytes) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: initialised memory of the emulator's copy, which lives as long as the allocation; only
        // the device's thread touches it, and no kernel runs while the result lives.
        Ok(unsafe { std::slice::from_raw_parts(address as *const u8, bytes) })
    }

    pub fn bytes_mut(&mut self, address: u64, bytes: usize) -> Result<&mut [u8]> {
        if !self.holds(address, bytes) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: as above, and `self` is borrowed exclusively.
        Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // The emulator writes its copy back to the source.
        drop(self.held.take());
        // SAFETY: `allocate` leaked both; the emulator, which borrowed them, is done.
        unsafe {
            let source = Box::from_raw(self.source);
            drop(Box::from_raw(source.whole));
        }
    }
}
