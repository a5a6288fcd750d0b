//! The driver: whether it is there, and its errors as the crate's.

use crate::error::Error;
use cudarc::driver::{CudaContext, DriverError};
use libloading::Library;
use std::error::Error as _;
use std::ffi::CStr;
use std::sync::Arc;

/// The primary context of device `ordinal`, which the CUDA runtime API and other libraries of this
/// process use too.
///
/// # Errors
/// [`Error::Unavailable`] where the machine has no CUDA driver or the driver finds no such device;
/// [`Error::Driver`] for anything else that the driver says.
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>, Error> {
    find_driver()?;
    let devices = CudaContext::device_count().map_err(|error| match name(error).as_str() {
        "CUDA_ERROR_NO_DEVICE" | "CUDA_ERROR_STUB_LIBRARY" => unavailable(describe(error)),
        _ => driver("finding the devices")(error),
    })?;
    if ordinal >= usize::try_from(devices).unwrap_or(0) {
        return Err(unavailable(format!("device {ordinal} of {devices}")));
    }
    CudaContext::new(ordinal).map_err(driver("opening the device"))
}

/// Refuses where the driver's library cannot be loaded. cudarc panics there, whatever it is asked, and
/// its own question `is_culib_present` is gone where another crate of the program switches it to
/// dynamic linking.
fn find_driver() -> Result<(), Error> {
    // Names that cudarc tries as well.
    let names: &[&str] =
        if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    let mut reason = String::new();
    for &name in names {
        // SAFETY: loading a library runs its initialisers; the CUDA driver's have no conditions.
        match unsafe { Library::new(name) } {
            Ok(_) => return Ok(()),
            // What the system says stands in the source; the first name is the one that matters.
            Err(error) if reason.is_empty() => {
                reason = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            }
            Err(_) => {}
        }
    }
    Err(unavailable(format!("the driver's library does not load: {reason}")))
}

pub(super) fn unavailable(reason: String) -> Error {
    Error::Unavailable { backend: "cuda", reason }
}

/// Turns what the driver said during `operation` into an [`Error`].
pub(crate) fn driver(operation: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Driver { operation, code: error.0 as u32, message: describe(error) }
}

/// The driver's name and text for an error.
pub(super) fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{}, {}", name(error), text.to_string_lossy()),
        Err(_) => name(error),
    }
}

fn name(error: DriverError) -> String {
    error
        .error_name()
        .map_or_else(|_| "unknown".into(), |name: &CStr| name.to_string_lossy().into())
}
