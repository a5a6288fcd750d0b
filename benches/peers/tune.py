#!/usr/bin/env python3
"""Times other values of the kernels' constants on a GPU, and prints the table that goes beside the constants.

    ./run tune --list                # in the bundle: what can be tried; needs no GPU
    ./run tune                       # all of it; needs nvcc
    ./run tune NORM --seconds 60     # the constants with NORM in their names

kernels/tuning.cuh names the constants, the values to try, and on which cases. nvcc compiles each value. Then there is a
`device_bench --kernels DIR --serve` for each value, and they take turns: in each round each has a turn of some samples, and
each round begins with another, so that what drifts hits all alike. Their answers are checked before that, on tensors of few
rows: those of sort_rows and of a norm's sums in one pass are not, and `run check` is for them.

A value that does not compile, or whose answers are wrong, is a line in the table. What there was no time for is called "not
timed". tune.json is written as the run goes on. After an interruption (Ctrl-C) the table has what there is.

nvcc: $FUSED_DROPOUT_NVCC, else the first on PATH, else /usr/local/cuda/bin/nvcc.

Exit status: 0; 1 if nothing was timed, or after an interruption; 2 for bad arguments, a bad tuning file or no nvcc; 3
without a GPU.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import report
from ours import Ours

P = 0.1
SECONDS = 120
COMPILING = 0.6  # the share of the time that compiling may take
ROUNDS, SAMPLES = 5, 10
BUNDLE = pathlib.Path(__file__).resolve().parent.parent  # or benches/, whose parent has the kernels


class Bad(Exception):
    """What is wrong with a tuning file, and where."""


# The tuning file.


@dataclasses.dataclass
class Constant:
    name: str
    values: list
    files: list
    cases: dict  # what the file says: the request to the server
    present: dict  # the value by __CUDA_ARCH__; None: on the other chips

    def value(self, capability):
        """The present one on a chip, such as "9.0"."""
        return self.present.get(int(capability.replace(".", "")) * 10, self.present[None])


class Lines:
    """The lines of a tuning file that mean something here: `// word: ..`, and the preprocessor's."""

    def __init__(self, path):
        self.path = path
        marked = re.compile(r"// \w+:|#(?!pragma once$)")
        lines = enumerate(path.read_text().splitlines(), 1)
        self.rest = [(number, line) for number, line in lines if marked.match(line)]

    def begins(self, text):
        return bool(self.rest) and self.rest[0][1].startswith(text)

    def bad(self, number, why):
        return Bad(f"{self.path}:{number}: {why}")

    def take(self, wanted, pattern):
        """The number of the next line, and the groups of the pattern, which must be the whole of it."""
        number, line = self.rest.pop(0) if self.rest else ("end", "nothing")
        found = re.fullmatch(pattern, line)
        if not found:
            raise self.bad(number, f"expected `{wanted}`, got `{line}`")
        return number, found.groups()


def constant(lines):
    number, (values,) = lines.take("// tune: VALUE VALUE..", r"// tune: (\d+(?: \d+)+)")
    values = [int(value) for value in values.split()]
    in_file, (files,) = lines.take("// file: KERNEL.cu..", r"// file: (\w+\.cu(?: \w+\.cu)*)")
    cases = {}
    while not cases or lines.begins("// case:"):
        _, (case, *names, rows, cols) = lines.take(
            "// case: OPERATOR PASS TYPE ROWSxCOLS",
            r"// case: ((\w+) (forward|backward) (bf16|f16|f32) (\d+)x(\d+))",
        )
        names = dict(zip(("operator", "pass", "dtype"), names))
        cases[case] = names | {"rows": int(rows), "cols": int(cols)}
    _, (name,) = lines.take("#ifndef FD_NAME", r"#ifndef (FD_\w+)")

    def define():
        return int(lines.take(f"#define {name} VALUE", rf"#define {name} (\d+)")[1][0])

    present = {}
    if lines.begins("#if "):
        chip = "#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == "
        _, (arch,) = lines.take(f"{chip}NUMBER", rf"{re.escape(chip)}(\d+)")
        present[int(arch)] = define()
        lines.take("#else", "#else")
        present[None] = define()
        lines.take("#endif", "#endif")
    else:
        present[None] = define()
    lines.take("#endif", "#endif")
    if len({*values}) < len(values) or not {*present.values()} <= {*values}:
        raise lines.bad(number, f"the values must differ, and have the present one of {name}")
    for file in files.split():
        if not (lines.path.parent / file).is_file():
            raise lines.bad(in_file, f"there is no {file}")
    return Constant(name, values, files.split(), cases, present)


def read(path):
    """The constants of a tuning file, in its order."""
    lines = Lines(path)
    found = []
    while lines.rest:
        number, _ = lines.rest[0]
        found.append(constant(lines))
        if found[-1].name in [before.name for before in found[:-1]]:
            raise lines.bad(number, f"{found[-1].name} is there twice")
    return found


def show(constants):
    for one in constants:
        chips = [f"{value} on sm_{arch // 10}" for arch, value in one.present.items() if arch]
        present = ", otherwise ".join([*chips, str(one.present[None])])
        print(f"{one.name}: {', '.join(map(str, one.values))}; at present {present}")
        print(*(f"    {line}" for line in (" ".join(one.files), *one.cases)), sep="\n")


# Compiling, and the servers.


def find_nvcc():
    if named := os.environ.get("FUSED_DROPOUT_NVCC"):
        return shutil.which(named)
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def release(nvcc):
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return (re.findall(r"\bV[\d.]+", said) or ["unknown"])[0]


def flags(kernels):
    lines = (kernels / "nvcc-flags.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


class Variant:
    """A value of a constant: its folder of kernels, then its server, or why there is none."""

    def __init__(self, constant, value, folder):
        self.constant, self.value = constant, value
        self.folder = folder / f"{constant.name}={value}"
        self.server = self.error = None

    def compile(self, command, kernels, until):
        self.folder.mkdir()
        command = [*command, f"-D{self.constant.name}={self.value}"]
        for file in self.constant.files:
            to_file = [kernels / file, "-o", (self.folder / file).with_suffix(".cubin")]
            options = {"capture_output": True, "text": True}
            options["timeout"] = max(until - time.monotonic(), 0.01)
            try:
                done = subprocess.run([*command, *to_file], **options)
            except subprocess.TimeoutExpired:
                self.error = "out of time for compiling"
                return
            if done.returncode != 0:
                said = (done.stderr + done.stdout).splitlines()
                errors = [line for line in said if "error" in line] or said or ["nothing"]
                self.error = f"nvcc said: {errors[0][:200]}"
                return

    def start(self, program):
        """Starts the server, which first checks its answers."""
        if self.error:
            return
        try:
            with (self.folder / "stderr").open("w") as stderr:
                command = f"{program} --kernels {shlex.quote(str(self.folder))}"
                self.server = Ours(command, os.environ, stderr)
        except (OSError, RuntimeError, ValueError) as error:
            self.error = self.why(error)

    def why(self, error):
        said = (self.folder / "stderr").read_text().strip().split("\n")[0]
        return f"{error}: {said[:200]}" if said else str(error)

    def close(self):
        if self.server:
            self.server.close()


def say(text):
    print(text, file=sys.stderr, flush=True)


def in_parallel(what, variants, workers=None):
    """Calls `what` for each variant, and says so."""
    pool = concurrent.futures.ThreadPoolExecutor(workers or len(variants))
    try:
        jobs = {pool.submit(what, variant): variant for variant in variants}
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            yield jobs[job]
    finally:
        pool.shutdown(cancel_futures=True)


def take_turns(rows, variants, request, until):
    """Fills in the rows of a case, one for each variant."""
    times = [[] for _ in rows]
    turns = [*zip(rows, variants, times)]
    for turn in range(ROUNDS):
        start = turn % len(turns)
        for row, variant, seconds in turns[start:] + turns[:start]:
            if variant.error:
                row["error"] = variant.error
            if "error" in row or time.monotonic() > until:
                continue
            try:
                answer = variant.server.ask(request | {"p": P, "samples": SAMPLES})
            except (RuntimeError, ValueError) as error:
                row["error"] = variant.why(error)
                continue
            seconds += answer["seconds"]
            row |= {"bytes": answer["bytes"], "samples": len(seconds)}
            row["seconds"] = report.summary(seconds)


def run(chosen, constants, nvcc, about, rows, changed):
    """Compiles, and fills in the rows; calls `changed` when there is something new in them."""
    began = time.monotonic()
    until = began + chosen.seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = pathlib.Path(folder)
        variants = [Variant(one, value, folder) for one in constants for value in one.values]
        arch = "sm_" + about["compute_capability"].replace(".", "")
        command = [nvcc, "--cubin", f"-arch={arch}", *flags(chosen.kernels)]
        compile_until = began + COMPILING * chosen.seconds

        def compile(variant):
            variant.compile(command, chosen.kernels, compile_until)

        done = in_parallel(compile, variants, os.cpu_count())
        for count, variant in enumerate(done, 1):
            say(f"compiled {count} of {len(variants)}: {variant.folder.name} {variant.error or ''}")
        say(f"compiling took {time.monotonic() - began:.0f} s")

        for one in constants:
            mine = [variant for variant in variants if variant.constant is one]
            try:
                if time.monotonic() < until:
                    for variant in in_parallel(lambda variant: variant.start(chosen.ours), mine):
                        say(f"started {variant.folder.name} {variant.error or ''}")
                for case, request in one.cases.items():
                    say(f"{time.monotonic() - began:.0f} s: {one.name}, {case}")
                    named = {"constant": one.name, "case": case}
                    of_case = [row for row in rows if named.items() <= row.items()]
                    take_turns(of_case, mine, request, until)
                    changed()
            finally:
                for variant in mine:
                    variant.close()
        if time.monotonic() > until:
            say("out of time: more --seconds time the rest")


# The table.


def plan(constants, capability):
    """A row for each constant, case and value, to be filled in."""
    return [
        {"constant": one.name, "value": value, "present": value == one.value(capability)}
        | {"case": case}
        | request
        for one in constants
        for case, request in one.cases.items()
        for value in one.values
    ]


def print_table(rows, out):
    def names(row):
        return row["constant"], row["case"]

    present = {names(row): row for row in rows if row["present"] and "seconds" in row}
    lines = []
    for row in rows:
        line = row["constant"], row["value"], "present" if row["present"] else "", row["case"]
        if "seconds" not in row:
            lines.append((*line, *[""] * 4, row.get("error", "not timed")))
            continue
        seconds, base = row["seconds"], present.get(names(row))
        median = seconds["median"]
        spread = f"{100 * (seconds['p95'] - seconds['p5']) / median:.1f} %"
        ratio = f"{median / report.median(base):.3f}" if base else ""
        rate = f"{report.gigabytes(row):.0f}"
        lines.append((*line, f"{median * 1e6:.2f}", rate, spread, ratio, row.get("error", "")))
    header = ("constant", "value", "", "case", "us", "GB/s", "spread", "/ present", "")
    report.line_up(header, lines, out)
    print(
        "us: microseconds a call, the median. spread: from the 5th to the 95th percentile.\n"
        "/ present: the time, divided by that of the present value; below 1 is faster.",
        file=out,
    )


def arguments():
    about, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help="only constants with this in their names"
    )
    parser.add_argument("--list", action="store_true", help="only prints what can be tried")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS,
        help=f"for all of it ({SECONDS}); compiling may take {100 * COMPILING:.0f} %% of that",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="for tune.json")
    parser.add_argument(
        "--ours", metavar="PROGRAM", default=shlex.quote(str(BUNDLE / "device_bench")),
        help="the server, a command: started as `PROGRAM --kernels DIR --serve`",
    )  # fmt: skip
    found = [folder / "kernels" for folder in (BUNDLE, BUNDLE.parent)]
    parser.add_argument(
        "--kernels", metavar="DIR", type=pathlib.Path, default=found[not found[0].exists()],
        help="the sources, with tuning.cuh (those of the bundle)",
    )  # fmt: skip
    return parser.parse_args()


def ask_about(program):
    """(what the device is, None) or (None, exit status)."""
    try:
        done = subprocess.run([*shlex.split(program), "--about"], stdout=subprocess.PIPE, text=True)
    except OSError as error:
        say(f"tune: {error}")
        return None, 2
    return (None, done.returncode) if done.returncode else (json.loads(done.stdout), None)


def main():
    chosen = arguments()
    try:
        constants = read(chosen.kernels / "tuning.cuh")
    except (Bad, OSError) as error:
        say(f"tune: {error}")
        return 2
    if chosen.name:
        constants = [one for one in constants if any(name in one.name for name in chosen.name)]
    if not constants:
        say("tune: there is no such constant; --list names them")
        return 2
    if chosen.list:
        show(constants)
        return 0
    nvcc = find_nvcc()
    if not nvcc:
        say("tune: no nvcc in FUSED_DROPOUT_NVCC, on PATH or in /usr/local/cuda/bin")
        return 2
    about, status = ask_about(chosen.ours)
    if status:
        return status

    rows = plan(constants, about["compute_capability"])
    result = {"device": about, "command": shlex.join(["python3", *sys.argv]), "p": P}
    result |= {"nvcc": release(nvcc), "rows": rows, "notes": []}

    def write():
        if chosen.out:
            chosen.out.mkdir(parents=True, exist_ok=True)
            (chosen.out / "tune.json").write_text(json.dumps(result, indent=1) + "\n")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(chosen, constants, nvcc, about, rows, write)
    except KeyboardInterrupt:
        say("\ninterrupted; what there is:")
        result["notes"].append("interrupted")
    write()
    print(f"\n{about['device']}, driver {about['driver']}, p = {P}\n")
    print_table(rows, sys.stdout)
    if chosen.out:
        print(f"\nwrote {chosen.out / 'tune.json'}")
    return 0 if any("seconds" in row for row in rows) and not result["notes"] else 1


if __name__ == "__main__":
    sys.exit(main())
