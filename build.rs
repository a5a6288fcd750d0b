//! Compiles `kernels/<operator>.cu` and, with feature `transformer`, `kernels/transformer/*.cu`: with nvcc to
//! one fatbin each (feature `cuda`), with the machine's C++ compiler for the host (feature `emulator`).
//! Without these features it does nothing.

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
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    /// Compiles every kernel, the tests' faulty ones and the emulator's runtime with the
    /// machine's C++ compiler into one static library.
    pub fn compile() {
        let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("kernels");
        let out = PathBuf::from(env::var("OUT_DIR").unwrap());
        let mut cpp = cc::Build::new();
        cpp.cpp(true).std("c++17").opt_level(2).warnings(false);
        cpp.include(kernels.join("emulator")).flag_if_supported("-fno-exceptions");
        // The contract's arithmetic: no contraction of a * b + c, and nothing of fast-math.
        cpp.flag("-ffp-contract=off");
        // nvcc lets memory be looked at as another type.
        cpp.flag("-fno-strict-aliasing");

        // The kernels are instrumented; watch.cpp says for what.
        let mut build = cpp.clone();
        build.include(&kernels);
        build.flag_if_supported("-fsanitize=thread,bounds,shift-exponent");

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
             extern void (*const fused_dropout_emulator_units[])() = {{{table}}};\n}}\n"
        );
        let objects = build.try_compile_intermediates().unwrap_or_else(refuse);
        cpp.objects(objects);
        cpp.file(kernels.join("emulator/runtime.cpp")).file(kernels.join("emulator/watch.cpp"));
        cpp.file(write(&out, "units.cpp", &table));
        cpp.try_compile("fused_dropout_emulator").unwrap_or_else(refuse);
    }

    /// Ends the build with a message that says what is missing.
    fn refuse<T>(error: cc::Error) -> T {
        eprintln!(
            "error: feature `emulator` needs a C++17 compiler for a Unix system (g++ or clang++; the \
             environment variable CXX chooses one), and it must accept the kernels: {error}"
        );
        std::process::exit(1)
    }

    /// `kernels/*.cu`, the transformer's where it is asked for, and those that only the emulator's tests use.
    fn sources(kernels: &Path) -> Vec<PathBuf> {
        let mut folders = vec![kernels.to_owned(), kernels.join("emulator")];
        if cfg!(feature = "transformer") {
            folders.push(kernels.join("transformer"));
        }
        let mut sources: Vec<_> = folders
            .iter()
            .flat_map(|folder| fs::read_dir(folder).expect("a folder of kernels"))
            .map(|entry| entry.expect("an entry of a folder of kernels").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
            .collect();
        sources.sort();
        sources
    }

    fn write(out: &Path, name: &str, text: &str) -> PathBuf {
        let path = out.join(name);
        fs::write(&path, text).expect("OUT_DIR is writable");
        path
    }
}
