//! What no test should do to a real GPU, on the stand-in for one (`tests/stand_in/`); anywhere else it is skipped.
#![cfg(all(feature = "cuda", feature = "transformer"))]

use fused_dropout::cuda::{self, Gpu, Kernels};
use fused_dropout::device::{Call, KeyAddresses, dropout};
use fused_dropout::transformer::backend::Backend;
use fused_dropout::transformer::device::{Accelerator, CudaDevice};
use fused_dropout::{Dropout, Error, Key, Probability, Shape};
use std::io::Write;

/// After an illegal access every call returns the device's error, and nothing panics, drops included.
#[test]
fn a_device_that_faulted_gives_typed_errors() {
    let context = match cuda::context(0) {
        Ok(context) if context.name().unwrap().contains("no GPU") => context,
        _ => {
            // Past the test harness, which keeps a passing test's output to itself.
            let mut report = std::io::stderr();
            writeln!(report, "skipped: a device that faulted: no stand-in").unwrap();
            return;
        }
    };
    let kernels = Kernels::load(&context).unwrap();
    let gpu = Gpu::new(&kernels, context.new_stream().unwrap()).unwrap();
    let backend = Accelerator::<_, f32>::new(CudaDevice::open(0).unwrap()).unwrap();
    let held = backend.upload(&[1.0f32; 8]).unwrap();
    let mut x = gpu.stream().alloc_zeros::<f32>(8).unwrap();

    let (shape, drop_half) =
        (Shape::new(1, 8), Dropout::new(Key::new(1, 2), Probability::new(0.5).unwrap()));
    // SAFETY: none: 4096 is no address of the device, which is what the stand-in is to notice.
    let launched = unsafe {
        dropout::raw::forward::<f32, _>(
            &gpu,
            &drop_half,
            shape,
            KeyAddresses::default(),
            4096,
            4096,
        )
    };
    launched.expect("a launch is asynchronous");
    assert!(gpu.stream().synchronize().is_err());

    let errors = [
        dropout::forward_in_place(&Call::on(&gpu), &drop_half, shape, &mut x).err(),
        Kernels::load(&context).err(),
        backend.read(&held).err(),
        backend.zeros::<f32>(8).err(),
        backend.repeat(&mut None, 0, || Ok(())).err(),
        CudaDevice::open(0).err(),
    ];
    for error in errors {
        assert!(matches!(error, Some(Error::Driver { code: 700, .. })), "{error:?}");
    }
}
