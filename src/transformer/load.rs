//! Weights from files as they are published: with and without the base model's prefix, under older names, tied ones under
//! either name, in any float type, in one file or in several, and with the heads of other models.

use super::params::{Part, Specs, not_safetensors};
use super::refuse;
use crate::error::Error;
use safetensors::tensor::{Dtype as FileDtype, SafeTensors, TensorView};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Weights from files, and where these differ from the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// In f32, in the order of the tensors.
    pub values: Vec<Vec<f32>>,
    /// Tensors of the model's head that the files lack. They have the values of a new model.
    pub initialised: Vec<String>,
    /// Tensors of the files that are none of this model's: those of other heads, of layers that it has not, of adapters.
    pub passed_over: Vec<String>,
}

impl Loaded {
    /// The values of files that have every tensor of the model and no other.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the first tensor that was initialised anew or passed over.
    pub fn complete(self) -> Result<Vec<Vec<f32>>, Error> {
        if let Some(name) = self.initialised.first() {
            return Err(missing(name));
        }
        self.passed_over.first().map_or(Ok(self.values), |name| Err(unknown(name)))
    }
}

/// A line of each kind of tensor that there is: what a program shows.
impl fmt::Display for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [("initialised anew", &self.initialised), ("passed over", &self.passed_over)];
        let lines = kinds.iter().filter(|(_, names)| !names.is_empty());
        let lines: Vec<_> =
            lines.map(|(kind, names)| format!("{kind}: {}", names.join(", "))).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl Specs {
    /// The weights in a `safetensors` file, in the files that a `model.safetensors.index.json` names, or in a folder
    /// with either (the first, where it has both).
    ///
    /// What is taken is what Hugging Face's `from_pretrained` takes, but for a tensor below the heads that is missing,
    /// which is an error. Names may lack the base model's prefix (`transformer.`, `bert.`); `gamma` and `beta`
    /// are `weight` and `bias`; a tied tensor may have either name or both; f16, bf16 and f64 are converted; buffers
    /// that follow from the model (masks, positions) are not looked at. A head that the files lack is that of
    /// [`init`](Self::init) with `seed`, and tensors that are none of the model's are passed over; [`Loaded::complete`]
    /// refuses both.
    ///
    /// # Errors
    /// [`Error::Tensor`] with the tensor that is missing, of another shape or type, or, under two names, of two values;
    /// [`Error::File`] with the file that cannot be read or is none of these.
    pub fn open(&self, path: &Path, seed: u64) -> Result<Loaded, Error> {
        let files = read_all(path)?;
        let shards = files.iter().map(|(path, bytes)| {
            SafeTensors::deserialize(bytes).map_err(|error| not_read(path, error))
        });
        self.load_shards(&shards.collect::<Result<Vec<_>, _>>()?, seed)
    }

    /// As [`open`](Self::open), from the bytes of the files.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn load(&self, files: &[impl AsRef<[u8]>], seed: u64) -> Result<Loaded, Error> {
        let shards = files
            .iter()
            .map(|bytes| SafeTensors::deserialize(bytes.as_ref()).map_err(not_safetensors));
        self.load_shards(&shards.collect::<Result<Vec<_>, _>>()?, seed)
    }

    /// Every tensor's values from the bytes of a file that has all of them and no other: [`load`](Self::load), complete.
    ///
    /// # Errors
    /// As [`open`](Self::open), and as [`Loaded::complete`].
    pub fn parse(&self, bytes: &[u8]) -> Result<Vec<Vec<f32>>, Error> {
        self.load(&[bytes], 0)?.complete()
    }

    fn load_shards(&self, shards: &[SafeTensors<'_>], seed: u64) -> Result<Loaded, Error> {
        let names = Names::new(self);
        let mut found: HashMap<&str, Vec<Stored<'_>>> = HashMap::new();
        let mut passed_over = Vec::new();
        for (name, view) in shards.iter().flat_map(SafeTensors::iter) {
            match names.place(name) {
                Place::Part(part) => found.entry(part).or_default().push(Stored { name, view }),
                Place::Constant => {}
                Place::Elsewhere => passed_over.push(name.to_owned()),
            }
        }
        passed_over.sort();
        let (mut values, mut initialised) = (Vec::new(), Vec::new());
        for (index, spec) in self.iter().enumerate() {
            let mut tensor = Vec::new();
            for part in &spec.parts {
                if let Some(copies) = found.remove(part.name.as_str()) {
                    tensor.extend(agreed(part, copies)?);
                    continue;
                }
                if !self.is_head(index) {
                    return Err(missing(&part.name));
                }
                initialised.push(part.name.clone());
                let new = self.init_one(index, seed);
                tensor.extend_from_slice(&new[tensor.len()..][..part.elements()]);
            }
            values.push(tensor);
        }
        Ok(Loaded { values, initialised, passed_over })
    }
}

/// What the names in files may mean.
struct Names<'a> {
    specs: &'a Specs,
    /// The part of each name that files may use.
    parts: HashMap<&'a str, &'a str>,
}

/// Where a tensor of a file belongs.
enum Place<'a> {
    /// To the part of this name.
    Part(&'a str),
    /// To nothing that is stored: it follows from the model.
    Constant,
    /// To another model.
    Elsewhere,
}

impl<'a> Names<'a> {
    fn new(specs: &'a Specs) -> Self {
        let own = specs.iter().flat_map(|spec| &spec.parts).map(|part| part.name.as_str());
        let aliases = specs.aliases.iter().map(|(alias, name)| (alias.as_str(), name.as_str()));
        let parts = own.map(|name| (name, name)).chain(aliases).collect();
        Self { specs, parts }
    }

    fn place(&self, name: &str) -> Place<'a> {
        let name = modern(name);
        let full = format!("{}{name}", self.specs.base);
        if let Some(part) = [&name, &full].iter().find_map(|name| self.parts.get(name.as_str())) {
            return Place::Part(part);
        }
        match [name.as_str(), &full].iter().any(|&name| self.specs.constants.contains(name)) {
            true => Place::Constant,
            false => Place::Elsewhere,
        }
    }
}

/// Norms' tensors as they are called now.
fn modern(name: &str) -> String {
    match name.rsplit_once('.') {
        Some((of, "gamma")) => format!("{of}.weight"),
        Some((of, "beta")) => format!("{of}.bias"),
        _ => name.to_owned(),
    }
}

/// A tensor of a file that is a part of the model's.
struct Stored<'a> {
    name: &'a str,
    view: TensorView<'a>,
}

/// The values that all copies of a part have, from the one of the widest type.
fn agreed(part: &Part, mut copies: Vec<Stored<'_>>) -> Result<Vec<f32>, Error> {
    copies.sort_by_key(|copy| (copy.name != part.name, copy.name));
    let (first, others) = copies.split_first().expect("at least one copy");
    let (mut values, mut dtype) = (to_f32(part, first)?, first.view.dtype());
    for copy in others {
        let (more, other) = (to_f32(part, copy)?, copy.view.dtype());
        if !values.iter().zip(&more).all(|(&a, &b)| is_same(a, dtype, b, other)) {
            let expected = format!("the values of {}", first.name);
            return Err(refuse::tensor(copy.name, expected, "others"));
        }
        if other.bitsize() > dtype.bitsize() {
            (values, dtype) = (more, other);
        }
    }
    Ok(values)
}

/// Whether two values are one, as far as the types that they were stored in can tell.
fn is_same(a: f32, a_dtype: FileDtype, b: f32, b_dtype: FileDtype) -> bool {
    let same = |a: f32, b: f32| a == b || (a.is_nan() && b.is_nan());
    same(a, b) || same(rounded(a, b_dtype), b) || same(a, rounded(b, a_dtype))
}

fn rounded(value: f32, dtype: FileDtype) -> f32 {
    match dtype {
        FileDtype::F16 => half::f16::from_f32(value).to_f32(),
        FileDtype::BF16 => half::bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

fn to_f32(part: &Part, Stored { name, view }: &Stored<'_>) -> Result<Vec<f32>, Error> {
    if part.shape != view.shape() {
        return Err(refuse::tensor(
            name,
            format!("{:?}", part.shape),
            format!("{:?}", view.shape()),
        ));
    }
    let bytes = view.data();
    let halves = || bytes.as_chunks::<2>().0.iter().copied();
    match view.dtype() {
        FileDtype::F16 => Ok(halves().map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
        FileDtype::BF16 => Ok(halves().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
        FileDtype::F32 => {
            Ok(bytes.as_chunks::<4>().0.iter().copied().map(f32::from_le_bytes).collect())
        }
        FileDtype::F64 => {
            let wide = bytes.as_chunks::<8>().0.iter().copied().map(f64::from_le_bytes);
            Ok(wide.map(|value| value as f32).collect())
        }
        other => Err(refuse::tensor(name, "F16, BF16, F32 or F64", format!("{other:?}"))),
    }
}

/// Which file has each tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The file or files that a path stands for, and their bytes.
fn read_all(path: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, Error> {
    if !path.is_dir() {
        return read_files(path);
    }
    let found = [FILE, INDEX].map(|name| path.join(name)).into_iter().find(|path| path.exists());
    let found = found.ok_or_else(|| not_read(path, format!("no {FILE} and no {INDEX} in it")))?;
    read_files(&found)
}

fn read_files(path: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, Error> {
    let bytes = read(path)?;
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok(vec![(path.to_owned(), bytes)]);
    }
    let text = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&bytes);
    let index: Index = serde_json::from_slice(text).map_err(|error| not_read(path, error))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &index.weight_map {
        shards.entry(file).or_default().push(tensor);
    }
    let read_shard = |(file, tensors): (&str, Vec<&str>)| {
        // A file beside the index, or below it: no other is its business.
        if !Path::new(file).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(not_read(path, format!("expected names of files beside it, got {file}")));
        }
        let shard = path.with_file_name(file);
        let bytes = read(&shard)?;
        let has = SafeTensors::deserialize(&bytes).map_err(|error| not_read(&shard, error))?;
        match tensors.into_iter().find(|tensor| has.tensor(tensor).is_err()) {
            Some(tensor) => {
                Err(refuse::tensor(tensor, format!("a tensor of {}", shard.display()), "none"))
            }
            None => Ok((shard, bytes)),
        }
    };
    shards.into_iter().map(read_shard).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|error| not_read(path, error))
}

fn not_read(path: &Path, reason: impl ToString) -> Error {
    Error::File { path: path.display().to_string(), reason: reason.to_string() }
}

fn missing(name: &str) -> Error {
    refuse::tensor(name, "a tensor", "none")
}

fn unknown(name: &str) -> Error {
    refuse::tensor(name, "a tensor of this model", "an unknown one")
}
