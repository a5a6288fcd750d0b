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
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    /// Compiles every `kernels/*.cu`, the tests' faulty kernels and the emulator's runtime with the
    /// machine's C++ compiler into one static library.
    pub fn compile() {
        let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("kernels");
        let out = PathBuf::from(env::var("OUT_DIR").unwrap());
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).warnings(false);
        // The contract's arithmetic: no contraction of a * b + c, and nothing of fast-math.
        build.flag("-ffp-contract=off").flag_if_supported("-Wno-unknown-pragmas");
        build.include(&kernels).include(kernels.join("emulator"));
        build.file(kernels.join("emulator/runtime.cpp"));

        let mut units = String::new();
        let mut table = String::new();
        for source in sources(&kernels) {
            let unit = source.file_stem().unwrap().to_str().unwrap().to_owned();
            // The compiler takes a `.cu` file for a linker script, so a `.cpp` file includes it.
            let text = format!(
                "#include \"builtins.h\"\n#include {source:?}\n\
                 extern \"C\" void fused_dropout_emulator_unit_{unit}() {{}}\n"
            );
            build.file(write(&out, &format!("{unit}.cpp"), &text));
            units += &format!("void fused_dropout_emulator_unit_{unit}();\n");
            table += &format!("fused_dropout_emulator_unit_{unit}, ");
        }
        // Kernels register themselves before main. A linker takes an object file out of a library
        // only if somebody refers to it: this table does.
        let table = format!(
            "extern \"C\" {{\n{units}\
             void (*const fused_dropout_emulator_units[])() = {{{table}}};\n}}\n"
        );
        // `extern` because a const object of namespace scope is otherwise local to its file.
        let table = table.replace("void (*const fused", "extern void (*const fused");
        build.file(write(&out, "units.cpp", &table));
        if let Err(error) = build.try_compile("fused_dropout_emulator") {
            eprintln!(
                "error: feature `emulator` needs a C++17 compiler (g++ or clang++; CXX chooses one), \
                 and it must accept the kernels: {error}"
            );
            std::process::exit(1);
        }
    }

    /// `kernels/*.cu` in order of their names, and the faulty kernels.
    fn sources(kernels: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(kernels).expect("the folder kernels");
        let mut sources: Vec<_> = entries
            .map(|entry| entry.expect("an entry of the folder kernels").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .collect();
        sources.sort();
        sources.push(kernels.join("emulator/faults.cu"));
        sources
    }

    fn write(out: &Path, name: &str, text: &str) -> PathBuf {
        let path = out.join(name);
        fs::write(&path, text).expect("OUT_DIR is writable");
        path
    }
}
