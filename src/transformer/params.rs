//! The tensors of a model: their Hugging Face names, shapes and first values, and the file that is written of them.

use super::backend::{Act, Backend, F32};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::tensor::Gradient;
use rand_philox::{Philox, u32_to_unit_f32};
use safetensors::tensor::Dtype as FileDtype;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::{Index, IndexMut};

/// A tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(usize);

/// What a tensor of a new model holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f32),
    /// Zeros.
    Zeros,
    /// Ones.
    Ones,
}

/// A tensor as a file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

/// A tensor of a model: one of a file, or several that lie behind each other, where one product takes them all.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The file's tensors.
    pub parts: Vec<Part>,
    /// What it holds in a new model.
    pub init: Init,
}

impl Part {
    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Spec {
    /// Elements.
    pub fn elements(&self) -> usize {
        self.parts.iter().map(Part::elements).sum()
    }

    /// Whether weight decay acts on it: on matrices and tables, not on biases and norms, as is usual.
    pub fn decays(&self) -> bool {
        self.parts[0].shape.len() >= 2
    }
}

/// All tensors of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Specs {
    list: Vec<Spec>,
    /// Where the base model ends and the head begins; none: there is no head.
    head: Option<usize>,
    /// How the base model's names begin; files of the base model alone leave it out.
    pub(super) base: &'static str,
    /// Other names under which files have a tensor instead or once more: tied weights.
    pub(super) aliases: Vec<(String, String)>,
    /// What files have besides tensors of the model: buffers that follow from it.
    pub(super) constants: HashSet<String>,
}

impl Specs {
    /// Of a model whose base has names that begin with `base`.
    pub(crate) fn of(base: &'static str) -> Self {
        Self { base, ..Self::default() }
    }

    /// The base model is complete: what is added from now on is a head, which files may lack.
    pub(crate) fn begin_head(&mut self) {
        self.head = Some(self.list.len());
    }

    pub(super) fn is_head(&self, index: usize) -> bool {
        self.head.is_some_and(|first| index >= first)
    }

    /// Adds a tensor of one part.
    pub(crate) fn add(&mut self, name: String, shape: &[usize], init: Init) -> Id {
        self.add_parts(vec![Part { name, shape: shape.to_vec() }], init)
    }

    /// Adds a tensor of several parts.
    pub(crate) fn add_parts(&mut self, parts: Vec<Part>, init: Init) -> Id {
        self.list.push(Spec { parts, init });
        Id(self.list.len() - 1)
    }

    /// Files may have tensor `name` under `alias` too.
    pub(crate) fn alias(&mut self, alias: &str, name: &str) {
        self.aliases.push((alias.to_owned(), name.to_owned()));
    }

    /// Files may have a buffer `name`, which is no weight.
    pub(crate) fn constant(&mut self, name: String) {
        self.constants.insert(name);
    }

    /// The tensors, in order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &Spec> {
        self.list.iter()
    }

    /// Refuses tensors of other lengths than the model's.
    pub(crate) fn check(
        &self,
        model: &'static str,
        argument: &'static str,
        lens: &[usize],
    ) -> Result<(), Error> {
        if self.iter().map(Spec::elements).eq(lens.iter().copied()) {
            return Ok(());
        }
        Err(Error::argument(model, argument, "the tensors of this model", "those of another"))
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        self.iter().map(Spec::elements).sum()
    }

    /// The first values of a new model. Tensor i is drawn from stream 2^64 - 1 - i of `seed`, which no training
    /// step reaches.
    pub fn init(&self, seed: u64) -> Vec<Vec<f32>> {
        (0..self.list.len()).map(|index| self.init_one(index, seed)).collect()
    }

    pub(super) fn init_one(&self, index: usize, seed: u64) -> Vec<f32> {
        let spec = &self.list[index];
        match spec.init {
            Init::Zeros => vec![0.0; spec.elements()],
            Init::Ones => vec![1.0; spec.elements()],
            Init::Normal(deviation) => normal(seed, index, deviation, spec.elements()),
        }
    }

    /// Values of all tensors under their names, each with `prefix` before it, as entries of a `safetensors` file.
    pub fn entries<'a>(
        &'a self,
        prefix: &str,
        values: &'a [Vec<f32>],
    ) -> impl Iterator<Item = (String, Entry<'a>)> {
        self.list.iter().zip(values).flat_map(move |(spec, values)| {
            let mut rest = &values[..];
            let prefix = prefix.to_owned();
            spec.parts.iter().map(move |part| {
                let (values, behind) = rest.split_at(part.elements());
                rest = behind;
                (format!("{prefix}{}", part.name), Entry { shape: part.shape.clone(), values })
            })
        })
    }

    /// The bytes of a `safetensors` file with these values.
    ///
    /// # Errors
    /// [`Error::File`] where the format refuses them.
    pub fn serialize(&self, values: &[Vec<f32>]) -> Result<Vec<u8>, Error> {
        // Older versions of Hugging Face's library read no file that does not say so.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::serialize(self.entries("", values), Some(metadata)).map_err(not_safetensors)
    }
}

/// f32 values of a tensor of a file.
pub struct Entry<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl safetensors::View for Entry<'_> {
    fn dtype(&self) -> FileDtype {
        FileDtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        bytemuck::cast_slice(self.values).into()
    }
    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// A model's weights on a backend.
pub struct Params<B: Backend> {
    pub(crate) weights: Vec<Act<B>>,
    /// The same in f32, where the operators read another type.
    pub(crate) masters: Option<Vec<F32<B>>>,
    lens: Vec<usize>,
}

impl<B: Backend> Params<B> {
    /// Puts values on a backend.
    ///
    /// # Errors
    /// What the backend says.
    pub fn upload(backend: &B, values: &[Vec<f32>]) -> Result<Self, Error> {
        let weights = values.iter().map(|values| {
            let rounded: Vec<_> = values.iter().map(|&value| B::Elem::from_f32(value)).collect();
            backend.upload(&rounded)
        });
        let weights = weights.collect::<Result<_, _>>()?;
        let masters = match <B::Elem as Dtype>::ID {
            crate::DtypeId::F32 => None,
            _ => Some(upload(backend, values)?),
        };
        Ok(Self { weights, masters, lens: values.iter().map(Vec::len).collect() })
    }

    /// Elements of each tensor.
    pub(crate) fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// The values, in f32.
    ///
    /// # Errors
    /// What the backend says.
    pub fn download(&self, backend: &B) -> Result<Vec<Vec<f32>>, Error> {
        if let Some(masters) = &self.masters {
            return download(backend, masters);
        }
        let widen =
            |values: &Act<B>| Ok(backend.read(values)?.into_iter().map(Dtype::to_f32).collect());
        self.weights.iter().map(widen).collect()
    }
}

impl<B: Backend> Index<Id> for Params<B> {
    type Output = Act<B>;
    fn index(&self, id: Id) -> &Act<B> {
        &self.weights[id.0]
    }
}

/// The gradients of a model's weights, in f32.
///
/// A backward pass writes them all. For micro-batches the first pass of a step writes, and the others add
/// ([`add`](Self::add)).
pub struct Grads<B: Backend> {
    pub(crate) buffers: Vec<F32<B>>,
    lens: Vec<usize>,
    adds: bool,
}

impl<B: Backend> Grads<B> {
    /// Zeros.
    ///
    /// # Errors
    /// What the backend says.
    pub fn zeros(backend: &B, specs: &Specs) -> Result<Self, Error> {
        let lens = specs.iter().map(Spec::elements).collect();
        Ok(Self { buffers: zeros(backend, specs)?, lens, adds: false })
    }

    /// Whether the backward passes from now on add to the gradients, or write them, as they do at first.
    pub fn add(&mut self, adds: bool) {
        self.adds = adds;
    }

    /// Whether backward passes add.
    pub(crate) fn adds(&self) -> bool {
        self.adds
    }

    /// Elements of each tensor.
    pub(crate) fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// The values.
    ///
    /// # Errors
    /// What the backend says.
    pub fn download(&self, backend: &B) -> Result<Vec<Vec<f32>>, Error> {
        download(backend, &self.buffers)
    }

    /// The gradient of a tensor, written or added.
    pub(crate) fn gradient(&mut self, id: Id) -> Gradient<'_, B::Memory> {
        let [gradient] = self.gradients([id]);
        gradient
    }

    /// Those of several tensors, for operators that have several. The ids differ.
    pub(crate) fn gradients<const N: usize>(
        &mut self,
        ids: [Id; N],
    ) -> [Gradient<'_, B::Memory>; N] {
        let adds = self.adds;
        let buffers = self.buffers.get_disjoint_mut(ids.map(|id| id.0));
        buffers.expect("different tensors of the model").map(|buffer| match adds {
            true => Gradient::Add(buffer),
            false => Gradient::Write(buffer),
        })
    }
}

impl<B: Backend> Index<Id> for Grads<B> {
    type Output = F32<B>;
    fn index(&self, id: Id) -> &F32<B> {
        &self.buffers[id.0]
    }
}

impl<B: Backend> IndexMut<Id> for Grads<B> {
    fn index_mut(&mut self, id: Id) -> &mut F32<B> {
        &mut self.buffers[id.0]
    }
}

/// Zeros in the shapes of all tensors.
pub(crate) fn zeros<B: Backend>(backend: &B, specs: &Specs) -> Result<Vec<F32<B>>, Error> {
    specs.iter().map(|spec| backend.zeros(spec.elements())).collect()
}

/// Several buffers of f32.
pub(crate) fn upload<B: Backend>(backend: &B, values: &[Vec<f32>]) -> Result<Vec<F32<B>>, Error> {
    values.iter().map(|values| backend.upload(values)).collect()
}

/// The contents of several buffers.
pub(crate) fn download<B: Backend>(
    backend: &B,
    buffers: &[F32<B>],
) -> Result<Vec<Vec<f32>>, Error> {
    buffers.iter().map(|buffer| backend.read(buffer)).collect()
}

pub(crate) fn not_safetensors(error: safetensors::SafeTensorError) -> Error {
    Error::File { path: "safetensors".into(), reason: error.to_string() }
}

/// Normal numbers by Box and Muller's method.
fn normal(seed: u64, index: usize, deviation: f32, count: usize) -> Vec<f32> {
    let mut philox = Philox::from_u64_seed_stream(seed, u64::MAX - index as u64);
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // 1 - u lies above 0, so its logarithm is finite.
        let radius = (-2.0 * f64::from(1.0 - u32_to_unit_f32(philox.next_u32())).ln()).sqrt();
        let angle = std::f64::consts::TAU * f64::from(u32_to_unit_f32(philox.next_u32()));
        let (sine, cosine) = angle.sin_cos();
        values.extend([cosine, sine].map(|of| (radius * of) as f32 * deviation));
    }
    values.truncate(count);
    values
}
