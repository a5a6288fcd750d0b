//! What needs a GPU, in one program: the case table, the CUDA layer, large tensors, errors, and with feature
//! `transformer` the models. Without a GPU every trial is skipped, and says why.
//!
//!     cargo test --features cuda,transformer --test device
//!
//! `FUSED_DROPOUT_EVERY=31` runs every 31st row of the case table alone, for tools that slow kernels down: no multiple of
//! 2 or 3, or all rows would have the same drop probability.

mod backend;
#[path = "../cases/mod.rs"]
mod cases;
mod errors;
mod graphs;
mod large;
mod layer;
#[cfg(feature = "transformer")]
mod models;
#[path = "../oracle/mod.rs"]
mod oracle;

use cases::trials::on;
use fused_dropout::cuda::{self, Gpu, Kernels};
use libtest_mimic::{Arguments, Completion, Trial};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

fn main() -> ExitCode {
    if std::env::var_os(errors::LOSE_THE_DEVICE).is_some() {
        return errors::lose_the_device();
    }
    let mut all = table();
    all.extend(layer::trials());
    all.extend(graphs::trials());
    all.extend(large::trials());
    all.extend(errors::trials());
    #[cfg(feature = "transformer")]
    all.extend(models::trials());
    libtest_mimic::run(&Arguments::from_args(), all).exit_code()
}

/// The case table. Each trial has a stream of its own, and they run at the same time.
fn table() -> Vec<Trial> {
    let mut cases = cases::table();
    if let Some(every) = std::env::var("FUSED_DROPOUT_EVERY").ok().and_then(|n| n.parse().ok()) {
        cases = cases.into_iter().step_by(every).collect();
    }
    let open = || {
        let turn = together();
        Ok(backend::GpuBackend::on(gpu()?, turn))
    };
    cases::trials::trials("table", &Arc::new(cases), open)
}

/// A check on a stream of its own.
fn trial(name: &str, check: fn(&Gpu)) -> Trial {
    Trial::ignorable_test(name, move || {
        let _turn = together();
        on(gpu(), |gpu| {
            check(gpu);
            Ok(Completion::Completed)
        })
    })
}

/// A check on a context object that no other trial uses, with nothing else running: a capture does not get on
/// with cudarc's events, which are switched off for a context object as a whole, nor with another thread's
/// waits for the device, which loading and unloading of modules may be.
fn trial_alone(name: &str, check: impl FnOnce(&Gpu) + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        let _turn = alone();
        on(kernels(), |kernels| {
            // SAFETY: the check uses one stream for everything.
            unsafe { kernels.context().disable_event_tracking() };
            check(&Gpu::new(kernels, kernels.context().new_stream().unwrap()).unwrap());
            Ok(Completion::Completed)
        })
    })
}

static TURN: RwLock<()> = RwLock::new(());

/// Held by a trial that others may run beside.
fn together() -> RwLockReadGuard<'static, ()> {
    TURN.read().unwrap_or_else(PoisonError::into_inner)
}

/// Held by a trial that runs alone.
fn alone() -> RwLockWriteGuard<'static, ()> {
    TURN.write().unwrap_or_else(PoisonError::into_inner)
}

/// A stream of the first GPU. The kernels are loaded once.
fn gpu() -> Result<Gpu, String> {
    static KERNELS: OnceLock<Result<Arc<Kernels>, String>> = OnceLock::new();
    let kernels = KERNELS.get_or_init(kernels).clone()?;
    let stream = kernels.context().new_stream().expect("a stream");
    Ok(Gpu::new(&kernels, stream).expect("a stream of the kernels' context"))
}

/// The kernels in a context object that nobody else has.
///
/// # Panics
/// Where there is a device, and it does not take them.
fn kernels() -> Result<Arc<Kernels>, String> {
    let context = cuda::context(0).map_err(|error| error.to_string())?;
    Ok(Kernels::load(&context).expect("kernels that this device takes"))
}
