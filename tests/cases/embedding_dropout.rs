//! `embedding_dropout`: the checks of a row of the table.

use super::*;
use crate::oracle;
use fused_dropout::ops::embedding_dropout::{
    Backward, BackwardNorm, Forward, ForwardNorm, Gradients, Ids, Lookup, Lookups, Tables,
    check_report,
};
use fused_dropout::{Norm, Writable};

pub fn check<T: Dtype, B: TestBackend>(backend: &B, call: &Call, tally: &mut Tally) {
    tally.count::<T, B>(backend, "embedding_dropout", call, forward::<T, B>(backend, call));
    tally.count::<T, B>(
        backend,
        "embedding_dropout gradients",
        call,
        gradients::<T, B>(backend, call),
    );
    tally.count::<T, B>(backend, "embedding_dropout with norm", call, norm::<T, B>(backend, call));
    let result = norm_gradients::<T, B>(backend, call);
    tally.count::<T, B>(backend, "embedding_dropout with norm, gradients", call, result);
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
}

/// The tables of a case.
struct Data<T>([Option<Vec<T>>; 3]);

impl<T: Dtype> Data<T> {
    fn new(lookups: &Lookups<&[u32]>, cols: usize, specials: bool) -> Self {
        let mut salt = 10;
        Self([Some(lookups.token), lookups.position, lookups.segment].map(|lookup| {
            salt += 1;
            let len = lookup?.entries * cols;
            Some(match specials {
                true => values::<T>(len, salt, true),
                false => some_special::<T>(len, cols, salt),
            })
        }))
    }

    fn tables(&self) -> Tables<&[T]> {
        let [token, position, segment] = self.0.each_ref().map(|table| table.as_deref());
        Tables { token: token.expect("there are always tokens"), position, segment }
    }
}

/// Ids and tables on a backend.
struct There<B: TestBackend, T: Dtype> {
    ids: [Option<B::Tensor<u32>>; 3],
    tables: [Option<B::Tensor<T>>; 3],
}

impl<B: TestBackend, T: Dtype> There<B, T> {
    fn new(backend: &B, call: &Call, lookups: &Lookups<&[u32]>, data: &Data<T>) -> Self {
        let ids = [Some(lookups.token), lookups.position, lookups.segment].map(|lookup| {
            match lookup?.ids {
                Ids::Given(ids) => Some(backend.tensor(ids, call.offset)),
                Ids::Sequence(_) => None,
            }
        });
        let table = |table: &Vec<T>| backend.tensor(table, call.offset);
        Self { ids, tables: data.0.each_ref().map(|data| data.as_ref().map(table)) }
    }

    fn lookups(&self, of: &Lookups<&[u32]>) -> Lookups<In<'_, u32, B::Backend>> {
        let lookup = |i: usize, lookup: Lookup<&[u32]>| Lookup {
            entries: lookup.entries,
            ids: match (lookup.ids, &self.ids[i]) {
                (Ids::Sequence(length), _) => Ids::Sequence(length),
                (Ids::Given(_), ids) => Ids::Given(ids.as_ref().expect("ids that are given") as _),
            },
        };
        Lookups {
            token: lookup(0, of.token),
            position: of.position.map(|position| lookup(1, position)),
            segment: of.segment.map(|segment| lookup(2, segment)),
        }
    }

    fn tables(&self) -> Tables<In<'_, T, B::Backend>> {
        let [token, position, segment] = self.tables.each_ref().map(given);
        Tables { token: token.expect("there are always tokens"), position, segment }
    }
}

fn forward<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let rows = Rows::new(call);
    let lookups = rows.lookups();
    let data = Data::<T>::new(&lookups, call.shape.cols, true);
    let expected = oracle::embedding_dropout(&call.dropout, call.shape, &lookups, &data.tables());
    let there = There::new(backend, call, &lookups, &data);
    let mut y = backend.tensor(&vec![T::from_f32(5.0); expected.len()], call.offset);
    let mut report = backend.tensor(&[u32::MAX], 0);
    let pass = Forward {
        shape: call.shape,
        lookups: there.lookups(&lookups),
        tables: there.tables(),
        y: &mut y,
        report: Some(&mut report),
    };
    backend.run(call, pass)?;
    check_report(backend.contents(&report)?[0]).map_err(|error| error.to_string())?;
    same("y", &backend.contents(&y)?, &expected)
}

/// The case's norm; its weight and, for some, its bias.
struct Normed<T> {
    norm: Norm,
    weight: Vec<T>,
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
        Self { norm, weight: parameter(16), bias }
    }
}

fn norm<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let (rows, shape) = (Rows::new(call), call.shape);
    let lookups = rows.lookups();
    let data = Data::<T>::new(&lookups, shape.cols, false);
    let Normed { norm, weight, bias } = Normed::new(call);
    let affine = oracle::Affine { weight: &weight, bias: bias.as_deref() };
    let tables = data.tables();
    let (expected, expected_stats) =
        oracle::embedding_norm(&call.dropout, &norm, shape, &lookups, &tables, &affine);
    let there = There::new(backend, call, &lookups, &data);
    let weight = backend.tensor(&weight, call.offset);
    let bias = bias.map(|bias| backend.tensor(&bias, call.offset));
    let run = |with_stats: bool| {
        let mut y = backend.tensor(&vec![T::from_f32(5.0); expected.len()], call.offset);
        let mut stats = backend.tensor(&vec![9.0f32; 2 * shape.rows], 0);
        let mut report = backend.tensor(&[u32::MAX], 0);
        let pass = ForwardNorm {
            shape,
            norm,
            lookups: there.lookups(&lookups),
            tables: there.tables(),
            weight: &weight,
            norm_bias: given(&bias),
            y: &mut y,
            stats: with_stats.then_some(&mut stats as _),
            // One of the two calls does without.
            report: with_stats.then_some(&mut report as _),
        };
        backend.run(call, pass)?;
        check_report(backend.contents(&report)?[0]).map_err(|error| error.to_string())?;
        Ok::<_, String>((backend.contents(&y)?, backend.contents(&stats)?))
    };
    let (y, stats) = run(true)?;
    close("y", &y, &expected)?;
    close("stats", &stats, &expected_stats)?;
    let (again, _) = run(false)?;
    same("y without stats, against y", &again, &y)
}

/// Whether the gradients of a call are added to what is there, or written.
fn adds(call: &Call) -> bool {
    call.dropout.key.seed.is_multiple_of(2)
}

/// A gradient that is may be asked for, added to what is there or written.
fn asked<M: Memory>(
    tensor: &mut Option<impl Writable<f32, M>>,
    adds: bool,
) -> Option<Gradient<'_, M>> {
    tensor.as_mut().map(|tensor| if adds { Gradient::Add(tensor) } else { Gradient::Write(tensor) })
}

fn norm_gradients<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let (rows, shape, d) = (Rows::new(call), call.shape, &call.dropout);
    let lookups = rows.lookups();
    let data = Data::<T>::new(&lookups, shape.cols, false);
    let Normed { norm, weight, .. } = Normed::new(call);
    let dy = some_special::<T>(elements(call), shape.cols, 14);
    let affine = oracle::Affine { weight: &weight, bias: None };
    let tables = data.tables();
    let (_, stats) = oracle::embedding_norm(d, &norm, shape, &lookups, &tables, &affine);
    let stats: Vec<f32> = stats.iter().map(|stats| stats.value as f32).collect();
    let before = |len| values::<f32>(len, 15, false);
    let there = There::new(backend, call, &lookups, &data);
    let (weight_there, stats_there) =
        (backend.tensor(&weight, call.offset), backend.tensor(&stats, 0));
    let dy_there = backend.tensor(&dy, call.offset);
    let with_norm = shape.rows % 4 != 3;
    let adds = adds(call);
    let expected = oracle::embedding_norm_backward(
        d,
        &norm,
        shape,
        &lookups,
        &tables,
        &weight,
        &stats,
        &dy,
        |len| if adds { before(len) } else { vec![0.0; len] },
    );
    let held = |len| backend.tensor(&before(len), call.offset);
    let mut gradients =
        expected.tables.each_ref().map(|table| table.as_ref().map(|table| held(table.len())));
    let mut of_norm = [with_norm.then(|| held(shape.cols)), with_norm.then(|| held(shape.cols))];
    let [token, position, segment] = gradients.each_mut().map(|held| asked(held, adds));
    let [dweight, dnorm_bias] = of_norm.each_mut().map(|held| asked(held, adds));
    let pass = BackwardNorm {
        shape,
        norm,
        lookups: there.lookups(&lookups),
        tables: there.tables(),
        weight: &weight_there,
        stats: &stats_there,
        dy: &dy_there,
        gradients: Gradients { token, position, segment },
        dweight,
        dnorm_bias,
    };
    backend.run(call, pass)?;
    for (gradient, expected) in gradients.iter().zip(&expected.tables) {
        let (Some(gradient), Some(expected)) = (gradient, expected) else { continue };
        close("a table's gradient", &backend.contents(gradient)?, expected)?;
    }
    if let [Some(dweight), Some(dnorm_bias)] = &of_norm {
        close("dweight", &backend.contents(dweight)?, &expected.weight)?;
        same("dnorm_bias", &backend.contents(dnorm_bias)?, &expected.bias)?;
    }
    Ok(())
}

fn gradients<T: Dtype, B: TestBackend>(backend: &B, call: &Call) -> Result<(), String> {
    let (rows, shape, d) = (Rows::new(call), call.shape, &call.dropout);
    let lookups = rows.lookups();
    let data = Data::<T>([None, None, None]);
    let there = There::new(backend, call, &lookups, &data);
    let dy = values::<T>(elements(call), 14, true);
    let dy_there = backend.tensor(&dy, call.offset);
    let parts = [
        ("token gradient", Some(lookups.token)),
        ("position gradient", lookups.position),
        ("segment gradient", lookups.segment),
    ];
    // All three, and one of them alone.
    let adds = adds(call);
    for (only, adds) in [(None, adds), (Some(shape.rows % 3), !adds)] {
        let wanted = |i: usize| only.is_none_or(|only| only == i);
        let before = |i: usize| {
            let lookup = parts[i].1.filter(|_| wanted(i))?;
            Some(values::<f32>(lookup.entries * shape.cols, 15, true))
        };
        let before: [Option<Vec<f32>>; 3] = std::array::from_fn(before);
        let mut held =
            before.each_ref().map(|before| before.as_ref().map(|b| backend.tensor(b, call.offset)));
        let [token, position, segment] = held.each_mut().map(|held| asked(held, adds));
        let pass = Backward {
            shape,
            lookups: there.lookups(&lookups),
            dy: &dy_there,
            gradients: Gradients { token, position, segment },
        };
        backend.run(call, pass)?;
        for ((what, lookup), (before, held)) in parts.iter().zip(before.iter().zip(&held)) {
            let (Some(lookup), Some(before), Some(held)) = (lookup, before, held) else { continue };
            let zeros = vec![0.0; before.len()];
            let before = if adds { before } else { &zeros };
            let after = oracle::embedding_gradient(d, shape, lookup, &dy, before);
            same(what, &backend.contents(held)?, &after)?;
        }
    }
    Ok(())
}
