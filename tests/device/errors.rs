//! What a device answers after a refused call, and a lost one: errors, and no panic.

use crate::cases::trials::on;
use crate::{gpu, together, trial};
use fused_dropout::cuda::{Gpu, Kernels};
use fused_dropout::device::Pointer;
use fused_dropout::ops::dropout::Forward;
#[cfg(feature = "transformer")]
use fused_dropout::transformer::{
    Backend,
    device::{Accelerator, CudaBuffer, CudaDevice},
};
use fused_dropout::{Dropout, Error, Key, Out, Probability, Shape, Source};
use libtest_mimic::{Completion, Trial};
use std::process::{Command, ExitCode};

/// Set where this program is to lose its device: a process that has lost one cannot use it again.
pub const LOSE_THE_DEVICE: &str = "FUSED_DROPOUT_LOSE_THE_DEVICE";

const SHAPE: Shape = Shape { rows: 8, cols: 64 };

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::ignorable_test("a lost device is an error", || {
            let _turn = together();
            on(gpu(), |_| Ok(a_lost_device().map(|()| Completion::Completed)?))
        }),
        trial("an error leaves no trace on later calls", an_error_leaves_no_trace),
    ]
}

fn drop() -> Dropout<'static> {
    Dropout::new(Key::new(42, 7), Probability::new(0.1).unwrap())
}

/// x = D(x).
fn in_place(gpu: &Gpu, x: Out<'_, f32, Gpu>) -> Result<(), Error> {
    gpu.run(&drop(), Forward { shape: SHAPE, x: Source::InPlace, y: x })
}

fn an_error_leaves_no_trace(gpu: &Gpu) {
    let elements = SHAPE.rows * SHAPE.cols;
    let x = gpu.stream().clone_htod(&vec![1.0f32; elements]).unwrap();
    let mut y = gpu.stream().clone_htod(&vec![5.0f32; elements]).unwrap();
    let short = Forward { shape: SHAPE, x: Source::Tensor(&x.slice(1..)), y: &mut y };
    gpu.run(&drop(), short).expect_err("a short tensor");
    gpu.run(&drop(), Forward { shape: SHAPE, x: Source::Tensor(&x), y: &mut y }).unwrap();
    let y = gpu.stream().clone_dtoh(&y).unwrap();
    gpu.stream().synchronize().unwrap();
    assert!(y.iter().all(|&y| y == 0.0 || y == drop().p.scale()));
}

/// In a process of its own.
fn a_lost_device() -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(program)
        .env(LOSE_THE_DEVICE, "1")
        .output()
        .map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stderr);
    match output.status.success() && !text.contains("panicked") {
        true => Ok(()),
        false => Err(format!("{}: {text}", output.status)),
    }
}

/// Lets a kernel read where nothing is. Everything after it must answer with an error, and dropping what is
/// left with nothing at all.
pub fn lose_the_device() -> ExitCode {
    let gpu = gpu().expect("a device");
    let mut tensor = gpu.stream().clone_htod(&vec![1.0f32; SHAPE.rows * SHAPE.cols]).unwrap();
    #[cfg(feature = "transformer")]
    let model = Model::open();
    gpu.stream().synchronize().unwrap();
    // SAFETY: this breaks the promise on purpose: no memory lies at address 4096. The driver stops the kernel
    // and refuses everything later in this process.
    let mut nothing = unsafe { Pointer::<f32>::new(4096, SHAPE.rows * SHAPE.cols) };
    let submitted = in_place(&gpu, &mut nothing);
    eprintln!("the launch: {submitted:?}");
    let waited = gpu.stream().synchronize();
    eprintln!("waiting: {waited:?}");
    let mut answers = vec![
        ("a later call", in_place(&gpu, &mut tensor)),
        ("another", in_place(&gpu, &mut tensor)),
        ("loading", Kernels::load(gpu.stream().context()).map(|_| ())),
    ];
    #[cfg(feature = "transformer")]
    answers.extend(model.iter().flat_map(Model::answers));
    for (what, answer) in &answers {
        eprintln!("{what}: {answer:?}");
    }
    answers.retain(|(_, answer)| !matches!(answer, Err(Error::Driver { .. })));
    match waited.is_err() && answers.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// A backend of the models with something in its memory.
#[cfg(feature = "transformer")]
struct Model {
    backend: Accelerator<CudaDevice, f32>,
    held: CudaBuffer<f32>,
}

#[cfg(feature = "transformer")]
impl Model {
    /// None without cuBLAS.
    fn open() -> Option<Self> {
        let backend = Accelerator::new(CudaDevice::open(0).ok()?).unwrap();
        let held = backend.upload(&[1.0f32; 8]).unwrap();
        Some(Self { backend, held })
    }

    fn answers(&self) -> [(&'static str, Result<(), Error>); 4] {
        [
            ("reading", self.backend.read(&self.held).map(|_| ())),
            ("allocating", self.backend.zeros::<f32>(8).map(|_| ())),
            ("capturing", self.backend.repeat(&mut None, 0, || Ok(()))),
            ("opening", CudaDevice::open(0).map(|_| ())),
        ]
    }
}
