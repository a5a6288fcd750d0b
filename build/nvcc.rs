//! Feature `cuda`: finds nvcc, compiles every `kernels/<operator>.cu` to one fatbin, and writes
//! `fatbins.rs`, the list that `src/cuda` includes.
//!
//! Environment:
//! - `FUSED_DROPOUT_NVCC`: the nvcc to use, and no other.
//! - `FUSED_DROPOUT_ARCHS`: what to compile for, separated by commas: `90` is machine code for
//!   sm_90, `90+ptx` the same and the PTX that it came from. See [`DEFAULT_ARCHS`].

use std::env::consts::EXE_SUFFIX;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, fs, io, thread};

/// Machine code for Ampere and Ada (8.x), Hopper (9.0) and both Blackwells (10.x, 12.x): a chip runs
/// the code of lower numbers of its own generation. Any other chip needs PTX, which the driver
/// compiles on first use and which runs on every higher number: compute_90 for chips to come and for
/// 11.0, compute_80 for the embedded 8.7, which takes no machine code of 8.0.
const DEFAULT_ARCHS: &str = "80+ptx,90+ptx,100,120";

/// PTX of a later toolkit needs a later driver than the 580 series.
const NEWEST_TOOLKIT: (u32, u32) = (13, 0);

/// Everything that nvcc needs, for somebody who has none.
const WHEELS: &str = "nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
                      nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85";

/// Whose change may mean another nvcc or other code. PATH is missing: it differs between a shell and
/// an editor, and each change would compile all kernels again.
const VARIABLES: [&str; 10] = [
    "FUSED_DROPOUT_NVCC",
    "FUSED_DROPOUT_ARCHS",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "NVCC_CCBIN",
    "NVCC_PREPEND_FLAGS",
    "NVCC_APPEND_FLAGS",
];

/// A source with half types, for the trial that an nvcc must pass: it fails where the compiler's
/// other programs, the headers or the host compiler are missing.
const TRIAL: &str = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n\
    extern \"C\" __global__ void trial(__half* y) { *y = __float2half_rn(0.5f); }\n";

/// Compiles the kernels; on a failure prints what to do about it and ends the build.
pub fn compile() {
    println!("cargo::rerun-if-changed=build");
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // docs.rs has no compiler, and documenting needs no kernels.
    if env::var_os("DOCS_RS").is_some() {
        return write_list(&out, "none", "", &[]);
    }
    if let Err(message) = compile_into(&out) {
        eprintln!("error: {message}");
        std::process::exit(1);
    }
}

fn compile_into(out: &Path) -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let kernels = root.join("kernels");
    let mut flags = read_flags(&kernels.join("nvcc-flags.txt"))?;
    let archs = env::var("FUSED_DROPOUT_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.into());
    flags.extend(gencode(&archs)?);

    let nvcc = find(out, &flags)?;
    println!("cargo::rerun-if-changed={}", nvcc.path.display());
    if nvcc.version > NEWEST_TOOLKIT {
        let ((major, minor), (most, least)) = (nvcc.version, NEWEST_TOOLKIT);
        println!(
            "cargo::warning=nvcc {major}.{minor} is newer than {most}.{least}: drivers of the 580 \
             series cannot load its PTX"
        );
    }
    let sources = sources(&kernels)?;
    let keys: Vec<String> =
        sources.iter().map(|source| key(&nvcc, &flags, source)).collect::<Result<_, _>>()?;
    let changed: Vec<usize> =
        (0..sources.len()).filter(|&i| !is_current(out, &sources[i], &keys[i])).collect();
    let jobs: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    flags.push(format!("--threads={}", (jobs / changed.len().max(1)).max(1)));
    let next = AtomicUsize::new(0);
    // `cargo build -vv` shows a line a kernel.
    let work = || {
        while let Some(&i) = changed.get(next.fetch_add(1, Ordering::Relaxed)) {
            let start = Instant::now();
            compile_one(&nvcc.path, &flags, &sources[i], out)?;
            let done = out.join(name(&sources[i])).with_extension("key");
            fs::write(&done, &keys[i]).map_err(|error| format!("{}: {error}", done.display()))?;
            eprintln!("compiled {}.cu, {:.0} s", name(&sources[i]), start.elapsed().as_secs_f32());
        }
        Ok::<(), String>(())
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
        running.into_iter().try_for_each(|one| one.join().expect("`work` does not panic"))
    })?;
    let (major, minor) = nvcc.version;
    write_list(out, &format!("{major}.{minor}"), &archs, &sources);
    Ok(())
}

/// Everything that a kernel's code follows from: the compiler, its flags, the source and the headers that it includes.
fn key(nvcc: &Nvcc, flags: &[String], source: &Path) -> Result<String, String> {
    let mut files = vec![source.to_owned()];
    let mut text = format!("{} {:?}\n{}\n", nvcc.path.display(), nvcc.version, flags.join(" "));
    let mut at = 0;
    while let Some(file) = files.get(at).cloned() {
        let content =
            fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))?;
        for line in content.lines().filter_map(|line| line.strip_prefix("#include \"")) {
            let header = file.with_file_name(line.trim_end().trim_end_matches('"'));
            if !files.contains(&header) {
                files.push(header);
            }
        }
        text += &content;
        at += 1;
    }
    Ok(text)
}

/// Whether the fatbin of an earlier build is what this one would compile.
fn is_current(out: &Path, source: &Path, key: &str) -> bool {
    let built = out.join(name(source));
    let known = fs::read_to_string(built.with_extension("key"));
    built.with_extension("fatbin").is_file() && known.is_ok_and(|known| known == key)
}

/// `kernels/*.cu`, and the transformer's where it is asked for, in the order of their names.
fn sources(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let mut files = list(kernels);
    if cfg!(feature = "transformer") {
        files.extend(list(&kernels.join("transformer")));
    }
    let mut sources: Vec<_> = files
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}

/// The flags of `nvcc-flags.txt`: one a line, `#` begins a comment.
fn read_flags(path: &Path) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let lines = text.lines().map(str::trim);
    Ok(lines.filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect())
}

/// `80,90+ptx` as nvcc takes it.
fn gencode(archs: &str) -> Result<Vec<String>, String> {
    archs
        .split(',')
        .map(|entry| {
            let entry = entry.trim();
            let (arch, ptx) = entry.strip_suffix("+ptx").map_or((entry, false), |a| (a, true));
            // 90a and 100f are variants for one chip or family.
            let digits = arch.strip_suffix(['a', 'f']).unwrap_or(arch);
            if digits.len() < 2 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(format!(
                    "FUSED_DROPOUT_ARCHS={archs}: expected a list like 80,90+ptx, got {entry:?} in it"
                ));
            }
            let code = if ptx { format!("[sm_{arch},compute_{arch}]") } else { format!("sm_{arch}") };
            Ok(format!("--generate-code=arch=compute_{arch},code={code}"))
        })
        .collect()
}

fn compile_one(nvcc: &Path, flags: &[String], source: &PathBuf, out: &Path) -> Result<(), String> {
    let fatbin = out.join(name(source)).with_extension("fatbin");
    run(Command::new(nvcc).arg("--fatbin").args(flags).arg(source).arg("-o").arg(fatbin))
        .map(|text| {
            for line in text.lines().filter(|line| !line.trim().is_empty()) {
                println!("cargo::warning={line}");
            }
        })
        .map_err(|error| {
            format!("{} does not compile {}:\n{error}", nvcc.display(), source.display())
        })
}

/// Writes the list of fatbins as Rust.
fn write_list(out: &Path, toolkit: &str, archs: &str, sources: &[PathBuf]) {
    let mut text = format!("pub(super) const TOOLKIT: &str = {toolkit:?};\n");
    writeln!(text, "pub(super) const ARCHS: &str = {archs:?};").expect("a String takes it");
    text += "pub(super) const FATBINS: &[(&str, &[u8])] = &[\n";
    for source in sources {
        let operator = name(source);
        let path = format!("concat!(env!(\"OUT_DIR\"), \"/{operator}.fatbin\")");
        writeln!(text, "    ({operator:?}, include_bytes!({path})),").expect("a String takes it");
    }
    text += "];\n";
    fs::write(out.join("fatbins.rs"), text).expect("OUT_DIR is writable");
}

/// `dropout_add` of `kernels/dropout_add.cu`.
fn name(source: &Path) -> &str {
    source.file_stem().and_then(|stem| stem.to_str()).expect("kernels have names in ASCII")
}

/// A working nvcc.
struct Nvcc {
    path: PathBuf,
    version: (u32, u32),
}

/// The first nvcc that passes the trial with `flags`, or a message that tells what was searched.
fn find(out: &Path, flags: &[String]) -> Result<Nvcc, String> {
    let trial = out.join("trial.cu");
    fs::write(&trial, TRIAL).map_err(|error| format!("{}: {error}", trial.display()))?;
    let attempt = |path: &Path| -> Result<Nvcc, String> {
        let version = run(Command::new(path).arg("--version"))?;
        let version = release(&version).ok_or("--version names no release")?;
        let fatbin = trial.with_extension("fatbin");
        run(Command::new(path).arg("--fatbin").args(flags).arg(&trial).arg("-o").arg(fatbin))?;
        Ok(Nvcc { path: path.to_owned(), version })
    };

    if let Some(path) = env::var_os("FUSED_DROPOUT_NVCC") {
        let named = on_path(Path::new(&path)).unwrap_or_else(|| PathBuf::from(&path));
        return attempt(&named).map_err(|error| {
            format!("FUSED_DROPOUT_NVCC={}: this nvcc does not work: {error}", named.display())
        });
    }
    let mut report = String::new();
    let mut skipped = Vec::new();
    for (place, candidates) in places() {
        let existing: Vec<_> = candidates.into_iter().filter(|path| path.is_file()).collect();
        let found = if existing.is_empty() { "no nvcc" } else { "does not work:" };
        writeln!(report, "  {place}: {found}").expect("a String takes it");
        for path in existing {
            match attempt(&path) {
                Ok(nvcc) => {
                    for line in &skipped {
                        println!("cargo::warning={line}");
                    }
                    return Ok(nvcc);
                }
                Err(error) => {
                    let error = error.trim_end().replace('\n', "\n      ");
                    writeln!(report, "    {}: {error}", path.display()).expect("a String takes it");
                    let first = error.lines().next().unwrap_or_default();
                    skipped.push(format!("passed over {}: {first}", path.display()));
                }
            }
        }
    }
    Err(format!(
        "feature `cuda` needs nvcc, CUDA's compiler (12.8 or later, 13.0 for the widest choice of \
         drivers), and a C++ compiler beside it.\nSearched, in this order:\n  FUSED_DROPOUT_NVCC: \
         not set\n{report}Install it, without anything else of CUDA, into a Python environment:\n  \
         python3 -m venv cuda && . cuda/bin/activate && pip install {WHEELS}\nand build again there; \
         or set FUSED_DROPOUT_NVCC to an nvcc."
    ))
}

/// Where an nvcc may be: a place in words, and the files there that it would be.
fn places() -> Vec<(String, Vec<PathBuf>)> {
    let nvcc = format!("nvcc{EXE_SUFFIX}");
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let said = |name: &str, value: &Option<PathBuf>| match value {
        Some(path) => format!("{name}={}", path.display()),
        None => format!("{name} (not set)"),
    };
    let mut places = Vec::new();

    let named = variable("NVCC");
    let file = named.as_deref().map(|path| on_path(path).unwrap_or_else(|| path.to_owned()));
    places.push((said("NVCC", &named), file.into_iter().collect()));
    for home in ["CUDA_HOME", "CUDA_PATH"] {
        let folder = variable(home);
        let file = folder.as_deref().map(|folder| folder.join("bin").join(&nvcc));
        places.push((said(home, &folder), file.into_iter().collect()));
    }
    places.push(("PATH".into(), on_path(Path::new(&nvcc)).into_iter().collect()));

    let installed = if cfg!(windows) {
        let folder = r"C:\Program Files\NVIDIA GPU Computing Toolkit\CUDA";
        (folder.to_owned(), newest(list(Path::new(folder)), "v"))
    } else {
        let folders = newest(list(Path::new("/usr/local")), "cuda");
        let folders = folders.into_iter().chain(["/opt/cuda".into()]).collect();
        ("/usr/local/cuda*, /opt/cuda".to_owned(), folders)
    };
    let files = installed.1.iter().map(|folder| folder.join("bin").join(&nvcc)).collect();
    places.push((installed.0, files));

    for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let folder = variable(prefix);
        let mut files = Vec::new();
        if let Some(folder) = &folder {
            files.push(folder.join("bin").join(&nvcc));
            for site in site_packages(folder) {
                files.extend(wheel_compilers(&site, &nvcc));
            }
        }
        places.push((said(prefix, &folder), files));
    }
    let python = if cfg!(windows) { "python" } else { "python3" };
    let files = python_sites(python).into_iter().flat_map(|site| wheel_compilers(&site, &nvcc));
    places.push((format!("the packages of {python} on PATH"), files.collect()));
    places
}

/// The folders of `candidates` whose names start with `prefix`, highest version first; the name
/// without a version, which is the one that the machine's owner chose, before all.
fn newest(candidates: Vec<PathBuf>, prefix: &str) -> Vec<PathBuf> {
    let mut numbered: Vec<(Vec<u32>, PathBuf)> = candidates
        .into_iter()
        .filter_map(|path| {
            let rest = path.file_name()?.to_str()?.strip_prefix(prefix)?.trim_start_matches('-');
            let version = rest.split('.').map_while(|part| part.parse().ok()).collect();
            Some((version, path))
        })
        .collect();
    numbered.sort_by(|(a, _), (b, _)| (!a.is_empty()).cmp(&!b.is_empty()).then(b.cmp(a)));
    numbered.into_iter().map(|(_, path)| path).collect()
}

/// `<environment>/lib/python3.x/site-packages`, or `<environment>\Lib\site-packages`.
fn site_packages(environment: &Path) -> Vec<PathBuf> {
    let lib = environment.join(if cfg!(windows) { "Lib" } else { "lib" });
    let inner = list(&lib).into_iter().map(|folder| folder.join("site-packages"));
    inner.chain([lib.join("site-packages")]).filter(|path| path.is_dir()).collect()
}

/// The folders that `python` takes packages from; none where it does not run.
fn python_sites(python: &str) -> Vec<PathBuf> {
    let program = "import site, sysconfig\n\
        print(sysconfig.get_path('purelib'), site.getusersitepackages(), sep='\\n')";
    let text = run(Command::new(python).args(["-c", program])).unwrap_or_default();
    text.lines().map(PathBuf::from).collect()
}

/// The wheels of toolkit 13 share `site-packages/nvidia/cu13`; another toolkit's will have a
/// folder of their own beside it.
fn wheel_compilers(site: &Path, nvcc: &str) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        list(&site.join("nvidia")).iter().map(|folder| folder.join("bin").join(nvcc)).collect();
    files.sort();
    files
}

/// What a shell would run for `command`: itself where it names a folder, else the first on PATH.
fn on_path(command: &Path) -> Option<PathBuf> {
    if command.components().count() > 1 {
        return Some(command.to_owned());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(command)).find(|file| file.is_file())
}

/// A folder's entries; none where it cannot be read.
fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect()
}

/// (13, 0) of "Cuda compilation tools, release 13.0, V13.0.88".
fn release(text: &str) -> Option<(u32, u32)> {
    let version = text.split("release ").nth(1)?.split(',').next()?;
    let (major, minor) = version.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Runs a command; what it printed, as the error where it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let program = Path::new(command.get_program()).to_owned();
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let folder = program.parent().unwrap_or(Path::new(".")).display().to_string();
            format!("not executable; try: chmod +x {folder}/* {folder}/../nvvm/bin/*")
        }
        _ => error.to_string(),
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout) + &text(&output.stderr));
    }
    let printed = (text(&output.stderr) + &text(&output.stdout)).trim().to_owned();
    Err(if printed.is_empty() { output.status.to_string() } else { printed })
}
