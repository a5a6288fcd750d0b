//! cuBLAS: what this crate and cudarc's handle call of it, with sums in f32, one after the other.

use crate::codes::{self, INVALID_CONTEXT};
use crate::device::Op;
use crate::memory::Memory;
use crate::thread::ask;
use fused_dropout::Dtype;
use half::{bf16, f16};
use std::ffi::{c_int, c_longlong, c_uint};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A product, or a batch of them, column-major: c = alpha op(a) op(b) + beta c.
pub struct Product {
    mnk: [usize; 3],
    transposed: [bool; 2],
    ld: [usize; 3],
    stored: [Stored; 3],
    scale: [f32; 2],
    count: usize,
    place: Place,
}

/// Where the matrices of a batch lie.
pub enum Place {
    /// The first ones, and the elements from one to the next.
    Strided([u64; 3], [i64; 3]),
    /// Lists of addresses in device memory.
    Listed([u64; 3]),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stored {
    F32,
    F16,
    Bf16,
}

/// `cublasStatus_t`.
const SUCCESS: u32 = 0;
const NOT_INITIALIZED: u32 = 1;
const INVALID_VALUE: u32 = 7;
const EXECUTION_FAILED: u32 = 13;
const INTERNAL_ERROR: u32 = 14;
const NOT_SUPPORTED: u32 = 15;

/// `cublasComputeType_t`: sums in f32.
const COMPUTE_32F: u32 = 68;

impl Stored {
    /// From a `cudaDataType`.
    fn of(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            2 => Some(Self::F16),
            14 => Some(Self::Bf16),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn read(self, bytes: &[u8]) -> f32 {
        match self {
            Self::F32 => bytemuck::pod_read_unaligned(bytes),
            Self::F16 => bytemuck::pod_read_unaligned::<f16>(bytes).to_f32(),
            Self::Bf16 => bytemuck::pod_read_unaligned::<bf16>(bytes).to_f32(),
        }
    }

    fn write(self, value: f32, bytes: &mut [u8]) {
        match self {
            Self::F32 => bytes.copy_from_slice(bytemuck::bytes_of(&value)),
            Self::F16 => {
                bytes.copy_from_slice(bytemuck::bytes_of(&<f16 as Dtype>::from_f32(value)))
            }
            Self::Bf16 => {
                bytes.copy_from_slice(bytemuck::bytes_of(&<bf16 as Dtype>::from_f32(value)));
            }
        }
    }
}

impl Product {
    /// Computes all products of the batch; the text of a fault where a matrix is not in memory.
    pub fn run(&self, memory: &mut Memory) -> Result<(), String> {
        (0..self.count).try_for_each(|index| self.one(memory, self.addresses(memory, index)?))
    }

    fn addresses(&self, memory: &Memory, index: usize) -> Result<[u64; 3], String> {
        let mut addresses = [0; 3];
        for (x, address) in addresses.iter_mut().enumerate() {
            *address = match &self.place {
                Place::Strided(first, strides) => {
                    let elements = index as i64 * strides[x];
                    first[x].wrapping_add_signed(elements * self.stored[x].bytes() as i64)
                }
                Place::Listed(lists) => {
                    let entry = memory.bytes(lists[x] + 8 * index as u64, 8);
                    bytemuck::pod_read_unaligned(entry.map_err(|_| outside("a list of addresses"))?)
                }
            };
        }
        Ok(addresses)
    }

    fn one(&self, memory: &mut Memory, [a, b, c]: [u64; 3]) -> Result<(), String> {
        let [m, n, k] = self.mnk;
        let a = self.lines(memory, 0, a, m)?;
        let b = self.lines(memory, 1, b, n)?;
        let (stored, [alpha, beta]) = (self.stored[2], self.scale);
        let bytes = span(m, n, self.ld[2]) * stored.bytes();
        let c = memory.bytes_mut(c, bytes).map_err(|_| outside("c"))?;
        for col in 0..n {
            for row in 0..m {
                let at = (col * self.ld[2] + row) * stored.bytes();
                let c = &mut c[at..at + stored.bytes()];
                let (a, b) = (&a[row * k..][..k], &b[col * k..][..k]);
                let sum: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                // Where beta is zero c is not read: it may be NaN.
                let before = if beta == 0.0 { 0.0 } else { beta * stored.read(c) };
                stored.write(alpha * sum + before, c);
            }
        }
        Ok(())
    }

    /// Rows of op(a), columns of op(b): `count` lines of k.
    fn lines(&self, memory: &Memory, x: usize, at: u64, count: usize) -> Result<Vec<f32>, String> {
        let (k, ld, stored) = (self.mnk[2], self.ld[x], self.stored[x]);
        // A line of a lies across its columns, one of b along them, unless it is transposed.
        let across = self.transposed[x] == (x == 1);
        let (rows, cols) = if across { (count, k) } else { (k, count) };
        let bytes = span(rows, cols, ld) * stored.bytes();
        let bytes = memory.bytes(at, bytes).map_err(|_| outside(if x == 0 { "a" } else { "b" }))?;
        let place = |line, i| if across { i * ld + line } else { line * ld + i };
        let element =
            |line, i| stored.read(&bytes[place(line, i) * stored.bytes()..][..stored.bytes()]);
        Ok((0..count).flat_map(|line| (0..k).map(move |i| element(line, i))).collect())
    }
}

/// Elements from the first to the last of a matrix.
fn span(rows: usize, cols: usize, ld: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (cols - 1) * ld + rows }
}

fn outside(what: &str) -> String {
    format!("a matrix product: {what} lies outside of allocations")
}

// ---- handles ---------------------------------------------------------------------------------

/// A handle is the address of one of these.
#[derive(Default)]
struct Handle {
    stream: AtomicUsize,
}

fn status(result: codes::Result) -> u32 {
    match result {
        Ok(()) => SUCCESS,
        Err(INVALID_CONTEXT) => NOT_INITIALIZED,
        Err(_) => EXECUTION_FAILED,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasCreate_v2(out: Option<&mut *mut Handle>) -> u32 {
    let Some(out) = out else { return INVALID_VALUE };
    let checked = status(ask(|device, caller| device.check(caller)));
    if checked == SUCCESS {
        *out = Box::into_raw(Box::default());
    }
    checked
}

/// Waits for the device, as cuBLAS documents.
#[unsafe(no_mangle)]
extern "C" fn cublasDestroy_v2(handle: *mut Handle) -> u32 {
    if handle.is_null() {
        return NOT_INITIALIZED;
    }
    // SAFETY: `cublasCreate_v2` made it, and this is its last use.
    drop(unsafe { Box::from_raw(handle) });
    match ask(|device, caller| device.synchronize_context(caller)) {
        Ok(()) => SUCCESS,
        Err(_) => INTERNAL_ERROR,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetStream_v2(handle: Option<&Handle>, stream: usize) -> u32 {
    let Some(handle) = handle else { return NOT_INITIALIZED };
    handle.stream.store(stream, Ordering::Relaxed);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetMathMode(handle: Option<&Handle>, _mode: c_uint) -> u32 {
    if handle.is_some() { SUCCESS } else { NOT_INITIALIZED }
}

#[unsafe(no_mangle)]
extern "C" fn cublasSetWorkspace_v2(handle: Option<&Handle>, workspace: u64, bytes: usize) -> u32 {
    if handle.is_none() {
        return NOT_INITIALIZED;
    }
    match ask(move |device, _| Ok(device.memory.holds(workspace, bytes))) {
        Ok(true) => SUCCESS,
        _ => INVALID_VALUE,
    }
}

// ---- products --------------------------------------------------------------------------------

/// What both functions take, checked as cuBLAS does.
#[allow(clippy::type_complexity)]
#[expect(clippy::too_many_arguments)] // cuBLAS's
fn product(
    handle: Option<&Handle>,
    operations: [c_uint; 2],
    mnk: [c_int; 3],
    scale: [Option<&f32>; 2],
    stored: [c_uint; 3],
    ld: [c_int; 3],
    count: c_int,
    compute: c_uint,
    place: Place,
) -> u32 {
    let Some(handle) = handle else { return NOT_INITIALIZED };
    let stream = handle.stream.load(Ordering::Relaxed);
    let [Some(alpha), Some(beta)] = scale else { return INVALID_VALUE };
    let scale = [*alpha, *beta];
    if mnk.iter().chain([&count]).any(|&number| number < 0) || operations.iter().any(|&o| o > 1) {
        return INVALID_VALUE;
    }
    let ([m, n, k], transposed) = (mnk, operations.map(|operation| operation == 1));
    let rows = [if transposed[0] { k } else { m }, if transposed[1] { n } else { k }, m];
    if ld.iter().zip(rows).any(|(&ld, rows)| ld < rows.max(1)) {
        return INVALID_VALUE;
    }
    let stored = stored.map(Stored::of);
    let [Some(a), Some(b), Some(c)] = stored else { return NOT_SUPPORTED };
    if compute != COMPUTE_32F || a != b || (c != a && c != Stored::F32) {
        return NOT_SUPPORTED;
    }
    if m == 0 || n == 0 || count == 0 {
        return SUCCESS;
    }
    let product = Product {
        mnk: mnk.map(|number| number as usize),
        transposed,
        ld: ld.map(|number| number as usize),
        stored: [a, b, c],
        scale,
        count: count as usize,
        place,
    };
    status(ask(move |device, caller| device.submit(caller, stream, Op::Product(Rc::new(product)))))
}

#[unsafe(no_mangle)]
extern "C" fn cublasGemmStridedBatchedEx(
    handle: Option<&Handle>,
    operation_a: c_uint,
    operation_b: c_uint,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: Option<&f32>,
    a: u64,
    stored_a: c_uint,
    ld_a: c_int,
    stride_a: c_longlong,
    b: u64,
    stored_b: c_uint,
    ld_b: c_int,
    stride_b: c_longlong,
    beta: Option<&f32>,
    c: u64,
    stored_c: c_uint,
    ld_c: c_int,
    stride_c: c_longlong,
    count: c_int,
    compute: c_uint,
    _algorithm: c_int,
) -> u32 {
    product(
        handle,
        [operation_a, operation_b],
        [m, n, k],
        [alpha, beta],
        [stored_a, stored_b, stored_c],
        [ld_a, ld_b, ld_c],
        count,
        compute,
        Place::Strided([a, b, c], [stride_a, stride_b, stride_c]),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cublasGemmBatchedEx(
    handle: Option<&Handle>,
    operation_a: c_uint,
    operation_b: c_uint,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: Option<&f32>,
    a: u64,
    stored_a: c_uint,
    ld_a: c_int,
    b: u64,
    stored_b: c_uint,
    ld_b: c_int,
    beta: Option<&f32>,
    c: u64,
    stored_c: c_uint,
    ld_c: c_int,
    count: c_int,
    compute: c_uint,
    _algorithm: c_int,
) -> u32 {
    product(
        handle,
        [operation_a, operation_b],
        [m, n, k],
        [alpha, beta],
        [stored_a, stored_b, stored_c],
        [ld_a, ld_b, ld_c],
        count,
        compute,
        Place::Listed([a, b, c]),
    )
}
