//! Files in and out.

use super::encoding::{self, Decoded};
use super::say;
use anyhow::{Context, Result, bail};
use encoding_rs::Encoding;
use fused_dropout::transformer::Specs;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file's bytes.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// SHA-256 in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where a file lies. JSON has it as text if it is that, otherwise as serde writes an `OsString`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Place(PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Other(OsString),
}

impl From<Written> for Place {
    fn from(written: Written) -> Self {
        match written {
            Written::Text(path) => Self(path.into()),
            Written::Other(path) => Self(path.into()),
        }
    }
}

impl From<Place> for Written {
    fn from(Place(path): Place) -> Self {
        path.into_os_string().into_string().map_or_else(Self::Other, Self::Text)
    }
}

impl Place {
    /// A path as it was given. The same from every folder, if it is not a pipe's.
    pub fn new(path: &Path) -> Self {
        Self(path.canonicalize().unwrap_or_else(|_| path.to_owned()))
    }

    pub fn read(&self) -> Result<Vec<u8>> {
        read(&self.0)
    }

    /// A file's text, and to the standard error what its reader should know.
    pub fn decode(&self, bytes: &[u8], encoding: Option<&'static Encoding>) -> Result<String> {
        let path = self.0.display();
        let Decoded { text, remark } =
            encoding::decode(bytes, encoding).with_context(|| format!("cannot read {path}"))?;
        if let Some(remark) = remark {
            say::warn(format_args!("{path}: {remark}"));
        }
        Ok(text)
    }

    /// Where the bytes that were read can be read again: a pipe's are kept in the folder.
    pub fn lasting(self, folder: &Folder, name: &str, bytes: &[u8]) -> Result<Self> {
        // What has a path of its own: a here-document behind /dev/stdin is a file that has none any more.
        if self.0.canonicalize().is_ok_and(|path| path.is_file()) {
            return Ok(self);
        }
        // Another text's copy, which another run may need, has another name.
        let name = format!("{name}-{}.txt", &sha256(bytes)[..12]);
        folder.write(&name, bytes)?;
        Ok(Self::new(&folder.path(&name)))
    }
}

/// A folder that a run writes to.
#[derive(Clone, PartialEq)]
pub struct Folder(PathBuf);

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Folder {
    /// The name of a checkpoint.
    pub const CHECKPOINT: &str = "checkpoint.safetensors";

    /// The name of a trained model's weights.
    pub const MODEL: &str = "model.safetensors";

    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// One in it.
    pub fn inner(&self, name: &str) -> Self {
        Self(self.path(name))
    }

    pub fn as_path(&self) -> &Path {
        &self.0
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The checkpoint of the run.
    pub fn checkpoint(&self) -> PathBuf {
        self.path(Self::CHECKPOINT)
    }

    /// Makes it, with those above it.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.0).with_context(|| format!("cannot make {}", self.0.display()))
    }

    /// Writes a file as a whole or not at all: under another name first, which then replaces it.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, part) = (self.path(name), self.path(&format!("{name}.part")));
        let write = || {
            let mut file = File::create(&part)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&part, &path)
        };
        // What was written of it is of no use to anybody.
        let written = write().inspect_err(|_| drop(fs::remove_file(&part)));
        written.with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes a value as JSON.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        self.write(name, (serde_json::to_string_pretty(value)? + "\n").as_bytes())
    }

    /// Writes what Hugging Face's `from_pretrained` reads.
    pub fn write_model(&self, config: &str, specs: &Specs, weights: &[Vec<f32>]) -> Result<()> {
        self.write("config.json", config.as_bytes())?;
        self.write(Self::MODEL, &specs.serialize(weights)?)
    }

    /// Whether an earlier run, or this one, left a checkpoint.
    pub fn has_checkpoint(&self) -> bool {
        self.checkpoint().exists()
    }

    /// Whether there is a model, whosever it is.
    pub fn has_model(&self) -> bool {
        self.path(Self::MODEL).exists()
    }

    /// Keeps other runs out of the folder as long as the file is open: the system gives it free with the process, however
    /// that ends.
    pub fn lock(&self) -> Result<File> {
        let path = self.path(".lock");
        let cannot = || format!("cannot lock {}", path.display());
        let file = File::options().create(true).append(true).open(&path).with_context(cannot)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                bail!("another run is writing to {self}: wait for its end, or take another --out")
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
        }
    }

    /// Removes its checkpoint, which must be there.
    pub fn remove_checkpoint(&self) -> Result<()> {
        let path = self.checkpoint();
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}
