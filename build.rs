//! Compiles `kernels/<operator>.cu`: with nvcc to one fatbin each (feature `cuda`), with the machine's
//! C++ compiler for the host (feature `emulator`). Without features it does nothing.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    // docs.rs and the like: no compiler is needed to read the documentation.
    if std::env::var_os("DOCS_RS").is_some() {
        return;
    }
    #[cfg(feature = "cuda")]
    cuda::compile();
    #[cfg(feature = "emulator")]
    emulator::compile();
}

#[cfg(feature = "cuda")]
mod cuda {
    pub fn compile() {}
}

#[cfg(feature = "emulator")]
mod emulator {
    pub fn compile() {}
}
