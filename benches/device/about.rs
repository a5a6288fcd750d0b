//! What a result must say of the device that it comes from.

use anyhow::Result;
use fused_dropout::cuda::Gpu;
use fused_dropout::cuda::cudarc::driver::sys::CUdevice_attribute;
use serde::Serialize;
use std::env;
use std::process::Command;

/// A device, and the code that ran on it.
#[derive(Clone, Debug, Serialize)]
pub struct About {
    pub device: String,
    pub driver: String,
    pub compute_capability: String,
    pub sms: i32,
    pub l2_bytes: i32,
    pub memory_bytes: usize,
    /// Of the sources, from FUSED_DROPOUT_COMMIT.
    pub commit: String,
    /// From FUSED_DROPOUT_DATE.
    pub date: String,
}

impl About {
    /// # Errors
    /// What the driver says.
    pub fn of(gpu: &Gpu) -> Result<Self> {
        let context = gpu.stream().context();
        let (major, minor) = context.compute_capability()?;
        let attribute = |which| context.attribute(which);
        let from = |variable| env::var(variable).unwrap_or_else(|_| "unknown".into());
        Ok(Self {
            device: context.name()?,
            driver: smi("driver_version").unwrap_or_else(|| "unknown".into()),
            compute_capability: format!("{major}.{minor}"),
            sms: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            memory_bytes: context.total_mem()?,
            commit: from("FUSED_DROPOUT_COMMIT"),
            date: from("FUSED_DROPOUT_DATE"),
        })
    }
}

/// The clocks of this moment, and what holds them back, where nvidia-smi is there.
pub fn clocks() -> String {
    smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,clocks_event_reasons.active,power.draw")
        .unwrap_or_else(|| "unknown".into())
}

/// A query of nvidia-smi for the first device.
fn smi(query: &str) -> Option<String> {
    let query = format!("--query-gpu={query}");
    let output = Command::new("nvidia-smi")
        .args(["-i", "0", &query, "--format=csv,noheader"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success()).then(|| text.trim().to_owned())
}
