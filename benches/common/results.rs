//! Where criterion keeps what it has recorded.

use std::env;
use std::path::{Path, PathBuf};

/// The folder of a benchmark's newest results: `estimates.json`, `sample.json`. Names without a character that a
/// file's name cannot have.
pub fn newest(group: &str, name: &str) -> PathBuf {
    root().join(group).join(name).join("new")
}

fn root() -> PathBuf {
    if let Some(folder) = env::var_os("CRITERION_HOME") {
        return folder.into();
    }
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Path::new(env!("CARGO_MANIFEST_DIR")).join(target).join("criterion")
}
