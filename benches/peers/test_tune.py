"""python3 -m unittest discover -s benches/peers: the tuning file, the turns, the table; nvcc and the server are stand-ins."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import tune

KERNELS = pathlib.Path(__file__).resolve().parent.parent.parent / "kernels"
GOOD = """#pragma once
/// What it is: not timed.
// tune: 4 8 666
// file: sum.cu
// case: dropout forward bf16 16x8
// case: dropout backward f32 32x8
#ifndef FD_ROWS
#define FD_ROWS 8
#endif
static_assert(FD_ROWS > 0, "FD_ROWS");
// tune: 512 640
// file: sum.cu sort.cu
// case: copy forward bf16 16x8
#ifndef FD_THREADS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_THREADS 640
#else
#define FD_THREADS 512
#endif
#endif
"""
# Writes what is defined as its code; does not take 666.
NVCC = """#!{python}
import sys
if "--version" in sys.argv:
    sys.exit(print("Cuda compilation tools, release 13.0, V13.0.88"))
out = sys.argv[sys.argv.index("-o") + 1]
(defined,) = (word[2:] for word in sys.argv if word.startswith("-D"))
if "666" in defined:
    sys.exit("sum.cu(7): error: no such beast")
assert "-arch=sm_90" in sys.argv and "-O3" in sys.argv, sys.argv
open(out, "w").write(defined)
"""
# Takes as many microseconds as the value of its kernels; logs who was asked for what.
SERVER = """#!{python}
import json, os, pathlib, signal, sys
log = pathlib.Path(__file__).with_name("log")
if "--about" in sys.argv and "NO_GPU" in os.environ:
    sys.exit(3)
if "--about" in sys.argv:
    sys.exit(print(json.dumps({about})))
assert sys.argv[3] == "--serve"
folder = pathlib.Path(sys.argv[sys.argv.index("--kernels") + 1])
name, value = (folder / "sum.cubin").read_text().split("=")
if value == os.environ.get("WRONG"):
    sys.exit("error: y[0] is wrong")
print(json.dumps({about}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    with log.open("a") as out:
        print(value, request["operator"], request["pass"], file=out)
    if request["pass"] == os.environ.get("INTERRUPTED"):
        os.kill(os.getppid(), signal.SIGINT)
    if request["dtype"] == os.environ.get("REFUSED"):
        print(json.dumps({{"error": "no memory"}}), flush=True)
        continue
    seconds = [int(value) * 1e-6] * request["samples"]
    print(json.dumps({{"seconds": seconds, "bytes": 8000}}), flush=True)
"""
ABOUT = {"device": "NVIDIA H200", "driver": "580.1", "compute_capability": "9.0"}


class Temporary(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name)
        for name in ("sum.cu", "sort.cu"):
            (self.folder / name).touch()
        self.file = self.folder / "tuning.cuh"
        self.file.write_text(GOOD)


class TuningFile(Temporary):
    def test_it_gives_names_values_files_cases_and_what_each_chip_has(self):
        rows, threads = tune.read(self.file)
        self.assertEqual((rows.name, rows.values, rows.files), ("FD_ROWS", [4, 8, 666], ["sum.cu"]))
        self.assertEqual([*rows.cases], ["dropout forward bf16 16x8", "dropout backward f32 32x8"])
        request = {"operator": "dropout", "pass": "backward", "dtype": "f32", "rows": 32, "cols": 8}
        self.assertEqual(rows.cases["dropout backward f32 32x8"], request)
        self.assertEqual(threads.files, ["sum.cu", "sort.cu"])
        chips = [(one.value("9.0"), one.value("8.0")) for one in (rows, threads)]
        self.assertEqual(chips, [(8, 8), (640, 512)])

    def test_a_line_that_is_not_understood_is_named(self):
        for number, good, bad in (
            (3, "// tune: 4 8 666", "// tune: 8"),
            (3, "// tune: 4 8 666", "// tune: 4, 8"),
            (3, "// tune: 4 8 666", "// tune: 4 16"),
            (3, "// tune: 4 8 666", "// tune: 8 8"),
            (3, "// tune: 4 8 666", "// tnue: 4 8"),
            (3, "// tune: 4 8 666\n", ""),
            (4, "// file: sum.cu\n", ""),
            (4, "// file: sum.cu\n", "// file: sum.cuh\n"),
            (4, "// file: sum.cu\n", "// file: none.cu\n"),
            (5, "dropout forward bf16 16x8", "dropout forward bf16 16"),
            (5, "dropout forward bf16 16x8", "dropout sideways bf16 16x8"),
            (6, "// case: dropout backward", "// csae: dropout backward"),
            (7, "#ifndef FD_ROWS", "#ifndef ROWS"),
            (8, "#define FD_ROWS 8", "#define FD_ROW 8"),
            (8, "#define FD_ROWS 8", "#define FD_ROWS (8)"),
            (9, "#endif\nstatic", "static"),
            (15, "== 900", ">= 900"),
            ("end", "#endif\n#endif\n", "#endif\n"),
        ):
            with self.subTest(bad=bad):
                text = GOOD.replace(good, bad, 1)
                self.assertNotEqual(text, GOOD)
                self.file.write_text(text)
                with self.assertRaises(tune.Bad) as caught:
                    tune.read(self.file)
                # Where a line is missing, the next one that counts is named.
                named = re.match(rf"{re.escape(str(self.file))}:(\w+): ", str(caught.exception))
                self.assertIsNotNone(named, caught.exception)
                if bad.strip() != "static" and named[1] != "end":
                    self.assertEqual(int(named[1]), number, caught.exception)

    def test_a_constant_is_there_once(self):
        self.file.write_text(GOOD + GOOD)
        with self.assertRaisesRegex(tune.Bad, "tuning.cuh:23: FD_ROWS is there twice"):
            tune.read(self.file)

    def test_the_kernels_use_every_constant_of_the_crate(self):
        operators = (KERNELS.parent / "benches" / "device" / "operators.rs").read_text()
        constants = tune.read(KERNELS / "tuning.cuh")
        self.assertGreater(len(constants), 5)
        for one in constants:
            for file in one.files:
                sources = [path.read_text() for path in included(KERNELS / file)]
                self.assertTrue(any(re.search(rf"\b{one.name}\b", text) for text in sources), one)
            for request in one.cases.values():
                name = request["operator"].title().replace("_", "")
                self.assertRegex(operators, rf"\n    {name},\n")

    def test_no_file_but_this_one_defines_a_constant(self):
        for one in tune.read(KERNELS / "tuning.cuh"):
            for path in KERNELS.glob("**/*.cu*"):
                if path.name != "tuning.cuh":
                    self.assertNotIn(f"#define {one.name} ", path.read_text())


def included(path):
    """A source and all that it includes, but the tuning file."""
    found = [path]
    for one in found:
        for name in re.findall('^#include "(.*)"', one.read_text(), re.MULTILINE):
            header = one.parent / name
            if header not in found and name != "tuning.cuh":
                found.append(header)
    return found


class Program(Temporary):
    def setUp(self):
        super().setUp()
        (self.folder / "nvcc-flags.txt").write_text("# flags\n-O3\n")
        self.nvcc = self.program("nvcc", NVCC)
        self.server = self.program("server", SERVER)

    def program(self, name, text):
        path = self.folder / name
        path.write_text(text.format(python=sys.executable, about=ABOUT))
        path.chmod(0o755)
        return str(path)

    def tune(self, *arguments, **environment):
        command = [sys.executable, tune.__file__, "--ours", self.server, "--kernels", self.folder]
        return subprocess.run(
            [*command, "--out", self.folder / "out", *arguments], capture_output=True, text=True,
            env=os.environ | {"FUSED_DROPOUT_NVCC": self.nvcc} | environment,
        )  # fmt: skip

    def lines(self, done):
        """The table without its spaces."""
        return [" ".join(line.split()) for line in done.stdout.splitlines()]

    def result(self):
        return json.loads((self.folder / "out" / "tune.json").read_text())

    def test_the_table_has_every_value_beside_the_present_one(self):
        done = self.tune()
        self.assertEqual(done.returncode, 0, done.stderr)
        case = "dropout forward bf16 16x8"
        for line in (
            f"FD_ROWS 4 {case} 4.00 2 0.0 % 0.500",
            f"FD_ROWS 8 present {case} 8.00 1 0.0 % 1.000",
            f"FD_ROWS 666 {case} nvcc said: sum.cu(7): error: no such beast",
            "FD_THREADS 512 copy forward bf16 16x8 512.00 0 0.0 % 0.800",
            "FD_THREADS 640 present copy forward bf16 16x8 640.00 0 0.0 % 1.000",
        ):
            self.assertIn(line, self.lines(done))
        self.assertEqual((self.result()["device"], self.result()["nvcc"]), (ABOUT, "V13.0.88"))
        first = self.result()["rows"][0]
        self.assertEqual((first["value"], first["bytes"]), (4, 8000))
        self.assertEqual(first["samples"], tune.ROUNDS * tune.SAMPLES)

    def test_each_round_begins_with_another_value(self):
        self.tune("ROWS")
        log = (self.folder / "log").read_text().split("\n")
        forward, backward = [f"{v} dropout forward" for v in (4, 8)], ["4 dropout backward"]
        self.assertEqual(log[:6], forward + forward[::-1] + forward)
        # One case after the other, of this constant alone.
        self.assertEqual(log[2 * tune.ROUNDS : 2 * tune.ROUNDS + 1], backward)
        self.assertEqual(len(log) - 1, 2 * 2 * tune.ROUNDS)

    def test_wrong_answers_and_refusals_are_lines(self):
        done = self.tune("ROWS", WRONG="8", REFUSED="f32")
        self.assertEqual(done.returncode, 0)
        case = "dropout forward bf16 16x8"
        wrong = "the server ended with status 1: error: y[0] is wrong"
        for line in (
            f"FD_ROWS 4 {case} 4.00 2 0.0 %",
            f"FD_ROWS 8 present {case} {wrong}",
            "FD_ROWS 4 dropout backward f32 32x8 no memory",
        ):
            self.assertIn(line, self.lines(done))

    def test_an_interruption_leaves_what_there_is(self):
        done = self.tune("ROWS", INTERRUPTED="backward")
        self.assertEqual(done.returncode, 1)
        self.assertIn("FD_ROWS 4 dropout forward bf16 16x8 4.00 2 0.0 % 0.500", self.lines(done))
        self.assertIn("FD_ROWS 8 present dropout backward f32 32x8 not timed", self.lines(done))
        self.assertEqual(self.result()["notes"], ["interrupted"])
        self.assertIn("seconds", self.result()["rows"][0])

    def test_out_of_time_is_said(self):
        done = self.tune("--seconds", "0")
        self.assertEqual(done.returncode, 1)
        self.assertIn("out of time", done.stderr)
        line = "FD_ROWS 4 dropout forward bf16 16x8 out of time for compiling"
        self.assertIn(line, self.lines(done))

    def test_what_is_missing_has_a_status(self):
        for status, said, arguments, environment in (
            (2, "no nvcc", [], {"FUSED_DROPOUT_NVCC": "/none/nvcc"}),
            (2, "/none/server", ["--ours", "/none/server"], {}),
            (2, "/none/tuning.cuh", ["--kernels", "/none"], {}),
            (2, "no such constant", ["COLUMNS"], {}),
            (3, "", [], {"NO_GPU": "1"}),
        ):
            done = self.tune(*arguments, **environment)
            self.assertEqual((done.returncode, done.stdout), (status, ""))
            self.assertIn(said, done.stderr)
        self.file.write_text("// tune: 1\n")
        self.assertIn("tuning.cuh:1: expected", self.tune().stderr)

    def test_the_list_needs_neither_gpu_nor_nvcc(self):
        done = self.tune("--list", "THREADS", NO_GPU="1", FUSED_DROPOUT_NVCC="/none/nvcc")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(
            done.stdout,
            "FD_THREADS: 512, 640; at present 640 on sm_90, otherwise 512\n"
            "    sum.cu sort.cu\n"
            "    copy forward bf16 16x8\n",
        )


class Table(unittest.TestCase):
    def test_columns_line_up(self):
        names = {"constant": "FD_X", "case": "a 8x8"}
        seconds = {"median": 2e-6, "p5": 1.9e-6, "p95": 2.1e-6}
        rows = [
            names | {"value": 8, "present": False, "error": "no memory"},
            names | {"value": 16, "present": True, "seconds": seconds, "bytes": 4000},
        ]
        out = io.StringIO()
        tune.print_table(rows, out)
        self.assertEqual(
            out.getvalue().split("\n")[:3],
            [
                "constant  value           case     us  GB/s  spread  / present",
                "FD_X          8           a 8x8                                 no memory",
                "FD_X         16  present  a 8x8  2.00     2  10.0 %      1.000",
            ],
        )


if __name__ == "__main__":
    unittest.main()
