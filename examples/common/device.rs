//! Where a run takes place: the only lines that know more than `Backend` does.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use fused_dropout::transformer::{Backend, CpuBackend};
use serde::{Deserialize, Serialize};

/// A kind of backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// All cores of this machine (RAYON_NUM_THREADS for fewer)
    Cpu,
    /// The first NVIDIA GPU; a build with the feature cuda
    Cuda,
}

/// What runs on a backend, whichever it is.
pub trait Job {
    type Output;
    /// `name` is the device's, for the record.
    fn run<B: Backend>(self, backend: &B, name: &str) -> Result<Self::Output>;
}

const NO_CUDA: &str =
    "--device cuda: this build has no CUDA (cargo run --features transformer,cuda)";

impl Device {
    /// Refuses a device that this build does not know.
    pub fn check(self) -> Result<()> {
        ensure!(self == Device::Cpu || cfg!(feature = "cuda"), NO_CUDA);
        Ok(())
    }

    /// Runs a job on this device.
    pub fn run<J: Job>(self, job: J) -> Result<J::Output> {
        match self {
            Device::Cpu => job.run(&CpuBackend::new(), std::env::consts::ARCH),
            Device::Cuda => cuda(job),
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda<J: Job>(job: J) -> Result<J::Output> {
    use fused_dropout::transformer::device::{Accelerator, CudaDevice};
    let device = CudaDevice::open(0)?;
    let name = device.name()?;
    // Activations in 16 bits; the optimiser keeps the weights in f32 as well.
    job.run(&Accelerator::<_, half::bf16>::new(device)?, &name)
}

#[cfg(not(feature = "cuda"))]
fn cuda<J: Job>(_job: J) -> Result<J::Output> {
    anyhow::bail!(NO_CUDA)
}
