//! Times what it is asked for: a JSON object a line on the standard input, one a line as the answer, so that
//! another program can take turns with this one on the same device.

use crate::about::About;
use crate::operators::{Case, Data};
use crate::timer::Timer;
use anyhow::{Result, ensure};
use fused_dropout::cuda::Gpu;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write, stdin, stdout};

#[derive(Deserialize)]
struct Request {
    #[serde(flatten)]
    case: Case,
    /// Drop probability.
    p: f64,
    samples: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Error(String),
    /// Of one call each.
    #[serde(untagged)]
    Times {
        seconds: Vec<f64>,
        bytes: usize,
    },
}

/// Says what the device is, and answers until the input ends. The device is idle between requests.
///
/// # Errors
/// Where the output is closed.
pub fn serve(gpu: &Gpu, data: &Data, about: &About) -> Result<()> {
    say(about)?;
    // The tensors and the graph of the last request, which mostly is the next one too.
    let mut last: Option<(Case, f64, Timer)> = None;
    for line in stdin().lock().lines() {
        let answer = answer(gpu, data, &mut last, &line?);
        say(&answer.unwrap_or_else(|error| Answer::Error(format!("{error:#}"))))?;
    }
    Ok(())
}

fn answer(
    gpu: &Gpu,
    data: &Data,
    last: &mut Option<(Case, f64, Timer)>,
    line: &str,
) -> Result<Answer> {
    let Request { case, p, samples } = serde_json::from_str(line)?;
    ensure!((1..=10_000).contains(&samples), "samples: expected 1 to 10000, got {samples}");
    ensure!(case.fits(), "a shape that is not offered: {case:?}");
    if last.as_ref().is_none_or(|(before, q, _)| (*before, *q) != (case, p)) {
        // Its memory first.
        *last = None;
        gpu.stream().synchronize()?;
        *last = Some((case, p, Timer::new(gpu, data, &case, p)?));
    }
    let (_, _, timer) = last.as_mut().expect("just made");
    Ok(Answer::Times { seconds: timer.samples(samples)?, bytes: case.bytes() })
}

fn say(answer: &impl Serialize) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    Ok(out.flush()?)
}
