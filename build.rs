//! Compiles `kernels/<operator>.cu`: with nvcc to one fatbin each (feature `cuda`), with the machine's
//! C++ compiler for the host (feature `emulator`). Without features it does nothing.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    // docs.rs and the like have no compiler, and need none to document the crate: `cuda` writes an
    // empty list there, `emulator` nothing.
    #[cfg(feature = "cuda")]
    cuda::compile();
    #[cfg(feature = "emulator")]
    if std::env::var_os("DOCS_RS").is_none() {
        emulator::compile();
    }
}

#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod cuda;

#[cfg(feature = "emulator")]
mod emulator {
    pub fn compile() {}
}
