//! `embedding_dropout`: its calls on each backend, and its checks.

use super::*;
use crate::oracle;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookups, NormGradients, Tables};
use fused_dropout::{Affine, Norm};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use fused_dropout::{
    device::{self, Writable, embedding_dropout as op},
    ops::embedding_dropout::{Lookup, check_report, workspace_len},
};

/// y = D(token + position + segment).
pub trait EmbeddingDropoutCalls {
    fn embedding_dropout<T: Dtype>(
        &self,
        call: &Call,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error>;
    fn embedding_dropout_backward<T: Dtype>(
        &self,
        call: &Call,
        lookups: &Lookups<&[u32]>,
        dy: &[T],
        gradients: Gradients<&mut [f32]>,
    ) -> Result<(), Error>;
    fn embedding_norm<T: Dtype>(
        &self,
        call: &Call,
        norm: &Norm,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        affine: &Affine<&[T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) -> Result<(), Error>;
    fn embedding_norm_backward<T: Dtype>(
        &self,
        call: &Call,
        norm: &Norm,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        gradients: Gradients<&mut [f32]>,
        norm_gradients: NormGradients<&mut [f32]>,
    ) -> Result<(), Error>;
}

impl EmbeddingDropoutCalls for Cpu {
    fn embedding_dropout<T: Dtype>(
        &self,
        c: &Call,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::embedding_dropout::forward;
        forward(self, &c.dropout, c.shape, lookups, tables, y)
    }
    fn embedding_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        lookups: &Lookups<&[u32]>,
        dy: &[T],
        gradients: Gradients<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::embedding_dropout::backward;
        backward(self, &c.dropout, c.shape, lookups, dy, gradients)
    }
    fn embedding_norm<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        affine: &Affine<&[T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::embedding_dropout::forward_norm;
        forward_norm(self, &c.dropout, norm, c.shape, lookups, tables, affine, y, stats)
    }
    fn embedding_norm_backward<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        gradients: Gradients<&mut [f32]>,
        norm_gradients: NormGradients<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::embedding_dropout::backward_norm;
        let (d, shape) = (&c.dropout, c.shape);
        backward_norm(
            self,
            d,
            norm,
            shape,
            lookups,
            tables,
            weight,
            stats,
            dy,
            gradients,
            norm_gradients,
        )
    }
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<L: Lab> EmbeddingDropoutCalls for Kernels<L> {
    fn embedding_dropout<T: Dtype>(
        &self,
        c: &Call,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        let mut report = [u32::MAX];
        self.call(c, &mut |call, d| {
            with_lookups(&self.0, lookups, &mut |lookups| {
                with_tables(&self.0, tables, c.offset, &mut |tables| {
                    self.0.with(y, c.offset, &mut |y| {
                        self.0.with(&mut report, 0, &mut |report| {
                            op::forward(call, d, c.shape, lookups, tables, y, report)
                        })
                    })
                })
            })
        })?;
        check_report(report[0])
    }
    fn embedding_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        lookups: &Lookups<&[u32]>,
        dy: &[T],
        gradients: Gradients<&mut [f32]>,
    ) -> Result<(), Error> {
        let mut gradients = gradients;
        self.call(c, &mut |call, d| {
            with_lookups(&self.0, lookups, &mut |lookups| {
                self.0.reading(dy, c.offset, &mut |dy| {
                    with_gradients(&self.0, &mut gradients, c.offset, &mut |gradients| {
                        op::backward(call, d, c.shape, lookups, dy, gradients)
                    })
                })
            })
        })
    }
    fn embedding_norm<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        affine: &Affine<&[T]>,
        y: &mut [T],
        stats: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        let (mut report, mut stats) = ([u32::MAX], stats);
        let forward = &mut |call: &device::Call<'_, L::D>, d: &Dropout| {
            with_lookups(&self.0, lookups, &mut |lookups| {
                with_tables(&self.0, tables, c.offset, &mut |tables| {
                    self.0.reading(affine.weight, c.offset, &mut |weight| {
                        self.0.optional(affine.bias, c.offset, &mut |bias| {
                            self.0.with(y, c.offset, &mut |y| {
                                self.0.optional_out(stats.as_deref_mut(), &mut |mut stats| {
                                    self.0.with(&mut report, 0, &mut |report| {
                                        let (affine, stats) =
                                            (Affine { weight, bias }, again(&mut stats));
                                        op::forward_norm(
                                            call, d, norm, c.shape, lookups, tables, &affine, y,
                                            stats, report,
                                        )
                                    })
                                })
                            })
                        })
                    })
                })
            })
        };
        self.call(c, forward)?;
        check_report(report[0])
    }
    fn embedding_norm_backward<T: Dtype>(
        &self,
        c: &Call,
        norm: &Norm,
        lookups: &Lookups<&[u32]>,
        tables: &Tables<&[T]>,
        weight: &[T],
        stats: &[f32],
        dy: &[T],
        gradients: Gradients<&mut [f32]>,
        norm_gradients: NormGradients<&mut [f32]>,
    ) -> Result<(), Error> {
        let (mut gradients, mut norm_gradients) = (gradients, norm_gradients);
        // What lies in a workspace before a call must not matter.
        let mut workspace = vec![f32::NAN; workspace_len(c.shape)];
        let backward = &mut |call: &device::Call<'_, L::D>, d: &Dropout| {
            with_lookups(&self.0, lookups, &mut |lookups| {
                with_tables(&self.0, tables, c.offset, &mut |tables| {
                    self.0.reading(weight, c.offset, &mut |weight| {
                        self.0.reading(stats, 0, &mut |stats| {
                            self.0.reading(dy, c.offset, &mut |dy| {
                                self.0.with(&mut workspace, 0, &mut |workspace| {
                                    let all = (&mut gradients, &mut norm_gradients);
                                    with_all_gradients(&self.0, all, c.offset, &mut |g, n| {
                                        op::backward_norm(
                                            call, d, norm, c.shape, lookups, tables, weight, stats,
                                            dy, g, n, workspace,
                                        )
                                    })
                                })
                            })
                        })
                    })
                })
            })
        };
        self.call(c, backward)
    }
}

/// [`with_gradients`], and those of the norm.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn with_all_gradients<L: Lab>(
    lab: &L,
    (tables, norm): (&mut Gradients<&mut [f32]>, &mut NormGradients<&mut [f32]>),
    offset: usize,
    work: &mut dyn FnMut(
        op::DeviceGradients<'_, L::D>,
        NormGradients<&mut dyn Writable<f32, L::D>>,
    ) -> Result<(), Error>,
) -> Result<(), Error> {
    lab.optional_out_at(norm.weight.as_deref_mut(), offset, &mut |mut weight| {
        lab.optional_out_at(norm.bias.as_deref_mut(), offset, &mut |mut bias| {
            with_gradients(lab, tables, offset, &mut |tables| {
                let (weight, bias) = (again(&mut weight), again(&mut bias));
                work(tables, NormGradients { weight, bias })
            })
        })
    })
}

/// Runs `work` on lookups whose ids are in the memory of the laboratory's device.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn with_lookups<L: Lab>(
    lab: &L,
    lookups: &Lookups<&[u32]>,
    work: &mut dyn FnMut(&op::DeviceLookups<'_, L::D>) -> Result<(), Error>,
) -> Result<(), Error> {
    let given = |lookup: Option<Lookup<&'_ [u32]>>| match lookup.map(|lookup| lookup.ids) {
        Some(Ids::Given(ids)) => ids.to_vec(),
        _ => Vec::new(),
    };
    let Lookups { token, position, segment } = *lookups;
    lab.reading(&given(Some(token)), 1, &mut |tokens| {
        lab.reading(&given(position), 0, &mut |positions| {
            lab.reading(&given(segment), 3, &mut |segments| {
                let mut lookups = Lookups::tokens(token.entries, tokens);
                if let Some(Lookup { entries, ids }) = position {
                    lookups = lookups.positions(
                        entries,
                        match ids {
                            Ids::Given(_) => Ids::Given(positions),
                            Ids::Sequence(length) => Ids::Sequence(length),
                        },
                    );
                }
                if let Some(segment) = segment {
                    lookups = lookups.segments(segment.entries, segments);
                }
                work(&lookups)
            })
        })
    })
}

/// Runs `work` on tables in the memory of the laboratory's device.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn with_tables<T: Dtype, L: Lab>(
    lab: &L,
    tables: &Tables<&[T]>,
    offset: usize,
    work: &mut dyn FnMut(&op::DeviceTables<'_, T, L::D>) -> Result<(), Error>,
) -> Result<(), Error> {
    lab.reading(tables.token, offset, &mut |token| {
        lab.optional(tables.position, offset, &mut |position| {
            lab.optional(tables.segment, offset, &mut |segment| {
                work(&Tables { token, position, segment })
            })
        })
    })
}

/// An optional tensor for one more call.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn again<'a, D: device::Device>(
    tensor: &'a mut Option<&mut dyn Writable<f32, D>>,
) -> Option<&'a mut dyn Writable<f32, D>> {
    match tensor {
        Some(tensor) => Some(&mut **tensor),
        None => None,
    }
}

/// Runs `work` on gradients in the memory of the laboratory's device, and brings them back.
#[cfg(any(feature = "cuda", feature = "emulator"))]
fn with_gradients<L: Lab>(
    lab: &L,
    gradients: &mut Gradients<&mut [f32]>,
    offset: usize,
    work: &mut dyn FnMut(op::DeviceGradients<'_, L::D>) -> Result<(), Error>,
) -> Result<(), Error> {
    let Gradients { token, position, segment } = gradients;
    lab.optional_out_at(token.as_deref_mut(), offset, &mut |mut token| {
        lab.optional_out_at(position.as_deref_mut(), offset, &mut |mut position| {
            lab.optional_out_at(segment.as_deref_mut(), offset, &mut |mut segment| {
                work(Gradients {
                    token: again(&mut token),
                    position: again(&mut position),
                    segment: again(&mut segment),
                })
            })
        })
    })
}

/// Runs the checks of one row of the table.
pub fn check<T: Dtype, B: Backend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "embedding_dropout", call, forward::<T, B>(backend, call));
    let gradients = gradients::<T, B>(backend, call);
    tally.count::<T, B>(backend, "embedding_dropout gradients", call, gradients);
    let norm = norm::<T, B>(backend, call);
    tally.count::<T, B>(backend, "embedding_dropout with norm", call, norm);
    let norm_gradients = norm_gradients::<T, B>(backend, call);
    tally.count::<T, B>(backend, "embedding_dropout with norm, gradients", call, norm_gradients);
}

/// The case's rows as tokens: which tables there are, of how many entries, and what each row takes.
struct Rows {
    tokens: (usize, Vec<u32>),
    positions: Option<(usize, Option<Vec<u32>>)>,
    segments: Option<(usize, Vec<u32>)>,
}

/// Rows of a sequence, where positions follow from it.
const SEQUENCE: usize = 7;

impl Rows {
    /// From one token to many more than there are rows; ids that repeat, near each other and far apart.
    fn new(call: &Call) -> Self {
        let Shape { rows, cols } = call.shape;
        let kind = rows + cols + call.dropout.p.threshold() as usize % 7;
        let ids = |entries: usize, salt: u64| {
            let id = |i: usize| {
                let mixed = rand_philox::splitmix64(i as u64 * 977 + salt);
                // Half of the ids are among the first three.
                let among = if mixed & 1 == 0 { entries.min(3) } else { entries };
                ((mixed >> 20) % among as u64) as u32
            };
            (entries, (0..rows).map(id).collect::<Vec<_>>())
        };
        let positions = || {
            let (entries, ids) = ids(11, 2);
            (entries, kind.is_multiple_of(2).then_some(ids))
        };
        Self {
            tokens: ids([1, 37, 2, 300][kind % 4], 1),
            positions: (!kind.is_multiple_of(3)).then(positions),
            segments: (!kind.is_multiple_of(5)).then(|| ids(2, 3)),
        }
    }

    fn lookups(&self) -> Lookups<&[u32]> {
        let mut lookups = Lookups::tokens(self.tokens.0, &self.tokens.1[..]);
        if let Some((entries, ids)) = &self.positions {
            let ids = ids.as_deref().map_or(Ids::Sequence(SEQUENCE), Ids::Given);
            lookups = lookups.positions(*entries, ids);
        }
        if let Some((entries, ids)) = &self.segments {
            lookups = lookups.segments(*entries, ids);
        }
        lookups
    }

    /// Elements of each table.
    fn elements(&self, cols: usize) -> Tables<usize> {
        Tables {
            token: self.tokens.0 * cols,
            position: self.positions.as_ref().map(|(entries, _)| entries * cols),
            segment: self.segments.as_ref().map(|(entries, _)| entries * cols),
        }
    }
}

/// The tables of a case, unaligned with its offset.
struct Shifted<T>([Option<Guarded<T>>; 3]);

impl<T: Dtype> Shifted<T> {
    fn new(rows: &Rows, call: &Call, specials: bool) -> Self {
        let Tables { token, position, segment } = rows.elements(call.shape.cols);
        let mut salt = 10;
        Self([Some(token), position, segment].map(|len| {
            salt += 1;
            let table = |len| match specials {
                true => values::<T>(len, salt, true),
                false => some_special::<T>(len, call.shape.cols, salt),
            };
            len.map(|len| Guarded::new(&table(len), call.offset))
        }))
    }

    fn tables(&mut self) -> Tables<&[T]> {
        let [token, position, segment] =
            self.0.each_mut().map(|table| table.as_mut().map(|table| &*table.tensor()));
        Tables { token: token.expect("there are always tokens"), position, segment }
    }
}

fn forward<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let rows = Rows::new(call);
    let mut shifted = Shifted::<T>::new(&rows, call, true);
    let (lookups, tables) = (rows.lookups(), shifted.tables());
    let expected = oracle::embedding_dropout(&call.dropout, call.shape, &lookups, &tables);
    let y = output(&vec![T::from_f32(5.0); expected.len()], call, |y| {
        backend.embedding_dropout(call, &lookups, &tables, y)
    })?;
    same("y", &y, &expected)
}

/// The case's norm; its weight and, for some, its bias.
struct Normed<T> {
    norm: Norm,
    weight: Guarded<T>,
    bias: Option<Vec<T>>,
}

impl<T: Dtype> Normed<T> {
    fn new(call: &Call) -> Self {
        let Shape { rows, cols } = call.shape;
        let norm =
            if (rows + cols).is_multiple_of(3) { Norm::rms(1e-5) } else { Norm::layer(1e-12) };
        // A special value in a parameter is one in every row: in some calls only.
        let parameter = |salt| match (rows + cols + call.offset) % 9 {
            4 => with_special(values::<T>(cols, salt, false), 1, salt),
            _ => values::<T>(cols, salt, false),
        };
        let bias = rows.is_multiple_of(2).then(|| parameter(17));
        Self { norm, weight: Guarded::new(&parameter(16), call.offset), bias }
    }
}

fn norm<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let rows = Rows::new(call);
    let mut shifted = Shifted::<T>::new(&rows, call, false);
    let (lookups, tables) = (rows.lookups(), shifted.tables());
    let Normed { norm, mut weight, bias } = Normed::new(call);
    let affine = Affine { weight: &*weight.tensor(), bias: bias.as_deref() };
    let (expected, expected_stats) =
        oracle::embedding_norm(&call.dropout, &norm, call.shape, &lookups, &tables, &affine);
    let mut stats = Guarded::new(&vec![9.0f32; 2 * call.shape.rows], 0);
    let before = vec![T::from_f32(5.0); expected.len()];
    let y = output(&before, call, |y| {
        let stats = Some(stats.tensor());
        backend.embedding_norm(call, &norm, &lookups, &tables, &affine, y, stats)
    })?;
    close("y", &y, &expected)?;
    close("stats", &stats.finish()?, &expected_stats)?;
    let again = output(&before, call, |y| {
        backend.embedding_norm(call, &norm, &lookups, &tables, &affine, y, None)
    })?;
    same("y without stats, against y", &again, &y)
}

fn norm_gradients<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let rows = Rows::new(call);
    let mut shifted = Shifted::<T>::new(&rows, call, false);
    let (lookups, tables) = (rows.lookups(), shifted.tables());
    let Normed { norm, mut weight, .. } = Normed::new(call);
    let weight = &*weight.tensor();
    let dy = some_special::<T>(elements(call), call.shape.cols, 14);
    let affine = Affine { weight, bias: None };
    let (d, shape) = (&call.dropout, call.shape);
    let (_, stats) = oracle::embedding_norm(d, &norm, shape, &lookups, &tables, &affine);
    let stats: Vec<f32> = stats.iter().map(|stats| stats.value as f32).collect();
    let before = |len| values::<f32>(len, 15, false);
    let expected = oracle::embedding_norm_backward(
        d, &norm, shape, &lookups, &tables, weight, &stats, &dy, before,
    );
    let held = |len| Guarded::new(&before(len), call.offset);
    let mut gradients =
        expected.tables.each_ref().map(|table| table.as_ref().map(|table| held(table.len())));
    let with_norm = shape.rows % 4 != 3;
    let mut of_norm = [with_norm.then(|| held(shape.cols)), with_norm.then(|| held(shape.cols))];
    let [token, position, segment] = gradients.each_mut().map(|g| g.as_mut().map(Guarded::tensor));
    let [weight_gradient, bias] = of_norm.each_mut().map(|g| g.as_mut().map(Guarded::tensor));
    backend
        .embedding_norm_backward(
            call,
            &norm,
            &lookups,
            &tables,
            weight,
            &stats,
            &dy,
            Gradients { token, position, segment },
            NormGradients { weight: weight_gradient, bias },
        )
        .map_err(|error| error.to_string())?;
    for (gradient, expected) in gradients.into_iter().zip(&expected.tables) {
        let (Some(gradient), Some(expected)) = (gradient, expected) else { continue };
        close("a table's gradient", &gradient.finish()?, expected)?;
    }
    let [weight, bias] = of_norm;
    if let (Some(weight), Some(bias)) = (weight, bias) {
        close("the weight's gradient", &weight.finish()?, &expected.weight)?;
        same("the bias's gradient", &bias.finish()?, &expected.bias)?;
    }
    Ok(())
}

fn gradients<T: Dtype, B: Backend>(backend: &B, call: &Call) -> Result<(), String> {
    let rows = Rows::new(call);
    let lookups = rows.lookups();
    let dy = values::<T>(elements(call), 14, true);
    let mut shifted_dy = Guarded::new(&dy, call.offset);
    // What is there before is added to.
    let parts = [
        ("token gradient", Some(lookups.token)),
        ("position gradient", lookups.position),
        ("segment gradient", lookups.segment),
    ];
    let parts = parts.map(|(what, lookup)| {
        lookup.map(|lookup| {
            let before = values::<f32>(lookup.entries * call.shape.cols, 15, true);
            let (d, shape) = (&call.dropout, call.shape);
            let after = oracle::embedding_gradient(d, shape, &lookup, &dy, &before);
            (what, before, after)
        })
    });
    // All three, and one alone.
    for only in [None, Some(call.shape.rows % 3)] {
        let mut i = 0;
        let mut held = parts.each_ref().map(|part| {
            let wanted = only.is_none_or(|only| only == i);
            i += 1;
            part.as_ref()
                .filter(|_| wanted)
                .map(|(.., before, _)| Guarded::new(before, call.offset))
        });
        let [token, position, segment] = held.each_mut().map(|g| g.as_mut().map(Guarded::tensor));
        let gradients = Gradients { token, position, segment };
        backend
            .embedding_dropout_backward(call, &lookups, shifted_dy.tensor(), gradients)
            .map_err(|error| error.to_string())?;
        for (part, gradient) in parts.iter().zip(held) {
            let (Some((what, _, after)), Some(gradient)) = (part, gradient) else { continue };
            same(what, &gradient.finish()?, after)?;
        }
    }
    Ok(())
}
