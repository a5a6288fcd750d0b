//! The operators as launches of the kernels in `kernels/`: which kernel, how large a grid, which
//! parameters. Written once, for every [`Device`] that can run a kernel: a CUDA stream
//! (`cuda::Gpu`), or the host (`emulator::Emulator`). So what the emulator's tests prove is what a
//! GPU is given.
//!
//! A device's tensors are what [`Readable`] is implemented for: cudarc's slices and views, and bare
//! addresses as [`Pointer`]s.

use crate::dtype::{Dtype, DtypeId};
use crate::error::Error;
use crate::mask::OCTET;
use crate::ops::{MaskParams, Resident, Shape};
use crate::tensor::{Memory, Readable, Writable};
use abi::{Mask, Matrix};
use std::ffi::c_void;
use std::marker::PhantomData;

pub(crate) mod abi;

pub(crate) mod bias_act_dropout;
pub(crate) mod dropout;
pub(crate) mod dropout_add;
pub(crate) mod dropout_add_norm;
pub(crate) mod embedding_dropout;
pub(crate) mod keep_mask;
pub(crate) mod rows;
pub(crate) mod softmax_dropout;
mod sort_rows;
mod stream;
mod sum_rows;
pub(crate) mod swiglu_dropout;

/// A kernel: its name, and the operator whose file (`kernels/<operator>.cu`) it stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// The operator.
    pub operator: &'static str,
    /// The `extern "C"` name.
    pub name: &'static str,
}

/// Something that runs the crate's kernels.
pub trait Device: Sized {
    /// What keeps a tensor's address valid, and its uses in order, until the launch is submitted.
    type Hold<'a>
    where
        Self: 'a;

    /// Submits `kernel` on `blocks` blocks of `threads` threads. Every kernel has one parameter, a
    /// structure that the host fills in; `params` points to it.
    ///
    /// # Safety
    /// `params` points to the structure that the kernel declares, and every address in it is valid on
    /// this device for what the kernel reads and writes, until the kernel has run.
    ///
    /// # Errors
    /// What the device says.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: *const c_void,
    ) -> Result<(), Error>;

    /// Scratch memory of `elements` f32, whose contents do not matter, aligned to 16 bytes. It is the caller's alone
    /// until the address is dropped, and the kernels that are launched until then can use it. A pass holds one at a time.
    ///
    /// # Errors
    /// What the device says.
    fn workspace(&self, elements: usize) -> Result<Address<'_, Self>, Error>;
}

impl<D: Device> Memory for D {
    type In<'a, T: 'a>
        = Address<'a, D>
    where
        D: 'a;
    type Out<'a, T: 'a>
        = Address<'a, D>
    where
        D: 'a;

    fn skip<'a, T: 'a>(Address { pointer, hold }: Address<'a, D>, first: usize) -> Address<'a, D>
    where
        D: 'a,
    {
        Address { pointer: pointer + (first * size_of::<T>()) as u64, hold }
    }

    fn skip_mut<'a, T: 'a>(tensor: Address<'a, D>, first: usize) -> Address<'a, D>
    where
        D: 'a,
    {
        Self::skip::<T>(tensor, first)
    }
}

/// A tensor's address on a device, held until dropped.
pub struct Address<'a, D: Device + 'a> {
    /// The first element, as a kernel sees it.
    pub pointer: u64,
    /// Dropped after the launch was submitted. `None`: nothing is to be kept, and no uses to be ordered.
    pub hold: Option<D::Hold<'a>>,
}

/// Elements of `T` at a bare address on a device: a tensor of another library.
///
/// ```
/// use fused_dropout::device::Pointer;
/// let address = 0x7f00_0000_1000; // from a tensor of another library
/// // SAFETY: there are 4096 floats at this address, and nobody else writes them during the calls.
/// let x = unsafe { Pointer::<f32>::new(address, 4096) };
/// # let _ = x;
/// ```
#[derive(Debug)]
pub struct Pointer<T> {
    address: u64,
    elements: usize,
    of: PhantomData<T>,
}

impl<T> Pointer<T> {
    /// The `elements` values of `T` at `address`.
    ///
    /// # Safety
    /// As long as this value lives, `address` is valid on the device that it is given to, for reads and writes of so many
    /// elements, and aligned to `T`. Nobody else uses them meanwhile, but by work that the caller orders
    /// behind or before the device's. What lies between the rows of a [`Strided`](crate::Strided) one may be used.
    pub unsafe fn new(address: u64, elements: usize) -> Self {
        Self { address, elements, of: PhantomData }
    }
}

// SAFETY: what `Pointer::new` was promised.
unsafe impl<T, D: Device> Readable<T, D> for Pointer<T> {
    fn elements(&self) -> usize {
        self.elements
    }

    fn read<'a>(&'a self, _: &'a D) -> Result<Address<'a, D>, Error> {
        Ok(Address { pointer: self.address, hold: None })
    }
}

// SAFETY: as above.
unsafe impl<T, D: Device> Writable<T, D> for Pointer<T> {
    fn write<'a>(&'a mut self, _: &'a D) -> Result<Address<'a, D>, Error> {
        Ok(Address { pointer: self.address, hold: None })
    }
}

/// Where a pass is launched, and the mask that it draws.
pub(crate) struct Launch<'a, D: Device> {
    pub device: &'a D,
    pub mask: Mask,
}

impl<'a, D: Device> Launch<'a, D> {
    pub fn new(
        device: &'a D,
        operator: &'static str,
        draw: &MaskParams<'_>,
        resident: &Resident<'_, D>,
    ) -> Result<Self, Error> {
        Ok(Self { device, mask: Mask::new(operator, draw, resident)? })
    }
}

/// Threads of a block, where a kernel does not say otherwise: `THREADS` in `kernels/kernel.cuh`.
const THREADS: u32 = 256;

/// Launches `kernel` on `blocks` blocks.
///
/// # Safety
/// As [`launch_threads`].
pub(crate) unsafe fn launch<D: Device, P>(
    device: &D,
    kernel: Kernel,
    blocks: usize,
    params: &P,
) -> Result<(), Error> {
    // SAFETY: the caller's promise.
    unsafe { launch_threads(device, kernel, blocks, THREADS, params) }
}

/// Launches `kernel` on `blocks` blocks of `threads`.
///
/// # Safety
/// `P` is the structure that the kernel declares, and its addresses are as [`Device::launch`] asks.
pub(crate) unsafe fn launch_threads<D: Device, P>(
    device: &D,
    kernel: Kernel,
    blocks: usize,
    threads: u32,
    params: &P,
) -> Result<(), Error> {
    // What a GPU's grid can have in its first dimension.
    if blocks > i32::MAX as usize {
        let expected = "a tensor that 2^31 - 1 blocks cover";
        return Err(Error::argument(kernel.operator, "shape", expected, blocks));
    }
    // SAFETY: the caller's promise; `params` lives through the call.
    unsafe { device.launch(kernel, blocks as u32, threads, std::ptr::from_ref(params).cast()) }
}

/// Whether kernels can take whole octets of every row in 16-byte accesses: the one place where the
/// choice between the aligned kernels and the `unaligned` ones is made. An absent tensor (0) is aligned.
pub(crate) fn aligned(cols: usize, addresses: impl IntoIterator<Item = u64>) -> bool {
    cols.is_multiple_of(OCTET) && addresses.into_iter().all(|address| address.is_multiple_of(16))
}

/// How kernels find the octets of their matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Whole octets, one behind the other; of f32 an even number of them a row, which kernels take in pairs.
    Dense,
    /// Whole octets, and where a row's number and its stride say.
    Strided,
    /// Elements anywhere.
    Unaligned,
}

impl Layout {
    pub fn is_aligned(self) -> bool {
        self != Self::Unaligned
    }
}

/// The layout of a pass: of its matrices, and of what it reads beside them, a value a column; what is absent is left out.
pub(crate) fn layout<T: Dtype>(shape: Shape, matrices: &[Matrix], rows: &[u64]) -> Layout {
    let octet = OCTET as u64;
    let matrices = matrices.iter().filter(|matrix| matrix.pointer != 0);
    let addresses = matrices.clone().map(|matrix| matrix.pointer).chain(rows.iter().copied());
    let mut strides = matrices.map(|matrix| matrix.stride).filter(|_| shape.rows > 1);
    let whole = strides.clone().all(|stride| stride.is_multiple_of(octet));
    let paired = T::ID != DtypeId::F32 || shape.cols.is_multiple_of(2 * OCTET);
    match aligned(shape.cols, addresses) && whole {
        false => Layout::Unaligned,
        true if paired && strides.all(|stride| stride == shape.cols as u64) => Layout::Dense,
        true => Layout::Strided,
    }
}

/// The kernel `$name`, which may be given in parts, for the storage type `$T`; after `if` the one for aligned tensors, or
/// otherwise its `unaligned` twin; after `in` the one for a layout.
macro_rules! kernel {
    ($operator:expr, $name:literal, $T:ty, in $layout:expr) => {
        match $layout {
            $crate::device::Layout::Dense => $crate::device::kernel!($operator, $name, $T),
            $crate::device::Layout::Strided => {
                $crate::device::kernel!($operator, $name "_strided", $T)
            }
            $crate::device::Layout::Unaligned => {
                $crate::device::kernel!($operator, $name "_unaligned", $T)
            }
        }
    };
    ($operator:expr, $name:literal, $T:ty, if $aligned:expr) => {
        match $aligned {
            true => $crate::device::kernel!($operator, $name, $T),
            false => $crate::device::kernel!($operator, $name "_unaligned", $T),
        }
    };
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
