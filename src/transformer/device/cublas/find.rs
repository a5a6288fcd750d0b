//! Finding cuBLAS: the library of the system, or one of a Python environment.

use crate::error::Error;
use libloading::Library;
use std::error::Error as _;
use std::ffi::{OsStr, c_void};
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names of the library, newest first: whose functions this file calls have been the same since version 11.
const NAMES: &[&str] = if cfg!(windows) {
    &["cublas64_13.dll", "cublas64_12.dll"]
} else {
    &["libcublas.so.13", "libcublas.so.12"]
};

/// What cuBLAS itself loads, from the same folder, each for the name at its place in [`NAMES`].
const HELPERS: &[&str] = if cfg!(windows) {
    &["cublasLt64_13.dll", "cublasLt64_12.dll"]
} else {
    &["libcublasLt.so.13", "libcublasLt.so.12"]
};

/// What this crate calls: cudarc panics where one is missing.
const FUNCTIONS: &[&[u8]] = &[
    b"cublasCreate_v2\0",
    b"cublasDestroy_v2\0",
    b"cublasSetStream_v2\0",
    b"cublasSetWorkspace_v2\0",
    b"cublasSetMathMode\0",
    b"cublasGemmStridedBatchedEx\0",
    b"cublasGemmBatchedEx\0",
];

/// Loads cuBLAS where cudarc will find it; an error where there is none. cudarc looks for it by name and
/// panics without it. A library that is loaded already is found by its name wherever it lies, so one of a
/// Python environment is loaded here by its path.
pub(super) fn find() -> Result<(), Error> {
    let mut reason = String::new();
    let folders = folders();
    let paths = folders.iter().flat_map(|folder| (0..NAMES.len()).map(move |i| (Some(folder), i)));
    for (folder, i) in (0..NAMES.len()).map(|i| (None, i)).chain(paths) {
        match load(folder.map(PathBuf::as_path), i) {
            Ok(()) => return Ok(()),
            // The system's answer to the first name is the one that matters, unless a file is there.
            Err(error)
                if reason.is_empty() || folder.is_some_and(|f| f.join(NAMES[i]).exists()) =>
            {
                reason = error;
            }
            Err(_) => {}
        }
    }
    let reason = format!(
        "{reason} (looked for {NAMES:?} where the system does and in {} folders more; the wheel \
         nvidia-cublas in the Python environment that is active or on the PATH is enough)",
        folders.len()
    );
    Err(Error::Unavailable { backend: "cublas", reason })
}

/// Loads name `i`, from `folder` or from where the system looks, and keeps it for as long as the process
/// lives.
fn load(folder: Option<&Path>, i: usize) -> Result<(), String> {
    let path = |name: &str| folder.map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
    let words = |error: libloading::Error| {
        error.source().map_or_else(|| error.to_string(), ToString::to_string)
    };
    // Without its helper the library says so itself.
    let helper = folder.and_then(|_| open(&path(HELPERS[i])).ok());
    let library = open(&path(NAMES[i])).map_err(words)?;
    for &function in FUNCTIONS {
        // SAFETY: the symbol is not used, only looked for.
        unsafe { library.get::<*const c_void>(function) }.map_err(words)?;
    }
    std::mem::forget((helper, library));
    Ok(())
}

/// Loads a library, on Unix with its symbols visible to those that are loaded later.
fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: loading a library runs its initialisers; cuBLAS's have no conditions.
    #[cfg(unix)]
    return unsafe {
        use libloading::os::unix;
        unix::Library::open(Some(path), unix::RTLD_LAZY | unix::RTLD_GLOBAL).map(Library::from)
    };
    // SAFETY: as above.
    #[cfg(not(unix))]
    return unsafe { Library::new(path) };
}

/// Where cuBLAS may lie, besides where the system looks: CUDA installations, and the wheels of Python
/// environments.
fn folders() -> Vec<PathBuf> {
    let from = |variable: &str| env::var_os(variable).map(PathBuf::from);
    let mut folders = Vec::new();
    let toolkits = [from("CUDA_HOME"), from("CUDA_PATH"), Some(PathBuf::from("/usr/local/cuda"))];
    for toolkit in toolkits.into_iter().flatten() {
        folders.extend(["lib64", "lib", "bin/x64", "bin"].map(|folder| toolkit.join(folder)));
    }
    let active = [from("VIRTUAL_ENV"), from("CONDA_PREFIX")].into_iter().flatten();
    let found = environments(&env::var_os("PATH").unwrap_or_default());
    folders.extend(active.chain(found).flat_map(|environment| wheels(&environment)));
    folders.retain(|folder| folder.is_dir());
    folders
}

/// The Python environments of the `python3` on a PATH: where it lies, and where it points to, which for a
/// virtual environment is what it was made from; and the one that Debian's pip installs into.
fn environments(path: &OsStr) -> Vec<PathBuf> {
    let python = env::split_paths(path).map(|folder| folder.join("python3")).find(|p| p.is_file());
    let resolved = python.as_deref().and_then(|python| fs::canonicalize(python).ok());
    let around = |python: PathBuf| Some(python.parent()?.parent()?.to_owned());
    let mut environments: Vec<_> =
        [python, resolved].into_iter().flatten().filter_map(around).collect();
    environments.push(PathBuf::from("/usr/local"));
    environments
}

/// Folders with libraries in an environment's wheels, which Debian keeps in `dist-packages`.
fn wheels(environment: &Path) -> Vec<PathBuf> {
    let lib = environment.join(if cfg!(windows) { "Lib" } else { "lib" });
    let mut folders = vec![lib.clone()];
    for inner in list(&lib).into_iter().chain([lib]) {
        for packages in ["site-packages", "dist-packages"] {
            for package in list(&inner.join(packages).join("nvidia")) {
                folders.extend(["lib", "bin/x86_64", "bin"].map(|folder| package.join(folder)));
            }
        }
    }
    folders
}

/// A folder's entries in the order of their names; none where it cannot be read.
fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PyTorch's environment, not activated, and a link to its Python from elsewhere.
    #[cfg(unix)]
    #[test]
    fn wheels_of_the_python_on_the_path_are_found() {
        let root = env::temp_dir().join(format!("fused-dropout-wheels-{}", std::process::id()));
        let lib = root.join("torch/lib/python3.12/site-packages/nvidia/cu13/lib");
        for folder in [&lib, &root.join("torch/bin"), &root.join("elsewhere/bin")] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(root.join("torch/bin/python3"), "").unwrap();
        let link = root.join("elsewhere/bin/python3");
        std::os::unix::fs::symlink(root.join("torch/bin/python3"), link).unwrap();
        let looked_in = |folder: &str| -> Vec<PathBuf> {
            let path = env::join_paths([root.join("nothing"), root.join(folder)]).unwrap();
            environments(&path).iter().flat_map(|environment| wheels(environment)).collect()
        };
        let found = ["torch/bin", "elsewhere/bin"].map(|folder| looked_in(folder).contains(&lib));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, [true; 2]);
    }

    /// Whatever this machine has: an answer, and no panic.
    #[test]
    fn looking_for_the_library_is_no_panic() {
        if let Err(error) = find() {
            assert!(matches!(error, Error::Unavailable { backend: "cublas", .. }), "{error}");
        }
    }
}
