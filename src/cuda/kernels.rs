//! The compiled kernels of a context.

use super::context::{describe, driver, unavailable};
use crate::device::Kernel;
use crate::error::Error;
use cudarc::driver::sys::cuDriverGetVersion;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// What build.rs compiled: `TOOLKIT`, the toolkit's version ("none" where nothing was compiled), and
/// `FATBINS`, operator and fatbin.
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
    /// them, or there is neither machine code nor PTX for this device. [`Error::Unavailable`] where
    /// the crate was built for its documentation only.
    pub fn load(context: &Arc<CudaContext>) -> Result<Arc<Self>, Error> {
        if compiled::FATBINS.is_empty() {
            return Err(unavailable("the crate was built without its kernels".into()));
        }
        let mut modules = HashMap::new();
        for &(operator, fatbin) in compiled::FATBINS {
            // The copy gives the driver an aligned image.
            let image = Ptx::from_binary(fatbin.to_vec());
            modules.insert(operator, context.load_module(image).map_err(refused)?);
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

/// Why the driver did not take a fatbin, with both versions: most often it is too old.
fn refused(error: DriverError) -> Error {
    let mut version = 0;
    // SAFETY: the pointer is to a live i32. The driver has every function of its first versions.
    let known = unsafe { cuDriverGetVersion(&mut version) }.result();
    let message = known.map_or_else(
        |_| describe(error),
        |()| {
            format!(
                "{} (the kernels were compiled by CUDA {}, the driver supports up to CUDA {}.{})",
                describe(error),
                compiled::TOOLKIT,
                version / 1000,
                version % 1000 / 10
            )
        },
    );
    let Error::Driver { operation, code, .. } = driver("loading the kernels")(error) else {
        unreachable!("driver() makes Error::Driver")
    };
    Error::Driver { operation, code, message }
}
