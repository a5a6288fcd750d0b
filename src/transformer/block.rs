//! A transformer's block, attention and feed-forward part, forward and backward, pre-norm and post-norm.
//!
//! Both forms are the same two branches, each closed by one fused operator:
//!
//! ```text
//! s1 = residual + D(attention(a)),  a1 = norm1(s1)
//! s2 = residual1 + D(mlp(a1)),      a2 = norm2(s2)
//! ```
//!
//! Pre-norm (GPT): the residuals are the sums s and s1, and norm2 is the norm in front of whatever follows:
//! the next block's first, or the model's last. Post-norm (BERT): the residuals are a and a1.

use super::backend::{Act, Backend, F32, U32};
use super::matmul::{Layout, MatMul};
use super::params::{Grads, Id, Init, Params, Specs};
use super::streams::{Drops, Pass, Site};
use crate::error::Error;
use crate::mask::Probability;
use crate::ops::dropout_add_norm::Saved;
use crate::ops::softmax_dropout::{self, Mask, STATISTICS};
use crate::ops::{Shape, bias_act_dropout, dropout_add, dropout_add_norm};
use crate::tensor::Source;
use crate::{Activation, AttentionMask, Norm, Scores};

/// x += bias, in every row: the bias of a projection that no operator follows.
pub(crate) fn add_bias<B: Backend>(
    backend: &B,
    shape: Shape,
    x: &mut Act<B>,
    bias: &Act<B>,
) -> Result<(), Error> {
    let pass = bias_act_dropout::Forward {
        shape,
        activation: Activation::Identity,
        x: Source::InPlace,
        bias: Some(bias),
        y: x,
    };
    backend.run(Drops::Nothing, pass)
}

/// The gradient of such a bias: dy summed over the rows.
pub(crate) fn bias_grad<B: Backend>(
    backend: &B,
    shape: Shape,
    dy: &Act<B>,
    bias: Id,
    grads: &mut Grads<B>,
) -> Result<(), Error> {
    let dbias = Some(grads.gradient(bias));
    let pass = dropout_add::Backward { shape, dy: Source::Tensor(dy), dx: None, dbias };
    backend.run(Drops::Nothing, pass)
}

/// y = x · W, with W `[inputs, outputs]` (`input_major`, as in GPT-2) or `[outputs, inputs]`. The bias belongs to
/// the operator that follows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Linear {
    pub weight: Id,
    pub bias: Id,
    pub inputs: usize,
    pub outputs: usize,
    pub input_major: bool,
}

impl Linear {
    /// The weight as `[inputs, outputs]`.
    fn layout(&self) -> Layout {
        match self.input_major {
            true => Layout::rows(self.outputs),
            false => Layout::rows(self.inputs).transposed(),
        }
    }

    /// y = x · W.
    pub fn forward<B: Backend>(
        &self,
        backend: &B,
        rows: usize,
        params: &Params<B>,
        x: &Act<B>,
        y: &mut Act<B>,
    ) -> Result<(), Error> {
        let what = MatMul {
            mnk: [rows, self.outputs, self.inputs],
            batch: [1, 1],
            a: Layout::rows(self.inputs),
            b: self.layout(),
            c: Layout::rows(self.outputs),
            add: false,
        };
        backend.matmul(&what, x, &params[self.weight], y)
    }

    /// dW = xᵀ · dy, written or added, and dx = dy · Wᵀ or dx += dy · Wᵀ.
    #[expect(clippy::too_many_arguments)] // the tensors of a product and its gradients
    pub fn backward<B: Backend>(
        &self,
        backend: &B,
        rows: usize,
        params: &Params<B>,
        x: &Act<B>,
        dy: &Act<B>,
        dx: &mut Act<B>,
        add: bool,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let gradient = MatMul {
            mnk: [self.inputs, self.outputs, rows],
            batch: [1, 1],
            a: Layout::rows(self.inputs).transposed(),
            b: Layout::rows(self.outputs),
            c: self.layout(),
            add: grads.adds(),
        };
        backend.matmul_f32(&gradient, x, dy, &mut grads[self.weight])?;
        let through = MatMul {
            mnk: [rows, self.inputs, self.outputs],
            batch: [1, 1],
            a: Layout::rows(self.outputs),
            b: self.layout().transposed(),
            c: Layout::rows(self.inputs),
            add,
        };
        backend.matmul(&through, dy, &params[self.weight], dx)
    }
}

/// A norm's parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormIds {
    pub weight: Id,
    pub bias: Id,
}

impl NormIds {
    pub fn add(specs: &mut Specs, name: &str, width: usize) -> Self {
        Self {
            weight: specs.add(format!("{name}.weight"), &[width], Init::Ones),
            bias: specs.add(format!("{name}.bias"), &[width], Init::Zeros),
        }
    }
}

/// a = norm(s) of a boundary: `dropout_add_norm` with a branch that is dropped as a whole.
pub(crate) fn norm<B: Backend>(
    cx: &Context<'_, B>,
    norm: &Norm,
    shape: Shape,
    ids: NormIds,
    boundary: &mut Boundary<B>,
) -> Result<(), Error> {
    let Boundary { s, a, stats } = boundary;
    let pass = dropout_add_norm::Forward {
        shape,
        norm: *norm,
        x: s,
        bias: None,
        residual: Source::Tensor(s),
        weight: &cx.params[ids.weight],
        norm_bias: Some(&cx.params[ids.bias]),
        s: None,
        y: a,
        stats: Some(stats),
    };
    cx.backend.run(Drops::Everything, pass)
}

/// A block of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    /// Its number for the streams, from 1.
    pub layer: usize,
    pub pre_norm: bool,
    pub heads: usize,
    /// Query, key and value together: `3 · width` outputs.
    pub qkv: Linear,
    pub out: Linear,
    pub norm1: NormIds,
    pub up: Linear,
    pub activation: Activation,
    pub down: Linear,
    pub norm2: NormIds,
    pub norm: Norm,
    pub attention_p: Probability,
    pub residual_p: Probability,
}

/// What a batch of sequences is to attention.
pub(crate) struct Sequences<B: Backend> {
    pub batch: usize,
    pub length: usize,
    pub causal: bool,
    /// The keys that each row of the scores sees, where sequences are padded at their end.
    pub lengths: Option<U32<B>>,
    /// -infinity at padded keys, where they lie elsewhere.
    pub additive: Option<Act<B>>,
}

impl<B: Backend> Sequences<B> {
    pub fn rows(&self) -> usize {
        self.batch * self.length
    }

    fn mask(&self) -> Mask<'_, B::Elem, B::Memory> {
        AttentionMask {
            causal: self.causal.then_some(0),
            lengths: self.lengths.as_ref().map(|lengths| lengths as _),
            additive: self.additive.as_ref().map(|additive| additive as _),
        }
    }
}

/// What flows from one block to the next: a, which is normed, and the sum s under it with the norm's statistics.
/// `[rows, width]`, `[rows, 2]`.
pub(crate) struct Boundary<B: Backend> {
    pub s: Act<B>,
    pub a: Act<B>,
    pub stats: F32<B>,
}

impl<B: Backend> Boundary<B> {
    pub fn new(backend: &B, rows: usize, width: usize) -> Result<Self, Error> {
        Ok(Self {
            s: backend.zeros(rows * width)?,
            a: backend.zeros(rows * width)?,
            stats: backend.zeros(2 * rows)?,
        })
    }
}

/// What the backward pass of a block needs of its forward pass.
pub(crate) struct Activations<B: Backend> {
    qkv: Act<B>,
    /// Before the softmax, and after it and its dropout: `[batch, heads, length, length]`.
    scores: Act<B>,
    probs: Act<B>,
    statistics: F32<B>,
    context: Act<B>,
    middle: Boundary<B>,
    /// Before the activation and its bias, and after.
    up: Act<B>,
    active: Act<B>,
}

impl<B: Backend> Activations<B> {
    pub fn new(backend: &B, block: &Block, batch: usize, length: usize) -> Result<Self, Error> {
        let rows = batch * length;
        let (width, score_rows) = (block.out.outputs, rows * block.heads);
        Ok(Self {
            qkv: backend.zeros(rows * block.qkv.outputs)?,
            scores: backend.zeros(score_rows * length)?,
            probs: backend.zeros(score_rows * length)?,
            statistics: backend.zeros(score_rows * STATISTICS)?,
            context: backend.zeros(rows * width)?,
            middle: Boundary::new(backend, rows, width)?,
            up: backend.zeros(rows * block.up.outputs)?,
            active: backend.zeros(rows * block.up.outputs)?,
        })
    }
}

/// Memory that the passes through all blocks share.
pub(crate) struct Scratch<B: Backend> {
    /// A branch before its dropout, `[rows, width]`; in the backward pass its gradient.
    pub branch: Act<B>,
    /// Gradients of a and s of the boundary that was reached, `[rows, width]`.
    pub da: Act<B>,
    pub ds: Act<B>,
    /// Where the gradient of a residual is written.
    pub dresidual: Act<B>,
    /// Gradients within a block.
    dup: Act<B>,
    dqkv: Act<B>,
    dprobs: Act<B>,
}

impl<B: Backend> Scratch<B> {
    pub fn new(backend: &B, block: &Block, batch: usize, length: usize) -> Result<Self, Error> {
        let rows = batch * length;
        let wide = || backend.zeros(rows * block.out.outputs);
        Ok(Self {
            branch: wide()?,
            da: wide()?,
            ds: wide()?,
            dresidual: wide()?,
            dup: backend.zeros(rows * block.up.outputs)?,
            dqkv: backend.zeros(rows * block.qkv.outputs)?,
            dprobs: backend.zeros(rows * block.heads * length)?,
        })
    }
}

/// A pass over one batch.
pub(crate) struct Context<'a, B: Backend> {
    pub backend: &'a B,
    pub params: &'a Params<B>,
    pub sequences: &'a Sequences<B>,
    pub pass: Pass,
}

impl Block {
    /// a2 and s2 from a and s, and what the backward pass needs.
    pub fn forward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        input: &Boundary<B>,
        saved: &mut Activations<B>,
        scratch: &mut Scratch<B>,
        output: &mut Boundary<B>,
    ) -> Result<(), Error> {
        self.attention(cx, &input.a, saved, &mut scratch.branch)?;
        let residual = if self.pre_norm { &input.s } else { &input.a };
        let (site, end) = (Site::AttentionOutput, (self.out.bias, self.norm1));
        self.close(cx, site, end, &scratch.branch, residual, &mut saved.middle)?;
        self.mlp(cx, saved, &mut scratch.branch)?;
        let middle = &saved.middle;
        let residual = if self.pre_norm { &middle.s } else { &middle.a };
        let (site, end) = (Site::MlpOutput, (self.down.bias, self.norm2));
        self.close(cx, site, end, &scratch.branch, residual, output)
    }

    /// Gradients of the block's parameters, and in `scratch` those of a and s: on entry of a2 and s2, at the end of
    /// the input. (Post-norm models have no gradient of s.)
    pub fn backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        input: &Boundary<B>,
        saved: &mut Activations<B>,
        output: &Boundary<B>,
        scratch: &mut Scratch<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let end = (self.down.bias, self.norm2);
        self.open(cx, Site::MlpOutput, end, output, scratch, grads)?;
        self.mlp_backward(cx, saved, scratch, grads)?;
        let end = (self.out.bias, self.norm1);
        self.open(cx, Site::AttentionOutput, end, &saved.middle, scratch, grads)?;
        self.attention_backward(cx, &input.a, saved, scratch, grads)
    }

    /// s = residual + D(branch + bias), a = norm(s).
    fn close<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        site: Site,
        (bias, norm): (Id, NormIds),
        branch: &Act<B>,
        residual: &Act<B>,
        to: &mut Boundary<B>,
    ) -> Result<(), Error> {
        let pass = dropout_add_norm::Forward {
            shape: self.shape(cx),
            norm: self.norm,
            x: branch,
            bias: Some(&cx.params[bias]),
            residual: Source::Tensor(residual),
            weight: &cx.params[norm.weight],
            norm_bias: Some(&cx.params[norm.bias]),
            s: Some(&mut to.s),
            y: &mut to.a,
            stats: Some(&mut to.stats),
        };
        cx.backend.run(self.residual_drops(cx, site), pass)
    }

    /// From the gradients of a and s at `from`: that of the branch, and that of its residual, which in a pre-norm
    /// model is the new gradient of s, in a post-norm one the first part of that of a.
    fn open<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        site: Site,
        (bias, norm): (Id, NormIds),
        from: &Boundary<B>,
        scratch: &mut Scratch<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let [dbias, dweight, dnorm_bias] = grads.gradients([bias, norm.weight, norm.bias]);
        let ds = self.pre_norm.then_some(&scratch.ds);
        let pass = dropout_add_norm::Backward {
            shape: self.shape(cx),
            norm: self.norm,
            saved: Saved::Sum(&from.s),
            weight: &cx.params[norm.weight],
            stats: &from.stats,
            dy: &scratch.da,
            ds: ds.map(|ds| ds as _),
            dresidual: &mut scratch.dresidual,
            dx: &mut scratch.branch,
            dbias: Some(dbias),
            dweight: Some(dweight),
            dnorm_bias: Some(dnorm_bias),
        };
        cx.backend.run(self.residual_drops(cx, site), pass)?;
        let to = if self.pre_norm { &mut scratch.ds } else { &mut scratch.da };
        std::mem::swap(to, &mut scratch.dresidual);
        Ok(())
    }

    /// The feed-forward part up to its last bias: act(a1 · W + b) · W.
    fn mlp<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        saved: &mut Activations<B>,
        branch: &mut Act<B>,
    ) -> Result<(), Error> {
        let rows = cx.sequences.rows();
        self.up.forward(cx.backend, rows, cx.params, &saved.middle.a, &mut saved.up)?;
        let pass = bias_act_dropout::Forward {
            shape: Shape::new(rows, self.up.outputs),
            activation: self.activation,
            x: Source::Tensor(&saved.up),
            bias: Some(&cx.params[self.up.bias]),
            y: &mut saved.active,
        };
        cx.backend.run(Drops::Nothing, pass)?;
        self.down.forward(cx.backend, rows, cx.params, &saved.active, branch)
    }

    fn mlp_backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        saved: &Activations<B>,
        scratch: &mut Scratch<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let rows = cx.sequences.rows();
        let Scratch { branch, da, dup, .. } = scratch;
        self.down.backward(
            cx.backend,
            rows,
            cx.params,
            &saved.active,
            branch,
            dup,
            false,
            grads,
        )?;
        let pass = bias_act_dropout::Backward {
            shape: Shape::new(rows, self.up.outputs),
            activation: self.activation,
            x: &saved.up,
            bias: Some(&cx.params[self.up.bias]),
            dy: Source::InPlace,
            dx: dup,
            dbias: Some(grads.gradient(self.up.bias)),
        };
        cx.backend.run(Drops::Nothing, pass)?;
        let add = !self.pre_norm;
        self.up.backward(cx.backend, rows, cx.params, &saved.middle.a, dup, da, add, grads)
    }

    /// Attention up to its last bias: D(softmax(q · kᵀ / √d)) · v · W.
    fn attention<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        a: &Act<B>,
        saved: &mut Activations<B>,
        branch: &mut Act<B>,
    ) -> Result<(), Error> {
        let rows = cx.sequences.rows();
        let Activations { qkv, scores, probs, statistics, context, .. } = saved;
        self.qkv.forward(cx.backend, rows, cx.params, a, qkv)?;
        let wide = Shape::new(rows, self.qkv.outputs);
        add_bias(cx.backend, wide, qkv, &cx.params[self.qkv.bias])?;
        let Heads { q, k, v, square, merged } = self.layouts(cx.sequences);
        // q, k and v lie in one buffer; the product reads it twice.
        cx.backend.matmul(&self.square_of(cx, q, k.transposed()), qkv, qkv, scores)?;
        let pass = softmax_dropout::Forward {
            scores: self.scores(cx),
            mask: cx.sequences.mask(),
            x: Source::Tensor(scores),
            y: probs,
            statistics: Some(statistics),
        };
        cx.backend.run(self.attention_drops(cx), pass)?;
        cx.backend.matmul(&self.of_square(cx, square, v, merged), probs, qkv, context)?;
        self.out.forward(cx.backend, rows, cx.params, context, branch)
    }

    /// From the gradient of the branch to that of a.
    fn attention_backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        a: &Act<B>,
        saved: &mut Activations<B>,
        scratch: &mut Scratch<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let rows = cx.sequences.rows();
        let Activations { qkv, scores, probs, statistics, context, .. } = saved;
        let Scratch { branch, da, dqkv, dprobs, dresidual, .. } = scratch;
        let Heads { q, k, v, square, merged } = self.layouts(cx.sequences);
        // dresidual is free until the next norm.
        let dcontext = dresidual;
        self.out.backward(cx.backend, rows, cx.params, context, branch, dcontext, false, grads)?;
        cx.backend.matmul(&self.square_of(cx, merged, v.transposed()), dcontext, qkv, dprobs)?;
        cx.backend.matmul(
            &self.of_square(cx, square.transposed(), merged, v),
            probs,
            dcontext,
            dqkv,
        )?;
        let pass = softmax_dropout::Backward {
            scores: self.scores(cx),
            mask: cx.sequences.mask(),
            x: scores,
            statistics: Some(statistics),
            dy: Source::InPlace,
            dx: dprobs,
        };
        cx.backend.run(self.attention_drops(cx), pass)?;
        let dscores = dprobs;
        cx.backend.matmul(&self.of_square(cx, square, k, q), dscores, qkv, dqkv)?;
        cx.backend.matmul(&self.of_square(cx, square.transposed(), q, k), dscores, qkv, dqkv)?;
        let wide = Shape::new(rows, self.qkv.outputs);
        bias_grad(cx.backend, wide, dqkv, self.qkv.bias, grads)?;
        let add = !self.pre_norm;
        self.qkv.backward(cx.backend, rows, cx.params, a, dqkv, da, add, grads)
    }

    fn residual_drops<B: Backend>(&self, cx: &Context<'_, B>, site: Site) -> Drops {
        cx.pass.at(self.layer, site, cx.sequences.length, self.residual_p)
    }

    fn attention_drops<B: Backend>(&self, cx: &Context<'_, B>) -> Drops {
        let rows = self.heads * cx.sequences.length;
        cx.pass.at(self.layer, Site::Attention, rows, self.attention_p)
    }

    fn shape<B: Backend>(&self, cx: &Context<'_, B>) -> Shape {
        Shape::new(cx.sequences.rows(), self.out.outputs)
    }

    fn head_width(&self) -> usize {
        self.out.inputs / self.heads
    }

    fn scores<B: Backend>(&self, cx: &Context<'_, B>) -> Scores {
        Scores {
            batch: cx.sequences.batch,
            heads: self.heads,
            queries: cx.sequences.length,
            keys: cx.sequences.length,
            scale: 1.0 / (self.head_width() as f32).sqrt(),
        }
    }

    /// Where each head's matrices lie.
    fn layouts<B: Backend>(&self, sequences: &Sequences<B>) -> Heads {
        let (length, width, head) = (sequences.length, self.out.inputs, self.head_width());
        let part =
            |row: usize, offset: usize| Layout { offset, row, col: 1, batch: [length * row, head] };
        let square = length * length;
        Heads {
            q: part(3 * width, 0),
            k: part(3 * width, width),
            v: part(3 * width, 2 * width),
            square: Layout { batch: [self.heads * square, square], ..Layout::rows(length) },
            merged: part(width, 0),
        }
    }

    /// Every head's product into its square of scores: the sums run over the head's width.
    fn square_of<B: Backend>(&self, cx: &Context<'_, B>, a: Layout, b: Layout) -> MatMul {
        let length = cx.sequences.length;
        let c = self.layouts(cx.sequences).square;
        let batch = [cx.sequences.batch, self.heads];
        MatMul { mnk: [length, length, self.head_width()], batch, a, b, c, add: false }
    }

    /// Every head's product from its square of scores: the sums run over the square.
    fn of_square<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        square: Layout,
        b: Layout,
        c: Layout,
    ) -> MatMul {
        let length = cx.sequences.length;
        let batch = [cx.sequences.batch, self.heads];
        MatMul { mnk: [length, self.head_width(), length], batch, a: square, b, c, add: false }
    }
}

/// Where the matrices of attention's heads lie: query, key and value, `[length, head width]` of the common buffer;
/// scores or probabilities, `[length, length]`; and the heads' results beside each other.
struct Heads {
    q: Layout,
    k: Layout,
    v: Layout,
    square: Layout,
    merged: Layout,
}
