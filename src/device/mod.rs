//! The operators as launches of the kernels in `kernels/`: which kernel, how large a grid, which
//! parameters. Written once, for every [`Device`] that can run a kernel: a CUDA stream
//! (`cuda::Gpu`), or the host (`emulator::Emulator`). So what the emulator's tests prove is what a
//! GPU is given.
//!
//! Each operator has two levels: safe functions on tensors that the device can hold ([`Readable`],
//! [`Writable`]), and in its module `raw` the same launches on bare addresses.

use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::check_len;
use std::ffi::c_void;

pub(crate) mod abi;

pub mod bias_act_dropout;
pub mod dropout;
pub mod dropout_add;
pub mod dropout_add_norm;
pub mod embedding_dropout;
pub mod keep_mask;
mod rows;
pub mod softmax_dropout;
mod sum_rows;

pub use sum_rows::{BiasGrad, BiasGradAddresses};

/// A kernel: its name, and the operator whose file (`kernels/<operator>.cu`) it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The operator.
    pub operator: &'static str,
    /// The `extern "C"` name.
    pub name: &'static str,
}

/// Something that runs the crate's kernels.
pub trait Device {
    /// What keeps a tensor's address valid, and its uses in order, until the launch is submitted.
    type Hold<'a>;

    /// Submits `kernel` on `blocks` blocks of `threads` threads. Every kernel has one parameter, a
    /// structure that the host fills in; `params` points to it.
    ///
    /// # Safety
    /// `params` points to the structure that the kernel declares, and every address in it is valid on
    /// this device for what the kernel reads and writes, until the kernel has run.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: *const c_void,
    ) -> Result<(), Error>;
}

/// A tensor's address on a device, held until dropped.
pub struct Address<'a, D: Device> {
    /// The first element, as a kernel sees it.
    pub pointer: u64,
    /// Dropped after the launch was submitted.
    pub hold: D::Hold<'a>,
}

/// A tensor of `T` that kernels on `D` can read.
///
/// # Safety
/// While what [`read`](Self::read) gives is held, its address is valid on the device for reads of
/// [`elements`](Self::elements) values of `T`, and aligned to `T`. Both answers stay the same through a
/// call. The safe operators launch kernels on this word alone.
pub unsafe trait Readable<T, D: Device> {
    /// Length in elements.
    fn elements(&self) -> usize;
    /// The address, for a kernel that reads it.
    ///
    /// # Errors
    /// Whatever the device says while it orders the read behind earlier writes.
    fn read<'a>(&'a self, device: &'a D) -> Result<Address<'a, D>, Error>;
}

/// A tensor of `T` that kernels on `D` can read and write.
///
/// # Safety
/// As [`Readable`], for writes too: what [`write`](Self::write) gives is this tensor's alone while it is held,
/// and any bits that a kernel leaves there are a `T`.
pub unsafe trait Writable<T, D: Device>: Readable<T, D> {
    /// The address, for a kernel that writes it.
    ///
    /// # Errors
    /// Whatever the device says while it orders the write behind earlier uses.
    fn write<'a>(&'a mut self, device: &'a D) -> Result<Address<'a, D>, Error>;
}

/// Where an operator is launched, and the parts of its key that lie in device memory.
///
/// A captured CUDA graph replays its parameters as they were captured. A stream number that is read
/// from device memory when the kernel runs draws a fresh mask at each replay.
pub struct Call<'a, D: Device> {
    pub(crate) device: &'a D,
    stream_number: Option<&'a dyn Readable<u64, D>>,
    row_list: Option<&'a dyn Readable<u32, D>>,
}

impl<'a, D: Device> Call<'a, D> {
    /// A launch on `device`, the whole key from the host.
    pub fn on(device: &'a D) -> Self {
        Self { device, stream_number: None, row_list: None }
    }

    /// Reads the stream number (one u64) from device memory when the kernel runs, in place of
    /// `dropout.key.stream`.
    pub fn stream_number(self, number: &'a dyn Readable<u64, D>) -> Self {
        Self { stream_number: Some(number), ..self }
    }

    /// Takes the logical row of each local row (one u32 a row) from device memory, in place of
    /// `dropout.place.rows`: the explicit row map. `RowMap::Explicit` with its list on the host is
    /// refused on a device.
    pub fn row_list(self, list: &'a dyn Readable<u32, D>) -> Self {
        Self { row_list: Some(list), ..self }
    }

    /// The address of an optional tensor, 0 where there is none.
    pub(crate) fn optional<'t, T>(
        &self,
        tensor: Option<&'t dyn Readable<T, D>>,
    ) -> Result<Option<Address<'t, D>>, Error>
    where
        'a: 't,
    {
        tensor.map(|tensor| tensor.read(self.device)).transpose()
    }

    /// Checks the device-resident parts of the key and takes their addresses.
    pub(crate) fn resident(
        &self,
        operator: &'static str,
        rows: usize,
    ) -> Result<Resident<'_, D>, Error> {
        if let Some(number) = self.stream_number {
            check_len(operator, "stream_number", 1, number.elements())?;
        }
        if let Some(list) = self.row_list {
            check_len(operator, "row_list", rows, list.elements())?;
        }
        Ok(Resident {
            stream_number: self.stream_number.map(|n| n.read(self.device)).transpose()?,
            row_list: self.row_list.map(|l| l.read(self.device)).transpose()?,
        })
    }
}

/// The device-resident parts of a key, held for one launch.
pub(crate) struct Resident<'a, D: Device> {
    pub stream_number: Option<Address<'a, D>>,
    pub row_list: Option<Address<'a, D>>,
}

impl<D: Device> Resident<'_, D> {
    pub fn addresses(&self) -> KeyAddresses {
        KeyAddresses {
            stream_number: pointer(&self.stream_number),
            row_list: pointer(&self.row_list),
        }
    }
}

/// Addresses of the parts of a key that lie in device memory; 0 for a part that the host gives. What
/// [`Call::stream_number`] and [`Call::row_list`] say, for the functions on bare addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyAddresses {
    /// One u64, in place of `dropout.key.stream`.
    pub stream_number: u64,
    /// One u32 a row, in place of `dropout.place.rows`.
    pub row_list: u64,
}

/// Threads of a block, in every kernel: `THREADS` in `kernels/kernel.cuh`.
const THREADS: u32 = 256;

/// Octets that a block of a streaming kernel covers: `OCTETS_A_BLOCK` in `kernels/kernel.cuh`.
const OCTETS_A_BLOCK: u32 = 512;

/// Launches `kernel` on `blocks` blocks.
///
/// # Safety
/// `P` is the structure that the kernel declares, and its addresses are as [`Device::launch`] asks.
pub(crate) unsafe fn launch<D: Device, P>(
    device: &D,
    kernel: Kernel,
    blocks: usize,
    params: &P,
) -> Result<(), Error> {
    // What a GPU's grid can have in its first dimension.
    if blocks > i32::MAX as usize {
        let expected = "a tensor that 2^31 - 1 blocks cover";
        return Err(Error::argument(kernel.operator, "shape", expected, blocks));
    }
    // SAFETY: the caller's promise; `params` lives through the call.
    unsafe { device.launch(kernel, blocks as u32, THREADS, std::ptr::from_ref(params).cast()) }
}

/// Whether kernels can take whole octets of every row in 16-byte accesses: the one place where the
/// choice between the aligned kernels and the `any` ones is made. An absent tensor (0) is aligned.
pub(crate) fn aligned(cols: usize, addresses: &[u64]) -> bool {
    cols.is_multiple_of(OCTET) && addresses.iter().all(|address| address.is_multiple_of(16))
}

/// The kernel `$name`, which may be given in parts, for the storage type `$T`.
macro_rules! kernel {
    ($operator:expr, $($name:literal)+, $T:ty) => {
        $crate::device::Kernel {
            operator: $operator,
            name: match <$T as $crate::Dtype>::ID {
                $crate::DtypeId::F32 => concat!($($name,)+ "_f32"),
                $crate::DtypeId::F16 => concat!($($name,)+ "_f16"),
                $crate::DtypeId::Bf16 => concat!($($name,)+ "_bf16"),
            },
        }
    };
}
pub(crate) use kernel;

/// The pointer of an optional tensor, null where there is none.
pub(crate) fn pointer<D: Device>(address: &Option<Address<'_, D>>) -> u64 {
    address.as_ref().map_or(0, |address| address.pointer)
}
