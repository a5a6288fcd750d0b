#!/usr/bin/env python3
"""Collects what proves and measures the kernels on a GPU into a folder that runs where there is no Rust.

    python3 benches/bundle.py [--out target/bundle]     # needs Rust and nvcc, as feature `cuda` does
    target/bundle/run --help                            # on a machine with a driver

The programs are optimised, stripped, and load CUDA and cuBLAS at run time. The bundle is refused where it is over
60 MB, or a program needs a library that not every Linux with glibc has.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOST_BYTES = 60_000_000
FEATURES = "cuda,transformer"
# cargo's command, the target, and its name in the bundle.
PROGRAMS = [
    (["test", "--release", "--no-run", "--test", "device"], "device", "device_tests"),
    (["bench", "--no-run", "--bench", "device"], "device", "device_bench"),
    (["build", "--release", "--example", "train_gpt"], "train_gpt", "train_gpt"),
]
# What a program may be linked with: glibc, and the unwinder that comes with it everywhere.
LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1"}


def build(command, target):
    """The path of the program that cargo makes for a target."""
    command = ["cargo", *command, "--features", FEATURES, "--message-format", "json-render-diagnostics"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(f"bundle: {' '.join(command)} failed")
    for line in run.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == target:
            return pathlib.Path(message["executable"])
    sys.exit(f"bundle: cargo made no program {target}")


def needs(program):
    """The libraries that a program is linked with, and the newest glibc that it asks for."""
    text = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--version-info", program],
        stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"LC_ALL": "C"},
    ).stdout
    libraries = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
    versions = re.findall(r"GLIBC_([0-9.]+)", text)
    newest = max(versions, key=lambda v: [int(part) for part in v.split(".")], default="none")
    return {name for name in libraries if not name.startswith("ld-linux")}, newest


def commit():
    """The commit of the sources, marked where they differ from it."""
    git = lambda *args: subprocess.run(
        ["git", *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + ("-changed" if changed else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target" / "bundle", metavar="DIR")
    out = parser.parse_args().out
    if out.exists() and not (out / "commit").exists():
        sys.exit(f"bundle: {out} is there, and is no bundle")
    programs = {name: build(command, target) for command, target, name in PROGRAMS}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, program in programs.items():
        shutil.copy2(program, out / name)
        # Not by cargo's profile: the kernels would be compiled once more for other builds.
        subprocess.run(["strip", out / name], check=True)
    shutil.copy2(ROOT / "benches" / "run", out / "run")
    shutil.copytree(
        ROOT / "benches" / "peers", out / "peers", ignore=shutil.ignore_patterns("test_*", "__pycache__")
    )
    shutil.copytree(ROOT / "tests" / "hf", out / "hf", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    # For trying a change where there is nvcc and no Rust: `run bench --kernels`, `run tune`.
    shutil.copytree(ROOT / "kernels", out / "kernels", ignore=shutil.ignore_patterns("emulator"))
    (out / "commit").write_text(commit() + "\n")

    print(f"{'program':<14} {'MB':>6}  {'glibc':<6} libraries")
    for name in programs:
        libraries, glibc = needs(out / name)
        print(f"{name:<14} {(out / name).stat().st_size / 1e6:>6.1f}  {glibc:<6} {', '.join(sorted(libraries))}")
        if libraries - LIBRARIES:
            sys.exit(f"bundle: {name} needs {', '.join(sorted(libraries - LIBRARIES))}")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{'in all':<14} {total / 1e6:>6.1f}  {out}")
    if total > MOST_BYTES:
        sys.exit(f"bundle: over {MOST_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
