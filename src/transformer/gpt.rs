//! GPT-2: pre-norm, causal, output weights tied to the token embeddings; as a language model, and with the
//! sequence summary and its multiple-choice head beside that (GPT2DoubleHeadsModel).
//!
//! Where it drops: after the embeddings (`embd_pdrop`), attention probabilities (`attn_pdrop`), both residual branches
//! (`resid_pdrop`), and before the summary's projection (`summary_first_dropout`).

use super::backend::{Act, Backend, F32, U32};
use super::block::{Block, Context, Linear, NormIds, Sequences, norm};
use super::check::{check_below, check_size, check_tokens, mean_factor};
use super::config::GptConfig;
use super::matmul::{Layout, MatMul};
use super::params::{Grads, Id, Init, Params, Specs};
use super::stack::Stack;
use super::streams::{Drops, Pass, Site};
use crate::Norm;
use crate::error::Error;
use crate::ops::dropout_add_norm::Saved;
use crate::ops::embedding_dropout::{Gradients, Ids, Lookups, Tables};
use crate::ops::{Shape, bias_act_dropout, check_len, dropout_add_norm, embedding_dropout};
use crate::tensor::{Gradient, In, Source};

/// A GPT-2: its configuration and the names and shapes of its tensors. Weights and memory are arguments.
#[derive(Clone, Debug)]
pub struct Gpt {
    config: GptConfig,
    specs: Specs,
    token: Id,
    position: Id,
    first_norm: NormIds,
    blocks: Vec<Block>,
    /// The projection of the sequence summary, in a model with two heads.
    summary: Option<Linear>,
}

/// A label that stands for none.
pub const IGNORED: i32 = -100;

/// Sequences of one length on a backend, and what is to be predicted.
pub struct GptBatch<B: Backend> {
    ids: U32<B>,
    /// The token to predict at each position; negative: none.
    labels: B::Buffer<i32>,
    /// 1 / the positions that have a label.
    factor: F32<B>,
    choice: Option<Choice<B>>,
}

/// What the multiple-choice head is given.
struct Choice<B: Backend> {
    /// The row of each sequence that is summed up.
    rows: U32<B>,
    /// The right one of each group of sequences.
    labels: B::Buffer<i32>,
    groups: usize,
    /// 1 / the groups that have a label.
    factor: F32<B>,
}

/// Sequences and labels on the host. `rows = sequences · length`.
#[derive(Clone, Copy, Debug)]
pub struct GptInput<'a> {
    /// `[sequences, length]`.
    pub ids: &'a [u32],
    /// The token to predict at each position, negative for none: `[sequences, length]`. [`shifted`] makes
    /// them of ids.
    pub labels: &'a [i32],
    /// For a model with two heads: the token of each sequence that sums it up, `[sequences]`, and the number of the
    /// right sequence of each group of choices, `[groups]`.
    pub choice: Option<(&'a [u32], &'a [i32])>,
}

/// Memory for steps with batches of one shape.
pub struct GptRun<B: Backend> {
    sequences: Sequences<B>,
    stack: Stack<B>,
    /// After the forward pass the logits, `[rows, vocab_size]`; after the loss their gradient.
    logits: Act<B>,
    loss: F32<B>,
    summary: Option<Summary<B>>,
}

/// Memory of the sequence summary.
struct Summary<B: Backend> {
    /// What is summed up, after its dropout: `[sequences, n_embd]`.
    taken: Act<B>,
    projected: Act<B>,
    /// The logits, `[sequences]`, then their gradient.
    logits: Act<B>,
    loss: F32<B>,
    /// Gradients: of `taken`, and of all rows.
    dtaken: Act<B>,
    drows: F32<B>,
}

/// Losses of a step, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptLoss {
    /// Mean cross-entropy of the predicted tokens.
    pub tokens: f32,
    /// Mean cross-entropy of the choices, in a model with two heads.
    pub choices: Option<f32>,
}

impl GptLoss {
    /// What is minimised: the sum.
    pub fn total(&self) -> f32 {
        self.tokens + self.choices.unwrap_or(0.0)
    }
}

/// The labels of a language model: each position predicts the next token of its sequence, the last none.
pub fn shifted(ids: &[u32], length: usize) -> Vec<i32> {
    let next = |sequence: &[u32]| {
        let next = sequence[1..].iter().map(|&id| id as i32);
        next.chain([IGNORED]).collect::<Vec<_>>()
    };
    ids.chunks(length.max(1)).flat_map(next).collect()
}

impl Gpt {
    /// A language model; with `double_heads` also the sequence summary, which has one output, as in the library: it
    /// scores a choice, and `num_labels` says nothing about it.
    ///
    /// # Errors
    /// [`Error::Setting`] where the configuration's sizes do not fit each other.
    pub fn new(config: GptConfig, double_heads: bool) -> Result<Self, Error> {
        config.check()?;
        let mut specs = Specs::of("transformer.");
        let width = config.n_embd;
        let normal = Init::Normal(config.initializer_range);
        // The ends of the residual branches start smaller, so that the sum of all of them does not grow with their
        // number (Radford et al., 2019).
        let end = Init::Normal(config.initializer_range / (2.0 * config.n_layer as f32).sqrt());
        let token = specs.add("transformer.wte.weight".into(), &[config.vocab_size, width], normal);
        specs.alias("lm_head.weight", "transformer.wte.weight");
        let position =
            specs.add("transformer.wpe.weight".into(), &[config.n_positions, width], normal);
        let mut norms = Vec::new();
        let mut parts = Vec::new();
        for l in 0..config.n_layer {
            let name = |part: &str| format!("transformer.h.{l}.{part}");
            specs.constant(name("attn.bias"));
            specs.constant(name("attn.masked_bias"));
            norms.push(NormIds::add(&mut specs, &name("ln_1"), width));
            let mut linear = |part: &str, inputs, outputs, init| Linear {
                weight: specs.add(name(&format!("{part}.weight")), &[inputs, outputs], init),
                bias: specs.add(name(&format!("{part}.bias")), &[outputs], Init::Zeros),
                inputs,
                outputs,
                input_major: true,
            };
            let qkv = linear("attn.c_attn", width, 3 * width, normal);
            let out = linear("attn.c_proj", width, width, end);
            let up = linear("mlp.c_fc", width, config.n_inner, normal);
            let down = linear("mlp.c_proj", config.n_inner, width, end);
            parts.push((qkv, out, NormIds::add(&mut specs, &name("ln_2"), width), up, down));
        }
        norms.push(NormIds::add(&mut specs, "transformer.ln_f", width));
        specs.begin_head();
        let mut head = |part: &str, shape: &[usize], init| {
            specs.add(format!("multiple_choice_head.summary.{part}"), shape, init)
        };
        let summary = double_heads.then(|| Linear {
            weight: head("weight", &[1, width], normal),
            bias: head("bias", &[1], Init::Zeros),
            inputs: width,
            outputs: 1,
            input_major: false,
        });
        let block = |(l, (qkv, out, norm1, up, down))| Block {
            layer: l + 1,
            pre_norm: true,
            heads: config.n_head,
            qkv,
            out,
            norm1,
            up,
            activation: config.activation_function,
            down,
            norm2: norms[l + 1],
            norm: Norm::layer(config.layer_norm_epsilon),
            attention_p: config.attn_pdrop,
            residual_p: config.resid_pdrop,
        };
        let blocks = parts.into_iter().enumerate().map(block).collect();
        let first_norm = norms[0];
        Ok(Self { config, specs, token, position, first_norm, blocks, summary })
    }

    /// The configuration.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }

    /// The tensors.
    pub fn specs(&self) -> &Specs {
        &self.specs
    }

    /// Memory for `batch` sequences of `length` tokens. With `recompute` the backward pass computes each block again in
    /// place of keeping its activations (activation checkpointing): less memory, the same bits.
    ///
    /// # Errors
    /// [`Error::Argument`] where `length` exceeds the positions; what the backend says.
    pub fn run<B: Backend>(
        &self,
        backend: &B,
        batch: usize,
        length: usize,
        recompute: bool,
    ) -> Result<GptRun<B>, Error> {
        let GptConfig { vocab_size, n_positions, n_embd, n_inner, n_head, .. } = self.config;
        let widest = vocab_size.max(3 * n_embd).max(n_inner);
        check_size("gpt", [batch, length], n_positions, widest, n_head)?;
        let rows = batch * length;
        let summary = match &self.summary {
            Some(linear) => Some(Summary {
                taken: backend.zeros(batch * linear.inputs)?,
                projected: backend.zeros(batch * linear.outputs)?,
                logits: backend.zeros(batch * linear.outputs)?,
                loss: backend.zeros(1)?,
                dtaken: backend.zeros(batch * linear.inputs)?,
                drows: backend.zeros(rows * linear.inputs)?,
            }),
            None => None,
        };
        Ok(GptRun {
            sequences: Sequences { batch, length, causal: true, lengths: None, additive: None },
            stack: Stack::new(backend, &self.blocks, batch, length, recompute)?,
            logits: backend.zeros(rows * self.config.vocab_size)?,
            loss: backend.zeros(1)?,
            summary,
        })
    }

    /// Puts a batch on a backend.
    ///
    /// # Errors
    /// [`Error::Argument`] where a length does not fit or a token or label is out of range.
    pub fn batch<B: Backend>(
        &self,
        backend: &B,
        run: &GptRun<B>,
        input: &GptInput<'_>,
    ) -> Result<GptBatch<B>, Error> {
        let (rows, vocab) = (run.sequences.rows(), self.config.vocab_size);
        check_tokens("gpt", rows, vocab, input.ids, input.labels)?;
        Ok(GptBatch {
            ids: backend.upload(input.ids)?,
            labels: backend.upload(input.labels)?,
            factor: backend.upload(&[mean_factor(input.labels)])?,
            choice: self.choice(backend, run, input)?,
        })
    }

    /// What the multiple-choice head is given, where there is one.
    fn choice<B: Backend>(
        &self,
        backend: &B,
        run: &GptRun<B>,
        input: &GptInput<'_>,
    ) -> Result<Option<Choice<B>>, Error> {
        let (linear, tokens, labels) = match (&self.summary, input.choice) {
            (Some(linear), Some((tokens, labels))) => (linear, tokens, labels),
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(Error::argument("gpt", "choice", "a choice", "none")),
            (None, Some(_)) => return Err(Error::argument("gpt", "choice", "none", "a choice")),
        };
        let Sequences { batch, length, .. } = run.sequences;
        check_len("gpt", "summary tokens", batch, tokens.len())?;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= length) {
            return Err(Error::argument("gpt", "summary tokens", format!("below {length}"), token));
        }
        let outputs = batch * linear.outputs;
        if labels.is_empty() || !outputs.is_multiple_of(labels.len()) {
            let expected = format!("a divisor of the {outputs} logits");
            return Err(Error::argument("gpt", "choice labels", expected, labels.len()));
        }
        check_below("gpt", "choice labels", outputs / labels.len(), labels)?;
        let rows: Vec<u32> = tokens
            .iter()
            .zip(0..)
            .map(|(token, sequence)| sequence * length as u32 + token)
            .collect();
        Ok(Some(Choice {
            rows: backend.upload(&rows)?,
            labels: backend.upload(labels)?,
            groups: labels.len(),
            factor: backend.upload(&[mean_factor(labels)])?,
        }))
    }

    /// Replaces the tokens and labels of a batch, in its memory: for a captured graph too. It is then a batch of its own.
    ///
    /// # Errors
    /// As [`batch`](Self::batch); the batch is untouched then.
    pub fn refill<B: Backend>(
        &self,
        backend: &B,
        run: &GptRun<B>,
        batch: &mut GptBatch<B>,
        ids: &[u32],
        labels: &[i32],
    ) -> Result<(), Error> {
        check_tokens("gpt", run.sequences.rows(), self.config.vocab_size, ids, labels)?;
        backend.write(&mut batch.ids, ids)?;
        backend.write(&mut batch.labels, labels)?;
        backend.write(&mut batch.factor, &[mean_factor(labels)])
    }

    /// The logits of every position, and of the summary, in the memory of `run`.
    ///
    /// # Errors
    /// What the operators or the backend say.
    pub fn forward<B: Backend>(
        &self,
        backend: &B,
        params: &Params<B>,
        run: &mut GptRun<B>,
        batch: &GptBatch<B>,
        pass: Pass,
    ) -> Result<(), Error> {
        self.check(params.lens(), run, batch)?;
        let cx = Context { backend, params, sequences: &run.sequences, pass };
        self.embed(&cx, &mut run.stack, batch)?;
        run.stack.forward(&cx, &self.blocks)?;
        let (a, _) = run.stack.output();
        backend.matmul(
            &self.head(run.sequences.rows()),
            a,
            &params[self.token],
            &mut run.logits,
        )?;
        if let (Some(linear), Some(memory), Some(choice)) =
            (&self.summary, &mut run.summary, &batch.choice)
        {
            self.summarise(&cx, linear, a, choice, memory)?;
        }
        Ok(())
    }

    /// The losses of the last forward pass, whose logits become their gradients.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn loss<B: Backend>(
        &self,
        backend: &B,
        run: &mut GptRun<B>,
        batch: &GptBatch<B>,
    ) -> Result<(), Error> {
        let shape = Shape::new(run.sequences.rows(), self.config.vocab_size);
        backend.cross_entropy(
            shape,
            &batch.factor,
            &batch.labels,
            &mut run.logits,
            &mut run.loss,
        )?;
        if let (Some(linear), Some(memory), Some(choice)) =
            (&self.summary, &mut run.summary, &batch.choice)
        {
            let groups = choice.groups;
            let shape = Shape::new(groups, run.sequences.batch * linear.outputs / groups);
            let (labels, logits) = (&choice.labels, &mut memory.logits);
            backend.cross_entropy(shape, &choice.factor, labels, logits, &mut memory.loss)?;
        }
        Ok(())
    }

    /// The gradients of all weights, after [`forward`](Self::forward) and [`loss`](Self::loss) of the same pass.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<B: Backend>(
        &self,
        backend: &B,
        params: &Params<B>,
        run: &mut GptRun<B>,
        batch: &GptBatch<B>,
        pass: Pass,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        self.check(params.lens(), run, batch)?;
        self.specs.check("gpt", "grads", grads.lens())?;
        let cx = Context { backend, params, sequences: &run.sequences, pass };
        let rows = run.sequences.rows();
        let (vocab, width) = (self.config.vocab_size, self.config.n_embd);
        let (a, scratch) = run.stack.output();
        let table = MatMul {
            mnk: [vocab, width, rows],
            batch: [1, 1],
            a: Layout::rows(vocab).transposed(),
            b: Layout::rows(width),
            c: Layout::rows(width),
            add: grads.adds(),
        };
        backend.matmul_f32(&table, &run.logits, a, &mut grads[self.token])?;
        let through = MatMul {
            mnk: [rows, width, vocab],
            a: Layout::rows(vocab),
            b: Layout::rows(width),
            add: false,
            ..table
        };
        backend.matmul(&through, &run.logits, &params[self.token], &mut scratch.da)?;
        // Nothing but the last norm reads the last sum.
        backend.clear(&mut scratch.ds)?;
        if let (Some(linear), Some(memory), Some(choice)) =
            (&self.summary, &mut run.summary, &batch.choice)
        {
            self.summarise_backward(&cx, linear, choice, memory, &mut scratch.da, grads)?;
        }
        run.stack.backward(&cx, &self.blocks, grads)?;
        self.embed_backward(&cx, &mut run.stack, batch, grads)
    }

    /// Refuses weights, memory and batches of another model.
    fn check<B: Backend>(
        &self,
        params: &[usize],
        run: &GptRun<B>,
        batch: &GptBatch<B>,
    ) -> Result<(), Error> {
        self.specs.check("gpt", "params", params)?;
        run.stack.check("gpt", self.blocks.len())?;
        let heads = [self.summary.is_some(), run.summary.is_some(), batch.choice.is_some()];
        if heads == [heads[0]; 3] {
            return Ok(());
        }
        let expected = "run and batch of a model with as many heads";
        Err(Error::argument("gpt", "run", expected, "those of another model"))
    }

    /// s = D(token + position), a = norm(s).
    fn embed<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        stack: &mut Stack<B>,
        batch: &GptBatch<B>,
    ) -> Result<(), Error> {
        let shape = Shape::new(cx.sequences.rows(), self.config.n_embd);
        let input = stack.input();
        let mut report = cx.backend.report();
        let pass = embedding_dropout::Forward {
            shape,
            lookups: self.lookups(cx, batch),
            tables: Tables {
                token: &cx.params[self.token],
                position: Some(&cx.params[self.position]),
                segment: None,
            },
            y: &mut input.s,
            report: report.as_deref_mut().map(|report| report as _),
        };
        cx.backend.run(self.embedding_drops(cx), pass)?;
        norm(cx, &self.blocks[0].norm, shape, self.first_norm, input)
    }

    fn embed_backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        stack: &mut Stack<B>,
        batch: &GptBatch<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let shape = Shape::new(cx.sequences.rows(), self.config.n_embd);
        let (input, scratch) = stack.input_and_scratch();
        let [dweight, dnorm_bias] = grads.gradients([self.first_norm.weight, self.first_norm.bias]);
        let pass = dropout_add_norm::Backward {
            shape,
            norm: self.blocks[0].norm,
            saved: Saved::Sum(&input.s),
            weight: &cx.params[self.first_norm.weight],
            stats: &input.stats,
            dy: &scratch.da,
            ds: Some(&scratch.ds),
            dresidual: &mut scratch.dresidual,
            dx: &mut scratch.branch,
            dbias: None,
            dweight: Some(dweight),
            dnorm_bias: Some(dnorm_bias),
        };
        cx.backend.run(Drops::Everything, pass)?;
        let [token, position] = grads.gradients([self.token, self.position]);
        let pass = embedding_dropout::Backward {
            shape,
            lookups: self.lookups(cx, batch),
            dy: &scratch.dresidual,
            gradients: Gradients {
                // It has the output layer's gradient already.
                token: Some(token.adding()),
                position: Some(position),
                segment: None,
            },
        };
        cx.backend.run(self.embedding_drops(cx), pass)
    }

    /// act(D(a\[row\]) · W + b): the dropout is that of a lookup, whose table are the rows of a.
    fn summarise<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        linear: &Linear,
        a: &Act<B>,
        choice: &Choice<B>,
        memory: &mut Summary<B>,
    ) -> Result<(), Error> {
        let batch = cx.sequences.batch;
        let pass = embedding_dropout::Forward {
            shape: Shape::new(batch, linear.inputs),
            lookups: Lookups::tokens(cx.sequences.rows(), &choice.rows),
            tables: Tables { token: a, position: None, segment: None },
            y: &mut memory.taken,
            report: None,
        };
        cx.backend.run(self.summary_drops(cx), pass)?;
        linear.forward(cx.backend, batch, cx.params, &memory.taken, &mut memory.projected)?;
        let pass = bias_act_dropout::Forward {
            shape: Shape::new(batch, linear.outputs),
            activation: self.config.summary_activation,
            x: Source::Tensor(&memory.projected),
            bias: Some(&cx.params[linear.bias]),
            y: &mut memory.logits,
        };
        cx.backend.run(Drops::Nothing, pass)
    }

    /// Adds to the gradient of a.
    fn summarise_backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        linear: &Linear,
        choice: &Choice<B>,
        memory: &mut Summary<B>,
        da: &mut Act<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let batch = cx.sequences.batch;
        let Summary { taken, projected, logits, dtaken, drows, .. } = memory;
        let pass = bias_act_dropout::Backward {
            shape: Shape::new(batch, linear.outputs),
            activation: self.config.summary_activation,
            x: projected,
            bias: Some(&cx.params[linear.bias]),
            dy: Source::InPlace,
            dx: logits,
            dbias: Some(grads.gradient(linear.bias)),
        };
        cx.backend.run(Drops::Nothing, pass)?;
        linear.backward(cx.backend, batch, cx.params, taken, logits, dtaken, false, grads)?;
        let pass = embedding_dropout::Backward {
            shape: Shape::new(batch, linear.inputs),
            lookups: Lookups::tokens(cx.sequences.rows(), &choice.rows),
            dy: dtaken,
            gradients: Gradients { token: Some(Gradient::Write(drows)), ..Gradients::NONE },
        };
        cx.backend.run(self.summary_drops(cx), pass)?;
        cx.backend.accumulate(drows, da)
    }

    fn embedding_drops<B: Backend>(&self, cx: &Context<'_, B>) -> Drops {
        cx.pass.at(0, Site::Embedding, cx.sequences.length, self.config.embd_pdrop)
    }

    fn summary_drops<B: Backend>(&self, cx: &Context<'_, B>) -> Drops {
        let layer = self.blocks.len() + 1;
        cx.pass.at(layer, Site::Summary, 1, self.config.summary_first_dropout)
    }

    fn lookups<'a, B: Backend>(
        &self,
        cx: &Context<'_, B>,
        batch: &'a GptBatch<B>,
    ) -> Lookups<In<'a, u32, B::Memory>> {
        Lookups::tokens(self.config.vocab_size, &batch.ids as In<'a, u32, B::Memory>)
            .positions(self.config.n_positions, Ids::Sequence(cx.sequences.length))
    }

    /// logits = a · tokensᵀ.
    fn head(&self, rows: usize) -> MatMul {
        let (vocab, width) = (self.config.vocab_size, self.config.n_embd);
        MatMul {
            mnk: [rows, vocab, width],
            batch: [1, 1],
            a: Layout::rows(width),
            b: Layout::rows(width).transposed(),
            c: Layout::rows(vocab),
            add: false,
        }
    }
}

impl<B: Backend> GptBatch<B> {
    /// Makes the batch a part of a step: the losses are divided by the labels of all of the step's sequences, `tokens` to
    /// predict and `choices` to make, in place of its own. So the losses and gradients of the parts add up to those of the
    /// step.
    ///
    /// # Errors
    /// What the backend says.
    pub fn part_of(&mut self, backend: &B, tokens: usize, choices: usize) -> Result<(), Error> {
        backend.write(&mut self.factor, &[1.0 / tokens.max(1) as f32])?;
        match &mut self.choice {
            Some(choice) => backend.write(&mut choice.factor, &[1.0 / choices.max(1) as f32]),
            None => Ok(()),
        }
    }
}

impl<B: Backend> GptRun<B> {
    /// Before [`Gpt::loss`]: the logits, `[batch, length, vocab_size]`. After it: their gradient.
    pub fn logits(&self) -> &Act<B> {
        &self.logits
    }

    /// Before [`Gpt::loss`]: the summary's logits, one a sequence: `[batch]`. After it: their gradient.
    pub fn choice_logits(&self) -> Option<&Act<B>> {
        self.summary.as_ref().map(|summary| &summary.logits)
    }

    /// Where [`Gpt::loss`] leaves the mean cross-entropy of the predicted tokens: one value.
    pub fn loss(&self) -> &F32<B> {
        &self.loss
    }

    /// The losses, once [`Gpt::loss`] has run. Waits for the backend.
    ///
    /// # Errors
    /// What the backend says.
    pub fn read_loss(&self, backend: &B) -> Result<GptLoss, Error> {
        let read = |loss: &F32<B>| Ok(backend.read(loss)?[0]);
        let choices = self.summary.as_ref().map(|summary| read(&summary.loss)).transpose()?;
        Ok(GptLoss { tokens: read(&self.loss)?, choices })
    }
}
