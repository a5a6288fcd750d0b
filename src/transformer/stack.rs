//! The blocks of a model behind each other: what GPT and BERT have in common above a block.

use super::backend::{Act, Backend};
use super::block::{Activations, Block, Boundary, Context, Scratch};
use super::params::Grads;
use crate::error::Error;

/// Memory for a pass through the blocks with batches of one shape. Kept from step to step: nothing is allocated in one.
pub(crate) struct Stack<B: Backend> {
    /// What enters block l, and behind the last block what leaves it.
    boundaries: Vec<Boundary<B>>,
    /// Of each block; or of one at a time, where blocks are computed again in the backward pass.
    activations: Vec<Activations<B>>,
    pub scratch: Scratch<B>,
}

impl<B: Backend> Stack<B> {
    /// With `recompute` the memory of one block in place of all of them: activation checkpointing.
    pub fn new(
        backend: &B,
        blocks: &[Block],
        batch: usize,
        length: usize,
        recompute: bool,
    ) -> Result<Self, Error> {
        let block = &blocks[0];
        let (rows, width) = (batch * length, block.out.outputs);
        let boundary = |_| Boundary::new(backend, rows, width);
        let activations = if recompute { 1 } else { blocks.len() };
        Ok(Self {
            boundaries: (0..=blocks.len()).map(boundary).collect::<Result<_, _>>()?,
            activations: (0..activations)
                .map(|_| Activations::new(backend, block, batch, length))
                .collect::<Result<_, _>>()?,
            scratch: Scratch::new(backend, block, batch, length)?,
        })
    }

    /// Refuses memory of a model with another number of blocks.
    pub fn check(&self, model: &'static str, blocks: usize) -> Result<(), Error> {
        let given = self.boundaries.len() - 1;
        if given == blocks {
            return Ok(());
        }
        Err(Error::argument(model, "run", format!("memory of {blocks} blocks"), given))
    }

    /// What enters the first block.
    pub fn input(&mut self) -> &mut Boundary<B> {
        &mut self.boundaries[0]
    }

    /// What enters the first block, and memory of `[rows, width]` to compute it.
    pub fn input_and_scratch(&mut self) -> (&mut Boundary<B>, &mut Scratch<B>) {
        (&mut self.boundaries[0], &mut self.scratch)
    }

    /// a behind the last block, and where its gradient belongs.
    pub fn output(&mut self) -> (&Act<B>, &mut Scratch<B>) {
        (&self.boundaries[self.boundaries.len() - 1].a, &mut self.scratch)
    }

    /// Through all blocks.
    pub fn forward(&mut self, cx: &Context<'_, B>, blocks: &[Block]) -> Result<(), Error> {
        (0..blocks.len()).try_for_each(|l| self.block_forward(cx, blocks, l))
    }

    /// Back through all blocks, with the gradients of the output's a and s in `scratch` on entry and those of the
    /// input's at the end.
    pub fn backward(
        &mut self,
        cx: &Context<'_, B>,
        blocks: &[Block],
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        for (l, block) in blocks.iter().enumerate().rev() {
            // The last block's activations are there still.
            if self.activations.len() < blocks.len() && l + 1 < blocks.len() {
                self.block_forward(cx, blocks, l)?;
            }
            let index = l.min(self.activations.len() - 1);
            let (activations, scratch) = (&mut self.activations[index], &mut self.scratch);
            let (input, output) = (&self.boundaries[l], &self.boundaries[l + 1]);
            block.backward(cx, input, activations, output, scratch, grads)?;
        }
        Ok(())
    }

    fn block_forward(
        &mut self,
        cx: &Context<'_, B>,
        blocks: &[Block],
        l: usize,
    ) -> Result<(), Error> {
        let index = l.min(self.activations.len() - 1);
        let (before, behind) = self.boundaries.split_at_mut(l + 1);
        let (input, output) = (&before[l], &mut behind[0]);
        blocks[l].forward(cx, input, &mut self.activations[index], &mut self.scratch, output)
    }
}
