//! cuBLAS: its handle, and its products.

use super::capture;
use crate::cuda::driver;
use crate::dtype::{Dtype, DtypeId};
use crate::error::Error;
use cudarc::cublas::result::{self, CublasError};
use cudarc::cublas::sys;
use cudarc::driver::result::ctx;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use find::find;
use gemm::int;
use std::ffi::c_void;
use std::sync::Arc;

mod find;
mod gemm;

pub(super) use gemm::{Gemm, addresses, listable, one_stride};

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
    move |error| Error::Library { operation, message: format!("{:?}", error.0) }
}
