//! What a stream does.

use super::Device;
use super::events::Stamp;
use crate::blas::Product;
use crate::codes::Code;
use fused_dropout::device::{Device as _, Kernel};
use std::ffi::c_void;
use std::rc::Rc;
use std::time::Instant;

/// Something that a stream does.
#[derive(Clone)]
pub enum Op {
    Kernel {
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: Rc<[u128]>,
    },
    Product(Rc<Product>),
    Set {
        to: u64,
        value: u8,
        bytes: usize,
    },
    /// From bytes that were taken at the call.
    Write {
        to: u64,
        values: Rc<[u8]>,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    /// From and to pinned memory of the host.
    FromHost {
        to: u64,
        host: usize,
        bytes: usize,
    },
    ToHost {
        host: usize,
        from: u64,
        bytes: usize,
    },
    Free {
        address: u64,
    },
    HostFunction {
        function: unsafe extern "C" fn(*mut c_void),
        data: usize,
    },
    /// Waits until a stream has done so many things.
    Wait {
        stream: usize,
        position: u64,
    },
    Stamp(Stamp),
}

impl Device {
    pub(super) fn execute(&mut self, op: Op) {
        if self.broken {
            return;
        }
        if let Err(fault) = self.try_execute(op) {
            eprintln!("stand-in for the CUDA driver: {fault}");
            self.broken = true;
        }
    }

    fn try_execute(&mut self, op: Op) -> std::result::Result<(), String> {
        let memory = &mut self.memory;
        let outside = |what: &'static str| move |_: Code| format!("{what} outside of allocations");
        match op {
            Op::Kernel { kernel, blocks, threads, params } => {
                let params = params.as_ptr().cast();
                // SAFETY: `launch` copied as many bytes as the kernel declares; accesses are checked.
                let launched = unsafe { memory.emulator.launch(kernel, blocks, threads, params) };
                launched.map_err(|error| error.to_string())?;
            }
            Op::Product(product) => product.run(memory)?,
            Op::Set { to, value, bytes } => {
                memory.bytes_mut(to, bytes).map_err(outside("a memset"))?.fill(value);
            }
            Op::Write { to, values } => {
                let to = memory.bytes_mut(to, values.len());
                to.map_err(outside("a copy from the host"))?.copy_from_slice(&values);
            }
            Op::Copy { to, from, bytes } => {
                let values = memory.bytes(from, bytes).map_err(outside("a copy from"))?.to_vec();
                memory.bytes_mut(to, bytes).map_err(outside("a copy to"))?.copy_from_slice(&values);
            }
            Op::FromHost { to, host, bytes } => {
                let to = memory.bytes_mut(to, bytes).map_err(outside("a copy from the host"))?;
                // SAFETY: the caller gave `bytes` bytes of page-locked memory, which it keeps.
                to.copy_from_slice(unsafe { std::slice::from_raw_parts(host as *const u8, bytes) });
            }
            Op::ToHost { host, from, bytes } => {
                let from = memory.bytes(from, bytes).map_err(outside("a copy to the host"))?;
                // SAFETY: as above.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host as *mut u8, bytes) };
            }
            Op::Free { address } => memory.free(address).map_err(outside("a free"))?,
            // SAFETY: the promise of whoever gave the function to the driver.
            Op::HostFunction { function, data } => unsafe { function(data as *mut c_void) },
            Op::Wait { stream, position } => self.run(stream, position),
            Op::Stamp(stamp) => stamp.set(Some(Instant::now())),
        }
        Ok(())
    }
}
