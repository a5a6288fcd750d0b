//! `dropout_add_norm`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::device;
use fused_dropout::ops::dropout_add_norm::{Inputs, ParamGrads, Saved};
use fused_dropout::{Affine, DtypeId, Norm, NormKind};

/// s = residual + D(x + bias), y = norm(s). `residual` is `None` for a call in place, in s.
pub trait DropoutAddNormCalls {
    fn dropout_add_norm<T: Dtype>(
        &self,
        call: &Call,
        norm: &Norm,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        affine: &Affine<&[T]>,
        s: Option<&mut [T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) -> Result<(), Error>;
    fn dropout_add_norm_backward<T: Dtype>(
        &self,
        call: &Call,
        norm: &Norm,
        saved: &Saved<&[T]>,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        ds: Option<&[T]>,
        dresidual: &mut [T],
        dx: &mut [T],
        grads: ParamGrads<&mut [f32]>,
    ) -> Result<(), Error>;
}

impl DropoutAddNormCalls for Cpu {
    fn dropout_add_norm<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        affine: &Affine<&[T]>,
        s: Option<&mut [T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::dropout_add_norm as op;
        match residual {
            Some(residual) => {
                let inputs = Inputs { x, bias, residual };
                op::forward(self, &c.dropout, norm, c.shape, &inputs, affine, s, y, stats)
            }
            None => {
                let residual = s.expect("a call in place has s");
                op::forward_in_place(
                    self, &c.dropout, norm, c.shape, x, bias, residual, affine, y, stats,
                )
            }
        }
    }
    fn dropout_add_norm_backward<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        saved: &Saved<&[T]>,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        ds: Option<&[T]>,
        dresidual: &mut [T],
        dx: &mut [T],
        grads: ParamGrads<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::dropout_add_norm as op;
        let d = &c.dropout;
        op::backward(self, d, norm, c.shape, saved, weight, stats, dy, ds, dresidual, dx, grads)
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> DropoutAddNormCalls for Kernels<L> {
    fn dropout_add_norm<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        affine: &Affine<&[T]>,
        s: Option<&mut [T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use device::dropout_add_norm as op;
        let (mut s, mut stats) = (s, stats);
        self.call(c, &mut |call, d| {
            self.affine(affine, c, &mut |affine| {
                self.0.reading(x, c.offset, &mut |x| {
                    self.0.optional(bias, c.offset / 2, &mut |bias| {
                        self.0.optional(residual, c.offset, &mut |residual| {
                            let (s, stats) = (s.as_deref_mut(), stats.as_deref_mut());
                            self.normalised(c, s, y, stats, &mut |s, y, stats| {
                                let (norm, shape) = (norm, c.shape);
                                let Some(residual) = residual else {
                                    let s = s.expect("a call in place has s");
                                    return op::forward_in_place(
                                        call, d, norm, shape, x, bias, s, affine, y, stats,
                                    );
                                };
                                let inputs = Inputs { x, bias, residual };
                                op::forward(call, d, norm, shape, &inputs, affine, s, y, stats)
                            })
                        })
                    })
                })
            })
        })
    }
    fn dropout_add_norm_backward<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        saved: &Saved<&[T]>,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        ds: Option<&[T]>,
        dresidual: &mut [T],
        dx: &mut [T],
        grads: ParamGrads<&mut [f32]>,
    ) -> Result<(), Error> {
        use device::dropout_add_norm as op;
        let mut grads = grads;
        self.call(c, &mut |call, d| {
            self.saved(saved, c, &mut |saved| {
                self.0.reading(weight, c.offset, &mut |weight| {
                    self.0.reading(stats, 0, &mut |stats| {
                        self.0.reading(dy, c.offset, &mut |dy| {
                            self.0.optional(ds, c.offset, &mut |ds| {
                                let (dresidual, dx) = (&mut *dresidual, &mut *dx);
                                self.gradients(c, dresidual, dx, &mut grads, &mut |dr, dx, sums| {
                                    let (norm, shape) = (norm, c.shape);
                                    op::backward(
                                        call, d, norm, shape, saved, weight, stats, dy, ds, dr, dx,
                                        sums,
                                    )
                                })
                            })
                        })
                    })
                })
            })
        })
    }
}

/// The same tensor for a shorter time.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn shorter<'s, T, D: device::Device>(
    tensor: &'s mut Option<&mut dyn device::Writable<T, D>>,
) -> Option<&'s mut dyn device::Writable<T, D>> {
    match tensor {
        Some(tensor) => Some(&mut **tensor),
        None => None,
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> Kernels<L> {
    fn affine<T: Dtype>(
        &self,
        affine: &Affine<&[T]>,
        c: &Call,
        work: &mut dyn FnMut(&Affine<&dyn device::Readable<T, L::D>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.0.reading(affine.weight, c.offset, &mut |weight| {
            self.0.optional(affine.bias, c.offset, &mut |bias| work(&Affine { weight, bias }))
        })
    }

    /// The outputs of a forward pass.
    fn normalised<T: Dtype>(
        &self,
        c: &Call,
        s: Option<&mut [T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
        work: &mut dyn FnMut(
            Option<&mut dyn device::Writable<T, L::D>>,
            &mut dyn device::Writable<T, L::D>,
            Option<&mut dyn device::Writable<f32, L::D>>,
        ) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut stats = stats;
        self.0.optional_out(s, &mut |mut s| {
            self.0.with(y, c.offset, &mut |y| {
                self.0.optional_out(stats.as_deref_mut(), &mut |stats| {
                    work(shorter(&mut s), y, stats)
                })
            })
        })
    }

    /// The outputs of a backward pass.
    fn gradients<T: Dtype>(
        &self,
        c: &Call,
        dresidual: &mut [T],
        dx: &mut [T],
        grads: &mut ParamGrads<&mut [f32]>,
        work: &mut dyn FnMut(
            &mut dyn device::Writable<T, L::D>,
            &mut dyn device::Writable<T, L::D>,
            Option<device::dropout_add_norm::SumGrads<'_, L::D>>,
        ) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.0.with(dresidual, c.offset, &mut |dresidual| {
            self.0.with(dx, c.offset, &mut |dx| {
                self.sums(c, grads, &mut |sums| work(dresidual, dx, sums))
            })
        })
    }

    /// The gradients of parameters, with a workspace; nothing where none is asked for.
    fn sums(
        &self,
        c: &Call,
        grads: &mut ParamGrads<&mut [f32]>,
        work: &mut dyn FnMut(
            Option<device::dropout_add_norm::SumGrads<'_, L::D>>,
        ) -> Result<(), Error>,
    ) -> Result<(), Error> {
        use device::dropout_add_norm::SumGrads;
        use fused_dropout::ops::dropout_add_norm::workspace_len;
        let ParamGrads { dbias, dweight, dnorm_bias } = grads;
        if dbias.is_none() && dweight.is_none() && dnorm_bias.is_none() {
            return work(None);
        }
        // What lies in a workspace before a call must not matter.
        let mut workspace = vec![f32::NAN; workspace_len(c.shape)];
        self.0.with(&mut workspace, 0, &mut |workspace| {
            self.0.optional_out(dbias.as_deref_mut(), &mut |mut dbias| {
                self.0.optional_out(dweight.as_deref_mut(), &mut |mut dweight| {
                    self.0.optional_out(dnorm_bias.as_deref_mut(), &mut |mut dnorm_bias| {
                        let grads = ParamGrads {
                            dbias: shorter(&mut dbias),
                            dweight: shorter(&mut dweight),
                            dnorm_bias: shorter(&mut dnorm_bias),
                        };
                        work(Some(SumGrads { grads, workspace: &mut *workspace }))
                    })
                })
            })
        })
    }

    fn saved<T: Dtype>(
        &self,
        saved: &Saved<&[T]>,
        c: &Call,
        work: &mut dyn FnMut(&Saved<&dyn device::Readable<T, L::D>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match *saved {
            Saved::Sum(s) => self.0.reading(s, c.offset, &mut |s| work(&Saved::Sum(s))),
            Saved::Inputs(Inputs { x, bias, residual }) => self.0.reading(x, c.offset, &mut |x| {
                self.0.optional(bias, c.offset, &mut |bias| {
                    self.0.reading(residual, c.offset, &mut |residual| {
                        work(&Saved::Inputs(Inputs { x, bias, residual }))
                    })
                })
            }),
        }
    }
}

/// Runs the checks of one row of the table.
pub fn check<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
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

    fn affine(&self) -> Affine<&[T]> {
        Affine { weight: &self.weight, bias: self.norm_bias.as_deref() }
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
fn sums<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let x = values::<T>(elements(call), 2, true);
    let bias = values::<T>(call.shape.cols, 3, true);
    let bias = call.shape.rows.is_multiple_of(2).then_some(&bias[..]);
    let residual = values::<T>(elements(call), 4, true);
    let weight = values::<T>(call.shape.cols, 24, true);
    let affine = Affine { weight: &weight[..], bias: None };
    let norm = Norm::layer(1e-5);
    let expected = oracle::dropout_add(&call.dropout, call.shape, &x, bias, &residual);
    let run = |content: &[T], residual: Option<&[T]>| {
        let mut y = Guarded::new(&x, call.offset);
        let s = output(content, call, |s| {
            let y = y.tensor();
            backend.dropout_add_norm(call, &norm, &x, bias, residual, &affine, Some(s), y, None)
        })?;
        Ok::<_, String>((s, y.finish()?))
    };
    let (s, y) = run(&x, Some(&residual))?;
    same("s", &s, &expected)?;
    let (s, again) = run(&residual, None)?;
    same("s in place", &s, &expected)?;
    same("y with s in place, against y", &again, &y)
}

fn forward<T: Dtype, B: Backend>(backend: &B, call: &Call, data: &Data<T>) -> Result<(), String> {
    let s = data.s(call);
    let expected = oracle::normalised(&data.norm, call.shape, &s, &data.affine());
    let mut stats = Guarded::new(&vec![9.0f32; 2 * call.shape.rows], 0);
    let mut given = data.dy.clone();
    let y = output(&data.dy, call, |y| {
        let (bias, residual) = (data.bias.as_deref(), Some(&data.residual[..]));
        let (norm, x, affine) = (&data.norm, &data.x, data.affine());
        // Pre-norm or post-norm.
        let s = data.keeps_s.then_some(&mut given[..]);
        let stats = Some(stats.tensor());
        backend.dropout_add_norm(call, norm, x, bias, residual, &affine, s, y, stats)
    })?;
    close("y", &y, &expected.y)?;
    close("stats", &stats.finish()?, &expected.stats)?;
    same("s", &given, if data.keeps_s { &s } else { &data.dy })
}

fn backward<T: Dtype, B: Backend>(backend: &B, call: &Call, data: &Data<T>) -> Result<(), String> {
    let s = data.s(call);
    let stats = oracle::normalised(&data.norm, call.shape, &s, &data.affine()).stats;
    let stats: Vec<f32> = stats.iter().map(|stat| stat.value as f32).collect();
    let (weight, dy, ds) = (&data.weight, &data.dy, data.ds.as_deref());
    let expected = oracle::dropout_add_norm_backward(
        &call.dropout,
        &data.norm,
        call.shape,
        &s,
        weight,
        &stats,
        dy,
        ds,
    );
    let saved = match data.keeps_s {
        true => Saved::Sum(&s[..]),
        false => Saved::Inputs(Inputs {
            x: &data.x[..],
            bias: data.bias.as_deref(),
            residual: &data.residual,
        }),
    };
    let mut sums = data.grads.map(|_| Guarded::new(&vec![9.0f32; call.shape.cols], 0));
    let [dbias, dweight, dnorm_bias] = &mut sums;
    let grads = ParamGrads {
        dbias: data.grads[0].then(|| dbias.tensor()),
        dweight: data.grads[1].then(|| dweight.tensor()),
        dnorm_bias: data.grads[2].then(|| dnorm_bias.tensor()),
    };
    let mut dx = Guarded::new(dy, call.offset);
    let dresidual = output(dy, call, |dresidual| {
        let (norm, dx) = (&data.norm, dx.tensor());
        backend.dropout_add_norm_backward(
            call, norm, &saved, weight, &stats, dy, ds, dresidual, dx, grads,
        )
    })?;
    close("dresidual", &dresidual, &expected.dresidual)?;
    close("dx", &dx.finish()?, &expected.dx)?;
    let [dbias, dweight, dnorm_bias] = sums;
    for (what, given, expected, wanted) in [
        ("dbias", dbias, &expected.dbias, data.grads[0]),
        ("dweight", dweight, &expected.dweight, data.grads[1]),
    ] {
        let given = given.finish()?;
        if wanted {
            close(what, &given, expected)?;
        }
    }
    let given = dnorm_bias.finish()?;
    if data.grads[2] { same("dnorm_bias", &given, &expected.dnorm_bias) } else { Ok(()) }
}
