//! cuBLAS: finding it, and a batch of row-major products as its calls, which are column-major.

use super::capture;
use crate::cuda::driver;
use crate::dtype::{Dtype, DtypeId};
use crate::error::Error;
use crate::transformer::backend::{Layout, MatMul};
use cudarc::cublas::result::{self, CublasError};
use cudarc::cublas::sys;
use cudarc::driver::result::ctx;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use libloading::Library;
use std::error::Error as _;
use std::ffi::{OsStr, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

/// Names of the library, newest first: whose functions this file calls have been the same since version 11.
const NAMES: &[&str] = if cfg!(windows) {
    &["cublas64_13.dll", "cublas64_12.dll"]
} else {
    &["libcublas.so.13", "libcublas.so.12"]
};

/// What cuBLAS itself loads, from the same folder, each for the name at its place in [`NAMES`].
const HELPERS: &[&str] = if cfg!(windows) {
    &["cublasLt64_13.dll", "cublasLt64_12.dll"]
} else {
    &["libcublasLt.so.13", "libcublasLt.so.12"]
};

/// What this crate calls: cudarc panics where one is missing.
const FUNCTIONS: &[&[u8]] = &[
    b"cublasCreate_v2\0",
    b"cublasDestroy_v2\0",
    b"cublasSetStream_v2\0",
    b"cublasSetWorkspace_v2\0",
    b"cublasSetMathMode\0",
    b"cublasGemmStridedBatchedEx\0",
    b"cublasGemmBatchedEx\0",
];

/// Loads cuBLAS where cudarc will find it; an error where there is none. cudarc looks for it by name and
/// panics without it. A library that is loaded already is found by its name wherever it lies, so one of a
/// Python environment is loaded here by its path.
pub(super) fn find() -> Result<(), Error> {
    let mut reason = String::new();
    let folders = folders();
    let paths = folders.iter().flat_map(|folder| (0..NAMES.len()).map(move |i| (Some(folder), i)));
    for (folder, i) in (0..NAMES.len()).map(|i| (None, i)).chain(paths) {
        match load(folder.map(PathBuf::as_path), i) {
            Ok(()) => return Ok(()),
            // The system's answer to the first name is the one that matters, unless a file is there.
            Err(error)
                if reason.is_empty() || folder.is_some_and(|f| f.join(NAMES[i]).exists()) =>
            {
                reason = error;
            }
            Err(_) => {}
        }
    }
    let reason = format!(
        "{reason} (looked for {NAMES:?} where the system does and in {} folders more; the wheel \
         nvidia-cublas in the Python environment that is active or on the PATH is enough)",
        folders.len()
    );
    Err(Error::Unavailable { backend: "cublas", reason })
}

/// Loads name `i`, from `folder` or from where the system looks, and keeps it for as long as the process
/// lives.
fn load(folder: Option<&Path>, i: usize) -> Result<(), String> {
    let path = |name: &str| folder.map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
    let words = |error: libloading::Error| {
        error.source().map_or_else(|| error.to_string(), ToString::to_string)
    };
    // Without its helper the library says so itself.
    let helper = folder.and_then(|_| open(&path(HELPERS[i])).ok());
    let library = open(&path(NAMES[i])).map_err(words)?;
    for &function in FUNCTIONS {
        // SAFETY: the symbol is not used, only looked for.
        unsafe { library.get::<*const c_void>(function) }.map_err(words)?;
    }
    std::mem::forget((helper, library));
    Ok(())
}

/// Loads a library, on Unix with its symbols visible to those that are loaded later.
fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: loading a library runs its initialisers; cuBLAS's have no conditions.
    #[cfg(unix)]
    return unsafe {
        use libloading::os::unix;
        unix::Library::open(Some(path), unix::RTLD_LAZY | unix::RTLD_GLOBAL).map(Library::from)
    };
    // SAFETY: as above.
    #[cfg(not(unix))]
    return unsafe { Library::new(path) };
}

/// Where cuBLAS may lie, besides where the system looks: CUDA installations, and the wheels of Python
/// environments.
fn folders() -> Vec<PathBuf> {
    let from = |variable: &str| env::var_os(variable).map(PathBuf::from);
    let mut folders = Vec::new();
    let toolkits = [from("CUDA_HOME"), from("CUDA_PATH"), Some(PathBuf::from("/usr/local/cuda"))];
    for toolkit in toolkits.into_iter().flatten() {
        folders.extend(["lib64", "lib", "bin/x64", "bin"].map(|folder| toolkit.join(folder)));
    }
    let active = [from("VIRTUAL_ENV"), from("CONDA_PREFIX")].into_iter().flatten();
    let found = environments(&env::var_os("PATH").unwrap_or_default());
    folders.extend(active.chain(found).flat_map(|environment| wheels(&environment)));
    folders.retain(|folder| folder.is_dir());
    folders
}

/// The Python environments of the `python3` on a PATH: where it lies, and where it points to, which for a
/// virtual environment is what it was made from; and the one that Debian's pip installs into.
fn environments(path: &OsStr) -> Vec<PathBuf> {
    let python = env::split_paths(path).map(|folder| folder.join("python3")).find(|p| p.is_file());
    let resolved = python.as_deref().and_then(|python| fs::canonicalize(python).ok());
    let around = |python: PathBuf| Some(python.parent()?.parent()?.to_owned());
    let mut environments: Vec<_> =
        [python, resolved].into_iter().flatten().filter_map(around).collect();
    environments.push(PathBuf::from("/usr/local"));
    environments
}

/// Folders with libraries in an environment's wheels, which Debian keeps in `dist-packages`.
fn wheels(environment: &Path) -> Vec<PathBuf> {
    let lib = environment.join(if cfg!(windows) { "Lib" } else { "lib" });
    let mut folders = vec![lib.clone()];
    for inner in list(&lib).into_iter().chain([lib]) {
        for packages in ["site-packages", "dist-packages"] {
            for package in list(&inner.join(packages).join("nvidia")) {
                folders.extend(["lib", "bin/x86_64", "bin"].map(|folder| package.join(folder)));
            }
        }
    }
    folders
}

/// A folder's entries in the order of their names; none where it cannot be read.
fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

/// A handle on a stream, with a workspace of its own: none is allocated while a graph is captured, and
/// results repeat to the bit.
pub(super) struct Blas {
    handle: Handle,
    _workspace: CudaSlice<u32>,
}

/// cuBLAS's handle. cudarc has one too, which panics when it is dropped after an error of the device, and
/// in a thread where another context is current, or none.
struct Handle {
    raw: sys::cublasHandle_t,
    context: Arc<CudaContext>,
}

// SAFETY: a handle may go from thread to thread; one thread uses it at a time, because it is not `Sync`.
unsafe impl Send for Handle {}

impl Handle {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        let context = stream.context().clone();
        bind(&context)?;
        let _no_capture = capture::none();
        let raw = result::create_handle().map_err(blas("opening cuBLAS"))?;
        let handle = Self { raw, context };
        // SAFETY: both are alive.
        unsafe { result::set_stream(raw, stream.cu_stream().cast()) }
            .map_err(blas("opening cuBLAS"))?;
        Ok(handle)
    }

    /// The handle, in a thread that its context is current in.
    fn bound(&self) -> Result<sys::cublasHandle_t, Error> {
        bind(&self.context)?;
        Ok(self.raw)
    }
}

impl Drop for Handle {
    /// Waits for the device. What fails is left to the process's end.
    fn drop(&mut self) {
        let _no_capture = capture::none();
        // SAFETY: the context is alive, and this is the handle's last use.
        unsafe {
            let _ = ctx::set_current(self.context.cu_ctx());
            let _ = result::destroy_handle(self.raw);
        }
    }
}

fn bind(context: &CudaContext) -> Result<(), Error> {
    context.bind_to_thread().map_err(driver("binding the context"))
}

/// What NVIDIA recommends for Hopper, in u32.
const WORKSPACE: usize = (32 << 20) / 4;

impl Blas {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        find()?;
        let handle = Handle::new(stream)?;
        let workspace: CudaSlice<u32> =
            stream.alloc_zeros(WORKSPACE).map_err(driver("allocating memory"))?;
        // f32 in f32, and sums of 16-bit products in f32 to the end.
        let exact = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle is alive; the workspace is as long as is said, and lives as long as the handle.
        unsafe {
            sys::cublasSetMathMode(handle.raw, exact)
                .result()
                .map_err(blas("setting cuBLAS up"))?;
            let (address, _) = workspace.device_ptr(stream);
            let address = address as *mut c_void;
            sys::cublasSetWorkspace_v2(handle.raw, address, WORKSPACE * 4)
                .result()
                .map_err(blas("setting cuBLAS up"))?;
        }
        Ok(Self { handle, _workspace: workspace })
    }

    /// One product, or a batch whose matrices lie one stride apart.
    ///
    /// # Safety
    /// `addresses` are those of the first matrices of a, b and c, and all matrices lie in memory of the
    /// handle's device, which holds a and b as `T`, c as `C`.
    pub(super) unsafe fn strided<T: Dtype, C: Dtype>(
        &self,
        gemm: &Gemm,
        batch: (usize, [usize; 3]),
        addresses: [u64; 3],
    ) -> Result<(), Error> {
        let (count, strides) = batch;
        let ([m, n, k], [ld_a, ld_b, ld_c], [op_a, op_b]) = gemm.arguments()?;
        let count = int("batch", count)?;
        let [a, b, c] = gemm.in_order(addresses);
        let [stride_a, stride_b, stride_c] = gemm.in_order(strides).map(|stride| stride as i64);
        let (alpha, beta) = (1.0f32, gemm.beta());
        let handle = self.handle.bound()?;
        // SAFETY: the caller's promise; alpha and beta are read before the call returns.
        unsafe {
            result::gemm_strided_batched_ex(
                handle,
                op_a,
                op_b,
                m,
                n,
                k,
                (&raw const alpha).cast(),
                a as *const c_void,
                stored::<T>(),
                ld_a,
                stride_a,
                b as *const c_void,
                stored::<T>(),
                ld_b,
                stride_b,
                (&raw const beta).cast(),
                c as *mut c_void,
                stored::<C>(),
                ld_c,
                stride_c,
                count,
                COMPUTE,
                ALGORITHM,
            )
        }
        .map_err(blas("a matrix product"))
    }

    /// A batch of `count` products whose addresses lie in device memory: `lists` are those of the addresses
    /// of a, of b and of c.
    ///
    /// # Safety
    /// As [`strided`](Self::strided), for the addresses in the lists when they are read.
    pub(super) unsafe fn listed<T: Dtype, C: Dtype>(
        &self,
        gemm: &Gemm,
        count: usize,
        lists: [u64; 3],
    ) -> Result<(), Error> {
        let ([m, n, k], [ld_a, ld_b, ld_c], [op_a, op_b]) = gemm.arguments()?;
        let count = int("batch", count)?;
        let [a, b, c] = gemm.in_order(lists);
        let (alpha, beta) = (1.0f32, gemm.beta());
        let handle = self.handle.bound()?;
        // SAFETY: as in `strided`.
        unsafe {
            sys::cublasGemmBatchedEx(
                handle,
                op_a,
                op_b,
                m,
                n,
                k,
                (&raw const alpha).cast(),
                a as *const *const c_void,
                stored::<T>(),
                ld_a,
                b as *const *const c_void,
                stored::<T>(),
                ld_b,
                (&raw const beta).cast(),
                c as *const *mut c_void,
                stored::<C>(),
                ld_c,
                count,
                COMPUTE,
                ALGORITHM,
            )
        }
        .result()
        .map_err(blas("a batch of matrix products"))
    }
}

/// Products and sums in f32; no TF32.
const COMPUTE: sys::cublasComputeType_t = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
const ALGORITHM: sys::cublasGemmAlgo_t = sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT;

fn stored<T: Dtype>() -> sys::cudaDataType {
    match T::ID {
        DtypeId::F32 => sys::cudaDataType::CUDA_R_32F,
        DtypeId::F16 => sys::cudaDataType::CUDA_R_16F,
        DtypeId::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

fn blas(operation: &'static str) -> impl FnOnce(CublasError) -> Error {
    move |error| Error::Blas { operation, status: format!("{:?}", error.0) }
}

/// A number as cuBLAS takes it.
fn int(argument: &'static str, value: usize) -> Result<i32, Error> {
    i32::try_from(value)
        .map_err(|_| Error::argument("matmul", argument, "numbers below 2^31", value))
}

/// How many products there are, and the strides between their matrices, where one stride each is enough.
pub(super) fn one_stride(what: &MatMul) -> Option<(usize, [usize; 3])> {
    let [outer, inner] = what.batch;
    let strides = |dimension: usize| [what.a, what.b, what.c].map(|l| l.batch[dimension]);
    let contiguous = [what.a, what.b, what.c].iter().all(|l| l.batch[0] == inner * l.batch[1]);
    if outer == 1 || contiguous {
        return Some((outer * inner, strides(1)));
    }
    (inner == 1).then(|| (outer, strides(0)))
}

/// Whether cuBLAS may be given the batch as a list of addresses: it does not look at them, and reads 16 bytes at once.
pub(super) fn listable(what: &MatMul, base: [u64; 3], size: [usize; 3]) -> bool {
    let whole = |(base, (layout, size)): (u64, (Layout, usize))| {
        let [outer, inner] = layout.batch;
        let mut strides = [layout.offset, outer, inner].into_iter();
        base.is_multiple_of(16) && strides.all(|stride| (stride * size).is_multiple_of(16))
    };
    base.into_iter().zip([what.a, what.b, what.c].into_iter().zip(size)).all(whole)
}

/// Where the matrices of a batch begin, `[3, products]`: those of a, of b and of c, whose buffers begin at `base` and
/// have elements of `size` bytes. The batch was checked.
pub(super) fn addresses(what: &MatMul, base: [u64; 3], size: [usize; 3]) -> Vec<u64> {
    let [outer, inner] = what.batch;
    let of = |((layout, base), size): ((Layout, u64), usize)| {
        let [of_outer, of_inner] = layout.batch;
        let first = move |o: usize, i: usize| layout.offset + o * of_outer + i * of_inner;
        let inner = move |o| (0..inner).map(move |i| base + (first(o, i) * size) as u64);
        (0..outer).flat_map(inner)
    };
    [what.a, what.b, what.c].into_iter().zip(base).zip(size).flat_map(of).collect()
}

/// A row-major product as a column-major one.
///
/// A row-major matrix is its transpose, column-major. So c = a · b, row-major, is cᵀ = bᵀ · aᵀ for cuBLAS: b
/// is its first matrix and a its second, and each is transposed where it is *not* row-major here. Where c is
/// column-major itself, it is a and b in this order, transposed where they are row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gemm {
    /// cuBLAS's m, n, k.
    mnk: [usize; 3],
    /// Leading dimensions of cuBLAS's first and second matrix and of c.
    ld: [usize; 3],
    /// Whether cuBLAS transposes its first and its second matrix.
    transposed: [bool; 2],
    /// Whether cuBLAS's first matrix is b.
    swapped: bool,
    add: bool,
}

impl Gemm {
    /// # Errors
    /// [`Error::Argument`] where rows or columns overlap.
    pub(super) fn new(what: &MatMul) -> Result<Self, Error> {
        let [m, n, k] = what.mnk;
        let (c_row_major, ld_c) = order("c", &what.c, [m, n])?;
        let (a_row_major, ld_a) = order("a", &what.a, [m, k])?;
        let (b_row_major, ld_b) = order("b", &what.b, [k, n])?;
        let add = what.add;
        Ok(if c_row_major {
            let transposed = [!b_row_major, !a_row_major];
            Self { mnk: [n, m, k], ld: [ld_b, ld_a, ld_c], transposed, swapped: true, add }
        } else {
            let transposed = [a_row_major, b_row_major];
            Self { mnk: [m, n, k], ld: [ld_a, ld_b, ld_c], transposed, swapped: false, add }
        })
    }

    /// What belongs to (a, b, c), as cuBLAS takes it.
    fn in_order<V: Copy>(&self, [a, b, c]: [V; 3]) -> [V; 3] {
        if self.swapped { [b, a, c] } else { [a, b, c] }
    }

    fn beta(&self) -> f32 {
        if self.add { 1.0 } else { 0.0 }
    }

    #[allow(clippy::type_complexity)] // cuBLAS's own arguments
    fn arguments(&self) -> Result<([i32; 3], [i32; 3], [sys::cublasOperation_t; 2]), Error> {
        let [m, n, k] = self.mnk;
        let [a, b, c] = self.ld;
        let mnk = [int("mnk", m)?, int("mnk", n)?, int("mnk", k)?];
        let ld = [int("a", a)?, int("b", b)?, int("c", c)?];
        let operation = |transposed| match transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        Ok((mnk, ld, self.transposed.map(operation)))
    }
}

/// Whether a matrix is row-major, and its leading dimension, which cuBLAS wants to be at least the length of
/// a row (a column), also where there is only one.
fn order(
    argument: &'static str,
    layout: &Layout,
    [rows, cols]: [usize; 2],
) -> Result<(bool, usize), Error> {
    let fits = |stride: usize, lines: usize, length: usize| lines <= 1 || stride >= length;
    if layout.col == 1 && fits(layout.row, rows, cols) {
        return Ok((true, layout.row.max(cols).max(1)));
    }
    if layout.row == 1 && fits(layout.col, cols, rows) {
        return Ok((false, layout.col.max(rows).max(1)));
    }
    // A single row may have any stride between its columns where it is one column long, and the like.
    let expected = "rows or columns without gaps that do not overlap";
    let given = format!("{layout:?} of {rows} x {cols}");
    Err(Error::argument("matmul", argument, expected, given))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `cublasGemmEx` documents: column-major, C = op(A) op(B) + beta C.
    fn gemm(g: &Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
        let ([m, n, k], [ld_a, ld_b, ld_c]) = (g.mnk, g.ld);
        // The conditions that cuBLAS refuses a call by.
        assert!(ld_a >= if g.transposed[0] { k } else { m });
        assert!(ld_b >= if g.transposed[1] { n } else { k });
        assert!(ld_c >= m);
        let at = |ld: usize, transposed: bool, row: usize, col: usize| match transposed {
            true => row * ld + col,
            false => col * ld + row,
        };
        for row in 0..m {
            for col in 0..n {
                let term =
                    |i| a[at(ld_a, g.transposed[0], row, i)] * b[at(ld_b, g.transposed[1], i, col)];
                let sum: f32 = (0..k).map(term).sum();
                let c = &mut c[col * ld_c + row];
                *c = sum + g.beta() * *c;
            }
        }
    }

    /// Small integers, so that every sum is exact.
    fn values(len: usize, salt: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + salt * 5) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn a_layout_becomes_the_call_that_computes_it() {
        let mut tried = 0;
        for [m, n, k] in [[3, 4, 5], [1, 4, 5], [3, 1, 5], [3, 4, 1], [1, 1, 1], [2, 2, 2]] {
            for choice in 0..32 {
                let bit = |i: usize| choice >> i & 1 == 1;
                let gap = if bit(4) { 3 } else { 0 };
                let layout = |transposed: bool, rows: usize, cols: usize| match transposed {
                    true => Layout { row: 1, col: rows + gap, ..Layout::rows(0) },
                    false => Layout::rows(cols + gap),
                };
                let what = MatMul {
                    mnk: [m, n, k],
                    batch: [1, 1],
                    a: layout(bit(0), m, k),
                    b: layout(bit(1), k, n),
                    c: layout(bit(2), m, n),
                    add: bit(3),
                };
                let (a, b, before) = (values(64, 1), values(64, 2), values(64, 3));
                let mut expected = before.clone();
                for row in 0..m {
                    for col in 0..n {
                        let c = row * what.c.row + col * what.c.col;
                        let term = |i: usize| {
                            a[row * what.a.row + i * what.a.col]
                                * b[i * what.b.row + col * what.b.col]
                        };
                        let sum: f32 = (0..k).map(term).sum();
                        expected[c] = sum + if what.add { before[c] } else { 0.0 };
                    }
                }
                let call = Gemm::new(&what).unwrap();
                let [first, second, _] = call.in_order([&a[..], &b[..], &[]]);
                let mut c = before;
                gemm(&call, first, second, &mut c);
                assert_eq!(c, expected, "{what:?} as {call:?}");
                tried += 1;
            }
        }
        assert_eq!(tried, 6 * 32);
    }

    #[test]
    fn overlapping_rows_are_refused() {
        let layout = Layout::rows(5);
        let mut what =
            MatMul { mnk: [3, 5, 5], batch: [1, 1], a: layout, b: layout, c: layout, add: false };
        assert!(Gemm::new(&what).is_ok());
        what.b.row = 4;
        let error = Gemm::new(&what).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "b", .. }), "{error}");
    }

    #[test]
    fn two_dimensions_of_a_batch_are_one_where_their_strides_allow_it() {
        let of = |batch, a: [usize; 2], b: [usize; 2]| {
            let layout = |batch| Layout { batch, ..Layout::rows(2) };
            let (a, b) = (layout(a), layout(b));
            one_stride(&MatMul { mnk: [2, 2, 2], batch, a, b, c: a, add: false })
        };
        assert_eq!(of([2, 3], [12, 4], [15, 5]), Some((6, [4, 5, 4])));
        assert_eq!(of([2, 3], [12, 4], [0, 0]), Some((6, [4, 0, 4])));
        assert_eq!(of([1, 3], [99, 4], [7, 5]), Some((3, [4, 5, 4])));
        assert_eq!(of([2, 1], [99, 4], [7, 5]), Some((2, [99, 7, 99])));
        assert_eq!(of([2, 3], [12, 4], [16, 5]), None);
        assert_eq!(of([2, 3], [12, 4], [0, 5]), None);
    }

    #[test]
    fn a_list_has_the_addresses_of_all_matrices() {
        let layout = |offset, batch| Layout { offset, batch, ..Layout::rows(2) };
        let (a, b, c) = (layout(8, [1000, 16]), layout(0, [0, 24]), layout(4, [12, 1 << 30]));
        let what = MatMul { mnk: [2, 2, 2], batch: [40, 3], a, b, c, add: false };
        let (base, size) = ([1 << 40, 3 << 33, 64], [2, 2, 4]);
        let list = addresses(&what, base, size);
        assert_eq!(list.len(), 3 * 120);
        for (x, matrix) in [a, b, c].into_iter().enumerate() {
            for i in 0..120 {
                let elements = matrix.offset + i / 3 * matrix.batch[0] + i % 3 * matrix.batch[1];
                assert_eq!(list[x * 120 + i], base[x] + (elements * size[x]) as u64);
            }
        }
        assert!(listable(&what, base, size));
        assert!(!listable(&what, [8, 16, 16], size));
        for a in [layout(4, [1000, 16]), layout(8, [1004, 16]), layout(8, [1000, 4])] {
            assert!(!listable(&MatMul { a, ..what }, base, size), "{a:?}");
        }
        assert!(list.iter().all(|address| address.is_multiple_of(16)));
    }

    /// PyTorch's environment, not activated, and a link to its Python from elsewhere.
    #[cfg(unix)]
    #[test]
    fn wheels_of_the_python_on_the_path_are_found() {
        let root = env::temp_dir().join(format!("fused-dropout-wheels-{}", std::process::id()));
        let lib = root.join("torch/lib/python3.12/site-packages/nvidia/cu13/lib");
        for folder in [&lib, &root.join("torch/bin"), &root.join("elsewhere/bin")] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(root.join("torch/bin/python3"), "").unwrap();
        let link = root.join("elsewhere/bin/python3");
        std::os::unix::fs::symlink(root.join("torch/bin/python3"), link).unwrap();
        let looked_in = |folder: &str| -> Vec<PathBuf> {
            let path = env::join_paths([root.join("nothing"), root.join(folder)]).unwrap();
            environments(&path).iter().flat_map(|environment| wheels(environment)).collect()
        };
        let found = ["torch/bin", "elsewhere/bin"].map(|folder| looked_in(folder).contains(&lib));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [true; 2]);
    }

    /// Whatever this machine has: an answer, and no panic.
    #[test]
    fn looking_for_the_library_is_no_panic() {
        if let Err(error) = find() {
            assert!(matches!(error, Error::Unavailable { backend: "cublas", .. }), "{error}");
        }
    }
}
