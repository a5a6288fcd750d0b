//! `dropout_add_norm`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::dropout_add_norm::{Backward, Forward, Saved};
use fused_dropout::{DtypeId, Norm, NormKind};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "dropout_add_norm s", call, sums::<T, B>(backend, call));
    for kind in [NormKind::Layer, NormKind::Rms] {
        let data = Data::<T>::new(call, kind);
        let name = |pass| format!("dropout_add_norm {kind:?} {pass}");
        tally.count::<T, B>(backend, &name("y"), call, forward(backend, call, &data));
        tally.count::<T, B>(backend, &name("gradients"), call, backward(backend, call, &data));
    }
}

/// The arguments of a row of the table: which of the optional ones are there, and what the values are like,
/// goes round with the rows.
struct Data<T> {
    norm: Norm,
    x: Vec<T>,
    bias: Option<Vec<T>>,
    residual: Vec<T>,
    weight: Vec<T>,
    norm_bias: Option<Vec<T>>,
    dy: Vec<T>,
    ds: Option<Vec<T>>,
    grads: [bool; 3],
    /// Pre-norm: s is an output of the forward pass, and given to the backward pass.
    keeps_s: bool,
}

impl<T: Dtype> Data<T> {
    fn new(call: &Call, kind: NormKind) -> Self {
        let (n, cols) = (elements(call), call.shape.cols);
        let k = call.shape.rows * 5 + cols + call.dropout.p.threshold() as usize / 6553 * 3;
        let k = k + call.offset + usize::from(kind == NormKind::Rms);
        let every = |n: usize| k.is_multiple_of(n);
        // Ordinary rows, rows that all but vanish beside their mean, and rows of one value.
        let (centre, spread) = match k % 5 {
            0 if T::ID == DtypeId::F32 => (1e4, 0.01),
            1 => (3.0, 0.0),
            2 => (-40.0, 1.0),
            _ => (0.0, 1.0),
        };
        let around = |centre: f32, salt| -> Vec<T> {
            let value = |(i, v): (usize, T)| {
                T::from_f32(outliers::<T>(i, cols) * (centre + spread * v.to_f32()))
            };
            let ordinary = values::<T>(n, salt, false).into_iter().enumerate().map(value);
            with_special(ordinary.collect(), cols, salt)
        };
        // A special value in a parameter is one in every row: in some calls only.
        let parameter = |salt| match k % 9 {
            4 => with_special(values::<T>(cols, salt, false), 1, salt),
            _ => values::<T>(cols, salt, false),
        };
        Self {
            norm: Norm { kind, epsilon: [1e-5, 0.0, 0.1][k % 3] },
            x: around(0.0, 21),
            bias: (every(2) && spread == 1.0).then(|| parameter(22)),
            residual: around(centre, 23),
            weight: parameter(24),
            norm_bias: (k % 4 < 2).then(|| parameter(25)),
            dy: some_special::<T>(n, cols, 26),
            ds: (k % 3 != 1).then(|| some_special::<T>(n, cols, 27)),
            grads: [every(2), !every(7), !every(3)],
            keeps_s: k % 8 < 5,
        }
    }

    fn affine(&self) -> oracle::Affine<'_, T> {
        oracle::Affine { weight: &self.weight, bias: self.norm_bias.as_deref() }
    }

    fn s(&self, call: &Call) -> Vec<T> {
        let bias = self.bias.as_deref();
        oracle::dropout_add(&call.dropout, call.shape, &self.x, bias, &self.residual)
    }
}

/// What element i is multiplied by: rows of each magnitude that a storage type has, and rows with an outlier in one
/// column, not always the first.
fn outliers<T: Dtype>(i: usize, cols: usize) -> f32 {
    let (row, col) = (i / cols, i % cols);
    match (row + cols) % 8 {
        1 if col == row * 5 % cols => 3000.0,
        3 if T::ID != DtypeId::F16 => 1e30,
        4 if T::ID != DtypeId::F16 => 1e-25,
        6 if T::ID != DtypeId::F16 => 3e19,
        7 if T::ID != DtypeId::F16 => 1e33,
        _ => 1.0,
    }
}

/// s, whatever the values.
fn sums<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let shape = call.shape;
    let (x, residual) =
        (values::<T>(elements(call), 2, true), values::<T>(elements(call), 4, true));
    let bias = values::<T>(shape.cols, 3, true);
    let bias = shape.rows.is_multiple_of(2).then_some(&bias[..]);
    let weight = values::<T>(shape.cols, 24, true);
    let expected = oracle::dropout_add(&call.dropout, shape, &x, bias, &residual);
    let x_there = backend.matrix(&x, call, 0);
    let residual_there = backend.matrix(&residual, call, 1);
    let bias = bias.map(|bias| backend.tensor(bias, call.offset / 2));
    let weight = backend.tensor(&weight, call.offset);
    let run = |content: &[T], residual| {
        let (mut s, mut y) = (backend.matrix(content, call, 2), backend.matrix(&x, call, 0));
        let pass = Forward {
            shape,
            norm: Norm::layer(1e-5),
            x: &x_there,
            bias: given(&bias),
            residual,
            weight: &weight,
            norm_bias: None,
            s: Some(&mut s),
            y: &mut y,
            stats: None,
        };
        backend.run(call, pass)?;
        Ok::<_, String>((backend.rows(&s)?, backend.rows(&y)?))
    };
    let (s, y) = run(&x, Source::Tensor(&residual_there))?;
    same("s", &s, &expected)?;
    let (s, again) = run(&residual, Source::InPlace)?;
    same("s in place", &s, &expected)?;
    same("y with s in place, against y", &again, &y)
}

fn forward<T: Dtype, B: TestBackend>(
    backend: &B,
    call: &Call,
    data: &Data<T>,
) -> Result<(), String> {
    let sums = data.s(call);
    let expected = oracle::normalised(&data.norm, call.shape, &sums, &data.affine());
    let there = |tensor: &[T]| backend.tensor(tensor, call.offset);
    let (x, residual) = (backend.matrix(&data.x, call, 0), backend.matrix(&data.residual, call, 1));
    let weight = there(&data.weight);
    let bias = data.bias.as_ref().map(|bias| backend.tensor(bias, call.offset / 2));
    let norm_bias = data.norm_bias.as_deref().map(there);
    let [mut s, mut y] = [2, 0].map(|which| backend.matrix(&data.dy, call, which));
    let mut stats = backend.tensor(&vec![9.0f32; 2 * call.shape.rows], 0);
    let pass = Forward {
        shape: call.shape,
        norm: data.norm,
        x: &x,
        bias: given(&bias),
        residual: Source::Tensor(&residual),
        weight: &weight,
        norm_bias: given(&norm_bias),
        // Pre-norm or post-norm.
        s: data.keeps_s.then_some(&mut s as _),
        y: &mut y,
        stats: Some(&mut stats),
    };
    backend.run(call, pass)?;
    close("y", &backend.rows(&y)?, &expected.y)?;
    close("stats", &backend.contents(&stats)?, &expected.stats)?;
    same("s", &backend.rows(&s)?, if data.keeps_s { &sums } else { &data.dy })
}

fn backward<T: Dtype, B: TestBackend>(
    backend: &B,
    call: &Call,
    data: &Data<T>,
) -> Result<(), String> {
    let (shape, sums) = (call.shape, data.s(call));
    let stats = oracle::normalised(&data.norm, shape, &sums, &data.affine()).stats;
    let stats: Vec<f32> = stats.iter().map(|stat| stat.value as f32).collect();
    let expected = oracle::dropout_add_norm_backward(
        &call.dropout,
        &data.norm,
        shape,
        &sums,
        &data.weight,
        &stats,
        &data.dy,
        data.ds.as_deref(),
    );
    let there = |tensor: &[T], which| backend.matrix(tensor, call, which);
    let (x, residual, s) = (there(&data.x, 0), there(&data.residual, 1), there(&sums, 2));
    let (weight, stats) = (backend.tensor(&data.weight, call.offset), backend.tensor(&stats, 0));
    let dy = there(&data.dy, 3);
    let bias = data.bias.as_ref().map(|bias| backend.tensor(bias, call.offset / 2));
    let ds = data.ds.as_deref().map(|ds| there(ds, 4));
    let before = values::<f32>(shape.cols, 7, false);
    let run = |add: bool| {
        let [mut dresidual, mut dx] = [5, 6].map(|which| there(&data.dy, which));
        let mut sums = data.grads.map(|_| backend.tensor(&before, 0));
        let [dbias, dweight, dnorm_bias] = &mut sums;
        let gradient = |wanted: bool, tensor| match (wanted, add) {
            (false, _) => None,
            (true, false) => Some(Gradient::Write(tensor)),
            (true, true) => Some(Gradient::Add(tensor)),
        };
        let pass = Backward {
            shape,
            norm: data.norm,
            saved: match data.keeps_s {
                true => Saved::Sum(&s),
                false => Saved::Inputs { x: &x, bias: given(&bias), residual: &residual },
            },
            weight: &weight,
            stats: &stats,
            dy: &dy,
            ds: given(&ds),
            dresidual: &mut dresidual,
            dx: &mut dx,
            dbias: gradient(data.grads[0], dbias),
            dweight: gradient(data.grads[1], dweight),
            dnorm_bias: gradient(data.grads[2], dnorm_bias),
        };
        backend.run(call, pass)?;
        let sums = sums.each_ref().map(|sum| backend.contents(sum));
        let [dbias, dweight, dnorm_bias] = sums;
        Ok::<_, String>((
            [backend.rows(&dresidual)?, backend.rows(&dx)?],
            [dbias?, dweight?, dnorm_bias?],
        ))
    };
    let ([dresidual, dx], sums) = run(false)?;
    close("dresidual", &dresidual, &expected.dresidual)?;
    close("dx", &dx, &expected.dx)?;
    let [dbias, dweight, dnorm_bias] = &sums;
    if data.grads[0] {
        close("dbias", dbias, &expected.dbias)?;
    }
    if data.grads[1] {
        close("dweight", dweight, &expected.dweight)?;
    }
    if data.grads[2] {
        same("dnorm_bias", dnorm_bias, &expected.dnorm_bias)?;
    }
    let ([again, _], more) = run(true)?;
    same("dresidual where gradients are added, against dresidual", &again, &dresidual)?;
    for (i, (more, sum)) in more.iter().zip(&sums).enumerate() {
        let expected = if data.grads[i] { &added(&before, sum) } else { &before };
        same("a parameter's gradient, added", more, expected)?;
    }
    Ok(())
}
