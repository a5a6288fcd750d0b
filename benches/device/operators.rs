//! The operators as what is run and timed on a GPU: which tensors a pass takes, how many bytes it cannot avoid
//! moving, and its call.

use fused_dropout::cuda::Gpu;
use fused_dropout::cuda::cudarc::driver::{
    CudaSlice, CudaView, CudaViewMut, DeviceRepr, DriverError, ValidAsZeroBits,
};
use fused_dropout::ops::dropout_add_norm::Saved;
use fused_dropout::ops::embedding_dropout::{Gradients, Ids, Lookup, Lookups, Tables};
use fused_dropout::ops::{
    bias_act_dropout, dropout, dropout_add, dropout_add_norm, embedding_dropout, keep_mask,
    softmax_dropout, swiglu_dropout,
};
use fused_dropout::{
    Activation, AttentionMask, Dropout, Dtype, Error, Gradient, In, Norm, Scores, Shape, Source,
    Strided,
};
use half::{bf16, f16};
use rand_philox::Philox;
use serde::{Deserialize, Serialize};

/// An operator in one of its forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operator {
    /// The limit: timer.rs says of what.
    Copy,
    Dropout,
    DropoutAdd,
    /// On the left half of each row of its tensors.
    StridedDropoutAdd,
    BiasDropoutAdd,
    BiasGeluDropout,
    SwigluDropout,
    DropoutAddLayernorm,
    SoftmaxDropout,
    CausalSoftmaxDropout,
    EmbeddingDropout,
    EmbeddingLayernormDropout,
    KeepMask,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    Forward,
    Backward,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    F32,
    F16,
    Bf16,
}

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    pub operator: Operator,
    pub pass: Pass,
    pub dtype: Storage,
    pub rows: usize,
    pub cols: usize,
}

/// Every operator with its passes, those that take longest last.
pub const PASSES: [(Operator, Pass); 23] = {
    use Operator::*;
    use Pass::*;
    [
        (Copy, Forward),
        (Dropout, Forward),
        (Dropout, Backward),
        (DropoutAdd, Forward),
        (DropoutAdd, Backward),
        (StridedDropoutAdd, Forward),
        (BiasDropoutAdd, Forward),
        (BiasDropoutAdd, Backward),
        (BiasGeluDropout, Forward),
        (BiasGeluDropout, Backward),
        (SwigluDropout, Forward),
        (SwigluDropout, Backward),
        (DropoutAddLayernorm, Forward),
        (DropoutAddLayernorm, Backward),
        (SoftmaxDropout, Forward),
        (SoftmaxDropout, Backward),
        (CausalSoftmaxDropout, Forward),
        (CausalSoftmaxDropout, Backward),
        (EmbeddingDropout, Forward),
        (EmbeddingLayernormDropout, Forward),
        (KeepMask, Forward),
        (EmbeddingLayernormDropout, Backward),
        (EmbeddingDropout, Backward),
    ]
};

pub const STORAGES: [Storage; 3] = [Storage::F32, Storage::F16, Storage::Bf16];

/// GPT-2's vocabulary, and its positions.
const VOCABULARY: usize = 50_257;
const POSITIONS: usize = 1024;

impl Case {
    pub fn shape(&self) -> Shape {
        Shape::new(self.rows, self.cols)
    }

    /// Whether its tensors are of a size that can be meant, in rows of whole octets, so that every set is
    /// aligned.
    pub fn fits(&self) -> bool {
        let elements = self.rows.checked_mul(self.cols);
        self.cols.is_multiple_of(8) && elements.is_some_and(|n| (1..=1 << 32).contains(&n))
    }

    /// Allocates `sets` sets of tensors, the inputs of random numbers.
    ///
    /// # Errors
    /// What the driver says: above all that there is no memory.
    pub fn prepare(
        &self,
        data: &Data,
        gpu: &Gpu,
        sets: usize,
    ) -> Result<Box<dyn Work>, DriverError> {
        Ok(match self.dtype {
            Storage::F32 => Box::new(Tensors::<f32>::new(*self, data, gpu, sets)?),
            Storage::F16 => Box::new(Tensors::<f16>::new(*self, data, gpu, sets)?),
            Storage::Bf16 => Box::new(Tensors::<bf16>::new(*self, data, gpu, sets)?),
        })
    }

    /// The bytes that a call cannot avoid reading or writing. Of tensors of one row, of statistics and of ids
    /// too; of an embedding table what the ids of `rows` uniform draws take on average.
    pub fn bytes(&self) -> usize {
        let element = match self.dtype {
            Storage::F32 => 4,
            _ => 2,
        };
        let (rows, cols) = (self.rows, self.cols);
        let (all, row) = (rows * cols * element, cols * element);
        let seen = self.seen() * element;
        let (taken, positions) = (self.taken(), POSITIONS.min(rows));
        let (stats, ids) = (8 * rows, 4 * rows);
        let parameters = 4 * cols;
        match (self.operator, self.pass) {
            (Operator::Copy | Operator::Dropout, _) => 2 * all,
            (Operator::DropoutAdd, Pass::Forward) => 3 * all,
            (Operator::DropoutAdd, Pass::Backward) => 2 * all,
            (Operator::StridedDropoutAdd, _) => 3 * all / 2,
            (Operator::BiasDropoutAdd, Pass::Forward) => 3 * all + row,
            (Operator::BiasDropoutAdd, Pass::Backward) => 2 * all + parameters,
            (Operator::BiasGeluDropout, Pass::Forward) => 2 * all + row,
            (Operator::BiasGeluDropout, Pass::Backward) => 3 * all + row + parameters,
            (Operator::SwigluDropout, Pass::Forward) => 3 * all,
            (Operator::SwigluDropout, Pass::Backward) => 5 * all,
            (Operator::DropoutAddLayernorm, Pass::Forward) => 4 * all + 2 * row + stats,
            (Operator::DropoutAddLayernorm, Pass::Backward) => {
                5 * all + row + stats + 2 * parameters
            }
            // x of what is not masked, and all of y.
            (Operator::SoftmaxDropout | Operator::CausalSoftmaxDropout, Pass::Forward) => {
                seen + all
            }
            (Operator::SoftmaxDropout | Operator::CausalSoftmaxDropout, Pass::Backward) => {
                2 * seen + all
            }
            (Operator::EmbeddingDropout, Pass::Forward) => all + (taken + positions) * row + ids,
            // Gradients are added to: read and written, in f32.
            (Operator::EmbeddingDropout, Pass::Backward) => {
                all + (taken + positions) * 2 * parameters + ids
            }
            (Operator::EmbeddingLayernormDropout, Pass::Forward) => {
                all + (taken + positions + 2) * row + ids + stats
            }
            (Operator::EmbeddingLayernormDropout, Pass::Backward) => {
                let tables = (taken + positions) * (row + 2 * parameters);
                all + tables + row + ids + stats + 4 * parameters
            }
            (Operator::KeepMask, _) => (rows * cols).div_ceil(8),
        }
    }

    /// Entries of the vocabulary that occur among as many uniform draws as there are rows, on average.
    fn taken(&self) -> usize {
        let vocabulary = VOCABULARY as f64;
        let missed = (1.0 - 1.0 / vocabulary).powf(self.rows as f64);
        (vocabulary * (1.0 - missed)) as usize
    }

    /// Scores that the attention mask leaves.
    fn seen(&self) -> usize {
        if self.causal().is_none() {
            return self.rows * self.cols;
        }
        let (heads, queries) = self.heads();
        let first = self.cols - queries + 1;
        heads * queries * (first + self.cols) / 2
    }

    /// Heads, and queries of each: squares, and one shorter one where there are fewer rows than columns.
    fn heads(&self) -> (usize, usize) {
        let queries = self.rows.min(self.cols);
        (self.rows / queries, queries)
    }

    fn scores(&self) -> Scores {
        let (heads, queries) = self.heads();
        Scores { batch: 1, heads, queries, keys: self.cols, scale: 0.125 }
    }

    /// The queries are the last ones of their sequence.
    fn causal(&self) -> Option<i64> {
        let causal = self.operator == Operator::CausalSoftmaxDropout;
        causal.then(|| (self.cols - self.heads().1) as i64)
    }
}

/// Random numbers in the device's memory, of every storage type: what inputs are filled with.
pub struct Data {
    f32: CudaSlice<f32>,
    f16: CudaSlice<f16>,
    bf16: CudaSlice<bf16>,
}

const RANDOM: usize = 1 << 22;

impl Data {
    /// # Errors
    /// What the driver says.
    pub fn new(gpu: &Gpu) -> Result<Self, DriverError> {
        let mut philox = Philox::from_u64_seed(1);
        let mut uniform = || rand_philox::u32_to_unit_f32(philox.next_u32()) * 4.0 - 2.0;
        let numbers: Vec<f32> = (0..RANDOM).map(|_| uniform()).collect();
        Ok(Self {
            f32: gpu.stream().clone_htod(&numbers)?,
            f16: gpu.stream().clone_htod(&rounded(&numbers))?,
            bf16: gpu.stream().clone_htod(&rounded(&numbers))?,
        })
    }
}

fn rounded<T: Dtype>(numbers: &[f32]) -> Vec<T> {
    numbers.iter().map(|&x| T::from_f32(x)).collect()
}

/// A storage type with its random numbers.
trait Stored: Dtype + DeviceRepr + ValidAsZeroBits {
    fn numbers(data: &Data) -> &CudaSlice<Self>;
}

impl Stored for f32 {
    fn numbers(data: &Data) -> &CudaSlice<Self> {
        &data.f32
    }
}

impl Stored for f16 {
    fn numbers(data: &Data) -> &CudaSlice<Self> {
        &data.f16
    }
}

impl Stored for bf16 {
    fn numbers(data: &Data) -> &CudaSlice<Self> {
        &data.bf16
    }
}

/// Tensors of one length and purpose, one a set; or one for all sets.
struct Stack<T> {
    memory: CudaSlice<T>,
    len: usize,
}

impl<T: DeviceRepr + ValidAsZeroBits> Stack<T> {
    fn zeros(gpu: &Gpu, sets: usize, len: usize) -> Result<Self, DriverError> {
        // The driver allocates no zero bytes.
        Ok(Self { memory: gpu.stream().alloc_zeros((sets * len).max(1))?, len })
    }

    fn get(&self, set: usize) -> CudaView<'_, T> {
        let first = self.first(set);
        self.memory.slice(first..first + self.len)
    }

    fn get_mut(&mut self, set: usize) -> CudaViewMut<'_, T> {
        let first = self.first(set);
        self.memory.slice_mut(first..first + self.len)
    }

    fn first(&self, set: usize) -> usize {
        set * self.len % self.memory.len()
    }
}

impl<T: Stored> Stack<T> {
    fn random(data: &Data, gpu: &Gpu, sets: usize, len: usize) -> Result<Self, DriverError> {
        let numbers = T::numbers(data);
        let mut stack = Self::zeros(gpu, sets, len)?;
        for (piece, first) in (0..sets * len).step_by(RANDOM / 2).enumerate() {
            let count = (RANDOM / 2).min(sets * len - first);
            // Another place of the numbers for each piece.
            let from = piece * 7919 * 8 % (RANDOM / 2);
            let mut to = stack.memory.slice_mut(first..first + count);
            gpu.stream().memcpy_dtod(&numbers.slice(from..from + count), &mut to)?;
        }
        Ok(stack)
    }
}

/// A pass of an operator with its tensors.
pub trait Work {
    /// Launches it on a set of tensors.
    fn launch(&mut self, gpu: &Gpu, set: usize, drop: &Dropout<'_, Gpu>) -> Result<(), Error>;
    /// The bytes of a set's outputs, and of the gradients of parameters, which all sets share.
    fn outputs(&self, gpu: &Gpu, set: usize) -> Result<Vec<u8>, DriverError>;
    /// Fills all outputs with zeros.
    fn clear(&mut self, gpu: &Gpu) -> Result<(), DriverError>;
}

/// The tensors of a pass: how many of the shape, and the lengths of the others.
#[derive(Default)]
struct Needs {
    inputs: usize,
    outputs: usize,
    /// Of one row, and tables.
    parameters: Vec<usize>,
    /// Of parameters, in f32.
    gradients: Vec<usize>,
    stats: usize,
    ids: usize,
    bits: usize,
}

impl Needs {
    fn of(case: &Case) -> Self {
        let Case { rows, cols, .. } = *case;
        let (none, stats, ids) = (Self::default(), 2 * rows, rows);
        let tables = [VOCABULARY * cols, POSITIONS * cols];
        let with = |rows_of_one: usize| [&tables[..], &vec![cols; rows_of_one]].concat();
        match (case.operator, case.pass) {
            (Operator::Copy | Operator::Dropout, _) => Self { inputs: 1, outputs: 1, ..none },
            (Operator::DropoutAdd, Pass::Forward) | (Operator::StridedDropoutAdd, _) => {
                Self { inputs: 2, outputs: 1, ..none }
            }
            (Operator::DropoutAdd, Pass::Backward) => Self { inputs: 1, outputs: 1, ..none },
            (Operator::SwigluDropout, Pass::Forward) => Self { inputs: 2, outputs: 1, ..none },
            (Operator::SwigluDropout, Pass::Backward) => Self { inputs: 3, outputs: 2, ..none },
            (Operator::BiasDropoutAdd, Pass::Forward) => {
                Self { inputs: 2, outputs: 1, parameters: vec![cols], ..none }
            }
            (Operator::BiasDropoutAdd, Pass::Backward) => {
                Self { inputs: 1, outputs: 1, gradients: vec![cols], ..none }
            }
            (Operator::BiasGeluDropout, Pass::Forward) => {
                Self { inputs: 1, outputs: 1, parameters: vec![cols], ..none }
            }
            (Operator::BiasGeluDropout, Pass::Backward) => {
                let (parameters, gradients) = (vec![cols], vec![cols]);
                Self { inputs: 2, outputs: 1, parameters, gradients, ..none }
            }
            (Operator::DropoutAddLayernorm, Pass::Forward) => {
                Self { inputs: 2, outputs: 2, parameters: vec![cols; 2], stats, ..none }
            }
            (Operator::DropoutAddLayernorm, Pass::Backward) => {
                let (parameters, gradients) = (vec![cols], vec![cols; 2]);
                Self { inputs: 3, outputs: 2, parameters, gradients, stats, ..none }
            }
            (Operator::SoftmaxDropout | Operator::CausalSoftmaxDropout, Pass::Forward) => {
                Self { inputs: 1, outputs: 1, ..none }
            }
            (Operator::SoftmaxDropout | Operator::CausalSoftmaxDropout, Pass::Backward) => {
                Self { inputs: 2, outputs: 1, ..none }
            }
            (Operator::EmbeddingDropout, Pass::Forward) => {
                Self { outputs: 1, parameters: with(0), ids, ..none }
            }
            (Operator::EmbeddingDropout, Pass::Backward) => {
                Self { inputs: 1, gradients: with(0), ids, ..none }
            }
            (Operator::EmbeddingLayernormDropout, Pass::Forward) => {
                Self { outputs: 1, parameters: with(2), stats, ids, ..none }
            }
            (Operator::EmbeddingLayernormDropout, Pass::Backward) => {
                let (parameters, gradients) = (with(1), with(2));
                Self { inputs: 1, parameters, gradients, stats, ids, ..none }
            }
            (Operator::KeepMask, _) => Self { bits: (rows * cols).div_ceil(8), ..none },
        }
    }
}

struct Tensors<T> {
    case: Case,
    inputs: Vec<Stack<T>>,
    outputs: Vec<Stack<T>>,
    // One for all sets, from here on but for ids, stats and bits.
    parameters: Vec<Stack<T>>,
    gradients: Vec<Stack<f32>>,
    stats: Stack<f32>,
    ids: Stack<u32>,
    report: CudaSlice<u32>,
    bits: Stack<u8>,
}

impl<T: Stored> Tensors<T> {
    fn new(case: Case, data: &Data, gpu: &Gpu, sets: usize) -> Result<Self, DriverError> {
        let needs = Needs::of(&case);
        let elements = case.rows * case.cols;
        let mut philox = Philox::from_u64_seed(2);
        let ids: Vec<u32> =
            (0..(sets * needs.ids).max(1)).map(|_| philox.bounded(VOCABULARY as u32)).collect();
        let random = |sets, len| Stack::<T>::random(data, gpu, sets, len);
        Ok(Self {
            case,
            inputs: many(needs.inputs, |_| random(sets, elements))?,
            outputs: many(needs.outputs, |_| Stack::zeros(gpu, sets, elements))?,
            parameters: many(needs.parameters.len(), |i| random(1, needs.parameters[i]))?,
            gradients: many(needs.gradients.len(), |i| Stack::zeros(gpu, 1, needs.gradients[i]))?,
            stats: Stack::random(data, gpu, sets, needs.stats)?,
            ids: Stack { memory: gpu.stream().clone_htod(&ids)?, len: needs.ids },
            report: gpu.stream().clone_htod(&[u32::MAX])?,
            bits: Stack::zeros(gpu, sets, needs.bits)?,
        })
    }
}

fn many<S>(
    count: usize,
    make: impl Fn(usize) -> Result<S, DriverError>,
) -> Result<Vec<S>, DriverError> {
    (0..count).map(make).collect()
}

impl<T: Stored> Tensors<T> {
    fn run(&mut self, gpu: &Gpu, set: usize, drop: &Dropout<'_, Gpu>) -> Result<(), Error> {
        let case = self.case;
        let (shape, scores) = (case.shape(), case.scores());
        let (activation, norm) = (Activation::GeluTanh, Norm::layer(1e-5));
        let mask = AttentionMask { causal: case.causal(), ..AttentionMask::NONE };
        let inputs: Vec<_> = self.inputs.iter().map(|input| input.get(set)).collect();
        let parameters: Vec<_> = self.parameters.iter().map(|parameter| parameter.get(0)).collect();
        let (input, parameter) = (|i: usize| &inputs[i] as In<'_, T, Gpu>, &parameters);
        let source = |i: usize| Source::Tensor(input(i));
        let mut outputs: Vec<_> =
            self.outputs.iter_mut().map(|output| output.get_mut(set)).collect();
        let [mut output, mut second] = {
            let mut outputs = outputs.iter_mut();
            [(); 2].map(|()| outputs.next())
        };
        let mut gradients: Vec<_> =
            self.gradients.iter_mut().map(|gradient| gradient.get_mut(0)).collect();
        // Of tables and a norm's parameters in embeddings they are added to, as in a model with tied weights.
        let embeds = matches!(
            case.operator,
            Operator::EmbeddingDropout | Operator::EmbeddingLayernormDropout
        );
        let [g0, g1, g2, g3] = {
            let mut gradients = gradients.iter_mut();
            [(); 4].map(|()| {
                gradients.next().map(|gradient| match embeds {
                    true => Gradient::Add(gradient),
                    false => Gradient::Write(gradient),
                })
            })
        };
        let ids = self.ids.get(set);
        let lookups = Lookups {
            token: Lookup { entries: VOCABULARY, ids: Ids::Given(&ids as In<'_, u32, Gpu>) },
            position: Some(Lookup { entries: POSITIONS, ids: Ids::Sequence(POSITIONS) }),
            segment: None,
        };
        let tables = || Tables {
            token: &parameter[0] as In<'_, T, Gpu>,
            position: Some(&parameter[1] as _),
            segment: None,
        };
        match (case.operator, case.pass) {
            (Operator::Copy, _) => {
                let copied = gpu.stream().memcpy_dtod(&inputs[0], out(&mut output));
                copied.map_err(|error| Error::Driver {
                    operation: "copying",
                    code: error.0 as u32,
                    message: error.to_string(),
                })
            }
            (Operator::Dropout, Pass::Forward) => {
                gpu.run(drop, dropout::Forward { shape, x: source(0), y: out(&mut output) })
            }
            (Operator::Dropout, Pass::Backward) => {
                gpu.run(drop, dropout::Backward { shape, dy: source(0), dx: out(&mut output) })
            }
            (Operator::DropoutAdd | Operator::BiasDropoutAdd, Pass::Forward) => {
                let pass = dropout_add::Forward {
                    shape,
                    x: input(0),
                    bias: parameter.first().map(|bias| bias as _),
                    residual: source(1),
                    y: out(&mut output),
                };
                gpu.run(drop, pass)
            }
            (Operator::DropoutAdd | Operator::BiasDropoutAdd, Pass::Backward) => {
                let dx = Some(out(&mut output) as _);
                gpu.run(drop, dropout_add::Backward { shape, dy: source(0), dx, dbias: g0 })
            }
            (Operator::StridedDropoutAdd, _) => {
                let [x, residual] = [0, 1].map(|i| Strided::new(&inputs[i], case.cols));
                let pass = dropout_add::Forward {
                    shape: Shape::new(case.rows, case.cols / 2),
                    x: &x as In<'_, T, Gpu>,
                    bias: None,
                    residual: Source::Tensor(&residual),
                    y: &mut Strided::new(out(&mut output), case.cols),
                };
                gpu.run(drop, pass)
            }
            (Operator::SwigluDropout, Pass::Forward) => {
                let (gate, up, y) = (source(0), input(1), out(&mut output));
                gpu.run(drop, swiglu_dropout::Forward { shape, gate, up, y })
            }
            (Operator::SwigluDropout, Pass::Backward) => {
                let (gate, up, dy) = (input(0), input(1), source(2));
                let (dgate, dup) = (out(&mut output), out(&mut second));
                gpu.run(drop, swiglu_dropout::Backward { shape, gate, up, dy, dgate, dup })
            }
            (Operator::BiasGeluDropout, Pass::Forward) => {
                let pass = bias_act_dropout::Forward {
                    shape,
                    activation,
                    x: source(0),
                    bias: Some(&parameter[0]),
                    y: out(&mut output),
                };
                gpu.run(drop, pass)
            }
            (Operator::BiasGeluDropout, Pass::Backward) => {
                let pass = bias_act_dropout::Backward {
                    shape,
                    activation,
                    x: input(0),
                    bias: Some(&parameter[0]),
                    dy: source(1),
                    dx: out(&mut output),
                    dbias: g0,
                };
                gpu.run(drop, pass)
            }
            (Operator::DropoutAddLayernorm, Pass::Forward) => {
                let pass = dropout_add_norm::Forward {
                    shape,
                    norm,
                    x: input(0),
                    bias: None,
                    residual: source(1),
                    weight: &parameter[0],
                    norm_bias: Some(&parameter[1]),
                    s: Some(out(&mut second)),
                    y: out(&mut output),
                    stats: Some(&mut self.stats.get_mut(set)),
                };
                gpu.run(drop, pass)
            }
            (Operator::DropoutAddLayernorm, Pass::Backward) => {
                let pass = dropout_add_norm::Backward {
                    shape,
                    norm,
                    saved: Saved::Sum(input(0)),
                    weight: &parameter[0],
                    stats: &self.stats.get(set),
                    dy: input(1),
                    ds: Some(input(2)),
                    dresidual: out(&mut output),
                    dx: out(&mut second),
                    dbias: None,
                    dweight: g0,
                    dnorm_bias: g1,
                };
                gpu.run(drop, pass)
            }
            (Operator::SoftmaxDropout | Operator::CausalSoftmaxDropout, Pass::Forward) => {
                let (x, y) = (source(0), out(&mut output));
                gpu.run(drop, softmax_dropout::Forward { scores, mask, x, y, statistics: None })
            }
            (Operator::SoftmaxDropout | Operator::CausalSoftmaxDropout, Pass::Backward) => {
                let pass = softmax_dropout::Backward {
                    scores,
                    mask,
                    x: input(0),
                    statistics: None,
                    dy: source(1),
                    dx: out(&mut output),
                };
                gpu.run(drop, pass)
            }
            (Operator::EmbeddingDropout, Pass::Forward) => {
                let (tables, y, report) = (tables(), out(&mut output), Some(&mut self.report as _));
                gpu.run(drop, embedding_dropout::Forward { shape, lookups, tables, y, report })
            }
            (Operator::EmbeddingDropout, Pass::Backward) => {
                let gradients = Gradients { token: g0, position: g1, segment: None };
                let dy = input(0);
                gpu.run(drop, embedding_dropout::Backward { shape, lookups, dy, gradients })
            }
            (Operator::EmbeddingLayernormDropout, Pass::Forward) => {
                let pass = embedding_dropout::ForwardNorm {
                    shape,
                    norm,
                    lookups,
                    tables: tables(),
                    weight: &parameter[2],
                    norm_bias: Some(&parameter[3]),
                    y: out(&mut output),
                    stats: Some(&mut self.stats.get_mut(set)),
                    report: Some(&mut self.report),
                };
                gpu.run(drop, pass)
            }
            (Operator::EmbeddingLayernormDropout, Pass::Backward) => {
                let pass = embedding_dropout::BackwardNorm {
                    shape,
                    norm,
                    lookups,
                    tables: tables(),
                    weight: &parameter[2],
                    stats: &self.stats.get(set),
                    dy: input(0),
                    gradients: Gradients { token: g0, position: g1, segment: None },
                    dweight: g2,
                    dnorm_bias: g3,
                };
                gpu.run(drop, pass)
            }
            (Operator::KeepMask, _) => {
                gpu.run(drop, keep_mask::Bits { shape, out: &mut self.bits.get_mut(set) })
            }
        }
    }
}

impl<T: Stored> Work for Tensors<T> {
    fn launch(&mut self, gpu: &Gpu, set: usize, drop: &Dropout<'_, Gpu>) -> Result<(), Error> {
        self.run(gpu, set, drop)
    }

    fn outputs(&self, gpu: &Gpu, set: usize) -> Result<Vec<u8>, DriverError> {
        let mut all = Vec::new();
        for output in &self.outputs {
            all.extend_from_slice(bytemuck::cast_slice(
                &gpu.stream().clone_dtoh(&output.get(set))?,
            ));
        }
        for gradient in &self.gradients {
            all.extend_from_slice(bytemuck::cast_slice(
                &gpu.stream().clone_dtoh(&gradient.get(0))?,
            ));
        }
        all.extend(gpu.stream().clone_dtoh(&self.bits.get(set))?);
        gpu.stream().synchronize()?;
        Ok(all)
    }

    fn clear(&mut self, gpu: &Gpu) -> Result<(), DriverError> {
        for output in &mut self.outputs {
            gpu.stream().memset_zeros(&mut output.memory)?;
        }
        for gradient in &mut self.gradients {
            gpu.stream().memset_zeros(&mut gradient.memory)?;
        }
        gpu.stream().memset_zeros(&mut self.bits.memory)
    }
}

/// An output that [`Needs`] has asked for.
fn out<'a, 'm, T>(output: &'a mut Option<&mut CudaViewMut<'m, T>>) -> &'a mut CudaViewMut<'m, T> {
    output.as_deref_mut().expect("as many outputs as `Needs` says")
}
