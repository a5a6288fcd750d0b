//! The frame of the operators that take a tensor element by element: pieces for the threads, blocks of
//! random lanes, and one way out.

use super::octets::{self, Segment};
use super::split::{Line, Part};
use super::sum_rows::close_run;
use super::{Cpu, split};
use crate::dtype::Dtype;
use crate::ops::sum_rows::{RUN_ROWS, TILE_ROWS};
use crate::ops::{MaskParams, Shape};
use crate::tensor::{Matrix, Sum};
use rayon::prelude::*;
use std::ops::Range;

/// One pass over tensors of a shape.
pub(super) struct Stream<'a, T> {
    pub cpu: Cpu,
    pub params: &'a MaskParams<'a>,
    pub shape: Shape,
    /// What is read beside the output: asked for ahead of its use.
    pub inputs: [Option<Matrix<&'a [T]>>; 2],
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
    pub fn run(
        &self,
        out: Matrix<&mut [T]>,
        body: impl Fn(&Segment, &[u16], &[T], &mut [f32]) + Sync,
    ) {
        let streaming = self.streaming();
        split::pieces(self.shape, Part::whole(out), |range, out| {
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
        out: Option<Matrix<&mut [T]>>,
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
        let streaming = self.streaming();
        let mut sums = vec![0.0f32; self.shape.rows.div_ceil(TILE_ROWS) * cols];
        let outs = split::optional_rows(out, TILE_ROWS, sums.len() / cols);
        let tiles = outs.into_par_iter().zip(sums.par_chunks_mut(cols));
        tiles.enumerate().for_each_init(
            || vec![0.0f32; cols],
            |of_run, (tile, (out, of_tile))| {
                let mut run = tile * TILE_ROWS / RUN_ROWS;
                self.piece(
                    tile * octets_a_tile..((tile + 1) * octets_a_tile).min(end),
                    out,
                    streaming,
                    #[inline(always)]
                    |segment, lanes, out, values| {
                        if segment.row / RUN_ROWS != run {
                            run = segment.row / RUN_ROWS;
                            close_run(of_tile, of_run);
                        }
                        body(segment, lanes, out, values, &mut of_run[segment.cols.clone()]);
                    },
                );
                close_run(of_tile, of_run);
            },
        );
        sum.finish(sums, factor);
    }

    /// Octets `range`, whose elements `out` holds, where there is an output.
    #[inline]
    fn piece(
        &self,
        range: Range<usize>,
        mut out: Option<Part<'_, T>>,
        streaming: Option<Line>,
        mut body: impl FnMut(&Segment, &[u16], &[T], &mut [f32]),
    ) {
        let strided = out.as_ref().is_some_and(|out| out.stride != self.shape.cols);
        self.cpu.vectorised(
            #[inline(always)]
            || {
                let (mut block, mut filled) = (Block::new(), 0);
                octets::walk(
                    self.params,
                    self.shape,
                    range,
                    #[inline(always)]
                    |block| {
                        let inputs = self.inputs.into_iter().flatten();
                        inputs.for_each(|input| input.prefetch(&block));
                    },
                    #[inline(always)]
                    |segment, lanes| {
                        let values = &mut block.0[filled..filled + lanes.len()];
                        let before = out.as_ref().map_or(&[][..], |out| out.at(&segment));
                        body(&segment, lanes, before, values);
                        filled += lanes.len();
                        // Not each segment, where rows follow each other: a line that two of them share is read before it
                        // is written.
                        if segment.last || strided {
                            if let Some(out) = &mut out {
                                let written = out.up_to(&segment, filled);
                                split::emit(&block.0[..filled], written, streaming);
                            }
                            filled = 0;
                        }
                    },
                );
                split::fence();
            },
        );
    }

    fn streaming(&self) -> Option<Line> {
        split::streaming::<T>(self.cpu, self.shape).filter(|_| !self.in_place)
    }
}
