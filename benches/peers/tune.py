#!/usr/bin/env python3
"""Times other values of the kernels' constants on a GPU, and prints the table that goes beside the constants.

    ./run tune --list                # in the bundle: what can be tried; needs no GPU
    ./run tune                       # all of it; needs nvcc
    ./run tune NORM --seconds 60     # the constants with NORM in their names

kernels/tuning.cuh names the constants, the values to try, and on which cases. nvcc compiles each
value. Then there is a `device_bench --kernels DIR --serve` for each value, and they take turns: in
each round each has a turn of some samples, and each round begins with another, so that what drifts
hits all alike. Their answers are checked before that, on tensors of few rows: those of sort_rows
and of a norm's sums in one pass are not, and `run check` is for them.

A value that does not compile, or whose answers are wrong, is a line in the table. What there was no
time for is called "out of time for compiling" or "not timed". tune.json is written as the run goes
on. Where there is one, it stays, and the new one is called tune-2.json, and so on. After an
interruption (Ctrl-C) the table has what there is.

The default of --seconds is for 16 cores or so: all constants are about 50 compilations, of 5 to 60
seconds of a core each. On few cores give more --seconds, or names.

To try a value that is not listed, copy the bundle's folder kernels, add the value to the `tune:`
line in the copy's tuning.cuh, and give --kernels COPY. --kernels names a folder of sources here,
and one of compiled kernels for `run bench`.

nvcc is looked for where the build of the sources looks, in the same order: FUSED_DROPOUT_NVCC,
NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda*, /opt/cuda, and the active Python environment.
After that it is looked for in the environment of the Python that runs this.

Exit status: 0; 1 if nothing was timed, after an interruption, or if tune.json was not written; 2
for bad arguments, a bad tuning file, a folder that cannot be written, or no nvcc; 3 without a GPU.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import nvcc
import report
from ours import Ours
from tuning_file import Bad, read, read_text

P = 0.1
SECONDS, MOST_SECONDS = 120, 86400
COMPILING = 0.6  # the share of the time that compiling may take
ROUNDS, SAMPLES = 5, 10
NO_GPU = 3  # the exit status, that of device_bench too
BUNDLE = pathlib.Path(__file__).resolve().parent.parent  # or benches/, whose parent has the kernels


def choose(constants, names):
    """Those with one of the names in theirs; all without a name."""
    found = {}
    for name in names:
        found[name] = [one for one in constants if name.upper() in one.name.upper()]
        if not found[name]:
            raise Bad(f"no constant has {name} in its name; --list names them")
    return [one for one in constants if not names or any(one in of for of in found.values())]


def show(constants):
    for one in constants:
        chips = [f"{value} on sm_{arch // 10}" for arch, value in one.present.items() if arch]
        present = ", otherwise ".join([*chips, str(one.present[None])])
        print(f"{one.name}: {', '.join(map(str, one.values))}; at present {present}")
        print(*(f"    {line}" for line in (" ".join(one.files), *one.cases)), sep="\n")


# Compiling, and the servers.


def options(kernels, about):
    """What nvcc compiles every kernel with, for the device."""
    lines = map(str.strip, read_text(kernels / "nvcc-flags.txt").splitlines())
    flags = [line for line in lines if line and not line.startswith("#")]
    return ["--cubin", "-arch=sm_" + about["compute_capability"].replace(".", ""), *flags]


class Variant:
    """A value of a constant: its folder of kernels, then its server, or why there is none."""

    def __init__(self, constant, value, folder):
        self.constant, self.value = constant, value
        self.folder = folder / f"{constant.name}={value}"
        self.server = self.error = None

    def compile(self, compiler, kernels, until):
        define = f"-D{self.constant.name}={self.value}"
        try:
            self.folder.mkdir()
            for file in self.constant.files:
                cubin = (self.folder / file).with_suffix(".cubin")
                compiler.compile(kernels / file, cubin, until, define)
        except (nvcc.Failed, OSError) as error:
            self.error = str(error)

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


def in_parallel(what, variants, workers=None, stop=lambda: None):
    """Calls `what` for each variant, and says so; after an interruption `stop` ends the calls."""
    pool = concurrent.futures.ThreadPoolExecutor(workers or len(variants))
    try:
        jobs = {pool.submit(what, variant): variant for variant in variants}
        for job in concurrent.futures.as_completed(jobs):
            job.result()
            yield jobs[job]
    finally:
        stop()
        pool.shutdown(cancel_futures=True)


def take_turns(rows, variants, request, until):
    """Fills in the rows of a case, one for each variant."""
    times = [[[] for _ in range(ROUNDS)] for _ in rows]
    turns = [*zip(rows, variants, times)]
    for turn in range(ROUNDS):
        start = turn % len(turns)
        for row, variant, rounds in turns[start:] + turns[:start]:
            if variant.error:
                row["error"] = variant.error
            if "error" in row or time.monotonic() > until:
                continue
            try:
                answer = variant.server.ask(request | {"p": P, "samples": SAMPLES})
            except (RuntimeError, ValueError) as error:
                row["error"] = variant.why(error)
                continue
            rounds[turn] = answer["seconds"]
            seconds = sum(rounds, [])
            row |= {"bytes": answer["bytes"], "samples": len(seconds)}
            row["seconds"] = report.summary(seconds)
        compare(rows, times)


def compare(rows, times):
    """Gives each row its ratios to the present value, one for each round that has both."""
    present = next(rounds for row, rounds in zip(rows, times) if row["present"])
    for row, rounds in zip(rows, times):
        both = [pair for pair in zip(rounds, present) if all(pair)]
        row["ratios"] = [statistics.median(mine) / statistics.median(base) for mine, base in both]


def run(chosen, constants, compiler, rows, changed):
    """Compiles, and fills in the rows; calls `changed` when there is something new in them."""
    began = time.monotonic()
    until = began + chosen.seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        folder = pathlib.Path(folder)
        variants = [Variant(one, value, folder) for one in constants for value in one.values]
        compile_until = began + COMPILING * chosen.seconds

        def compile(variant):
            variant.compile(compiler, chosen.kernels, compile_until)

        # The present values first: without them the others have nothing to be compared with.
        variants.sort(key=lambda one: one.value not in one.constant.present.values())
        done = in_parallel(compile, variants, os.cpu_count(), compiler.stop)
        for count, variant in enumerate(done, 1):
            say(f"compiled {count} of {len(variants)}: {variant.folder.name} {variant.error or ''}")
        say(f"compiling took {time.monotonic() - began:.0f} s")
        if time.monotonic() > compile_until:
            say("out of time for compiling: more --seconds, or names, for the rest")

        for one in constants:
            mine = [variant for variant in variants if variant.constant is one]
            mine.sort(key=lambda variant: one.values.index(variant.value))  # as the rows are
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


def mark(ratios):
    """What the rounds agree on."""
    if len(ratios) < ROUNDS:
        return f"only {len(ratios)} of {ROUNDS} rounds" if ratios else ""
    if max(ratios) < 1:
        return "faster"
    return "slower" if min(ratios) > 1 else ""


def print_table(rows, out):
    lines = []
    for row in rows:
        line = row["constant"], row["value"], "present" if row["present"] else "", row["case"]
        if "seconds" not in row:
            lines.append((*line, *[""] * 5, row.get("error", "not timed")))
            continue
        seconds, ratios = row["seconds"], row.get("ratios", [])
        median = seconds["median"]
        spread = f"{100 * (seconds['p95'] - seconds['p5']) / median:.1f} %"
        line = (*line, f"{median * 1e6:.2f}", f"{report.gigabytes(row):.0f}", spread)
        ratio = f"{statistics.median(ratios):.3f}" if ratios else ""
        span = f"{min(ratios):.3f}-{max(ratios):.3f}" if ratios and not row["present"] else ""
        lines.append((*line, ratio, span, row.get("error", mark(ratios))))
    header = ("constant", "value", "", "case", "us", "GB/s", "spread", "/ present", "rounds", "")
    report.line_up(header, lines, out)
    print(
        "us: microseconds a call, the median. spread: from the 5th to the 95th percentile.\n"
        "/ present: the time, divided by that of the present value in the same round; below 1 is"
        " faster.\nIt is the median of the rounds, and rounds has the lowest and the highest.\n"
        f"faster, slower: the value was so in each of {ROUNDS} rounds. This does not say that the"
        " gain is worth a change.\nIt can be chance, too: with no difference at all, all"
        f" {ROUNDS} rounds agree by chance for 1 value in {2 ** (ROUNDS - 1)}.\n"
        "So run again before you take a value.",
        file=out,
    )


# The results.


class Results:
    """The file that the results go to, written anew as they come."""

    def __init__(self, folder, result):
        self.folder, self.result = folder, result
        self.path = self.error = None

    def prepare(self):
        """Makes the folder, and a file in it for a moment: what is timed must not be lost."""
        if not self.folder:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise Bad(f"--out {self.folder}: {error}") from None

    def timed(self):
        return any("seconds" in row for row in self.result["rows"])

    def write(self):
        """Leaves a failure in `error`: the run goes on to its table."""
        if not self.folder or not self.timed():
            return
        try:
            self.path = self.path or unused(self.folder)
            part = self.path.with_suffix(".part")
            try:
                part.write_text(json.dumps(self.result, indent=1) + "\n")
                part.replace(self.path)
            finally:
                part.unlink(missing_ok=True)
            self.error = None
        except OSError as error:
            self.error = error


def unused(folder):
    """tune.json; where there is one, tune-2.json, and so on."""
    path, number = folder / "tune.json", 2
    while path.exists():
        path, number = folder / f"tune-{number}.json", number + 1
    return path


# The command line.


def seconds(text):
    value = float(text)
    if not 1 <= value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MOST_SECONDS}, got {text}")
    return value


def arguments():
    about, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog=os.environ.get("FUSED_DROPOUT_PROG"),  # `./run tune`, which runs this
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", nargs="*", metavar="NAME",
        help="only constants with this in their names, in upper or lower case",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only prints what can be tried")
    parser.add_argument(
        "--seconds", type=seconds, default=SECONDS,
        help=f"for all of it, 1 to {MOST_SECONDS} ({SECONDS});"
        f" compiling may take {100 * COMPILING:.0f} %% of that",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=pathlib.Path,
        help="for tune.json; `run` gives it $OUT, or results",
    )  # fmt: skip
    parser.add_argument(
        "--ours", metavar="PROGRAM", default=shlex.quote(str(BUNDLE / "device_bench")),
        help="the server, a command: started as `PROGRAM --kernels DIR --serve`",
    )  # fmt: skip
    found = [folder / "kernels" for folder in (BUNDLE, BUNDLE.parent)]
    parser.add_argument(
        "--kernels", metavar="DIR", type=pathlib.Path, default=found[not found[0].exists()],
        help="the sources of the kernels, with tuning.cuh and nvcc-flags.txt (those of the bundle)",
    )  # fmt: skip
    return parser.parse_intermixed_args()  # names before and behind options


def ask_about(program):
    """What the device is; None where there is none."""
    try:
        command = [*shlex.split(program), "--about"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except FileNotFoundError as error:
        build = "build the bundle (python3 benches/bundle.py), or name a device_bench with --ours"
        raise Bad(f"{error}: {build}") from None
    except (OSError, ValueError) as error:
        raise Bad(f"--ours {program}: {error}") from None
    if done.returncode == NO_GPU:
        return None
    if done.returncode != 0:
        raise Bad(f"`{program} --about` ended with status {done.returncode}")
    try:
        about = json.loads(done.stdout)
    except ValueError:
        raise Bad(f"`{program} --about` speaks no JSON") from None
    for name, form in (("device", ".+"), ("driver", ".+"), ("compute_capability", r"\d+\.\d+")):
        value = about.get(name) if isinstance(about, dict) else None
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise Bad(f"`{program} --about` says no {name}")
    return about


def prepare(chosen, constants):
    """The compiler and the results, before the clock starts; None without a GPU."""
    about = ask_about(chosen.ours)
    if about is None:
        return None
    result = {"device": about, "command": shlex.join(["python3", *sys.argv]), "p": P}
    result |= {"rows": plan(constants, about["compute_capability"]), "notes": []}
    results = Results(chosen.out, result)
    results.prepare()
    compiler = nvcc.find(options(chosen.kernels, about))
    say(f"nvcc {compiler.release}: {compiler.path}")
    result["nvcc"] = compiler.release
    return compiler, results


def finish(results):
    """The table, and the exit status."""
    results.write()
    about, rows = results.result["device"], results.result["rows"]
    of_sources = f"commit {about.get('commit', 'unknown')}, {about.get('date', 'unknown')}"
    print(f"\n{about['device']}, driver {about['driver']}, {of_sources}, p = {P}\n")
    print_table(rows, sys.stdout)
    if results.error:
        sys.stdout.flush()
        say(f"tune: not written: {results.error}")
        return 1
    if results.path:
        print(f"\nwrote {results.path}")
    return 0 if results.timed() and not results.result["notes"] else 1


def main():
    chosen = arguments()
    try:
        constants = choose(read(chosen.kernels / "tuning.cuh"), chosen.name)
        if chosen.list:
            show(constants)
            return 0
        prepared = prepare(chosen, constants)
    except (Bad, nvcc.Failed, OSError) as error:
        say(f"tune: {error}")
        return 2
    if prepared is None:
        return NO_GPU

    compiler, results = prepared
    try:
        run(chosen, constants, compiler, results.result["rows"], results.write)
    except KeyboardInterrupt:
        say("\ninterrupted; what there is:")
        results.result["notes"].append("interrupted")
    return finish(results)


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(1)
