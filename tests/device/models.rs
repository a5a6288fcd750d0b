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

use crate::alone;
use crate::cases::trials::on;
use fused_dropout::ops::dropout;
use fused_dropout::transformer::backend::{Backend, Element};
use fused_dropout::transformer::device::{Accelerator, CudaDevice};
use fused_dropout::transformer::{Pass, Site};
use fused_dropout::{Dtype, Error, Probability, Shape, Source};
use half::{bf16, f16};
use hf_parity::{Fixture, folders};
use libtest_mimic::{Completion, Trial};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use transformer_device::{SCHEDULES, Training};

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
        trial("a graph outlives its buffers and stays on its device", a_graph_without_its_buffers),
        trial("memory of another device is refused", memory_of_another_device),
        trial(
            "a device that another thread drops does not end a capture",
            a_device_dropped_during_a_capture,
        ),
        trial("no memory left is an error", no_memory_left),
    ]
}

/// A check on a backend of its own, skipped where there is no GPU or no cuBLAS.
fn trial<T: Dtype + Element>(name: &str, check: fn(&Gpu<T>)) -> Trial {
    Trial::ignorable_test(format!("models: {name}"), move || {
        let _turn = alone();
        let backend = match open() {
            Err(error @ Error::Unavailable { .. }) => Err(error.to_string()),
            opened => Ok(opened?),
        };
        on(backend, |backend| {
            check(backend);
            Ok(Completion::Completed)
        })
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

/// A step that is captured once and replayed trains as one that is submitted every time: the same bits,
/// fresh masks included. Stream numbers that come later, more than a buffer of them, change nothing.
fn a_captured_step(device: &Gpu<f32>) {
    let submitting = open::<f32>().unwrap();
    let mut expected = Training::new(&submitting, 7, false).unwrap();
    let losses = expected.losses(6, |_| {});
    let layers = |step| if step == 0 { 100..400 } else { 0..0 };
    let draws = |step| layers(step).for_each(|layer| draw(device, step, layer).unwrap());
    let mut training = Training::new(device, 7, false).unwrap();
    assert_eq!(training.repeated_losses(6, draws), losses);
    assert_eq!(training.weights(), expected.weights());
    // The replays follow a schedule of dropout.
    for schedule in SCHEDULES {
        let mut expected = Training::new(&submitting, 7, false).unwrap().scheduled(schedule);
        let mut training = Training::new(device, 7, false).unwrap().scheduled(schedule);
        assert_eq!(training.repeated_losses(4, |_| {}), expected.losses(4, |_| {}));
    }
    // Another model on the same backend begins again at step 0.
    let mut training = Training::new(device, 7, false).unwrap();
    assert_eq!(training.repeated_losses(6, |_| {}), losses);
}

/// Takes the stream number of a site of a layer.
fn draw(device: &Gpu<f32>, step: u64, layer: usize) -> Result<(), Error> {
    let pass = Pass::train(1, step);
    let drops = pass.at(layer, Site::Attention, 1, Probability::new(0.5)?);
    let (x, mut y) = (device.zeros::<f32>(8)?, device.zeros::<f32>(8)?);
    let x = Source::Tensor(&x as _);
    device.run(drops, dropout::Forward { shape: Shape::new(1, 8), x, y: &mut y })
}

/// What a graph cannot repeat is refused while one is captured, and the backend is usable afterwards; after a
/// panic too.
fn a_copy_in_a_capture(device: &Gpu<f32>) {
    let mut training = Training::new(device, 7, false).unwrap();
    let error = device.repeat(&mut None, 0, || {
        training.prepare(0)?;
        training.work(0)
    });
    let error = error.expect_err("the copies of `prepare`");
    assert!(matches!(error, Error::Argument { operator: "graph", .. }), "{error}");
    assert!(training.loss().unwrap().is_finite());

    let mut runs = 0;
    let capture = || {
        device.repeat(&mut None, 0, || {
            runs += 1;
            match runs {
                1 => training.work(0),
                // A panic that nothing prints.
                _ => resume_unwind(Box::new("in the captured run")),
            }
        })
    };
    assert!(catch_unwind(AssertUnwindSafe(capture)).is_err());
    training.prepare(0).unwrap();
    assert!(training.loss().unwrap().is_finite());
}

/// A graph keeps the memory that it uses, and runs on its own device alone.
fn a_graph_without_its_buffers(device: &Gpu<f32>) {
    let other = open::<f32>().unwrap();
    let mut recorded = None;
    let mut training = Training::new(device, 7, false).unwrap();
    training.prepare(0).unwrap();
    device.repeat(&mut recorded, 0, || training.work(0)).unwrap();
    drop(training);
    let mut work = || panic!("it was recorded");
    device.repeat(&mut recorded, 1, &mut work).unwrap();
    device.check().unwrap();
    let error = other.repeat(&mut recorded, 2, &mut work).unwrap_err();
    assert!(matches!(error, Error::Argument { argument: "device", .. }), "{error}");
}

/// Devices have streams of their own: memory of one is not used by another.
fn memory_of_another_device(device: &Gpu<f32>) {
    let other = open::<f32>().unwrap();
    let buffer = other.upload(&[1.0f32]).unwrap();
    let error = device.read(&buffer).unwrap_err();
    assert!(matches!(error, Error::Argument { argument: "tensor", .. }), "{error}");
}

/// Closing cuBLAS waits for the whole device, and the driver ends a capture that meets such a wait.
fn a_device_dropped_during_a_capture(device: &Gpu<f32>) {
    let mut other = Some(CudaDevice::open(0).unwrap());
    let mut buffer = device.zeros::<f32>(4).unwrap();
    let (mut runs, mut dropping) = (0, None);
    let repeated = device.repeat(&mut None, 0, || {
        runs += 1;
        if runs == 2 {
            let other = other.take();
            let (sender, started) = std::sync::mpsc::channel();
            dropping = Some(std::thread::spawn(move || {
                sender.send(()).unwrap();
                drop(other);
            }));
            started.recv().unwrap();
            // Time enough to do harm; shorter, the test could pass by chance.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        device.clear(&mut buffer)
    });
    repeated.unwrap();
    dropping.unwrap().join().unwrap();
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
