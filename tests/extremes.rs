//! Values at the edges of f32, as users meet them: masks that trainers write, outliers, overflows. Right values are computed
//! by hand; `tests/conformance.rs` has the bounds for every backend.

use fused_dropout::cpu::Cpu;
use fused_dropout::ops::bias_act_dropout;
use fused_dropout::ops::dropout_add_norm::{self, Saved};
use fused_dropout::ops::softmax_dropout::{self, STATISTICS};
use fused_dropout::{
    Activation, AttentionMask, Backend, Dropout, Key, Mode, Norm, Probability, Readable, Scores,
    Shape, Source, Writable,
};
use half::{bf16, f16};

/// Nothing is dropped.
fn kept() -> Dropout<'static> {
    Dropout::new(Key::new(1, 2), Probability::new(0.1).unwrap()).mode(Mode::Inference)
}

/// dx of one row of scores, with saved statistics and without.
fn softmax_gradients(cpu: &Cpu, x: &[f32], additive: &[f32], dy: &[f32]) -> [Vec<f32>; 2] {
    let scores = Scores { batch: 1, heads: 1, queries: 1, keys: x.len(), scale: 1.0 };
    let mask = AttentionMask { additive: Some(&additive as _), ..AttentionMask::NONE };
    let (mut y, mut statistics) = (vec![0.0; x.len()], [0.0; STATISTICS]);
    let forward = softmax_dropout::Forward {
        scores,
        mask,
        x: Source::Tensor(&x),
        y: &mut y,
        statistics: Some(&mut statistics),
    };
    cpu.run(&kept(), forward).unwrap();
    [Some(&statistics as _), None].map(|statistics| {
        let mut dx = vec![9.0; x.len()];
        let dy = Source::Tensor(&dy as _);
        let backward =
            softmax_dropout::Backward { scores, mask, x: &x, statistics, dy, dx: &mut dx };
        cpu.run(&kept(), backward).unwrap();
        dx
    })
}

#[test]
fn the_gradient_of_a_masked_key_stays_out_of_its_row() {
    let x = [0.5, 9.0, -0.25, 1.0, 0.0, 0.75, -1.0, 2.0];
    for cpu in Cpu::levels() {
        // Masked, or so far below that P is 0.
        for hidden in [f32::NEG_INFINITY, -200.0] {
            let additive = std::array::from_fn::<f32, 8, _>(|k| if k == 1 { hidden } else { 0.0 });
            let with = |dy: f32| {
                let dys = std::array::from_fn::<f32, 8, _>(|k| if k == 1 { dy } else { k as f32 });
                softmax_gradients(&cpu, &x, &additive, &dys)
            };
            let expected = with(0.0);
            for dy in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
                for (dx, expected) in with(dy).iter().zip(&expected) {
                    assert_eq!(dx[1].to_bits(), 0, "{cpu:?}: dx of the masked key for dy = {dy}");
                    assert_eq!(dx, expected, "{cpu:?}: dy = {dy}");
                    assert!(dx.iter().all(|dx| dx.is_finite()));
                }
            }
        }
    }
}

#[test]
fn a_finite_mask_over_a_whole_row_costs_nothing() {
    let dy = std::array::from_fn::<f32, 8, _>(|k| k as f32);
    // P = 1/8, mean(dy) = 3.5: within the rounding of the exponentials, of the sums and of two products.
    let tolerance = 64.0 * f32::EPSILON;
    for cpu in Cpu::levels() {
        for (x, mask) in
            [(0.0, -1e9), (0.0, f32::MIN), (0.0, -65504.0), (1e7, 0.0), (-1e7, 0.0), (3.0, -1e4)]
        {
            for dx in softmax_gradients(&cpu, &[x; 8], &[mask; 8], &dy) {
                for (k, dx) in dx.iter().enumerate() {
                    let expected = (k as f32 - 3.5) / 8.0;
                    assert!(
                        (dx - expected).abs() <= tolerance,
                        "{cpu:?} {mask:e}: {dx} {expected}"
                    );
                }
            }
        }
    }
}

fn layer_norm<T: fused_dropout::Dtype>(cpu: &Cpu, norm: &Norm, s: &[f32]) -> Vec<f32> {
    let row: Vec<T> = s.iter().map(|&s| T::from_f32(s)).collect();
    let zeros = vec![T::from_f32(0.0); s.len()];
    let weight = vec![T::from_f32(1.0); s.len()];
    let mut y = zeros.clone();
    let pass = dropout_add_norm::Forward {
        shape: Shape::new(1, s.len()),
        norm: *norm,
        x: &zeros,
        bias: None,
        residual: Source::Tensor(&row),
        weight: &weight,
        norm_bias: None,
        s: None,
        y: &mut y,
        stats: None,
    };
    cpu.run(&kept(), pass).unwrap();
    y.iter().map(|y| y.to_f32()).collect()
}

#[test]
fn an_outlier_costs_the_same_in_every_column() {
    let n = 4096;
    let spread = |k: usize| ((k * 2_654_435_761) % 65_536) as f32 / 32_768.0 - 1.0;
    for cpu in Cpu::levels() {
        for column in [0, 1, 17, 4095] {
            let row: Vec<f32> =
                (0..n).map(|k| if k == column { 3000.0 } else { spread(k) }).collect();
            let wide = || row.iter().map(|&s| f64::from(s));
            let mean = wide().sum::<f64>() / n as f64;
            let variance = wide().map(|s| (s - mean).powi(2)).sum::<f64>() / n as f64;
            let y = layer_norm::<f32>(&cpu, &Norm::layer(0.0), &row);
            for (k, (y, s)) in y.iter().zip(wide()).enumerate() {
                // The deviation is that of the outlier, 47, and has half of the 271 roundings of a square. With the first
                // value as the pivot, an outlier there cost 60 times as much as this.
                let expected = (s - mean) / variance.sqrt();
                let error = (f64::from(*y) - expected).abs();
                assert!(
                    error <= 8.1e-6 * expected.abs().max(1.0 / 47.0),
                    "column {column}, {k}: {error}"
                );
            }
        }
    }
}

#[test]
fn rows_of_any_magnitude_are_normalised() {
    for cpu in Cpu::levels() {
        for size in [3e19f32, 1e30, 1e37, 1e-25, 1e-37] {
            let row: Vec<f32> = (0..64).map(|k| if k % 2 == 0 { size } else { -size }).collect();
            for norm in [Norm::layer(0.0), Norm::rms(0.0)] {
                for y in
                    [layer_norm::<f32>(&cpu, &norm, &row), layer_norm::<bf16>(&cpu, &norm, &row)]
                {
                    for (k, y) in y.iter().enumerate() {
                        let expected = if k % 2 == 0 { 1.0 } else { -1.0 };
                        assert!(
                            (y - expected).abs() <= 4.0 * f32::EPSILON,
                            "{size:e} {norm:?}: {y}"
                        );
                    }
                }
            }
        }
    }
}

/// With |xhat| at most 1 and |dy| at most 2, no gradient of a row is larger than 6 rstd.
#[test]
fn gradients_of_rows_of_any_magnitude_are_finite() {
    // The lanes of a warp have values of one sign, so that sums of them overflow.
    let sign = |k: usize| if k / 8 % 32 < 16 { 1.0 } else { -1.0 };
    let (shape, norm) = (Shape::new(1, 1024), Norm::layer(0.0));
    let dy: Vec<f32> = (0..1024).map(|k| (k % 5) as f32 - 2.0).collect();
    let weight = vec![1.0; 1024];
    for size in [3e37f32, 1e-37] {
        let s: Vec<f32> = (0..1024).map(|k| sign(k) * size).collect();
        let stats = [0.0, 1.0 / size];
        let bounded = |what: &str, ds: &[f32]| {
            let most = 6.0 / size;
            assert!(ds.iter().all(|ds| ds.abs() <= most), "{what}, {size:e}: {:?}", &ds[..8]);
        };
        for cpu in Cpu::levels() {
            bounded("cpu", &row_gradient(&cpu, &norm, shape, &s, &weight, &stats, &dy));
        }
        #[cfg(feature = "emulator")]
        {
            let emulator = fused_dropout::emulator::Emulator::new();
            bounded("kernels", &row_gradient(&emulator, &norm, shape, &s, &weight, &stats, &dy));
        }
    }
}

/// dresidual, nothing dropped.
fn row_gradient<B: Backend>(
    backend: &B,
    norm: &Norm,
    shape: Shape,
    s: &Vec<f32>,
    weight: &Vec<f32>,
    stats: &[f32; 2],
    dy: &Vec<f32>,
) -> Vec<f32>
where
    Vec<f32>: Writable<f32, B>,
    [f32; 2]: Readable<f32, B>,
{
    let (mut ds, mut dx) = (vec![9.0; s.len()], vec![9.0; s.len()]);
    let pass = dropout_add_norm::Backward {
        shape,
        norm: *norm,
        saved: Saved::Sum(s),
        weight,
        stats,
        dy,
        ds: None,
        dresidual: &mut ds,
        dx: &mut dx,
        dbias: None,
        dweight: None,
        dnorm_bias: None,
    };
    backend.run(&kept(), pass).unwrap();
    ds
}

#[test]
fn activations_that_overflowed_have_their_limits() {
    // 60000 + 60000 is an infinity in f16 and none in f32; both ways to one are here.
    let x = [f16::NEG_INFINITY, f16::INFINITY, f16::MIN, f16::MAX].map(|x| [x; 8]).concat();
    let bias = [f16::from_f32(0.0); 32];
    let (shape, ones) = (Shape::new(1, 32), vec![f16::from_f32(1.0); 32]);
    for cpu in Cpu::levels() {
        for act in [Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Relu] {
            let (mut y, mut dx) = (ones.clone(), ones.clone());
            let forward = bias_act_dropout::Forward {
                shape,
                activation: act,
                x: Source::Tensor(&x),
                bias: Some(&bias),
                y: &mut y,
            };
            cpu.run(&kept(), forward).unwrap();
            let backward = bias_act_dropout::Backward {
                shape,
                activation: act,
                x: &x,
                bias: Some(&bias),
                dy: Source::Tensor(&ones),
                dx: &mut dx,
                dbias: None,
            };
            cpu.run(&kept(), backward).unwrap();
            let [y, dx] = [y, dx].map(|v| [0, 8, 16, 24].map(|k| v[k].to_f32()));
            assert_eq!(y, [0.0, f32::INFINITY, 0.0, f16::MAX.to_f32()], "{act:?}");
            assert_eq!(dx, [0.0, 1.0, 0.0, 1.0], "{act:?}'s slope");
        }
    }
}
