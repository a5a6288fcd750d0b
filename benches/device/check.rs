//! Before the clock starts: every operator gives the oracle's values on this device.

use crate::backend::GpuBackend;
use crate::cases::trials::checks;
use crate::cases::{Call, Tally};
use anyhow::{Result, ensure};
use fused_dropout::cuda::Gpu;
use fused_dropout::ops::dropout::Forward;
use fused_dropout::{Dropout, Key, Probability, Shape, Source};

/// Runs the case table's checks on the shape of a benchmark's row, without and with a stride, and one with a tail, at two
/// probabilities; and holds the share of kept elements to its binomial bound.
///
/// # Errors
/// Where a check fails.
pub fn check(gpu: &Gpu) -> Result<()> {
    for p in [0.1, 0.001] {
        // 66 rows: a whole tile of the sums over rows, and a part of one.
        for (rows, cols, gap) in [(66, 1024, 0), (16, 1024, 8), (16, 1021, 0)] {
            let drop = Dropout::new(Key::new(42, 7), Probability::nonvanishing(p)?);
            let shape = Shape::new(rows, cols);
            let call = Call { dropout: drop, shape, offset: 0, gap, resident_p: false };
            let mut tally = Tally::default();
            for (_, _, check) in checks() {
                check(&GpuBackend::on(gpu.clone(), ()), &call, &mut tally);
            }
            ensure!(tally.failures.is_empty(), "{}", tally.failures.join("\n"));
        }
        kept(gpu, p)?;
    }
    Ok(())
}

/// The share of kept elements of 2^24, and with it E\[y\] / x: y is x times the scale, or 0.
fn kept(gpu: &Gpu, p: f64) -> Result<()> {
    let shape = Shape::new(1 << 14, 1 << 10);
    let elements = shape.rows * shape.cols;
    let drop = Dropout::new(Key::new(42, 7), Probability::nonvanishing(p)?);
    let x = gpu.stream().clone_htod(&vec![1.0f32; elements])?;
    let mut y = gpu.stream().alloc_zeros::<f32>(elements)?;
    gpu.run(&drop, Forward { shape, x: Source::Tensor(&x), y: &mut y })?;
    let y = gpu.stream().clone_dtoh(&y)?;
    gpu.stream().synchronize()?;
    let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / elements as f64;
    let p = drop.p.effective();
    let sigma = (p / (1.0 - p) / elements as f64).sqrt();
    // The scale is rounded to f32.
    let bound = 5.0 * sigma + f64::from(f32::EPSILON);
    ensure!((mean - 1.0).abs() < bound, "p = {p}: E[y]/x - 1 = {:e}, beyond {bound:e}", mean - 1.0);
    Ok(())
}
