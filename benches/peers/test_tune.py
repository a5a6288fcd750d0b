"""python3 -m unittest discover -s benches/peers: the tuning file, the turns, the table; nvcc and the server are stand-ins."""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import unittest
from unittest import mock

import nvcc
import tune
import tuning_file

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
# Writes what is defined as its code. Does not take 666. At the value that SLEEPS names it waits. So
# does its child, which holds a lock as long as it lives.
NVCC = """#!{python}
import fcntl, os, pathlib, subprocess, sys, time
if "--version" in sys.argv:
    sys.exit(print("Cuda compilation tools, release 13.0, V13.0.88"))
assert "-arch=sm_90" in sys.argv and "-O3" in sys.argv, sys.argv
defined = "".join(word[2:] for word in sys.argv if word.startswith("-D"))
if "666" in defined:
    print(os.environ.get("SAID", "sum.cu(7): error: no such beast"))
    sys.exit(2)
if defined.endswith(os.environ.get("SLEEPS", "none")):
    lock = pathlib.Path(__file__).with_name("lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    subprocess.Popen(["sleep", "30"], pass_fds=[lock.fileno()])
    pathlib.Path(__file__).with_name("sleeping").touch()
    time.sleep(30)
open(sys.argv[sys.argv.index("-o") + 1], "w").write(defined)
"""
# Takes as many microseconds as the value of its kernels, and if it DRIFTS more from call to call.
# Logs who was asked for what.
SERVER = """#!{python}
import json, os, pathlib, shutil, signal, sys
log = pathlib.Path(__file__).with_name("log")
if "--about" in sys.argv and "NO_GPU" in os.environ:
    sys.exit(3)
if "--about" in sys.argv:
    sys.exit(print(os.environ.get("ABOUT", json.dumps({about}))))
assert sys.argv[3] == "--serve"
folder = pathlib.Path(sys.argv[sys.argv.index("--kernels") + 1])
name, value = (folder / "sum.cubin").read_text().split("=")
if value == os.environ.get("WRONG"):
    sys.exit("error: y[0] is wrong")
print(json.dumps({about}), flush=True)
for call, line in enumerate(sys.stdin):
    request = json.loads(line)
    with log.open("a") as out:
        print(value, request["operator"], request["pass"], file=out)
    if request["pass"] == os.environ.get("INTERRUPTED"):
        os.kill(os.getppid(), signal.SIGINT)
    if "FULL" in os.environ:
        shutil.rmtree(log.with_name("out"), ignore_errors=True)
        log.with_name("out").touch()
    if request["dtype"] == os.environ.get("REFUSED"):
        print(json.dumps({{"error": "no memory"}}), flush=True)
        continue
    seconds = [int(value) * 1e-6 * (1 + call * ("DRIFTS" in os.environ))] * request["samples"]
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
            (5, "dropout forward bf16 16x8", "dropuot forward bf16 16x8"),
            (5, "dropout forward bf16 16x8", "dropout forward bf16 16x9"),
            (5, "dropout forward bf16 16x8", "dropout forward bf16 0x8"),
            (6, "dropout backward f32", "keep_mask backward f32"),
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

    def test_a_line_that_is_not_utf_8_is_named(self):
        self.file.write_bytes(GOOD.encode() + b"// caf\xe9\n")
        with self.assertRaisesRegex(tune.Bad, "tuning.cuh:21: not UTF-8"):
            tune.read(self.file)

    def test_the_operators_are_those_of_device_bench(self):
        operators = (KERNELS.parent / "benches" / "device" / "operators.rs").read_text()
        passes = re.findall(r"^ +\((\w+), (Forward|Backward)\),$", operators, re.MULTILINE)
        snake = [(re.sub(r"\B([A-Z])", r"_\1", name).lower(), way.lower()) for name, way in passes]
        self.assertEqual(len(snake), int(re.search(r"PASSES: .*; (\d+)\]", operators)[1]))
        known = [(name, way) for name, ways in tuning_file.OPERATORS.items() for way in ways]
        self.assertEqual(sorted(known), sorted(snake))

    def test_the_kernels_use_every_constant_of_the_crate(self):
        constants = tune.read(KERNELS / "tuning.cuh")
        self.assertGreater(len(constants), 5)
        for one in constants:
            for file in one.files:
                sources = [path.read_text() for path in included(KERNELS / file)]
                self.assertTrue(any(re.search(rf"\b{one.name}\b", text) for text in sources), one)

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

    def result(self, name="tune.json"):
        return json.loads((self.folder / "out" / name).read_text())

    def refused(self, said, *arguments, **environment):
        """It says so in its last line, with status 2, and compiles nothing."""
        done = self.tune(*arguments, **environment)
        self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
        self.assertIn(said, done.stderr.splitlines()[-1])
        self.assertNotIn("Traceback", done.stderr)
        self.assertNotIn("compiled", done.stderr)

    def ended(self):
        """Whether the child of a sleeping nvcc ends within five seconds."""
        with (self.folder / "lock").open() as lock:
            for _ in range(50):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                time.sleep(0.1)
        return False

    def test_the_table_has_every_value_beside_the_present_one(self):
        done = self.tune()
        self.assertEqual(done.returncode, 0, done.stderr)
        case = "dropout forward bf16 16x8"
        for line in (
            f"FD_ROWS 4 {case} 4.00 2 0.0 % 0.500 0.500-0.500 faster",
            f"FD_ROWS 8 present {case} 8.00 1 0.0 % 1.000",
            f"FD_ROWS 666 {case} nvcc said: sum.cu(7): error: no such beast",
            "FD_THREADS 512 copy forward bf16 16x8 512.00 0 0.0 % 0.800 0.800-0.800 faster",
            "FD_THREADS 640 present copy forward bf16 16x8 640.00 0 0.0 % 1.000",
        ):
            self.assertIn(line, self.lines(done))
        self.assertEqual((self.result()["device"], self.result()["nvcc"]), (ABOUT, "V13.0.88"))
        first = self.result()["rows"][0]
        self.assertEqual((first["value"], first["bytes"]), (4, 8000))
        self.assertEqual(first["samples"], tune.ROUNDS * tune.SAMPLES)
        self.assertEqual(first["ratios"], [0.5] * tune.ROUNDS)
        self.assertIn("by chance for 1 value in 16", " ".join(self.lines(done)))

    def test_the_ratio_is_of_the_same_round(self):
        done = self.tune("ROWS", DRIFTS="1")
        self.assertEqual(self.result()["rows"][0]["ratios"], [0.5] * tune.ROUNDS, done.stderr)

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
        line = "FD_ROWS 4 dropout forward bf16 16x8 4.00 2 0.0 % 0.500 0.500-0.500 faster"
        self.assertIn(line, self.lines(done))
        self.assertIn("FD_ROWS 8 present dropout backward f32 32x8 not timed", self.lines(done))
        self.assertEqual(self.result()["notes"], ["interrupted"])
        self.assertIn("seconds", self.result()["rows"][0])

    def test_out_of_time_is_said(self):
        done = self.tune("ROWS", "--seconds", "1", SLEEPS="4")
        self.assertIn("out of time", done.stderr)
        line = "FD_ROWS 4 dropout forward bf16 16x8 out of time for compiling"
        self.assertIn(line, self.lines(done))

    def test_what_nvcc_started_ends_with_its_time(self):
        self.tune("ROWS", "--seconds", "1", SLEEPS="4")
        self.assertTrue(self.ended())

    def test_what_nvcc_started_ends_with_an_interruption(self):
        for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(how=how.name):
                (self.folder / "sleeping").unlink(missing_ok=True)
                command = [sys.executable, tune.__file__, "--ours", self.server, "ROWS"]
                process = subprocess.Popen(
                    [*command, "--kernels", self.folder], stdout=subprocess.PIPE, text=True,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"FUSED_DROPOUT_NVCC": self.nvcc, "SLEEPS": "4"},
                )  # fmt: skip
                while process.poll() is None and not (self.folder / "sleeping").exists():
                    time.sleep(0.05)
                process.send_signal(how)
                said, _ = process.communicate(timeout=20)
                self.assertEqual(process.returncode, 1)
                self.assertIn("not timed", said)
                self.assertTrue(self.ended())

    def test_nvccs_complaint_is_an_error_or_its_last_line_with_the_status(self):
        warning = 'sum.cu(3): warning: variable "error" was set but never used'
        for said, told in (
            (f"{warning}\nsum.cu(7): error: no", "nvcc said: sum.cu(7): error: no"),
            (f"{warning}\nnvcc fatal   : no", "nvcc said: nvcc fatal : no"),
            (f"sum.cu(7): error #20: no\n{warning}", "nvcc said: sum.cu(7): error #20: no"),
            (f"{warning}\nKilled\n\n", "nvcc ended with status 2: Killed"),
            ("", "nvcc ended with status 2"),
        ):
            with self.subTest(said=said):
                line = f"FD_ROWS 666 dropout forward bf16 16x8 {told}"
                self.assertIn(line, self.lines(self.tune("ROWS", SAID=said)))

    def test_what_is_missing_has_a_status(self):
        for status, said, arguments, environment in (
            (2, "FUSED_DROPOUT_NVCC=/none/nvcc", [], {"FUSED_DROPOUT_NVCC": "/none/nvcc"}),
            (2, "/none/server", ["--ours", "/none/server"], {}),
            (2, "/none/tuning.cuh", ["--kernels", "/none"], {}),
            (3, "", [], {"NO_GPU": "1"}),
        ):
            done = self.tune(*arguments, **environment)
            self.assertEqual((done.returncode, done.stdout), (status, ""))
            self.assertIn(said, done.stderr)
        self.file.write_text("// tune: 1\n")
        self.assertIn("tuning.cuh:1: expected", self.tune().stderr)
        self.file.write_text("#pragma once\n")
        self.refused("tuning.cuh names no constant")
        self.file.write_bytes(b"\xff")
        self.refused("tuning.cuh:1: not UTF-8")

    def test_seconds_are_from_one_to_a_day(self):
        for seconds in ("nan", "inf", "1e30", "0", "-5", "two"):
            with self.subTest(seconds=seconds):
                self.refused("--seconds", "--seconds", seconds)

    def test_a_name_that_matches_nothing_is_named(self):
        self.refused("no constant has COLUMNS in its name", "ROWS", "COLUMNS")
        listed = self.tune("--list", "rows").stdout
        self.assertEqual(re.findall(r"^FD_\w+", listed, re.MULTILINE), ["FD_ROWS"])

    def test_a_server_that_is_none_is_said(self):
        self.refused("speaks no JSON", ABOUT="hello")
        self.refused("says no device", ABOUT="[]")
        self.refused("says no driver", ABOUT=json.dumps(ABOUT | {"driver": None}))
        nine = {"compute_capability": "nine"}
        self.refused("compute_capability", ABOUT=json.dumps(ABOUT | nine))
        self.refused("ended with status 1", "--ours", "false")
        self.refused("No closing quotation", "--ours", "'server")

    def test_kernels_without_flags_are_said(self):
        (self.folder / "nvcc-flags.txt").unlink()
        self.refused("nvcc-flags.txt")

    def test_without_a_bundle_it_says_how_to_build_one(self):
        command = [sys.executable, tune.__file__, "--kernels", self.folder]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("python3 benches/bundle.py", done.stderr)

    def test_under_run_the_usage_says_so(self):
        shutil.copy(KERNELS.parent / "benches" / "run", self.folder)
        (self.folder / "commit").touch()
        (self.folder / "peers").symlink_to(pathlib.Path(tune.__file__).parent)
        done = subprocess.run(
            ["./run", "tune", "--help"], cwd=self.folder, capture_output=True, text=True
        )
        self.assertTrue(done.stdout.startswith("usage: ./run tune "), done.stdout + done.stderr)

    def test_an_earlier_result_stays(self):
        self.assertIn(f"wrote {self.folder / 'out' / 'tune.json'}", self.tune("ROWS").stdout)
        first = self.result()
        self.assertIn("tune-2.json", self.tune("THREADS").stdout)
        self.assertIn("tune-3.json", self.tune("ROWS", INTERRUPTED="backward").stdout)
        self.assertEqual(self.result(), first)
        self.assertEqual(self.result("tune-2.json")["rows"][0]["constant"], "FD_THREADS")
        self.assertEqual(self.result("tune-3.json")["notes"], ["interrupted"])
        self.assertEqual(len(os.listdir(self.folder / "out")), 3)

    def test_a_run_that_timed_nothing_writes_nothing(self):
        done = self.tune("ROWS", INTERRUPTED="forward")
        self.assertEqual(done.returncode, 1)
        self.assertNotIn("wrote", done.stdout)
        self.assertEqual(os.listdir(self.folder / "out"), [])

    def test_a_folder_that_cannot_be_written_is_said_at_once(self):
        for folder in (self.file, self.file / "out", "/dev/null/out"):
            self.refused(str(folder), "--out", folder)

    def test_a_result_that_cannot_be_written_leaves_the_table(self):
        done = self.tune("ROWS", FULL="1")
        self.assertEqual(done.returncode, 1)
        line = "FD_ROWS 4 dropout backward f32 32x8 4.00 2 0.0 % 0.500 0.500-0.500 faster"
        self.assertIn(line, self.lines(done))
        self.assertNotIn("wrote", done.stdout)
        self.assertIn("tune: not written: ", done.stderr.splitlines()[-1])

    def test_an_nvcc_that_does_not_work_is_passed_over(self):
        broken = self.program("broken", "#!/bin/sh\necho 'error: no host compiler'; exit 1\n")
        (self.folder / "bin").mkdir()
        shutil.copy(self.nvcc, self.folder / "bin" / "nvcc")
        homes = {"FUSED_DROPOUT_NVCC": "", "NVCC": broken, "CUDA_HOME": str(self.folder)}
        done = self.tune("ROWS", **homes)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"passed over {broken}: nvcc said: error: no host compiler", done.stderr)
        self.assertIn(f"nvcc V13.0.88: {self.folder}/bin/nvcc", done.stderr)
        self.refused(f"FUSED_DROPOUT_NVCC={broken}: ", FUSED_DROPOUT_NVCC=broken)

    def test_the_list_needs_neither_gpu_nor_nvcc(self):
        done = self.tune("--list", "THREADS", NO_GPU="1", FUSED_DROPOUT_NVCC="/none/nvcc")
        self.assertEqual(done.returncode, 0)
        self.assertEqual(
            done.stdout,
            "FD_THREADS: 512, 640; at present 640 on sm_90, otherwise 512\n"
            "    sum.cu sort.cu\n"
            "    copy forward bf16 16x8\n",
        )


class Nvcc(Temporary):
    def file_at(self, path):
        """An empty nvcc there, and its path."""
        path = self.folder / path
        path.parent.mkdir(parents=True)
        path.touch(mode=0o755)
        return str(path)

    def test_it_is_where_the_build_looks_and_in_its_order(self):
        wheel = "site-packages/nvidia/cu13/bin/nvcc"
        expected = [
            self.file_at(path)
            for path in (
                "named/nvcc",
                "home/bin/nvcc",
                "path/bin/nvcc",
                "on_path/nvcc",
                "local/cuda/bin/nvcc",
                "local/cuda-13.0/bin/nvcc",
                "local/cuda-12.8/bin/nvcc",
                "local/cuda-9.2/bin/nvcc",
                "opt/bin/nvcc",
                "venv/bin/nvcc",
                f"venv/lib/python3.11/{wheel}",
                "conda/bin/nvcc",
                f"conda/lib/python3.12/{wheel}",
                f"python3/{wheel}",
                "running/bin/nvcc",
                f"running/{wheel}",
            )
        ]
        python = self.folder / "on_path" / "python3"
        python.write_text(f"#!/bin/sh\necho {self.folder}/python3/site-packages\n")
        python.chmod(0o755)
        variables = ("NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV", "CONDA_PREFIX")
        places = ("named/nvcc", "home", "path", "on_path", "venv", "conda")
        environment = {name: f"{self.folder}/{at}" for name, at in zip(variables, places)}
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(nvcc, "LOCAL", self.folder / "local"),
            mock.patch.object(nvcc, "OPT", self.folder / "opt"),
            mock.patch.object(sys, "prefix", f"{self.folder}/running"),
            mock.patch.object(sys, "path", [f"{self.folder}/running/site-packages"]),
        ):
            self.assertEqual([*map(str, nvcc.candidates())], expected)

    def test_where_there_is_none_it_says_where_it_looked(self):
        with (
            mock.patch.dict(os.environ, {"FUSED_DROPOUT_NVCC": ""}),
            mock.patch.object(nvcc, "candidates", list),
            self.assertRaisesRegex(nvcc.Failed, "no nvcc in .*CUDA_HOME.*VIRTUAL_ENV"),
        ):
            nvcc.find([])


class Rounds(unittest.TestCase):
    def line(self, *times):
        """The end of the line of a value with such times; the present one takes 1 us each."""

        def variant(times):
            def ask(_):
                if not left:
                    raise RuntimeError("lost")
                return {"seconds": [left.pop(0) * 1e-6] * tune.SAMPLES, "bytes": 1000}

            left = list(times)
            return types.SimpleNamespace(server=types.SimpleNamespace(ask=ask), error=None, why=str)

        names = {"constant": "FD_X", "case": "a 8x8"}
        rows = [names | {"value": 1, "present": True}, names | {"value": 2, "present": False}]
        with mock.patch.object(tune, "ROUNDS", 5):
            variants = [variant([1] * 5), variant(times)]
            tune.take_turns(rows, variants, {}, time.monotonic() + 60)
            out = io.StringIO()
            tune.print_table(rows, out)
        return out.getvalue().splitlines()[2].split("%")[1].split()

    def test_a_value_is_marked_where_all_rounds_agree(self):
        self.assertEqual(self.line(0.9, 0.7, 0.8, 0.7, 0.9), ["0.800", "0.700-0.900", "faster"])
        self.assertEqual(self.line(1.1, 1.2, 1.5, 1.2, 1.1), ["1.200", "1.100-1.500", "slower"])
        self.assertEqual(self.line(0.9, 0.9, 1.01, 0.9, 0.9), ["0.900", "0.900-1.010"])
        self.assertEqual(self.line(1.1, 1.1, 1.0, 1.1, 1.1), ["1.100", "1.000-1.100"])

    def test_a_value_without_all_its_rounds_is_not_marked(self):
        self.assertEqual(self.line(0.9, 0.8, 0.9, 0.9), ["0.900", "0.800-0.900", "lost"])

    def test_rounds_that_there_was_no_time_for_are_said(self):
        row = {"constant": "FD_X", "case": "a 8x8", "value": 2, "present": False, "bytes": 1000}
        row |= {"seconds": {"median": 1e-6, "p5": 1e-6, "p95": 1e-6}, "ratios": [0.9, 0.9]}
        out = io.StringIO()
        tune.print_table([row], out)
        self.assertIn("0.900-0.900  only 2 of 5 rounds\n", out.getvalue())


class Table(unittest.TestCase):
    def test_columns_line_up(self):
        names = {"constant": "FD_X", "case": "a 8x8"}
        seconds = {"median": 2e-6, "p5": 1.9e-6, "p95": 2.1e-6}
        rows = [
            names | {"value": 8, "present": False, "error": "no memory"},
            names | {"value": 16, "present": True, "seconds": seconds, "bytes": 4000},
        ]
        rows[1]["ratios"] = [1.0] * tune.ROUNDS
        out = io.StringIO()
        tune.print_table(rows, out)
        self.assertEqual(
            out.getvalue().split("\n")[:3],
            [
                "constant  value           case     us  GB/s  spread  / present  rounds",
                "FD_X          8           a 8x8                                         no memory",
                "FD_X         16  present  a 8x8  2.00     2  10.0 %      1.000",
            ],
        )


if __name__ == "__main__":
    unittest.main()
