//! The models on a GPU: the checks of the test files of the same names, and training steps from a captured graph.

#[allow(unused)] // what its own tests use
#[path = "../hf_parity.rs"]
mod hf_parity;
#[allow(unused)]
#[path = "../transformer_device.rs"]
mod transformer_device;
#[allow(unused)]
#[path = "../transformer_kernels.rs"]
mod transformer_kernels;

use fused_dropout::transformer::backend::{Backend, Element};
use fused_dropout::transformer::device::{Accelerator, CudaDevice, StepGraph};
use fused_dropout::{Dtype, Error};
use half::{bf16, f16};
use hf_parity::{Fixture, folders};
use libtest_mimic::{Completion, Trial};
use transformer_device::Training;

const CUDA_ERROR_OUT_OF_MEMORY: u32 = 2;

type Gpu<T> = Accelerator<CudaDevice, T>;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("a missing device is an error for the models too", || {
            let error = CudaDevice::open(100).err().expect("no machine has a hundred GPUs");
            assert!(matches!(error, Error::Unavailable { .. }), "{error}");
            Ok(())
        }),
        trial("products, losses and optimiser f32", kernels::<f32>),
        trial("products, losses and optimiser f16", kernels::<f16>),
        trial("products, losses and optimiser bf16", kernels::<bf16>),
        trial("models equal Hugging Face's", models_equal_hugging_face),
        trial("a captured step trains like a submitted one", a_captured_step),
        trial("a copy is refused in a capture", a_copy_in_a_capture),
        trial("no memory left is an error", no_memory_left),
    ]
}

/// A check on a backend of its own, skipped where there is no GPU or no cuBLAS.
fn trial<T: Dtype + Element>(name: &str, check: fn(&Gpu<T>)) -> Trial {
    Trial::ignorable_test(format!("models: {name}"), move || match open() {
        Ok(backend) => {
            check(&backend);
            Ok(Completion::Completed)
        }
        Err(error @ Error::Unavailable { .. }) => Ok(Completion::ignored_with(error)),
        Err(error) => Err(error.into()),
    })
}

fn open<T: Dtype + Element>() -> Result<Gpu<T>, Error> {
    Accelerator::new(CudaDevice::open(0)?)
}

fn kernels<T: Dtype + Element>(backend: &Gpu<T>) {
    assert!(!transformer_kernels::check(backend).is_empty());
}

fn models_equal_hugging_face(backend: &Gpu<f32>) {
    for folder in folders() {
        for recompute in [false, true] {
            Fixture::open(&folder).check(backend, recompute);
        }
    }
}

/// The same bits, fresh masks included.
fn a_captured_step(backend: &Gpu<f32>) {
    let submitting = open::<f32>().unwrap();
    let mut expected = Training::new(&submitting, 7, false).unwrap();
    let losses = expected.losses(6, |_| {});

    let mut training = Training::new(backend, 7, false).unwrap();
    training.prepare(0).unwrap();
    let graph = StepGraph::capture(backend, 0, || training.work(0)).unwrap();
    let mut replayed = vec![training.loss().unwrap()];
    for step in 1..6 {
        training.prepare(step).unwrap();
        // SAFETY: it is this backend's graph, and `training` keeps all buffers.
        unsafe { graph.replay(backend, step).unwrap() };
        replayed.push(training.loss().unwrap());
    }
    assert_eq!(replayed, losses);
    assert_eq!(training.weights(), expected.weights());
}

/// What a graph cannot repeat is refused while one is captured, and the backend is usable afterwards.
fn a_copy_in_a_capture(backend: &Gpu<f32>) {
    let mut training = Training::new(backend, 7, false).unwrap();
    let error = StepGraph::capture(backend, 0, || {
        training.prepare(0)?;
        training.work(0)
    });
    let error = error.err().expect("the copies of `prepare`");
    assert!(matches!(error, Error::Argument { operator: "graph", .. }), "{error}");
    assert!(training.loss().unwrap().is_finite());
}

/// Here, because the operators allocate nothing.
fn no_memory_left(backend: &Gpu<f32>) {
    // 4 TB.
    let error = backend.zeros::<f32>(1 << 40).err().expect("no GPU has 4 TB");
    let Error::Driver { operation, code, .. } = &error else { panic!("{error}") };
    assert_eq!((*operation, *code), ("allocating memory", CUDA_ERROR_OUT_OF_MEMORY), "{error}");
    let small = backend.upload(&[1.0f32, 2.0]).unwrap();
    assert_eq!(backend.read(&small).unwrap(), [1.0, 2.0]);
}
