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

/// The sum of `term(a, b)` over two rows of the same length: [`LANES`] running sums, and a tree over them.
#[inline(always)]
pub(super) fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for l in 0..LANES {
            sums[l] += term(a[l], b[l]);
        }
    }
    // Otherwise the compiler pairs the sums as the tree below does, and shuffles in the loop above.
    let mut sums = std::hint::black_box(sums);
    for (l, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        sums[l] += term(a, b);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            sums[l] += sums[l + width];
        }
        width /= 2;
    }
    sums[0]
}
