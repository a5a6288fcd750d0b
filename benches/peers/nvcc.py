"""Finds an nvcc that works, and compiles with it. What it starts ends with it."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

LOCAL, OPT = pathlib.Path("/usr/local"), pathlib.Path("/opt/cuda")
# As in build/nvcc.rs, which says why.
TRIAL = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
extern "C" __global__ void trial(__half* y) { *y = __float2half_rn(0.5f); }
"""
TRIAL_SECONDS = 60
# "error:", "error #20:", "nvcc fatal   :"; not the name of a variable in a warning.
ERROR = re.compile(r"\b(error|fatal)( #\S+)?\s*:")


class Failed(Exception):
    """Why there is no nvcc, or what it did not do."""


def find(options):
    """The first nvcc that compiles with these options. If FUSED_DROPOUT_NVCC is set, no other."""
    if named := os.environ.get("FUSED_DROPOUT_NVCC"):
        try:
            return Nvcc(shutil.which(named) or named, options)
        except (Failed, OSError) as error:
            raise Failed(f"FUSED_DROPOUT_NVCC={named}: this nvcc does not work: {error}") from None
    for path in candidates():
        try:
            return Nvcc(path, options)
        except (Failed, OSError) as error:
            print(f"passed over {path}: {error}", file=sys.stderr, flush=True)
    raise Failed(
        "no nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda*, /opt/cuda, VIRTUAL_ENV,"
        f" CONDA_PREFIX, or the packages of python3 and {sys.executable}; set FUSED_DROPOUT_NVCC"
    )


def candidates():
    """The files where build/nvcc.rs of the sources looks, in its order; then this Python's."""
    named = os.environ.get("NVCC")
    found = [shutil.which(named) or named] if named else []
    found += [home / "bin" / "nvcc" for home in folders("CUDA_HOME", "CUDA_PATH")]
    found += [shutil.which("nvcc") or ""]
    installed = sorted(LOCAL.glob("cuda*"), key=version, reverse=True)
    found += [folder / "bin" / "nvcc" for folder in (*installed, OPT)]
    for environment in folders("VIRTUAL_ENV", "CONDA_PREFIX"):
        found += [environment / "bin" / "nvcc"]
        found += wheels(sorted(environment.glob("lib/*/site-packages")))
    found += wheels(python3_packages())
    found += [pathlib.Path(sys.prefix, "bin", "nvcc"), *wheels(sys.path)]
    return [path for path in dict.fromkeys(map(pathlib.Path, found)) if path.is_file()]


def folders(*variables):
    return [pathlib.Path(os.environ[name]) for name in variables if os.environ.get(name)]


def version(folder):
    """For sorting; a name without one is what the machine's owner chose, and the highest."""
    return [int(part) for part in re.findall(r"\d+", folder.name)] or [float("inf")]


def wheels(packages):
    found = [sorted(pathlib.Path(folder).glob("nvidia/*/bin/nvcc")) for folder in packages]
    return sum(found, [])


def python3_packages():
    """The folders that the python3 on PATH takes packages from."""
    program = "import sys; print(*filter(None, sys.path), sep='\\n')"
    with contextlib.suppress(OSError):
        done = subprocess.run(["python3", "-c", program], capture_output=True, text=True)
        return done.stdout.splitlines()
    return []


class Nvcc:
    """One that works. `stop` ends what it runs."""

    def __init__(self, path, options):
        self.path, self.options = path, options
        self.stopped = threading.Event()
        self.release = self.trial()

    def trial(self):
        """Its release. It must compile: headers or a host compiler may be missing."""
        until = time.monotonic() + TRIAL_SECONDS
        release = re.search(r"\bV[\d.]+", self.run(["--version"], until))
        if not release:
            raise Failed("--version names no release")
        with tempfile.TemporaryDirectory() as folder:
            source = pathlib.Path(folder, "trial.cu")
            source.write_text(TRIAL)
            self.compile(source, source.with_suffix(".cubin"), until)
        return release[0]

    def stop(self):
        self.stopped.set()

    def compile(self, source, out, until, *more):
        self.run([*self.options, *more, source, "-o", out], until)

    def run(self, arguments, until):
        """What it says. It leads a process group, so that cicc and ptxas end with it."""
        self.check(until)
        process = subprocess.Popen(
            [self.path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        with process:
            try:
                said = self.wait(process, until)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode != 0:
            raise Failed(complaint(process.returncode, said))
        return said

    def wait(self, process, until):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=0.1)[0]
            self.check(until)

    def check(self, until):
        if self.stopped.is_set():
            raise Failed("interrupted")
        if time.monotonic() > until:
            raise Failed("out of time for compiling")


def complaint(status, said):
    lines = [line.strip()[:200] for line in said.splitlines() if line.strip()]
    for line in lines:
        if ERROR.search(line):
            return f"nvcc said: {line}"
    return f"nvcc ended with status {status}" + (f": {lines[-1]}" if lines else "")
