//! What a backend of the models computes besides the crate's operators: matrix products, cross-entropy, the
//! gradient's norm, AdamW. One table of checks against f64; every backend is put through it: the CPU, and the
//! emulated kernels in f32, f16 and bf16 with several orders of their threads.
//!
//! u = 2^-24. Bounds are to first order, with a hundredth on top.

#![cfg(feature = "transformer")]

use fused_dropout::transformer::CpuBackend;
use fused_dropout::transformer::backend::{Backend, Element, Weight};
use fused_dropout::transformer::matmul::{Layout, MatMul};
use fused_dropout::{Dtype, DtypeId, Error, Shape};

const U: f64 = 1.0 / 16_777_216.0;

/// Results as bits, in the order of the checks: what must not depend on the order of threads.
pub(crate) type Trace = Vec<u32>;

pub(crate) fn check<B: Backend>(backend: &B) -> Trace {
    let mut trace = Trace::new();
    matmul(backend, &mut trace);
    cross_entropy(backend, &mut trace);
    accumulate(backend, &mut trace);
    cross_entropy_of_equals(backend);
    gradient_norm(backend, &mut trace);
    adamw(backend, &mut trace);
    adamw_of_several(backend);
    copies(backend);
    trace
}

#[test]
fn the_cpu() {
    assert!(!check(&CpuBackend::new()).is_empty());
}

/// Half a unit in the last place of T, relative, and absolute for subnormal results.
fn rounding<T: Dtype>() -> (f64, f64) {
    match T::ID {
        DtypeId::F32 => (U, 2f64.powi(-150)),
        DtypeId::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DtypeId::Bf16 => (2f64.powi(-8), 2f64.powi(-134)),
        other => unreachable!("{other:?} has no bound here"),
    }
}

/// Asserts that `given`, computed in f32 within `error` and stored as T, is `value`.
#[track_caller]
fn within<T: Dtype>(what: &str, given: T, value: f64, error: f64) {
    let (relative, absolute) = rounding::<T>();
    let (given, error) = (f64::from(given.to_f32()), 1.01 * error);
    let bound = error + (value.abs() + error) * relative + absolute;
    assert!((given - value).abs() <= bound, "{what}: {given:e}, not {value:e} within {bound:e}");
}

/// Values between -1 and 1 that T holds.
fn values<T: Dtype>(len: usize, salt: usize) -> Vec<T> {
    (0..len).map(|i| T::from_f32(((i * 7919 + salt * 104_729) as f32 * 0.37).sin())).collect()
}

fn wide<T: Dtype>(value: T) -> f64 {
    f64::from(value.to_f32())
}

fn keep<T: Dtype>(trace: &mut Trace, values: &[T]) {
    trace.extend(values.iter().map(|value| value.to_f32().to_bits()));
}

/// Two sequences of 5 tokens, three heads of 4: attention's layouts among others.
fn products() -> Vec<MatMul> {
    let one = [1, 1];
    let flat = |mnk: [usize; 3], add| {
        let [_, n, k] = mnk;
        let (a, b, c) = (Layout::rows(k), Layout::rows(n), Layout::rows(n));
        MatMul { mnk, batch: one, a, b, c, add }
    };
    let transposed = |mnk: [usize; 3], a: bool, b: bool, c: bool| {
        let [m, n, k] = mnk;
        let of = |turned: bool, rows: usize, cols: usize| match turned {
            true => Layout::rows(rows).transposed(),
            false => Layout::rows(cols),
        };
        MatMul { mnk, batch: one, a: of(a, m, k), b: of(b, k, n), c: of(c, m, n), add: false }
    };
    // q, k and v side by side in rows of 36 = 3 * 3 * 4, scores [2, 3, 5, 5].
    let of_qkv = |part: usize| Layout { offset: 12 * part, row: 36, col: 1, batch: [180, 4] };
    let scores = Layout { batch: [75, 25], ..Layout::rows(5) };
    let heads = Layout { batch: [60, 4], ..Layout::rows(12) };
    let (mut qk, mut pv) = (flat([5, 5, 4], false), flat([5, 4, 5], false));
    (qk.batch, qk.a, qk.b, qk.c) = ([2, 3], of_qkv(0), of_qkv(1).transposed(), scores);
    (pv.batch, pv.a, pv.b, pv.c) = ([2, 3], scores, of_qkv(2), heads);
    // The gradient of k: transposed scores, into its place between q and v, on top of what is there.
    let dk = MatMul {
        mnk: [5, 4, 5],
        a: scores.transposed(),
        b: of_qkv(0),
        c: of_qkv(1),
        add: true,
        ..qk
    };
    let mut all = vec![qk, pv, dk];
    for mnk in [[1, 1, 1], [3, 5, 7], [8, 1, 9], [1, 9, 4], [17, 33, 65], [4, 3, 0]] {
        all.extend([flat(mnk, false), flat(mnk, true)]);
        for turn in 1..8 {
            all.push(transposed(mnk, turn & 1 > 0, turn & 2 > 0, turn & 4 > 0));
        }
    }
    // One matrix b for the whole batch, and a batch of none.
    let mut shared = flat([2, 3, 4], false);
    (shared.batch, shared.a.batch, shared.c.batch) = ([3, 2], [16, 8], [12, 6]);
    all.extend([shared, MatMul { batch: [0, 5], ..shared }]);
    all
}

/// Where an element lies.
fn at(layout: &Layout, batch: [usize; 2], row: usize, col: usize) -> usize {
    let first = layout.offset + batch[0] * layout.batch[0] + batch[1] * layout.batch[1];
    first + row * layout.row + col * layout.col
}

/// A sum of k products in f32, in any order, is off by k roundings of its terms' sizes at most, and by one
/// more where it is added to something; 2u each, because a GPU's tensor cores cut off where they add.
fn matmul<B: Backend>(backend: &B, trace: &mut Trace) {
    for what in products() {
        let (a, b) = (values::<B::Elem>(2000, 1), values::<B::Elem>(3000, 2));
        let before = values::<B::Elem>(3000, 3);
        let before_f32: Vec<f32> = values(3000, 4);
        let (on_a, on_b) = (backend.upload(&a).unwrap(), backend.upload(&b).unwrap());
        let mut c = backend.upload(&before).unwrap();
        backend.matmul(&what, &on_a, &on_b, &mut c).unwrap();
        let c = backend.read(&c).unwrap();
        compare_product(&what, &a, &b, &before, &c);
        let mut c_f32 = backend.upload(&before_f32).unwrap();
        backend.matmul_f32(&what, &on_a, &on_b, &mut c_f32).unwrap();
        let c_f32 = backend.read(&c_f32).unwrap();
        compare_product(&what, &a, &b, &before_f32, &c_f32);
        keep(trace, &c);
        keep(trace, &c_f32);
    }
    refused_products(backend);
}

fn compare_product<T: Dtype, C: Dtype>(what: &MatMul, a: &[T], b: &[T], before: &[C], c: &[C]) {
    let [m, n, k] = what.mnk;
    let mut untouched: Vec<bool> = vec![true; c.len()];
    for batch in (0..what.batch[0]).flat_map(|o| (0..what.batch[1]).map(move |i| [o, i])) {
        for (row, col) in (0..m).flat_map(|row| (0..n).map(move |col| (row, col))) {
            let terms = (0..k)
                .map(|i| wide(a[at(&what.a, batch, row, i)]) * wide(b[at(&what.b, batch, i, col)]));
            let index = at(&what.c, batch, row, col);
            let old = if what.add { wide(before[index]) } else { 0.0 };
            let size = old.abs() + terms.clone().map(f64::abs).sum::<f64>();
            let error = (k + 1) as f64 * 2.0 * U * size;
            within(&format!("{what:?} at {row}, {col}"), c[index], old + terms.sum::<f64>(), error);
            untouched[index] = false;
        }
    }
    for (i, untouched) in untouched.into_iter().enumerate() {
        assert!(!untouched || c[i] == before[i], "{what:?} wrote to element {i}");
    }
}

fn refused_products<B: Backend>(backend: &B) {
    let a = backend.zeros(12).unwrap();
    let mut c = backend.zeros(9).unwrap();
    let rows = Layout::rows(3);
    let fits = MatMul { mnk: [3, 3, 3], batch: [1, 1], a: rows, b: rows, c: rows, add: false };
    backend.matmul(&fits, &a, &a, &mut c).unwrap();
    let wrong = [
        MatMul { a: Layout { offset: 4, ..rows }, ..fits },
        MatMul { b: Layout { row: usize::MAX, ..rows }, ..fits },
        MatMul { c: Layout { offset: 1, ..rows }, ..fits },
        MatMul { c: Layout { row: 2, ..rows }, ..fits },
        MatMul { batch: [2, 1], ..fits },
    ];
    for what in wrong {
        let error = backend.matmul(&what, &a, &a, &mut c).unwrap_err();
        assert!(matches!(error, Error::Argument { operator: "matmul", .. }), "{what:?}: {error}");
    }
}

/// With z = |x - max|, an exponential is within e = u z + 4u; a sum of n terms within (n / 16 + 20) u more on any
/// backend (the kernels': 8 terms a thread and round, 5 roundings across a warp, 12 across a block), so a probability P within
/// P (e + mean e + that + 3u), and the gradient two roundings further. The logarithm of the sum is off by the
/// sum's relative error, mean e + (n / 16 + 20) u, and the loss by 6 roundings of its parts' sizes.
fn cross_entropy<B: Backend>(backend: &B, trace: &mut Trace) {
    let shapes =
        [(3, 1), (5, 7), (9, 65), (4, 64), (300, 3), (2, 2100), (0, 5), (2, 2056), (3, 1000)];
    for (rows, cols) in shapes {
        let logits: Vec<B::Elem> = values(rows * cols, 5);
        let logits: Vec<_> =
            logits.iter().map(|x| B::Elem::from_f32(x.to_f32() * 9.0 + 3.0)).collect();
        let label = |row: usize| match row % 3 {
            1 => -100,
            _ => ((row * 31 + 3) % cols) as i32,
        };
        let labels: Vec<i32> = (0..rows).map(label).collect();
        let factor = 1.0 / rows.max(1) as f32;
        let mut gradient = backend.upload(&logits).unwrap();
        let mut loss = backend.upload(&[9.0f32]).unwrap();
        let on_labels = backend.upload(&labels).unwrap();
        let shape = Shape::new(rows, cols);
        let on_factor = backend.upload(&[factor]).unwrap();
        backend.cross_entropy(shape, &on_factor, &on_labels, &mut gradient, &mut loss).unwrap();
        let (gradient, loss) = (backend.read(&gradient).unwrap(), backend.read(&loss).unwrap());

        let (mut total, mut size, mut error) = (0.0, 0.0, 0.0);
        for (row, &label) in labels.iter().enumerate() {
            let x: Vec<f64> = logits[row * cols..][..cols].iter().map(|&x| wide(x)).collect();
            let of_row = &gradient[row * cols..][..cols];
            if label < 0 {
                assert!(of_row.iter().all(|g| g.to_f32().to_bits() == 0), "row {row} has no label");
                continue;
            }
            let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = x.iter().map(|x| (x - most).exp()).collect();
            let sum: f64 = e.iter().sum();
            let off = |c: usize| U * (most - x[c]) + 4.0 * U;
            let mean: f64 = (0..cols).map(|c| off(c) * e[c] / sum).sum();
            let of_sum = mean + ((cols.div_ceil(16) + 20) as f64) * U;
            for c in 0..cols {
                let p = e[c] / sum;
                let difference = p - f64::from(c == label as usize);
                let off = p * (off(c) + of_sum + 3.0 * U) + 2.0 * U * difference.abs();
                let factor = f64::from(factor);
                let name = format!("{rows} x {cols}, gradient {row}, {c}");
                within(&name, of_row[c], factor * difference, factor * off);
            }
            let parts = most.abs() + sum.ln() + x[label as usize].abs();
            error += of_sum + 6.0 * U * parts;
            total += sum.ln() + most - x[label as usize];
            size += (sum.ln() + most - x[label as usize]).abs();
        }
        let error = error + ((rows / 256 + 15) as f64) * U * size;
        let factor = f64::from(factor);
        within(&format!("{rows} x {cols}, loss"), loss[0], factor * total, factor * error);
        keep(trace, &gradient);
        keep(trace, &loss);
    }
}

/// Equal logits of any size have the loss ln n, and rows without labels +0. 4u of the logarithm's size.
fn cross_entropy_of_equals<B: Backend>(backend: &B) {
    let loss_of = |value: f32, label: i32| {
        let mut logits = backend.upload(&[B::Elem::from_f32(value); 10]).unwrap();
        let mut loss = backend.upload(&[9.0f32]).unwrap();
        let (factor, labels) = (backend.upload(&[1.0]).unwrap(), backend.upload(&[label]).unwrap());
        backend.cross_entropy(Shape::new(1, 10), &factor, &labels, &mut logits, &mut loss).unwrap();
        backend.read(&loss).unwrap()[0]
    };
    for value in [0.0, 1e4, -1e4, 6e4, 1e6, 1e8, -1e30, 3e38] {
        if B::Elem::from_f32(value).to_f32().is_finite() {
            within(&format!("loss of {value:e}"), loss_of(value, 3), 10f64.ln(), 10.0 * U);
        }
    }
    assert_eq!(loss_of(1.0, -100).to_bits(), 0, "the loss without labels is +0");
}

/// One sum in f32, rounded once: exact.
fn accumulate<B: Backend>(backend: &B, trace: &mut Trace) {
    for len in [0, 1, 1023, 1024, 2500] {
        let (from, to) = (values::<f32>(len, 6), values::<B::Elem>(len, 7));
        let mut sum = backend.upload(&to).unwrap();
        backend.accumulate(&backend.upload(&from).unwrap(), &mut sum).unwrap();
        let sum = backend.read(&sum).unwrap();
        for (i, (from, to)) in from.iter().zip(&to).enumerate() {
            let expected = B::Elem::from_f32(to.to_f32() + from);
            assert_eq!(sum[i], expected, "element {i} of {len}");
        }
        keep(trace, &sum);
        let short = backend.zeros(len + 1).unwrap();
        let mut to = backend.zeros(len).unwrap();
        let error = backend.accumulate(&short, &mut to).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "from", .. }), "{error}");
    }
}

/// Sums of squares are in f64; a part of the kernels' is rounded to f32, and so are the norm and what clips it.
fn gradient_norm<B: Backend>(backend: &B, trace: &mut Trace) {
    // More tensors than a launch takes, and empty ones among them and behind them.
    let many: Vec<usize> = (0..100).map(|i| if i % 47 > 40 { 0 } else { 7 * i }).collect();
    let cases: [&[usize]; 5] = [&[1], &[5, 0, 16_384, 16_385], &[40_000, 3], &[], &many];
    for lens in cases {
        for max_norm in [0.5f32, 1e6] {
            let grads: Vec<Vec<f32>> =
                lens.iter().enumerate().map(|(i, &len)| values(len, 8 + i)).collect();
            let square: f64 = grads.iter().flatten().map(|g| wide(*g) * wide(*g)).sum();
            let grads: Vec<_> = grads.iter().map(|g| backend.upload(g).unwrap()).collect();
            let mut norm = backend.upload(&[7.0f32; 2]).unwrap();
            backend.gradient_norm(&grads, max_norm, &mut norm).unwrap();
            let norm = backend.read(&norm).unwrap();
            let expected = square.sqrt();
            within(&format!("norm of {lens:?}"), norm[0], expected, 2.01 * U * expected);
            let factor = (f64::from(max_norm) / (expected + f64::from(1e-6f32))).min(1.0);
            within(&format!("factor of {lens:?}"), norm[1], factor, 3.01 * U * factor);
            keep(trace, &norm);
        }
    }
    let norm_of = |grads: &[f32]| {
        let grads = [backend.upload(grads).unwrap()];
        let mut norm = backend.zeros(2).unwrap();
        backend.gradient_norm(&grads, 1.0, &mut norm).unwrap();
        backend.read(&norm).unwrap()
    };
    // Squares beyond f32's range, at both of its ends.
    for value in [1e20f32, f32::MAX / 4.0, 1e-30] {
        let [norm, factor] = norm_of(&[value; 4])[..] else { panic!("two values") };
        within("norm", norm, 2.0 * wide(value), 4.02 * U * wide(value));
        let expected = (1.0 / (2.0 * wide(value) + 1e-6)).min(1.0);
        within("factor", factor, expected, 3.01 * U * expected);
    }
    let norm = norm_of(&[1.0, f32::NAN]);
    assert!(norm.iter().all(|value| value.is_nan()), "a NaN does not go unseen: {norm:?}");
    let norm = norm_of(&[1.0, f32::INFINITY]);
    assert!(norm[0].is_infinite() && norm[1].is_nan(), "nor does an infinity: {norm:?}");
    assert_eq!(norm_of(&[])[0].to_bits(), 0, "the norm of nothing is +0");
}

/// Four roundings of each term for m, six for v (whose terms have one sign); the root halves those, and with the
/// corrections, epsilon, the quotient and the rate the step has what m has and 9u; the decay three roundings and
/// the two differences one each.
fn adamw<B: Backend>(backend: &B, trace: &mut Trace) {
    let is_f32 = B::Elem::ID == DtypeId::F32;
    for (len, decay) in [(1, 0.1f32), (1025, 0.0), (3000, 0.1)] {
        let mut w: Vec<f32> = values(len, 20);
        let (mut m, mut v): (Vec<f32>, Vec<f32>) = (vec![0.0; len], vec![0.0; len]);
        let start: Vec<_> = w.iter().map(|&w| B::Elem::from_f32(w)).collect();
        let mut weight = backend.upload(&start).unwrap();
        let mut master = (!is_f32).then(|| backend.upload(&w).unwrap());
        let (mut on_m, mut on_v) = (backend.zeros(len).unwrap(), backend.zeros(len).unwrap());
        for step in 1..=3 {
            let (beta1, beta2) = (0.9f32, 0.99f32);
            let correction = |beta: f32| 1.0 / (1.0 - beta.powi(step));
            let numbers =
                [1e-2 / step as f32, beta1, beta2, 1e-8, correction(beta1), correction(beta2)];
            let norm = [3.0f32, 0.7];
            let grad: Vec<f32> = values(len, 30 + step as usize);
            let of_weight = Weight {
                weight: &mut weight,
                master: master.as_mut(),
                grad: &backend.upload(&grad).unwrap(),
                m: &mut on_m,
                v: &mut on_v,
                decay,
            };
            let (on_numbers, on_norm) =
                (backend.upload(&numbers).unwrap(), backend.upload(&norm).unwrap());
            backend.adamw(&on_numbers, &on_norm, vec![of_weight]).unwrap();
            let (new_m, new_v) = (backend.read(&on_m).unwrap(), backend.read(&on_v).unwrap());
            let rounded = backend.read(&weight).unwrap();
            let new_w: Vec<f32> = match &master {
                Some(master) => backend.read(master).unwrap(),
                None => rounded.iter().map(|w| w.to_f32()).collect(),
            };
            let [lr, beta1, beta2, epsilon, correction1, correction2] = numbers.map(f64::from);
            for i in 0..len {
                let g = wide(grad[i]) * wide(norm[1]);
                let [old, fresh] = [beta1 * wide(m[i]), (1.0 - beta1) * g];
                let m_error = 4.0 * U * (old.abs() + fresh.abs());
                let name = |what: &str| format!("{what}[{i}] of {len}, step {step}");
                within(&name("m"), new_m[i], old + fresh, m_error);
                let square = beta2 * wide(v[i]) + (1.0 - beta2) * g * g;
                within(&name("v"), new_v[i], square, 6.0 * U * square);
                let deviation = (square * correction2).sqrt() + epsilon;
                let change = lr * (old + fresh) * correction1 / deviation;
                let change_error = lr * m_error * correction1 / deviation + 9.0 * U * change.abs();
                let decayed = lr * f64::from(decay) * wide(w[i]);
                let value = wide(w[i]) - decayed - change;
                let error = change_error
                    + 3.0 * U * decayed.abs()
                    + U * (wide(w[i]) - decayed).abs()
                    + U * value.abs();
                within(&name("w"), new_w[i], value, error);
                assert_eq!(rounded[i], B::Elem::from_f32(new_w[i]), "{}", name("rounded w"));
            }
            keep(trace, &new_w);
            (w, m, v) = (new_w, new_m, new_v);
        }
    }
}

/// Weights that are moved together: each as it is alone, to the bit.
fn adamw_of_several<B: Backend>(backend: &B) {
    // More than a launch takes, and empty ones among them and behind them.
    let lens: Vec<usize> = (0..100).map(|i| if i % 49 > 45 { 0 } else { 31 * i }).collect();
    let numbers = backend.upload(&[1e-2f32, 0.9, 0.99, 1e-8, 10.0, 100.0]).unwrap();
    let norm = backend.upload(&[3.0f32, 0.7]).unwrap();
    let moved = |together: bool| -> Vec<Vec<B::Elem>> {
        let upload = |(i, &len): (usize, &usize)| {
            let values: Vec<f32> = values(len, i);
            let weight: Vec<_> = values.iter().map(|&w| B::Elem::from_f32(w)).collect();
            let all = [(); 4].map(|()| backend.upload(&values).unwrap());
            (backend.upload(&weight).unwrap(), all)
        };
        let mut all: Vec<_> = lens.iter().enumerate().map(upload).collect();
        let weights = all.iter_mut().enumerate().map(|(i, (weight, [master, grad, m, v]))| {
            let master = (B::Elem::ID != DtypeId::F32).then_some(master);
            Weight { weight, master, grad, m, v, decay: i as f32 / 100.0 }
        });
        match together {
            true => backend.adamw(&numbers, &norm, weights.collect()).unwrap(),
            false => {
                weights.for_each(|weight| backend.adamw(&numbers, &norm, vec![weight]).unwrap());
            }
        }
        all.iter().map(|(weight, _)| backend.read(weight).unwrap()).collect()
    };
    let (together, alone) = (moved(true), moved(false));
    for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
        let bits = |w: &B::Elem| w.to_f32().to_bits();
        assert!(together.iter().map(bits).eq(alone.iter().map(bits)), "weight {i}");
    }
}

fn copies<B: Backend>(backend: &B) {
    let mut buffer = backend.upload(&[1u32, 2, 3]).unwrap();
    backend.write(&mut buffer, &[7]).unwrap();
    assert_eq!(backend.read(&buffer).unwrap(), [7, 2, 3]);
    let error = backend.write(&mut buffer, &[0; 4]).unwrap_err();
    assert!(matches!(error, Error::Argument { operator: "write", .. }), "{error}");
    assert_eq!(backend.read(&buffer).unwrap(), [7, 2, 3]);
    backend.clear(&mut buffer).unwrap();
    assert_eq!(backend.read(&buffer).unwrap(), [0, 0, 0]);
    let three = backend.upload(&[9.0f32, 1.0, 2.0]).unwrap();
    let mut five = backend.zeros::<f32>(5).unwrap();
    backend.copy(&three, 1..3, &mut five, 2).unwrap();
    assert_eq!(backend.read(&five).unwrap(), [0.0, 0.0, 1.0, 2.0, 0.0]);
    backend.copy(&three, 3..3, &mut five, 5).unwrap();
    for (part, at) in [(1..3, 4), (1..3, usize::MAX), (2..4, 0), (0..usize::MAX, 0)] {
        let error = backend.copy(&three, part, &mut five, at).unwrap_err();
        assert!(matches!(error, Error::Argument { operator: "copy", .. }), "{error}");
    }
    assert_eq!(backend.read(&five).unwrap(), [0.0, 0.0, 1.0, 2.0, 0.0]);
    let empty: B::Buffer<f32> = backend.zeros(0).unwrap();
    assert!(backend.read(&empty).unwrap().is_empty());
    empty_twice::<B, i32>(backend);
}

fn empty_twice<B: Backend, E: Element + PartialEq + std::fmt::Debug>(backend: &B) {
    let mut empty = backend.upload::<E>(&[]).unwrap();
    backend.write(&mut empty, &[]).unwrap();
    backend.clear(&mut empty).unwrap();
    assert_eq!(backend.read(&empty).unwrap(), []);
}

#[cfg(feature = "emulator")]
mod emulated {
    use super::*;
    use fused_dropout::emulator::Emulator;
    use fused_dropout::ops::dropout;
    use fused_dropout::ops::embedding_dropout::{self, Ids, Lookup, Lookups, Tables};
    use fused_dropout::transformer::device::Accelerator;
    use fused_dropout::transformer::{Drops, Pass, Site};
    use fused_dropout::{Probability, Source};
    use half::{bf16, f16};

    fn backend<T: Dtype + Element>(order: u64) -> Accelerator<Emulator, T> {
        Accelerator::new(Emulator::new().order(order)).unwrap()
    }

    /// In every order of the threads the same bits.
    fn check_orders<T: Dtype + Element>() {
        let ascending = check(&backend::<T>(0));
        for order in [1, 2] {
            assert!(check(&backend::<T>(order)) == ascending, "{}: order {order}", T::NAME);
        }
    }

    #[test]
    fn f32() {
        check_orders::<f32>();
    }

    #[test]
    fn half_precision() {
        check_orders::<f16>();
    }

    #[test]
    fn bfloat16() {
        check_orders::<bf16>();
    }

    #[test]
    fn a_label_that_is_no_column_makes_the_loss_no_number() {
        let backend = backend::<f32>(0);
        let labels = backend.upload(&[1, 3, i32::MAX]).unwrap();
        let mut logits = backend.upload(&[0.0f32; 9]).unwrap();
        let mut loss = backend.zeros(1).unwrap();
        let factor = backend.upload(&[1.0]).unwrap();
        backend.cross_entropy(Shape::new(3, 3), &factor, &labels, &mut logits, &mut loss).unwrap();
        assert!(backend.read(&loss).unwrap()[0].is_nan());
        let gradient = backend.read(&logits).unwrap();
        assert!(gradient[0] > 0.3 && gradient[1] < -0.6);
        assert_eq!(gradient[3..], [0.0; 6]);
    }

    #[test]
    fn arguments_that_do_not_fit_are_refused() {
        let backend = backend::<bf16>(0);
        let (two, mut three) = (backend.zeros(2).unwrap(), backend.zeros(3).unwrap());
        let mut one = backend.zeros(1).unwrap();
        let mut logits = backend.zeros(6).unwrap();
        let labels = backend.zeros(2).unwrap();
        let shape = Shape::new(2, 3);
        let refused = |argument: &str, result: Result<(), Error>| match result {
            Err(Error::Argument { argument: given, .. }) if given == argument => {}
            other => panic!("{argument}: {other:?}"),
        };
        let (wide, factor) = (Shape::new(2, 4), backend.zeros(1).unwrap());
        refused("logits", backend.cross_entropy(wide, &factor, &labels, &mut logits, &mut one));
        let long = backend.zeros(3).unwrap();
        refused("labels", backend.cross_entropy(shape, &factor, &long, &mut logits, &mut one));
        refused("loss", backend.cross_entropy(shape, &factor, &labels, &mut logits, &mut three));
        refused("factor", backend.cross_entropy(shape, &two, &labels, &mut logits, &mut one));
        refused("norm", backend.gradient_norm(&[], 1.0, &mut three));

        let numbers = backend.zeros(6).unwrap();
        let (mut m, mut v) = (backend.zeros(3).unwrap(), backend.zeros(3).unwrap());
        let mut step = |numbers, grad, master: Option<usize>| {
            let (mut weight, mut master) =
                (backend.zeros(3)?, master.map(|len| backend.zeros(len)).transpose()?);
            let (weight, master) = (&mut weight, master.as_mut());
            let weight = Weight { weight, master, grad, m: &mut m, v: &mut v, decay: 0.0 };
            backend.adamw(numbers, &two, vec![weight])
        };
        let grad = backend.zeros(3).unwrap();
        refused("master", step(&numbers, &grad, None));
        refused("numbers", step(&two, &grad, Some(3)));
        refused("grad", step(&numbers, &two, Some(3)));
        refused("master", step(&numbers, &grad, Some(1)));
        step(&numbers, &grad, Some(3)).unwrap();
    }

    /// y = D(1) at a site of a layer.
    fn draw(
        backend: &Accelerator<Emulator, f32>,
        pass: Pass,
        layer: usize,
    ) -> Result<Vec<f32>, Error> {
        let drops = pass.at(layer, Site::Attention, 5, Probability::new(0.4)?);
        let (x, mut y) = (backend.upload(&[1.0; 100])?, backend.zeros(100)?);
        let x = Source::Tensor(&x as _);
        backend.run(drops, dropout::Forward { shape: Shape::new(5, 20), x, y: &mut y })?;
        backend.read(&y)
    }

    #[test]
    fn resident_stream_numbers_draw_the_masks_of_the_hosts() {
        let (host, resident) = (backend::<f32>(0), backend::<f32>(0));
        resident.resident(7).unwrap();
        let pass = |step| Pass::train(3, step);
        // More layers than there is room for at first.
        for layer in 0..300 {
            let (a, b) = (draw(&host, pass(7), layer), draw(&resident, pass(7), layer));
            assert_eq!(a, b, "layer {layer}");
        }
        let before = draw(&host, pass(7), 299).unwrap();
        for step in [8, 1 << 40] {
            resident.resident(step).unwrap();
            for layer in [0, 1, 299] {
                let drawn = draw(&resident, pass(step), layer);
                assert_eq!(drawn, draw(&host, pass(step), layer), "step {step}, layer {layer}");
                assert_ne!(drawn.unwrap(), before);
            }
        }
        // A micro-batch has the rows of its sequences.
        let micro = pass(1 << 40).from_sequence(1);
        let drawn = draw(&resident, micro, 1).unwrap();
        assert_eq!(drawn, draw(&host, micro, 1).unwrap());
        assert_ne!(drawn, draw(&host, pass(1 << 40), 1).unwrap());
        // An evaluation draws nothing and has no step.
        assert_eq!(draw(&resident, Pass::Evaluate, 0).unwrap(), [1.0; 100]);
    }

    #[test]
    fn a_step_that_the_device_is_not_at_is_refused() {
        let backend = backend::<f32>(0);
        let error = backend.resident(1 << 44).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "step", .. }), "{error}");
        backend.resident(1).unwrap();
        let error = draw(&backend, Pass::train(3, 2), 0).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "step", .. }), "{error}");
    }

    #[test]
    fn an_id_that_is_in_no_table_is_reported_once() {
        let backend = backend::<f32>(0);
        let table = backend.upload(&[1.0f32; 12]).unwrap();
        let mut y = backend.zeros::<f32>(8).unwrap();
        let mut embed = |ids: &[u32]| {
            let ids = backend.upload(ids).unwrap();
            let mut report = backend.report();
            let token = Lookup { entries: 3, ids: Ids::Given(&ids as _) };
            let pass = embedding_dropout::Forward {
                shape: Shape::new(2, 4),
                lookups: Lookups { token, position: None, segment: None },
                tables: Tables { token: &table as _, position: None, segment: None },
                y: &mut y,
                report: report.as_deref_mut().map(|report| report as _),
            };
            backend.run(Drops::Nothing, pass).unwrap();
            drop(report);
            backend.read(&y)
        };
        assert_eq!(embed(&[0, 2]).unwrap(), [1.0; 8]);
        let error = embed(&[0, 3]).unwrap_err();
        assert!(matches!(error, Error::Argument { argument: "lookups", .. }), "{error}");
        assert!(error.to_string().contains("row 1"), "{error}");
        assert_eq!(embed(&[1, 1]).unwrap(), [1.0; 8]);
        assert!(backend.check().is_ok());
    }
}
