//! BERT: post-norm, bidirectional, with segments and padding; for masked language modelling
//! (BertForMaskedLM) and for sequence classification with the pooler (BertForSequenceClassification).
//!
//! Where it drops: after the embeddings' norm and in both residual branches (`hidden_dropout_prob`), attention
//! probabilities (`attention_probs_dropout_prob`), and between pooler and classifier (`classifier_dropout`).

use super::backend::{Act, Backend, F32, U32};
use super::block::{
    Block, Boundary, Context, Linear, NormIds, Sequences, add_bias, bias_grad, norm,
};
use super::check::{check_below, check_size, check_tokens, mean_factor};
use super::config::BertConfig;
use super::matmul::{Layout, MatMul};
use super::params::{Grads, Id, Init, Params, Part, Specs};
use super::refuse;
use super::stack::Stack;
use super::streams::{Drops, Pass, Site};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::ops::dropout_add_norm::Saved;
use crate::ops::embedding_dropout::{Gradients, Ids, Lookups, Tables};
use crate::ops::{Shape, bias_act_dropout, check_len, dropout_add_norm, embedding_dropout};
use crate::tensor::{Gradient, In, Source};
use crate::{Activation, Norm};

/// What a BERT is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BertTask {
    /// A token at each position that has a label.
    MaskedLanguageModel,
    /// A class of each sequence.
    Classification,
}

/// A BERT: its configuration and the names and shapes of its tensors.
#[derive(Clone, Debug)]
pub struct Bert {
    config: BertConfig,
    specs: Specs,
    tables: [Id; 3],
    embedding_norm: NormIds,
    blocks: Vec<Block>,
    head: Head,
}

#[derive(Clone, Copy, Debug)]
enum Head {
    /// Transformation, its norm, and the bias of the output weights, which are the table of tokens.
    MaskedLanguageModel {
        transform: Linear,
        norm: NormIds,
        bias: Id,
    },
    Classification {
        pooler: Linear,
        classifier: Linear,
    },
}

/// Sequences and labels on the host.
#[derive(Clone, Copy, Debug)]
pub struct BertInput<'a> {
    /// `[batch, length]`.
    pub ids: &'a [u32],
    /// The segment of each token, `[batch, length]`.
    pub segments: &'a [u32],
    /// Whether each token is one, or padding: `[batch, length]`.
    pub tokens: &'a [bool],
    /// Of a masked language model: the token to predict at each position, negative for none, `[batch, length]`. Of a
    /// classifier: the class of each sequence, `[batch]`.
    pub labels: &'a [i32],
}

/// Sequences on a backend, and what is to be predicted.
pub struct BertBatch<B: Backend> {
    ids: U32<B>,
    segments: U32<B>,
    labels: B::Buffer<i32>,
    /// 1 / the labels that there are.
    factor: F32<B>,
    sequences: Sequences<B>,
}

/// Memory for steps with batches of one shape.
pub struct BertRun<B: Backend> {
    batch: usize,
    length: usize,
    stack: Stack<B>,
    /// After the forward pass the logits, `[batch, num_labels]` or `[batch, length, vocab_size]`; after the loss their gradient.
    logits: Act<B>,
    loss: F32<B>,
    head: HeadMemory<B>,
}

/// Memory of the head. `rows` are the sequences of a classifier, all tokens of a masked language model.
struct HeadMemory<B: Backend> {
    /// The row of each sequence's first token; of a classifier.
    firsts: U32<B>,
    /// What the pooler is given, `[batch, hidden_size]`; of a classifier.
    taken: Act<B>,
    /// Before the activation: `[rows, hidden_size]`.
    dense: Act<B>,
    /// After it, and of a masked language model after the norm.
    active: Boundary<B>,
    /// Gradients, `[rows, hidden_size]`.
    dactive: Act<B>,
    dnormed: Act<B>,
    unused: Act<B>,
    /// The gradient of the padding's row of the table, `[hidden_size]`.
    padding: F32<B>,
    /// The gradient of all rows; of a classifier.
    drows: F32<B>,
}

impl Bert {
    /// A model for a task.
    ///
    /// # Errors
    /// [`Error::Setting`] where the configuration's sizes do not fit each other, or where a classifier has another loss
    /// than the cross-entropy of one class of several: to Hugging Face's library one label is a regression.
    pub fn new(config: BertConfig, task: BertTask) -> Result<Self, Error> {
        config.check()?;
        if task == BertTask::Classification {
            check_loss(&config)?;
        }
        let mut specs = Specs::of("bert.");
        specs.constant("bert.embeddings.position_ids".into());
        specs.constant("bert.embeddings.token_type_ids".into());
        let width = config.hidden_size;
        let normal = Init::Normal(config.initializer_range);
        let tables = [
            ("word", config.vocab_size),
            ("position", config.max_position_embeddings),
            ("token_type", config.type_vocab_size),
        ]
        .map(|(name, entries)| {
            let name = format!("bert.embeddings.{name}_embeddings.weight");
            specs.add(name, &[entries, width], normal)
        });
        let embedding_norm = NormIds::add(&mut specs, "bert.embeddings.LayerNorm", width);
        let blocks = (0..config.num_hidden_layers).map(|l| {
            let name = |part: &str| format!("bert.encoder.layer.{l}.{part}");
            let inner = config.intermediate_size;
            Block {
                layer: l + 1,
                pre_norm: false,
                heads: config.num_attention_heads,
                qkv: qkv(&mut specs, &name("attention.self"), width, normal),
                out: linear(&mut specs, &name("attention.output.dense"), width, width, normal),
                norm1: NormIds::add(&mut specs, &name("attention.output.LayerNorm"), width),
                up: linear(&mut specs, &name("intermediate.dense"), width, inner, normal),
                activation: config.hidden_act,
                down: linear(&mut specs, &name("output.dense"), inner, width, normal),
                norm2: NormIds::add(&mut specs, &name("output.LayerNorm"), width),
                norm: Norm::layer(config.layer_norm_eps),
                attention_p: config.attention_probs_dropout_prob,
                residual_p: config.hidden_dropout_prob,
            }
        });
        let blocks = blocks.collect();
        specs.begin_head();
        let head = match task {
            BertTask::MaskedLanguageModel => {
                specs.alias(
                    "cls.predictions.decoder.weight",
                    "bert.embeddings.word_embeddings.weight",
                );
                specs.alias("cls.predictions.decoder.bias", "cls.predictions.bias");
                let transform = "cls.predictions.transform";
                let name = |part: &str| format!("{transform}.{part}");
                Head::MaskedLanguageModel {
                    transform: linear(&mut specs, &name("dense"), width, width, normal),
                    norm: NormIds::add(&mut specs, &name("LayerNorm"), width),
                    bias: specs.add(
                        "cls.predictions.bias".into(),
                        &[config.vocab_size],
                        Init::Zeros,
                    ),
                }
            }
            BertTask::Classification => Head::Classification {
                pooler: linear(&mut specs, "bert.pooler.dense", width, width, normal),
                classifier: linear(&mut specs, "classifier", width, config.num_labels, normal),
            },
        };
        Ok(Self { config, specs, tables, embedding_norm, blocks, head })
    }

    /// The configuration.
    pub fn config(&self) -> &BertConfig {
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
    ) -> Result<BertRun<B>, Error> {
        let width = self.config.hidden_size;
        let widest = self
            .config
            .vocab_size
            .max(3 * width)
            .max(self.config.intermediate_size)
            .max(self.config.num_labels);
        let (positions, heads) =
            (self.config.max_position_embeddings, self.config.num_attention_heads);
        check_size("bert", [batch, length], positions, widest, heads)?;
        let tokens = batch * length;
        let (rows, classes, normed, taken) = match self.head {
            Head::MaskedLanguageModel { .. } => (tokens, self.config.vocab_size, tokens, 0),
            Head::Classification { .. } => (batch, self.config.num_labels, 0, batch),
        };
        let firsts: Vec<u32> = (0..taken).map(|sequence| (sequence * length) as u32).collect();
        let head = HeadMemory {
            firsts: backend.upload(&firsts)?,
            taken: backend.zeros(taken * width)?,
            dense: backend.zeros(rows * width)?,
            active: Boundary::new(backend, rows, width)?,
            dactive: backend.zeros(rows * width)?,
            dnormed: backend.zeros(rows * width)?,
            unused: backend.zeros(normed * width)?,
            padding: backend.zeros(width)?,
            drows: backend.zeros(if taken > 0 { tokens * width } else { 0 })?,
        };
        Ok(BertRun {
            batch,
            length,
            stack: Stack::new(backend, &self.blocks, batch, length, recompute)?,
            logits: backend.zeros(rows * classes)?,
            loss: backend.zeros(1)?,
            head,
        })
    }

    /// Puts a batch on a backend.
    ///
    /// # Errors
    /// [`Error::Argument`] where a length does not fit or a token, segment or label is out of range.
    pub fn batch<B: Backend>(
        &self,
        backend: &B,
        run: &BertRun<B>,
        input: &BertInput<'_>,
    ) -> Result<BertBatch<B>, Error> {
        let (batch, length) = (run.batch, run.length);
        let rows = batch * length;
        let config = &self.config;
        check_len("bert", "segments", rows, input.segments.len())?;
        check_len("bert", "tokens", rows, input.tokens.len())?;
        match self.head {
            Head::MaskedLanguageModel { .. } => {
                check_tokens("bert", rows, config.vocab_size, input.ids, input.labels)?;
            }
            Head::Classification { .. } => {
                check_tokens("bert", rows, config.vocab_size, input.ids, &vec![-1; rows])?;
                check_len("bert", "labels", batch, input.labels.len())?;
                check_below("bert", "labels", config.num_labels, input.labels)?;
            }
        }
        let segments = config.type_vocab_size;
        if let Some(segment) = input.segments.iter().find(|&&s| s as usize >= segments) {
            return Err(Error::argument("bert", "segments", format!("below {segments}"), segment));
        }
        Ok(BertBatch {
            ids: backend.upload(input.ids)?,
            segments: backend.upload(input.segments)?,
            labels: backend.upload(input.labels)?,
            factor: backend.upload(&[mean_factor(input.labels)])?,
            sequences: sequences(backend, batch, length, config.num_attention_heads, input.tokens)?,
        })
    }

    /// The logits, in the memory of `run`.
    ///
    /// # Errors
    /// What the operators or the backend say.
    pub fn forward<B: Backend>(
        &self,
        backend: &B,
        params: &Params<B>,
        run: &mut BertRun<B>,
        batch: &BertBatch<B>,
        pass: Pass,
    ) -> Result<(), Error> {
        self.check(params.lens(), run, batch)?;
        let cx = Context { backend, params, sequences: &batch.sequences, pass };
        let shape = self.shape(run);
        let input = run.stack.input();
        let mut report = backend.report();
        let embed = embedding_dropout::ForwardNorm {
            shape,
            norm: self.blocks[0].norm,
            lookups: self.lookups(batch),
            tables: self.embedding_tables(params),
            weight: &params[self.embedding_norm.weight],
            norm_bias: Some(&params[self.embedding_norm.bias]),
            y: &mut input.a,
            stats: Some(&mut input.stats),
            report: report.as_deref_mut().map(|report| report as _),
        };
        backend.run(self.embedding_drops(&cx), embed)?;
        drop(report);
        run.stack.forward(&cx, &self.blocks)?;
        let (a, _) = run.stack.output();
        match &self.head {
            Head::MaskedLanguageModel { transform, norm, bias } => {
                self.predict(&cx, (transform, norm, *bias), a, &mut run.head, &mut run.logits)
            }
            Head::Classification { pooler, classifier } => {
                self.classify(&cx, (pooler, classifier), a, &mut run.head, &mut run.logits)
            }
        }
    }

    /// The loss of the last forward pass, whose logits become its gradient.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn loss<B: Backend>(
        &self,
        backend: &B,
        run: &mut BertRun<B>,
        batch: &BertBatch<B>,
    ) -> Result<(), Error> {
        let shape = match self.head {
            Head::MaskedLanguageModel { .. } => {
                Shape::new(run.batch * run.length, self.config.vocab_size)
            }
            Head::Classification { .. } => Shape::new(run.batch, self.config.num_labels),
        };
        backend.cross_entropy(shape, &batch.factor, &batch.labels, &mut run.logits, &mut run.loss)
    }

    /// The gradients of all weights, after [`forward`](Self::forward) and [`loss`](Self::loss) of the same pass.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<B: Backend>(
        &self,
        backend: &B,
        params: &Params<B>,
        run: &mut BertRun<B>,
        batch: &BertBatch<B>,
        pass: Pass,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        self.check(params.lens(), run, batch)?;
        self.specs.check("bert", "grads", grads.lens())?;
        let cx = Context { backend, params, sequences: &batch.sequences, pass };
        let shape = self.shape(run);
        let BertRun { stack, logits, head, .. } = run;
        let (a, scratch) = stack.output();
        let da = &mut scratch.da;
        match &self.head {
            Head::MaskedLanguageModel { transform, norm, bias } => {
                let parts = (transform, norm, *bias);
                self.predict_backward(&cx, parts, a, head, logits, da, grads)?;
            }
            Head::Classification { pooler, classifier } => {
                self.classify_backward(&cx, (pooler, classifier), head, logits, da, grads)?;
            }
        }
        stack.backward(&cx, &self.blocks, grads)?;
        let [tokens, positions, segments] = self.tables;
        // The row of the padding learns nothing here: it is put back.
        let width = self.config.hidden_size;
        let padding = self.config.pad_token_id.map(|token| token * width..(token + 1) * width);
        if let Some(row) = padding.clone() {
            match grads.adds() {
                true => backend.copy(&grads[tokens], row, &mut head.padding, 0)?,
                false => backend.clear(&mut head.padding)?,
            }
        }
        let NormIds { weight, bias } = self.embedding_norm;
        let [token, position, segment, dweight, dnorm_bias] =
            grads.gradients([tokens, positions, segments, weight, bias]);
        let (input, scratch) = stack.input_and_scratch();
        let embed = embedding_dropout::BackwardNorm {
            shape,
            norm: self.blocks[0].norm,
            lookups: self.lookups(batch),
            tables: self.embedding_tables(params),
            weight: &params[weight],
            stats: &input.stats,
            dy: &scratch.da,
            gradients: Gradients {
                token: Some(token),
                position: Some(position),
                segment: Some(segment),
            },
            dweight: Some(dweight),
            dnorm_bias: Some(dnorm_bias),
        };
        backend.run(self.embedding_drops(&cx), embed)?;
        if let Some(row) = padding {
            backend.copy(&head.padding, 0..width, &mut grads[tokens], row.start)?;
        }
        // The output layer trains every entry of its table, that of the padding too.
        if let Head::MaskedLanguageModel { .. } = self.head {
            let [_, table, _] = self.output_products(shape.rows);
            backend.matmul_f32(&table, logits, &head.active.a, &mut grads[tokens])?;
        }
        Ok(())
    }

    /// Refuses weights, memory and batches of another model.
    fn check<B: Backend>(
        &self,
        params: &[usize],
        run: &BertRun<B>,
        batch: &BertBatch<B>,
    ) -> Result<(), Error> {
        self.specs.check("bert", "params", params)?;
        run.stack.check("bert", self.blocks.len())?;
        let of_batch = [batch.sequences.batch, batch.sequences.length];
        if of_batch == [run.batch, run.length] {
            return Ok(());
        }
        let expected = format!("{} sequences of {} tokens", run.batch, run.length);
        Err(Error::argument("bert", "batch", expected, format!("{of_batch:?}")))
    }

    /// logits = norm(act(a · W + b)) · tokensᵀ + bias.
    fn predict<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        (transform, ids, bias): (&Linear, &NormIds, Id),
        a: &Act<B>,
        head: &mut HeadMemory<B>,
        logits: &mut Act<B>,
    ) -> Result<(), Error> {
        let rows = cx.sequences.rows();
        let shape = Shape::new(rows, transform.outputs);
        transform.forward(cx.backend, rows, cx.params, a, &mut head.dense)?;
        let pass = bias_act_dropout::Forward {
            shape,
            activation: self.config.hidden_act,
            x: Source::Tensor(&head.dense),
            bias: Some(&cx.params[transform.bias]),
            y: &mut head.active.s,
        };
        cx.backend.run(Drops::Nothing, pass)?;
        norm(cx, &self.blocks[0].norm, shape, *ids, &mut head.active)?;
        let [head_product, ..] = self.output_products(rows);
        cx.backend.matmul(&head_product, &head.active.a, &cx.params[self.tables[0]], logits)?;
        let wide = Shape::new(rows, self.config.vocab_size);
        add_bias(cx.backend, wide, logits, &cx.params[bias])
    }

    #[expect(clippy::too_many_arguments)] // the tensors of a head and its gradients
    fn predict_backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        (transform, ids, bias): (&Linear, &NormIds, Id),
        a: &Act<B>,
        head: &mut HeadMemory<B>,
        dlogits: &mut Act<B>,
        da: &mut Act<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let rows = cx.sequences.rows();
        let shape = Shape::new(rows, transform.outputs);
        let wide = Shape::new(rows, self.config.vocab_size);
        bias_grad(cx.backend, wide, dlogits, bias, grads)?;
        let [_, _, through] = self.output_products(rows);
        cx.backend.matmul(&through, dlogits, &cx.params[self.tables[0]], &mut head.dnormed)?;
        let [dweight, dnorm_bias] = grads.gradients([ids.weight, ids.bias]);
        let pass = dropout_add_norm::Backward {
            shape,
            norm: self.blocks[0].norm,
            saved: Saved::Sum(&head.active.s),
            weight: &cx.params[ids.weight],
            stats: &head.active.stats,
            dy: &head.dnormed,
            ds: None,
            dresidual: &mut head.dactive,
            dx: &mut head.unused,
            dbias: None,
            dweight: Some(dweight),
            dnorm_bias: Some(dnorm_bias),
        };
        cx.backend.run(Drops::Everything, pass)?;
        let pass = bias_act_dropout::Backward {
            shape,
            activation: self.config.hidden_act,
            x: &head.dense,
            bias: Some(&cx.params[transform.bias]),
            dy: Source::InPlace,
            dx: &mut head.dactive,
            dbias: Some(grads.gradient(transform.bias)),
        };
        cx.backend.run(Drops::Nothing, pass)?;
        transform.backward(cx.backend, rows, cx.params, a, &head.dactive, da, false, grads)
    }

    /// logits = D(tanh(first · W + b)) · W + bias, of each sequence's first token.
    fn classify<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        (pooler, classifier): (&Linear, &Linear),
        a: &Act<B>,
        head: &mut HeadMemory<B>,
        logits: &mut Act<B>,
    ) -> Result<(), Error> {
        let batch = cx.sequences.batch;
        let shape = Shape::new(batch, pooler.outputs);
        let pass = embedding_dropout::Forward {
            shape,
            lookups: Lookups::tokens(cx.sequences.rows(), &head.firsts),
            tables: Tables { token: a, position: None, segment: None },
            y: &mut head.taken,
            report: None,
        };
        cx.backend.run(Drops::Nothing, pass)?;
        pooler.forward(cx.backend, batch, cx.params, &head.taken, &mut head.dense)?;
        let pass = bias_act_dropout::Forward {
            shape,
            activation: Activation::Tanh,
            x: Source::Tensor(&head.dense),
            bias: Some(&cx.params[pooler.bias]),
            y: &mut head.active.s,
        };
        cx.backend.run(self.pooler_drops(cx), pass)?;
        classifier.forward(cx.backend, batch, cx.params, &head.active.s, logits)?;
        let wide = Shape::new(batch, classifier.outputs);
        add_bias(cx.backend, wide, logits, &cx.params[classifier.bias])
    }

    fn classify_backward<B: Backend>(
        &self,
        cx: &Context<'_, B>,
        (pooler, classifier): (&Linear, &Linear),
        head: &mut HeadMemory<B>,
        dlogits: &mut Act<B>,
        da: &mut Act<B>,
        grads: &mut Grads<B>,
    ) -> Result<(), Error> {
        let batch = cx.sequences.batch;
        let shape = Shape::new(batch, pooler.outputs);
        let wide = Shape::new(batch, classifier.outputs);
        let HeadMemory { firsts, taken, dense, active, dactive, dnormed, drows, .. } = head;
        bias_grad(cx.backend, wide, dlogits, classifier.bias, grads)?;
        classifier
            .backward(cx.backend, batch, cx.params, &active.s, dlogits, dactive, false, grads)?;
        let pass = bias_act_dropout::Backward {
            shape,
            activation: Activation::Tanh,
            x: dense,
            bias: Some(&cx.params[pooler.bias]),
            dy: Source::InPlace,
            dx: dactive,
            dbias: Some(grads.gradient(pooler.bias)),
        };
        cx.backend.run(self.pooler_drops(cx), pass)?;
        let dtaken = dnormed;
        pooler.backward(cx.backend, batch, cx.params, taken, dactive, dtaken, false, grads)?;
        let pass = embedding_dropout::Backward {
            shape,
            lookups: Lookups::tokens(cx.sequences.rows(), firsts),
            dy: dtaken,
            gradients: Gradients { token: Some(Gradient::Write(drows)), ..Gradients::NONE },
        };
        cx.backend.run(Drops::Nothing, pass)?;
        cx.backend.clear(da)?;
        cx.backend.accumulate(drows, da)
    }

    /// Products of the output layer: forward, the gradient of the table (which is added), that of what entered.
    fn output_products(&self, rows: usize) -> [MatMul; 3] {
        let (vocab, width) = (self.config.vocab_size, self.config.hidden_size);
        let (narrow, wide) = (Layout::rows(width), Layout::rows(vocab));
        let product = |mnk, a, b, c| MatMul { mnk, batch: [1, 1], a, b, c, add: false };
        let table = product([vocab, width, rows], wide.transposed(), narrow, narrow);
        [
            product([rows, vocab, width], narrow, narrow.transposed(), wide),
            MatMul { add: true, ..table },
            product([rows, width, vocab], wide, narrow, narrow),
        ]
    }

    fn shape<B: Backend>(&self, run: &BertRun<B>) -> Shape {
        Shape::new(run.batch * run.length, self.config.hidden_size)
    }

    fn embedding_drops<B: Backend>(&self, cx: &Context<'_, B>) -> Drops {
        cx.pass.at(0, Site::Embedding, cx.sequences.length, self.config.hidden_dropout_prob)
    }

    fn pooler_drops<B: Backend>(&self, cx: &Context<'_, B>) -> Drops {
        let layer = self.blocks.len() + 1;
        cx.pass.at(layer, Site::Pooler, 1, self.config.classifier_dropout)
    }

    fn embedding_tables<'a, B: Backend>(
        &self,
        params: &'a Params<B>,
    ) -> Tables<In<'a, B::Elem, B::Memory>> {
        let [token, position, segment] = self.tables.map(|table| &params[table] as _);
        Tables { token, position: Some(position), segment: Some(segment) }
    }

    fn lookups<'a, B: Backend>(&self, batch: &'a BertBatch<B>) -> Lookups<In<'a, u32, B::Memory>> {
        let length = batch.sequences.length;
        Lookups::tokens(self.config.vocab_size, &batch.ids as In<'a, u32, B::Memory>)
            .positions(self.config.max_position_embeddings, Ids::Sequence(length))
            .segments(self.config.type_vocab_size, &batch.segments)
    }
}

impl<B: Backend> BertBatch<B> {
    /// Makes the batch a part of a step: the loss is divided by the labels of all of the step's sequences in place of its
    /// own. So the losses and gradients of the parts add up to those of the step.
    ///
    /// # Errors
    /// What the backend says.
    pub fn part_of(&mut self, backend: &B, labels: usize) -> Result<(), Error> {
        backend.write(&mut self.factor, &[1.0 / labels.max(1) as f32])
    }
}

impl<B: Backend> BertRun<B> {
    /// Before [`Bert::loss`]: the logits, `[batch, num_labels]` or `[batch, length, vocab_size]`. After it: their gradient.
    pub fn logits(&self) -> &Act<B> {
        &self.logits
    }

    /// Where [`Bert::loss`] leaves the loss in nats: one value.
    pub fn loss(&self) -> &F32<B> {
        &self.loss
    }

    /// The loss in nats, once [`Bert::loss`] has run. Waits for the backend.
    ///
    /// # Errors
    /// What the backend says.
    pub fn read_loss(&self, backend: &B) -> Result<f32, Error> {
        Ok(backend.read(&self.loss)?[0])
    }
}

/// The padding of a batch as attention wants it: a length a row where each sequence's tokens come first, otherwise
/// -infinity at every padded key.
fn sequences<B: Backend>(
    backend: &B,
    batch: usize,
    length: usize,
    heads: usize,
    tokens: &[bool],
) -> Result<Sequences<B>, Error> {
    let mut sequences = Sequences { batch, length, causal: false, lengths: None, additive: None };
    if tokens.iter().all(|&token| token) {
        return Ok(sequences);
    }
    let first = |sequence: &[bool]| sequence.iter().take_while(|&&token| token).count();
    let count = |sequence: &[bool]| sequence.iter().filter(|&&token| token).count();
    if tokens.chunks(length).all(|sequence| first(sequence) == count(sequence)) {
        let lengths = tokens
            .chunks(length)
            .flat_map(|sequence| std::iter::repeat_n(first(sequence) as u32, heads * length));
        sequences.lengths = Some(backend.upload(&lengths.collect::<Vec<_>>())?);
        return Ok(sequences);
    }
    let key = |&token: &bool| B::Elem::from_f32(if token { 0.0 } else { f32::NEG_INFINITY });
    let additive = tokens.chunks(length).flat_map(|sequence| {
        let row: Vec<_> = sequence.iter().map(key).collect();
        std::iter::repeat_n(row, length).flatten()
    });
    sequences.additive = Some(backend.upload(&additive.collect::<Vec<_>>())?);
    Ok(sequences)
}

/// Refuses a classifier that is to learn by another loss than the one here.
fn check_loss(config: &BertConfig) -> Result<(), Error> {
    const LOSS: &str = "single_label_classification";
    if let Some(other) = config.problem_type.as_ref().filter(|&problem| problem != LOSS) {
        return Err(refuse::setting("problem_type", format!("null or {LOSS}"), other));
    }
    match config.num_labels {
        1 => Err(refuse::setting("num_labels", "at least 2 classes", 1)),
        _ => Ok(()),
    }
}

fn linear(specs: &mut Specs, name: &str, inputs: usize, outputs: usize, init: Init) -> Linear {
    Linear {
        weight: specs.add(format!("{name}.weight"), &[outputs, inputs], init),
        bias: specs.add(format!("{name}.bias"), &[outputs], Init::Zeros),
        inputs,
        outputs,
        input_major: false,
    }
}

/// Query, key and value as one: their rows lie behind each other.
fn qkv(specs: &mut Specs, name: &str, width: usize, init: Init) -> Linear {
    let parts = |end: &str, shape: &[usize]| {
        let part = |which| Part { name: format!("{name}.{which}.{end}"), shape: shape.to_vec() };
        ["query", "key", "value"].map(part).to_vec()
    };
    Linear {
        weight: specs.add_parts(parts("weight", &[width, width]), init),
        bias: specs.add_parts(parts("bias", &[width]), Init::Zeros),
        inputs: width,
        outputs: 3 * width,
        input_major: false,
    }
}
