//! The frame of the operators that take a tensor element by element: pieces for the threads, blocks of
//! random lanes, and one way out.

use super::octets::{self, Segment};
use super::split::Line;
use super::{Cpu, split};
use crate::dtype::Dtype;
use crate::ops::sum_rows::TILE_ROWS;
use crate::ops::{MaskParams, Shape};
use crate::tensor::Sum;
use rayon::prelude::*;
use std::ops::Range;

/// One pass over tensors of a shape.
pub(super) struct Stream<'a, T> {
    pub cpu: Cpu,
    pub draw: &'a MaskParams<'a>,
    pub shape: Shape,
    /// What is read beside the output: asked for ahead of its use.
    pub inputs: [Option<&'a [T]>; 2],
    /// Whether the output is read too.
    pub in_place: bool,
}

/// f32 values of a block, aligned to a cache line.
#[repr(align(64))]
pub(super) struct Block(pub [f32; octets::ELEMENTS]);

impl Block {
    #[inline(always)]
    pub fn new() -> Self {
        Self([0.0; octets::ELEMENTS])
    }
}

impl<T: Dtype> Stream<'_, T> {
    /// Gives every piece of a row, with its lanes and what `out` holds there, to `body`, and rounds the
    /// values that it computes into `out`. `body` must be `#[inline(always)]`, and so compiled for the
    /// level.
    pub fn run(&self, out: &mut [T], body: impl Fn(&Segment, &[u16], &[T], &mut [f32]) + Sync) {
        let before = |octet| octets::first_element(self.shape, octet);
        let streaming = self.streaming(out);
        split::pieces(self.shape, out, before, |range, out| {
            self.piece(
                range,
                Some(out),
                streaming,
                #[inline(always)]
                |segment, lanes, out, values| body(segment, lanes, out, values),
            );
        });
    }

    /// [`run`](Self::run), where there is an output, and the sum over the rows of what `body` adds to the columns of
    /// its segment (its last argument), times `factor`, in the order of [`crate::ops::sum_rows`].
    pub fn run_and_sum(
        &self,
        out: Option<&mut [T]>,
        sum: Sum<'_, Cpu>,
        factor: f32,
        body: impl Fn(&Segment, &[u16], &[T], &mut [f32], &mut [f32]) + Sync,
    ) {
        let cols = self.shape.cols;
        if cols == 0 {
            return;
        }
        let octets_a_tile = TILE_ROWS * octets::count(Shape { rows: 1, cols });
        let end = octets::count(self.shape);
        let streaming = out.as_deref().and_then(|out| self.streaming(out));
        let mut sums = vec![0.0f32; self.shape.rows.div_ceil(TILE_ROWS) * cols];
        let outs = split::optional_chunks(out, TILE_ROWS * cols, sums.len() / cols);
        let tiles = outs.into_par_iter().zip(sums.par_chunks_mut(cols));
        tiles.enumerate().for_each(|(tile, (out, sums))| {
            let range = tile * octets_a_tile..((tile + 1) * octets_a_tile).min(end);
            self.piece(
                range,
                out,
                streaming,
                #[inline(always)]
                |segment, lanes, out, values| {
                    let sums = &mut sums[segment.col..segment.col + values.len()];
                    body(segment, lanes, out, values, sums);
                },
            );
        });
        sum.finish(sums, factor);
    }

    /// Octets `range`, whose elements `out` holds, where there is an output.
    #[inline]
    fn piece(
        &self,
        range: Range<usize>,
        mut out: Option<&mut [T]>,
        streaming: Option<Line>,
        mut body: impl FnMut(&Segment, &[u16], &[T], &mut [f32]),
    ) {
        let base = octets::first_element(self.shape, range.start);
        self.cpu.vectorised(
            #[inline(always)]
            || {
                let (mut block, mut filled) = (Block::new(), 0);
                octets::walk(
                    self.draw,
                    self.shape,
                    range,
                    #[inline(always)]
                    |elements| {
                        let inputs = self.inputs.into_iter().flatten();
                        inputs.for_each(|input| split::prefetch(input, elements.clone()));
                    },
                    #[inline(always)]
                    |segment, lanes| {
                        let values = &mut block.0[filled..filled + lanes.len()];
                        let elements = segment.elements.start - base..segment.elements.end - base;
                        let before = out.as_deref().map_or(&[][..], |out| &out[elements.clone()]);
                        body(&segment, lanes, before, values);
                        filled += lanes.len();
                        // Not each segment: a line that two of them share is read before it is written.
                        if segment.last {
                            if let Some(out) = out.as_deref_mut() {
                                let written = elements.end - filled..elements.end;
                                split::emit(&block.0[..filled], &mut out[written], streaming);
                            }
                            filled = 0;
                        }
                    },
                );
                split::fence();
            },
        );
    }

    fn streaming(&self, out: &[T]) -> Option<Line> {
        split::streaming(self.cpu, out).filter(|_| !self.in_place)
    }
}
