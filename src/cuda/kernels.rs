//! The compiled kernels of a context.

use super::context::{describe, unavailable};
use crate::device::Kernel;
use crate::error::Error;
use cudarc::driver::sys::cuDriverGetVersion;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::{fmt, fs};

/// What build.rs compiled: `TOOLKIT`, the toolkit's version ("none" where nothing was compiled), `ARCHS`, the
/// architectures, and `FATBINS`, operator and fatbin.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// The crate's kernels, loaded into a context. Load them once and share them.
pub struct Kernels {
    context: Arc<CudaContext>,
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// Grows with the first launch of each kernel.
    functions: RwLock<HashMap<Kernel, CudaFunction>>,
}

impl Kernels {
    /// Loads the kernels into `context`.
    ///
    /// # Errors
    /// [`Error::Driver`] where the driver refuses them: it is too old for the toolkit that compiled
    /// them, or there is neither machine code nor PTX for this device; the message names the device's compute
    /// capability, those that were compiled, and both versions. [`Error::Unavailable`] where
    /// the crate was built for its documentation only.
    pub fn load(context: &Arc<CudaContext>) -> Result<Arc<Self>, Error> {
        Self::load_images(context, |_| Ok(None))
    }

    /// The same, but for operators that have a file `<operator>.cubin` or `<operator>.fatbin` in `folder` from there: to try
    /// a changed `kernels/<operator>.cu` without building the crate.
    ///
    /// # Errors
    /// As [`load`](Self::load); [`Error::Unavailable`] where a file cannot be read, or there is none for any operator.
    ///
    /// # Safety
    /// The files were compiled from kernels that take the parameters of this version's, and keep to their tensors.
    pub unsafe fn load_with(context: &Arc<CudaContext>, folder: &Path) -> Result<Arc<Self>, Error> {
        let mut found = 0;
        let kernels = Self::load_images(context, |operator| {
            let files = ["cubin", "fatbin"].map(|kind| folder.join(operator).with_extension(kind));
            let Some(file) = files.into_iter().find(|file| file.exists()) else { return Ok(None) };
            found += 1;
            let image = fs::read(&file);
            image.map(Some).map_err(|error| unavailable(format!("{}: {error}", file.display())))
        })?;
        if found == 0 {
            return Err(unavailable(format!("no kernels of an operator in {}", folder.display())));
        }
        Ok(kernels)
    }

    /// Loads what `replacement` gives for an operator, or its own.
    fn load_images(
        context: &Arc<CudaContext>,
        mut replacement: impl FnMut(&str) -> Result<Option<Vec<u8>>, Error>,
    ) -> Result<Arc<Self>, Error> {
        if compiled::FATBINS.is_empty() {
            return Err(unavailable("the crate was built without its kernels".into()));
        }
        let mut modules = HashMap::new();
        for &(operator, fatbin) in compiled::FATBINS {
            // The copy gives the driver an aligned image.
            let image = Ptx::from_binary(replacement(operator)?.unwrap_or_else(|| fatbin.to_vec()));
            modules.insert(
                operator,
                context.load_module(image).map_err(|error| refused(context, error))?,
            );
        }
        Ok(Arc::new(Self { context: context.clone(), modules, functions: RwLock::default() }))
    }

    /// The context that the kernels are loaded into.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The function of a kernel, looked up in its module the first time.
    pub(super) fn function(&self, kernel: Kernel) -> Result<CudaFunction, Error> {
        // A thread that panicked held the lock over a lookup or one insertion: the map is whole.
        let known = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = known.get(&kernel) {
            return Ok(function.clone());
        }
        drop(known);
        let module = self.modules.get(kernel.operator).ok_or_else(|| {
            unavailable(format!("kernels/{}.cu was not compiled into the crate", kernel.operator))
        })?;
        let function = module.load_function(kernel.name).map_err(|error| Error::Driver {
            operation: "looking a kernel up",
            code: error.0 as u32,
            message: format!("{}: {}", kernel.name, describe(error)),
        })?;
        let mut known = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        Ok(known.entry(kernel).or_insert(function).clone())
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("context", &self.context).finish_non_exhaustive()
    }
}

/// Why the driver did not take a fatbin: most often the device or the driver is too old.
fn refused(context: &CudaContext, error: DriverError) -> Error {
    let mut version = 0;
    // SAFETY: the pointer is to a live i32. The driver has every function of its first versions.
    let known = unsafe { cuDriverGetVersion(&mut version) }.result();
    let driver = known.ok().map(|()| (version / 1000, version % 1000 / 10));
    let message = explain(&describe(error), context.compute_capability().ok(), driver);
    Error::Driver { operation: "loading the kernels", code: error.0 as u32, message }
}

/// What the driver said, and what it was asked: the device's compute capability and those that were compiled, the
/// toolkit's version and the driver's.
fn explain(said: &str, device: Option<(i32, i32)>, driver: Option<(i32, i32)>) -> String {
    let version = |version: Option<(i32, i32)>| {
        version.map_or("unknown".into(), |(major, minor)| format!("{major}.{minor}"))
    };
    format!(
        "{said} (the device has compute capability {}; the kernels were compiled for {} by CUDA {}; the driver \
         supports up to CUDA {})",
        version(device),
        capabilities(compiled::ARCHS),
        compiled::TOOLKIT,
        version(driver)
    )
}

/// `80+ptx,90a` as compute capabilities: "8.0 and later, 9.0a".
fn capabilities(archs: &str) -> String {
    let capability = |arch: &str| {
        let (arch, later) = match arch.trim().strip_suffix("+ptx") {
            Some(arch) => (arch, " and later"),
            None => (arch.trim(), ""),
        };
        let digits = arch.trim_end_matches(|c: char| !c.is_ascii_digit()).len();
        let (major, minor) = arch.split_at(digits.saturating_sub(1));
        format!("{major}.{minor}{later}")
    };
    archs.split(',').map(capability).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_what_the_device_has_and_what_was_compiled() {
        assert_eq!(
            capabilities("80+ptx,90+ptx, 100,120f"),
            "8.0 and later, 9.0 and later, 10.0, 12.0f"
        );
        let text = explain("no kernel image", Some((7, 5)), Some((13, 0)));
        assert!(
            text.starts_with("no kernel image (the device has compute capability 7.5;"),
            "{text}"
        );
        assert!(text.contains(&capabilities(compiled::ARCHS)), "{text}");
        assert!(text.ends_with("the driver supports up to CUDA 13.0)"), "{text}");
        assert!(explain("", None, None).contains("capability unknown"));
    }
}
