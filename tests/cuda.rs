//! The CUDA backend: what it answers where there is no driver, and on a device that it works at all.
//! Where there is no device the other tests are skipped, and say so.
#![cfg(feature = "cuda")]

use fused_dropout::Error;
use fused_dropout::cuda::cudarc::driver::CudaContext;
use fused_dropout::cuda::{self, Gpu, Kernels};
use std::sync::Arc;

/// The device's context, or the reason why this machine has none. The reason is printed: a test that
/// asks for a device and gets none has not run.
fn device(test: &str) -> Option<Arc<CudaContext>> {
    match cuda::context(0) {
        Ok(context) => Some(context),
        Err(error) => {
            println!("skipped {test}: {error}");
            None
        }
    }
}

/// Runs everywhere: a machine without a driver, or without a hundred devices.
#[test]
fn a_missing_device_is_an_error_and_no_panic() {
    let error = cuda::context(100).expect_err("no machine has a hundred GPUs");
    assert!(matches!(error, Error::Unavailable { backend: "cuda", .. }), "{error}");
}

#[test]
fn kernels_load() {
    let Some(context) = device("kernels_load") else { return };
    let kernels = Kernels::load(&context).unwrap();
    Gpu::new(&kernels, context.default_stream()).unwrap();
}
