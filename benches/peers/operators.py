#!/usr/bin/env python3
"""What PyTorch and Triton take for the same work on the same GPU, in turns with ours.

    pip install torch==2.11.0 triton==3.6.0 matplotlib tqdm
    python3 benches/peers/operators.py --out DIR \\
        --ours 'cargo bench --features cuda --bench device --'

Checks every peer, then times every operator: in each round every peer and ours take a turn of some samples, in changing
order, so that what drifts hits all alike. Prints tables; DIR gets peers.json and peers.svg.

Peers: eager (PyTorch), compile (torch.compile), tutorial and strong (Triton). What each does is told in torch_peers.py
and triton_peers.py, how they are timed in timing.py, and what the least bytes are in work.py.

A peer that fails its check is called biased and timed all the same. Exit status: 0, also where a target is missed; 1 if
nothing was timed; 2 for bad arguments; 3 without a CUDA device.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
import warnings

try:
    import torch
except ImportError:
    sys.exit("PyTorch is not installed: pip install torch==2.11.0 triton==3.6.0 matplotlib tqdm")

import checks
import marks
import report
import timing
import torch_peers
import work
from ours import Ours
from work import Point

P = 0.1
CHECKED_P = (0.1, 0.001)
BUDGET = 480
ROUNDS, SAMPLES = 5, 20  # 100 samples of everything
DIRECTIONS = ("forward", "backward")
MAIN = (1 << 14, 1 << 10)  # 2^24 elements at 1024 columns
SIZES = [(1 << (power - 10), 1024) for power in (24, 20, 28, 16, 26, 22, 18)]
LENGTHS = [((1 << 24) // cols, cols) for cols in (4096, 2048, 16384, 512, 8192)]
CPU_SHAPES = [(256, 128), (128, 128)]


def arguments():
    about, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ours", metavar="PROGRAM", help="our server, a command: started as `PROGRAM --serve`"
    )
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="for peers.json, peers.svg")
    parser.add_argument(
        "--operator", metavar="NAME", action="append", choices=[*work.OPERATORS],
        help="only this one; may be repeated: " + ", ".join(work.OPERATORS),
    )  # fmt: skip
    parser.add_argument(
        "--dtype", action="append", choices=[*work.DTYPES],
        help="only this one; may be repeated. Without: bf16, and f16 and f32 at 2^24 elements",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", choices=report.PEERS, help="only this one; may be repeated"
    )
    parser.add_argument("--full", action="store_true", help="all shapes in all storage types")
    parser.add_argument("--quick", action="store_true", help="2^24 and 2^20 elements only, in bf16")
    parser.add_argument(
        "--seconds", metavar="BUDGET", type=float,
        help=f"when they are over, the rest is skipped and listed ({BUDGET}; with --full no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu is for trying this program, on tiny sizes: its times are no result",
    )  # fmt: skip
    chosen = parser.parse_args()
    if chosen.device == "cpu" and (chosen.out or chosen.ours):
        parser.error(
            "CPU times of peers are no result: --device cpu goes with neither --out nor --ours"
        )
    return chosen


def shapes(chosen):
    """(dtype, rows, cols), the most telling first."""
    if chosen.device == "cpu":
        sizes = CPU_SHAPES
    else:
        sizes = SIZES[:2] if chosen.quick else SIZES + LENGTHS
    dtypes = chosen.dtype or list(work.DTYPES)
    for size in sizes:
        everything = chosen.full or chosen.dtype or (size == MAIN and not chosen.quick)
        yield from ((dtype, *size) for dtype in dtypes if everything or dtype == "bf16")


def points(chosen):
    """What is to be timed. The copy of a shape comes before its operators: it is their limit."""
    operators = dict.fromkeys(["copy", *(chosen.operator or work.OPERATORS)])
    found = [
        Point(operator, direction, *shape)
        for shape in shapes(chosen)
        for operator in operators
        for direction in DIRECTIONS
    ]
    return [point for point in found if (point.operator, point.direction) != ("copy", "backward")]


def peers(chosen):
    found = [torch_peers.Eager()]
    if chosen.device == "cuda" or "compile" in (chosen.peer or ()):
        found.append(torch_peers.Compiled())
    if chosen.device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        import triton_peers

        found += [triton_peers.Tutorial(), triton_peers.Strong()]
    return [peer for peer in found if peer.name in (chosen.peer or report.PEERS)]


def progress(items, what):
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, unit="", file=sys.stderr, dynamic_ncols=True)


def reason(error):
    """The first line of an error: compilers tell theirs in hundreds."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"


def attempt(function, *rest):
    """(result, None) or (None, why not): a peer that fails is a row in the table, and no end."""
    try:
        return function(*rest), None
    except Exception as error:
        return None, reason(error)


def checked(chosen, all_peers):
    rows, cols = CPU_SHAPES[0] if chosen.device == "cpu" else MAIN
    wanted = [name for name in chosen.operator or work.OPERATORS if name != "copy"]
    found = []
    for operator in progress(wanted, "checks"):
        point = Point(operator, "backward", "f32", rows, cols)
        for peer, p in itertools.product(all_peers, CHECKED_P):
            if not peer.has(operator, "forward"):
                continue
            row, error = attempt(checks.check, peer, point, p, chosen.device)
            found.append(row or {"operator": operator, "peer": peer.name, "p": p, "error": error})
    return found


def remembered(chosen, all_peers):
    """Memory, at one size."""
    rows, cols = CPU_SHAPES[0] if chosen.device == "cpu" else MAIN
    wanted = [name for name in chosen.operator or work.OPERATORS if name != "copy"]
    found = []
    for operator, peer in progress([*itertools.product(wanted, all_peers)], "memory"):
        if not peer.has(operator, "forward"):
            continue
        point = Point(operator, "backward", "bf16", rows, cols)
        row, error = attempt(marks.memory, peer, point, P, chosen.device)
        if error:
            print(f"memory of {operator}, {peer.name}: {error}", file=sys.stderr)
        else:
            found.append(row)
    return found


def attended(chosen, _):
    if chosen.device == "cpu" or chosen.operator:
        return []
    found = []
    for width, both in progress([*itertools.product(marks.WIDTHS, (False, True))], "attention"):
        rows, error = attempt(marks.attention, P, width, both, ROUNDS, SAMPLES, chosen.device)
        if error:
            print(f"attention, width {width}: {error}", file=sys.stderr)
        found += rows or []
    return found


def prepare(point, all_peers, ours, device):
    """({peer: what times it}, {peer: why it cannot})."""
    sets = 1 if device == "cpu" else work.buffer_sets(point)
    buffers = work.buffers(point, sets, device)
    timers, errors = {}, {}

    def build(peer):
        calls = [peer.call(point, P, *one, seed=i + 1) for i, one in enumerate(buffers)]
        return timing.timer(calls, device)

    for peer in all_peers:
        if not peer.has(point.operator, point.direction):
            continue
        timer, error = attempt(build, peer)
        if error:
            errors[peer.name] = error
        else:
            timers[peer.name] = timer
    if ours:
        timers["ours"] = ours.timer(point, P)
    return timers, errors


def take_turns(timers, errors, device):
    """Seconds of each, in rounds: each round begins with another."""
    seconds = {name: [] for name in timers}
    rounds, samples = (1, 3) if device == "cpu" else (ROUNDS, SAMPLES)
    for turn in range(rounds):
        names = list(timers)
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            if device != "cpu":
                torch.cuda.synchronize()
            found, error = attempt(timers[name].sample, samples)
            if error:
                errors[name] = error
                del timers[name]
            else:
                seconds[name] += found
    return seconds


def agreed(point, theirs, count, notes):
    """The server's count of the least bytes, for all. A note, once a pass, where it is not ours here, ids apart."""
    name = f"{point.operator} {point.direction}: "
    if abs(theirs / count - 1) > 0.01 and not any(note.startswith(name) for note in notes):
        shape = f"{point.dtype} {point.rows}x{point.cols}"
        notes.append(f"{name}the server counts {theirs} bytes at {shape}, work.py {count}")
    return theirs


def timed(point, all_peers, ours, device, notes):
    """A row for each peer and ours."""
    prepared, error = attempt(prepare, point, all_peers, ours, device)
    if error:
        return [point.request() | {"peer": "all", "error": error}]
    timers, errors = prepared
    seconds = take_turns(timers, errors, device)
    count = work.least_bytes(point)
    if "ours" in timers:
        count = agreed(point, timers["ours"].bytes, count, notes)
    rows = [
        point.request()
        | {"peer": name, "bytes": count, "timer": timer.kind}
        | {"seconds": report.summary(seconds[name]), "samples": len(seconds[name])}
        for name, timer in timers.items()
    ]
    return rows + [point.request() | {"peer": n, "error": why} for n, why in errors.items()]


def sweep(chosen, all_peers, ours, result, deadline):
    """Adds to the result as it goes, so that an interrupted run has what was timed."""
    for point in progress(points(chosen), "timing"):
        if time.monotonic() > deadline:
            result["skipped"].append(str(point))
            continue
        result["rows"] += timed(point, all_peers, ours, chosen.device, result["notes"])
        if chosen.device == "cuda":
            torch.cuda.empty_cache()


def output_of(*command):
    here = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0]


def commit():
    return output_of("git", "rev-parse", "HEAD") or "unknown"


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def described(device, ours):
    """The device, in the words of our server if there is one."""
    if ours:
        return ours.device
    common = {"commit": commit(), "date": now()}
    if device == "cpu":
        return {"device": "no GPU"} | common
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "device": properties.name,
        "driver": output_of(*query),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    } | common


def software():
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if "triton" in sys.modules:
        found["triton"] = sys.modules["triton"].__version__
    return found | {"cuda": torch.version.cuda}


def write(result, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {folder / 'peers.json'}")
    drawn, error = attempt(report.plot, result, folder / "peers.svg")
    if error:
        print(f"no plot: {error}", file=sys.stderr)
    elif drawn:
        print(f"wrote {folder / 'peers.svg'}")


def no_device(device):
    if device == "cpu":
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own words on a missing driver
        return not torch.cuda.is_available()


def run(chosen, ours):
    budget = chosen.seconds or (float("inf") if chosen.full else BUDGET)
    deadline = time.monotonic() + budget
    result = {
        "device": described(chosen.device, ours),
        "command": shlex.join(["python3", *sys.argv]),
        "p": P,
    }
    result |= {name: [] for name in ("checks", "attention", "memory", "rows", "skipped", "notes")}
    all_peers = peers(chosen)
    try:
        result["checks"] = checked(chosen, all_peers)
        report.print_checks(result["checks"], sys.stdout)
        sweep(chosen, all_peers, ours, result, deadline)
        # What the time left allows: these two are not about ours.
        for name, measure in (("attention", attended), ("memory", remembered)):
            if time.monotonic() > deadline:
                result["skipped"].append(name)
            else:
                result[name] = measure(chosen, all_peers)
    except KeyboardInterrupt:
        print("\ninterrupted; what there is:", file=sys.stderr)
        result["notes"].append("interrupted")
    result |= {"software": software(), "targets": report.targets(result["rows"])}
    return result


def main():
    chosen = arguments()
    if no_device(chosen.device):
        print("no CUDA device: the peers were not timed", file=sys.stderr)
        return 3
    if chosen.device == "cpu":
        print("ON THE CPU, TINY SIZES: THIS TRIES THE PROGRAM. ITS TIMES ARE NO RESULT.")
    else:
        # One stream for everything, and not the default one, on which nothing can be captured.
        torch.cuda.set_stream(torch.cuda.Stream())
    # The server cannot know these two by itself.
    told = {"FUSED_DROPOUT_COMMIT": commit(), "FUSED_DROPOUT_DATE": now()}
    ours, error = attempt(Ours, chosen.ours, told | os.environ) if chosen.ours else (None, None)
    if error:
        print(f"our server does not start: {error}", file=sys.stderr)
        return 2
    try:
        result = run(chosen, ours)
    finally:
        if ours:
            ours.close()
    report.print_all(result, sys.stdout)
    if chosen.out:
        write(result, chosen.out)
    return 0 if any("seconds" in row for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
