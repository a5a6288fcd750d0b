//! Reductions over a row in f32, in an order that is the same for every vector width.

/// Partial results of a reduction over a row.
pub(super) const LANES: usize = 16;

/// The largest value, NaNs left out; -infinity of nothing.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (best, &value) in best.iter_mut().zip(chunk) {
            *best = if value > *best { value } else { *best };
        }
    }
    best.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// The sum of `term(a, b)` over two rows of the same length.
#[inline(always)]
pub(super) fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let [sum] = sums(a, b, |a, b| [term(a, b)]);
    sum
}

/// The sums of `terms(a, b)` over two rows of the same length: [`LANES`] running sums of each, and a tree over them.
#[inline(always)]
pub(super) fn sums<const N: usize>(
    a: &[f32],
    b: &[f32],
    terms: impl Fn(f32, f32) -> [f32; N],
) -> [f32; N] {
    let mut sums = [[0.0f32; LANES]; N];
    let mut add = |l: usize, a: f32, b: f32| {
        let terms = terms(a, b);
        (0..N).for_each(|n| sums[n][l] += terms[n]);
    };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        (0..LANES).for_each(|l| add(l, a[l], b[l]));
    }
    // Otherwise the compiler pairs the sums as the tree below does, and shuffles in the loop above.
    let mut sums = std::hint::black_box(sums);
    for (l, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        let terms = terms(a, b);
        (0..N).for_each(|n| sums[n][l] += terms[n]);
    }
    sums.map(tree)
}

#[inline(always)]
fn tree(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}
