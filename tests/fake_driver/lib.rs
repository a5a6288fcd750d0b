//! A stand-in for the CUDA driver and cuBLAS: a library that answers to `libcuda.so.1` and
//! `libcublas.so.13` and runs this crate's kernels on its emulator, so that everything on the host's side
//! of the CUDA backend runs where there is no GPU. `tests/fake_driver/with COMMAND` runs a command with it.
//!
//! It is as unkind as a GPU may be. Streams do their work as late as possible: when something waits for
//! it, and then only what must come before; so a wait that is missing between two streams gives wrong
//! results. Fresh memory is NaN. An access outside of allocations, or to freed memory, ends the launch, and
//! from then on every call answers CUDA_ERROR_ILLEGAL_ADDRESS. A capture refuses what the driver
//! refuses, and what the stand-in does not know (forked captures, allocations and copies from pageable
//! memory in a graph).
//!
//! `FUSED_DROPOUT_FAKE_DRIVER_BYTES` is how much memory the device has (2 GiB), `FUSED_DROPOUT_FAKE_DRIVER_CAPABILITY` its
//! compute capability (9.0); below 8.0 it takes no kernel, as a driver finds none for it. A function that is not here is a
//! missing symbol, which cudarc panics about.

mod blas;
mod codes;
mod device;
mod driver;
mod memory;
mod thread;
