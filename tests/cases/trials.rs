//! The case table as trials of a test program: one for each operator and storage type of a backend.

use super::*;
use libtest_mimic::{Completion, Failed, Trial};
use std::sync::Arc;

/// The checks of one row of the table.
type Check<B> = fn(&B, &Call, &mut Tally);

/// Failures of a trial whose texts are shown.
const SHOWN: usize = 20;

/// Runs every operator's checks of `cases` on the backend that `open` gives; where it says why there is none,
/// the trials are skipped.
pub fn trials<B: TestBackend + 'static>(
    backend: &str,
    cases: &Arc<Vec<Call>>,
    open: impl Fn() -> Result<B, String> + Clone + Send + 'static,
) -> Vec<Trial> {
    let trial = |(operator, dtype, check): (&str, &str, Check<B>)| {
        let (cases, open) = (cases.clone(), open.clone());
        Trial::ignorable_test(format!("{backend}: {operator} {dtype}"), move || {
            on(open(), |backend| Ok(run(backend, &cases, check)?))
        })
    };
    checks().into_iter().map(trial).collect()
}

/// Runs `check` on what was opened; where that is nothing, the trial is skipped and says why.
pub fn on<D>(
    opened: Result<D, String>,
    check: impl FnOnce(&D) -> Result<Completion, Failed>,
) -> Result<Completion, Failed> {
    match opened {
        Ok(device) => check(&device),
        Err(reason) => Ok(Completion::ignored_with(reason)),
    }
}

fn run<B: TestBackend>(backend: &B, cases: &[Call], check: Check<B>) -> Result<Completion, String> {
    let mut tally = Tally::default();
    cases.iter().for_each(|call| check(backend, call, &mut tally));
    let Tally { passed, failures } = tally;
    if failures.is_empty() {
        return Ok(Completion::Completed);
    }
    let shown = failures[..failures.len().min(SHOWN)].join("\n");
    Err(format!("{} of {} checks failed:\n{shown}", failures.len(), passed + failures.len()))
}

pub fn checks<B: TestBackend>() -> Vec<(&'static str, &'static str, Check<B>)> {
    let mut checks = Vec::new();
    checks.extend(typed::<f32, B>());
    checks.extend(typed::<f16, B>());
    checks.extend(typed::<bf16, B>());
    checks.push(("keep_mask", "", keep_mask::check));
    checks
}

fn typed<T: Dtype, B: TestBackend>() -> [(&'static str, &'static str, Check<B>); 7] {
    [
        ("bias_act_dropout", T::NAME, bias_act_dropout::check::<T, B>),
        ("dropout", T::NAME, dropout::check::<T, B>),
        ("dropout_add", T::NAME, dropout_add::check::<T, B>),
        ("dropout_add_norm", T::NAME, dropout_add_norm::check::<T, B>),
        ("embedding_dropout", T::NAME, embedding_dropout::check::<T, B>),
        ("softmax_dropout", T::NAME, softmax_dropout::check::<T, B>),
        ("swiglu_dropout", T::NAME, swiglu_dropout::check::<T, B>),
    ]
}
