#!/usr/bin/env python3
"""Holds the kernels' registers and shared memory to kernels/budget.txt, and forbids spills; holds the loads of
their sm_90 machine code to kernels/loads.txt, and what it executes for a usual row to kernels/usual.txt.

  budget.py            compile every kernel for every chip of the tables and compare
  budget.py --write    compile, and write the tables anew
  budget.py --sass     print what the sm_90 machine code is made of, kernel by kernel

nvcc: $FUSED_DROPOUT_NVCC, else the first on PATH, else the wheels' in $VIRTUAL_ENV or this Python.
cuobjdump and nvdisasm stand beside it (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import usual_row

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "kernels"
BUDGET = KERNELS / "budget.txt"
LOADS = KERNELS / "loads.txt"
USUAL = KERNELS / "usual.txt"
# No kernels of the crate: the activations alone, for the last table.
ACTIVATIONS = pathlib.Path(__file__).resolve().parent / "activations.cu"
ARCHS = ["sm_80", "sm_90", "sm_100", "sm_120"]


def find_nvcc():
    named = os.environ.get("FUSED_DROPOUT_NVCC") or shutil.which("nvcc")
    sites = [pathlib.Path(sysconfig.get_path("purelib"))]
    if environment := os.environ.get("VIRTUAL_ENV"):
        sites = [*pathlib.Path(environment).glob("lib/python*/site-packages"), *sites]
    wheels = [nvcc for site in sites for nvcc in sorted(site.glob("nvidia/*/bin/nvcc"))]
    if not named and not wheels:
        sys.exit("budget: no nvcc: set FUSED_DROPOUT_NVCC, or install the wheel nvidia-cuda-nvcc")
    return pathlib.Path(named or wheels[0])


def flags():
    """The build's own flags."""
    lines = (line.strip() for line in (KERNELS / "nvcc-flags.txt").read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def compile_one(nvcc, source, arch, folder):
    """Compiles a .cu; what ptxas printed."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    # A warning here is an error: users of the crate see them as their own build's.
    command = [nvcc, "--cubin", f"--gpu-architecture={arch}", *flags(), "--Werror=all-warnings"]
    command += ["--resource-usage", source, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"budget: {source.name} for {arch}:\n{done.stderr}{done.stdout}")
    return done.stderr + done.stdout


def compile_all(nvcc, archs, folder):
    """Compiles every .cu for every arch; {(file, arch): what ptxas printed}."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (source.stem, arch): pool.submit(compile_one, nvcc, source, arch, folder)
            for source in sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("transformer/*.cu")])
            for arch in archs
        }
        return {key: job.result() for key, job in jobs.items()}


def parse(text):
    """{kernel: {"registers", "smem", "stack", "stores", "loads"}} of what ptxas printed."""
    kernels = {}
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        smem = re.search(r"(\d+) bytes smem", part)
        kernels[part.split("'")[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "smem": int(smem[1]) if smem else 0,
            "stack": int(stack),
            "stores": int(stores),
            "loads": int(loads),
        }
    return kernels


def measure(nvcc, folder):
    """{kernel: {arch: its figures}}"""
    measured = {}
    for (_, arch), text in compile_all(nvcc, ARCHS, folder).items():
        for kernel, figures in parse(text).items():
            measured.setdefault(kernel, {})[arch] = figures
    if not measured:
        sys.exit(f"budget: no kernels in {KERNELS}")
    return measured


def read_budget():
    """{kernel: ({arch: registers}, shared memory in bytes)}"""
    budget = {}
    for line in BUDGET.read_text().splitlines():
        fields = line.split()
        if fields and fields[0] != "#":
            budget[fields[0]] = dict(zip(ARCHS, map(int, fields[1:-1]))), int(fields[-1])
    return budget


def write_budget(measured, nvcc):
    release = re.search(r"release [^,]*, (V\S+)", run([nvcc, "--version"]))[1]
    width = max(map(len, measured))
    lines = [
        "# What each kernel may use: registers a thread on each chip, and bytes of shared memory.",
        f"# As nvcc {release} compiles them; written by .ci/budget.py --write.",
        f"# {'kernel':<{width - 2}}" + "".join(f"{arch:>8}" for arch in [*ARCHS, "smem"]),
    ]
    for kernel in sorted(measured):
        registers = [measured[kernel][arch]["registers"] for arch in ARCHS]
        smem = max(figures["smem"] for figures in measured[kernel].values())
        lines.append(f"{kernel:<{width}}" + "".join(f"{n:>8}" for n in [*registers, smem]))
    BUDGET.write_text("\n".join(lines) + "\n")
    print(f"budget: {BUDGET.name} written, {len(measured)} kernels")


def spills(measured):
    return [
        f"{kernel} {arch}: spills ({f['stores']} bytes stored, {f['loads']} loaded, stack {f['stack']})"
        for kernel, archs in sorted(measured.items())
        for arch, f in archs.items()
        if f["stores"] or f["loads"] or f["stack"]
    ]


def compare(measured, budget, wrong):
    wrong += spills(measured)
    wrong += [f"{kernel}: not in {BUDGET.name}" for kernel in sorted(measured.keys() - budget.keys())]
    wrong += [f"{kernel}: no such kernel" for kernel in sorted(budget.keys() - measured.keys())]
    for kernel in sorted(measured.keys() & budget.keys()):
        registers, smem = budget[kernel]
        for arch, figures in measured[kernel].items():
            if figures["registers"] > registers[arch]:
                wrong.append(f"{kernel} {arch}: {figures['registers']} registers, {registers[arch]} allowed")
            if figures["smem"] > smem:
                wrong.append(f"{kernel} {arch}: {figures['smem']} bytes of shared memory, {smem} allowed")
    for line in wrong:
        print(f"budget: {line}")
    most = {arch: max(figures[arch]["registers"] for figures in measured.values()) for arch in ARCHS}
    print(f"budget: {len(measured)} kernels, {len(wrong)} faults; most registers: {most}")
    return 1 if wrong else 0


def registers_of(text, wide):
    """The registers that an operand such as R4 stands for, `wide` of them from it on."""
    first = int(re.match(r"R(\d+)", text)[1])
    return {f"R{first + i}" for i in range(wide)}


def loads_in_flight(code):
    """The most global loads that a straight run through the code, no branch taken that need not be,
    issues before it first needs the result of one of them."""
    most, waiting, loads = 0, set(), 0
    for _, predicate, name, operands in code:
        leaves = not predicate and name in ("BRA", "EXIT")
        if name.startswith("LDG"):
            target = next(o for o in operands.split(",") if re.match(r"\s*R\d", o)).strip()
            wide = 4 if ".128" in name else 2 if ".64" in name else 1
            waiting |= registers_of(target, wide)
            loads += 1
            most = max(most, loads)
        elif leaves or waiting & set(re.findall(r"\bR\d+", operands)):
            waiting, loads = set(), 0
    return most


COLUMNS = {
    "code": lambda names: len(names),
    "WIDE": lambda names: sum(n.startswith("IMAD.WIDE.U32") for n in names),
    "HI": lambda names: sum(n.startswith("IMAD.HI") for n in names),
    "VIMNMX": lambda names: sum(n.startswith("VIMNMX") for n in names),
    "LOP3": lambda names: sum(n.startswith("LOP3") for n in names),
    "LDG128": lambda names: sum(n.startswith("LDG") and ".128" in n for n in names),
    "LDG": lambda names: sum(n.startswith("LDG") for n in names),
    "STG128": lambda names: sum(n.startswith("STG") and ".128" in n for n in names),
    "STG": lambda names: sum(n.startswith("STG") for n in names),
    "BRA": lambda names: sum(n.startswith("BRA") for n in names),
}


def machine_code(nvcc, folder):
    """{kernel: [(address, predicate, name, operands)]} of the sm_90 cubins in a folder, without NOPs."""
    kernels = {}
    for cubin in sorted(folder.glob("*.sm_90.cubin")):
        text = run([nvcc.parent / "cuobjdump", "-sass", cubin])
        for part in text.split("Function : ")[1:]:
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*([^;]*);", part)
            code = [(int(line[0], 16), *line[1:]) for line in lines]
            kernels[part.split()[0]] = [line for line in code if line[2] != "NOP"]
    return kernels


def measure_loads(code, kernels):
    """{kernel: (loads in flight, loads of 16 bytes, narrower loads)} of those of `kernels` for aligned tensors."""
    loads = {}
    for kernel in kernels:
        lines = code[kernel]
        names = [name for _, _, name, _ in lines]
        wide, every = COLUMNS["LDG128"](names), COLUMNS["LDG"](names)
        if wide and "_unaligned_" not in kernel:
            loads[kernel] = loads_in_flight(lines), wide, every - wide
    return loads


def read_loads():
    lines = (line.split() for line in LOADS.read_text().splitlines())
    return {fields[0]: tuple(map(int, fields[1:])) for fields in lines if fields and fields[0] != "#"}


def write_loads(loads):
    width = max(map(len, loads))
    lines = [
        "# sm_90 code of the kernels for aligned tensors: the global loads that are issued before the result of",
        "# one is needed, at least; loads of 16 bytes in all paths together, at least; narrower ones, at most (ids,",
        "# a row's statistics, partial sums). Written by .ci/budget.py --write.",
        f"# {'kernel':<{width - 2}}{'in flight':>11}{'16 bytes':>10}{'narrower':>10}",
    ]
    lines += [f"{kernel:<{width}}{a:>11}{b:>10}{c:>10}" for kernel, (a, b, c) in sorted(loads.items())]
    LOADS.write_text("\n".join(lines) + "\n")


def compare_loads(measured, committed):
    """What is wrong: a kernel that is not in the table, or that loads less at a time or narrower than it says."""
    wrong = [f"{kernel}: not in both {LOADS.name} and the code" for kernel in measured.keys() ^ committed.keys()]
    for kernel in sorted(measured.keys() & committed.keys()):
        (flight, wide, narrow), (flight_least, wide_least, narrow_most) = measured[kernel], committed[kernel]
        if flight < flight_least or wide < wide_least or narrow > narrow_most:
            wrong.append(f"{kernel} sm_90: loads {measured[kernel]}, {committed[kernel]} in {LOADS.name}")
    return wrong


def read_usual():
    """{kernel: (instructions, the row's work)}"""
    usual = {}
    for line in USUAL.read_text().splitlines():
        fields = line.split()
        if fields and fields[0] != "#":
            instructions, *work = map(int, fields[1:])
            usual[fields[0]] = instructions, dict(zip(usual_row.WORK, work))
    return usual


def measure_usual(code, usual):
    """{kernel: instructions} of the table's kernels."""
    return {
        kernel: usual_row.instructions(code[kernel], work) for kernel, (_, work) in usual.items() if kernel in code
    }


def write_usual(measured, usual):
    width = max(map(len, usual))
    lines = [
        "# sm_90 code: instructions that a warp executes for a usual row, at most. Such a row is whole, aligned, in a plain",
        "# mask, and its scale is a power of two. Norms have their bias, but none of x; their gradients have no ds. A",
        "# streaming kernel has an octet a thread. Activations and slopes (.ci/activations.cu) have an octet as well: the",
        "# identity's count is loads, stores and conversions.",
        "#",
        "# The columns behind the count are the row's work, at least, by which its way through the code is told from others:",
        "# wide multiplications of Philox, 16-byte loads and stores, multi-function instructions, shuffles, packed conversions.",
        "# The work is written by hand, the count by .ci/budget.py --write; .ci/usual_row.py counts.",
        f"# {'kernel':<{width - 2}}{'instructions':>14}" + "".join(f"{kind:>10}" for kind in usual_row.WORK),
    ]
    for kernel, (_, work) in sorted(usual.items()):
        row = "".join(f"{n:>10}" for n in work.values())
        lines.append(f"{kernel:<{width}}{measured[kernel]:>14}{row}")
    USUAL.write_text("\n".join(lines) + "\n")


def compare_usual(measured, usual):
    wrong = [f"{kernel}: not in the code" for kernel in usual.keys() - measured.keys()]
    for kernel, instructions in sorted(measured.items()):
        if instructions is None:
            wrong.append(f"{kernel} sm_90: no way through the code does the work of {USUAL.name}")
        elif instructions > usual[kernel][0]:
            wrong.append(f"{kernel} sm_90: {instructions} instructions a row, {usual[kernel][0]} allowed")
    return wrong


def print_sass(nvcc, folder):
    """Counts over a kernel's whole code, all its paths together."""
    compile_all(nvcc, ["sm_90"], folder)
    rows = []
    for kernel, code in machine_code(nvcc, folder).items():
        names = [name for _, _, name, _ in code]
        rows.append([kernel, *(count(names) for count in COLUMNS.values()), loads_in_flight(code)])
    print("sm_90 machine code, instructions a kernel, all its paths together. WIDE and HI: the wide")
    print("multiplications; in flight: global loads issued before the first one's result is needed\n")
    width = max(len(row[0]) for row in rows)
    heads = [*COLUMNS, "in flight"]
    print(f"{'kernel':<{width}}" + "".join(f"{head:>{max(8, len(head) + 2)}}" for head in heads))
    for row in rows:
        cells = (f"{n:>{max(8, len(head) + 2)}}" for head, n in zip(heads, row[1:]))
        print(f"{row[0]:<{width}}" + "".join(cells))


def run(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table anew")
    parser.add_argument("--sass", action="store_true", help="print counts of machine instructions")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if arguments.sass:
            return print_sass(nvcc, folder)
        measured = measure(nvcc, folder)
        compile_one(nvcc, ACTIVATIONS, "sm_90", folder)
        code, usual = machine_code(nvcc, folder), read_usual()
        loads, rows = measure_loads(code, measured), measure_usual(code, usual)
    if arguments.write:
        # A table cannot allow a spill: say so now.
        for line in spills(measured):
            print(f"budget: {line}")
        write_loads(loads)
        write_usual(rows, usual)
        return write_budget(measured, nvcc)
    return compare(measured, read_budget(), compare_loads(loads, read_loads()) + compare_usual(rows, usual))


if __name__ == "__main__":
    sys.exit(main())
