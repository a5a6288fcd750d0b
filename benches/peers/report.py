"""Tables, targets and the plot, from rows alone: those of peers.json, and of tune.json."""

import re
import statistics
from collections import defaultdict

PEERS = ("eager", "compile", "tutorial", "strong")
# How many times faster than PyTorch eager the forward pass must be at 2^24 elements and more: what the bytes allow, with
# a byte mask on PyTorch's side.
EAGER_TARGETS = {"dropout_add": 1.8, "dropout_add_layernorm": 1.8, "softmax_dropout": 2.0}
LARGE = 1 << 24


def summary(seconds):
    """Median, and the 5th and 95th percentile."""
    if len(seconds) < 2:
        raise ValueError("a percentile needs two samples")
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"median": statistics.median(seconds), "p5": cuts[0], "p95": cuts[-1]}


def by_point(rows):
    """{(operator, pass, dtype, rows, cols): {peer: row}}, in the order of the rows; errors are left out."""
    points = defaultdict(dict)
    for row in rows:
        if "seconds" in row:
            names = (row["operator"], row["pass"], row["dtype"], row["rows"], row["cols"])
            points[names][row["peer"]] = row
    return points


def median(row):
    return row["seconds"]["median"]


def gigabytes(row):
    return row["bytes"] / median(row) * 1e-9


def best_peer(peers):
    others = [row for name, row in peers.items() if name != "ours"]
    return min(others, key=median, default=None)


def copies(points):
    """GB/s of the best copy of each (dtype, rows, cols)."""
    return {
        names[2:]: max(map(gigabytes, peers.values()))
        for names, peers in points.items()
        if names[0] == "copy"
    }


def verdict(peers):
    """Ours against the best peer: "met", "tie" where the 5..95 % ranges overlap, "missed"; None without a pair."""
    best, ours = best_peer(peers), peers.get("ours")
    if best is None or ours is None:
        return None
    ours, best = ours["seconds"], best["seconds"]
    if ours["p5"] <= best["p95"] and best["p5"] <= ours["p95"]:
        return "tie"
    return "met" if ours["median"] < best["median"] else "missed"


def line_up(header, lines, out):
    """Columns as wide as their widest cell; numbers stand to the right."""
    lines = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    number = re.compile(r"[(+-]?\d")
    text = [not any(map(number.match, column[1:])) for column in zip(*lines)]
    for line in lines:
        cells = (c.ljust(w) if t else c.rjust(w) for c, w, t in zip(line, widths, text))
        print("  ".join(cells).rstrip(), file=out)


def print_checks(checks, out):
    if not checks:
        return
    print("\nchecks, f32; each of two within 5 standard deviations (in brackets):", file=out)
    header = ("operator", "peer", "p", "keep rate", "", "E[y]/x - 1", "", "same mask", "")
    lines = []
    for row in checks:
        if "error" in row:
            lines.append((row["operator"], row["peer"], row["p"], *[""] * 5, row["error"]))
            continue
        same = {True: "yes", False: "NO", None: "no backward"}[row["same_mask"]]
        keep, bias = f"{row['keep_rate']:.6f}", f"{row['bias']:+.2e}"
        keep_bound, bias_bound = f"({row['keep_rate_bound']:.1e})", f"({row['bias_bound']:.1e})"
        passed = "passed" if row["passed"] else "FAILED: biased, timed all the same"
        line = (row["operator"], row["peer"], row["p"], keep, keep_bound, bias, bias_bound, same)
        lines.append((*line, passed))
    line_up(header, lines, out)


def cell(row):
    """Microseconds; "e" marks times of plain calls between events."""
    if row is None:
        return "-"
    return f"{median(row) * 1e6:.1f}" + ("e" if row["timer"] == "events" else "")


def print_times(rows, out):
    points = by_point(rows)
    if not points:
        return
    limits = copies(points)
    print(
        "\nmicroseconds a call, medians; GB/s are of the least bytes. e: not in a CUDA graph",
        file=out,
    )
    header = ("operator", "pass", "dtype", "rows", "cols", "ours", "GB/s", "of copy", *PEERS)
    lines = []
    for names, peers in points.items():
        ours, best = peers.get("ours"), best_peer(peers)
        rate = gigabytes(ours or best)
        limit = limits.get(names[2:])
        share = f"{100 * rate / limit:.0f} %" if limit else ""
        times = ("", "")
        if ours and best and names[0] != "copy":
            times = f"{median(best) / median(ours):.2f}", verdict(peers)
        line = (*names, cell(ours), f"{rate:.0f}", share, *(cell(peers.get(p)) for p in PEERS))
        lines.append((*line, *times))
    line_up((*header, "best/ours", ""), lines, out)
    if not any("ours" in peers for peers in points.values()):
        print("GB/s and share are the best peer's: ours was not run", file=out)


def print_errors(rows, notes, skipped, out):
    failed = [row for row in rows if "error" in row]
    if failed:
        print("\nwithout a time:", file=out)
    for row in failed:
        point = f"{row['operator']} {row['pass']} {row['dtype']} {row['rows']}x{row['cols']}"
        print(f"  {point}, {row['peer']}: {row['error']}", file=out)
    for note in notes:
        print(f"note: {note}", file=out)
    if skipped:
        print(f"\nskipped, the budget was over ({len(skipped)}):", file=out)
    for name in skipped:
        print(f"  {name}", file=out)


def print_attention(rows, out):
    if not rows:
        return
    print(
        "\nscaled_dot_product_attention, PyTorch's flash kernel, bf16, 8 x 16 x 2048, causal:",
        file=out,
    )
    header = ("width", "p", "ms", "dropout costs", "pass")
    lines = []
    for row in rows:
        cost = f"{row['cost_percent']:.1f} %" if row["p"] else ""
        lines.append((row["width"], row["p"], f"{median(row) * 1e3:.3f}", cost, row["pass"]))
    line_up(header, lines, out)


def print_memory(rows, out):
    if not rows:
        return
    first = rows[0]
    print(
        f"\nmemory, {first['dtype']}, {first['elements']} elements, MB: saved for the backward pass beyond inputs and"
        "\noutputs, and the peak of forward and backward together. Ours saves 0, for the norm 8 bytes a row.",
        file=out,
    )
    lines = []
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
        lines.append((row["operator"], row["peer"], f"{row['saved_bytes'] / 1e6:.3f}", peak))
    line_up(("operator", "peer", "saved", "peak"), lines, out)


def speed_targets(points):
    for operator, wanted in EAGER_TARGETS.items():
        ratios = [
            median(peers["eager"]) / median(peers["ours"])
            for names, peers in points.items()
            if names[:2] == (operator, "forward")
            and large(names)
            and {"eager", "ours"} <= set(peers)
        ]
        if ratios:
            name = f"{operator} forward at least {wanted} times faster than eager"
            yield name, f"{min(ratios):.2f} at least", min(ratios) >= wanted


def share_targets(points):
    limits = copies(points)
    shares = {False: [], True: []}
    for names, peers in points.items():
        if names[0] != "copy" and large(names) and "ours" in peers and names[2:] in limits:
            rows = names[0].endswith(("layernorm", "softmax_dropout"))
            shares[rows].append((gigabytes(peers["ours"]) / limits[names[2:]], names))
    for rows, wanted in ((False, 0.95), (True, 0.90)):
        if shares[rows]:
            least, names = min(shares[rows])
            name = f"{'LayerNorm and softmax' if rows else 'streaming operators'}: {wanted:.0%} of copy"
            yield name, f"{least:.0%} at least: {' '.join(map(str, names))}", least >= wanted


def peer_targets(points):
    verdicts = [
        v for names, peers in points.items() if names[0] != "copy" and (v := verdict(peers))
    ]
    if verdicts:
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "tie", "missed"))
        yield "never slower than the best peer, at any size", counts, "missed" not in verdicts


def large(names):
    return names[2] == "bf16" and names[3] * names[4] >= LARGE


def targets(rows):
    """What was to be reached and whether it was, in bf16 from 2^24 elements; nothing where ours was not run."""
    points = by_point(rows)
    found = (*speed_targets(points), *share_targets(points), *peer_targets(points))
    return [{"target": name, "result": result, "met": met} for name, result, met in found]


def print_targets(found, out):
    if not found:
        return
    print("\ntargets, in bf16 from 2^24 elements where no size is named:", file=out)
    for target in found:
        met = "met   " if target["met"] else "MISSED"
        print(f"  {met}  {target['target']}: {target['result']}", file=out)


def print_all(result, out):
    print_times(result["rows"], out)
    print_attention(result["attention"], out)
    print_memory(result["memory"], out)
    print_errors(result["rows"], result["notes"], result["skipped"], out)
    print_targets(result["targets"], out)


# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = {
    "ours": "#d55e00",
    "eager": "#0072b2",
    "compile": "#009e73",
    "tutorial": "#cc79a7",
    "strong": "#e69f00",
}


def plot_panel(axes, title, points, limits):
    curves, limit = defaultdict(list), []
    for names, peers in sorted(points.items(), key=lambda item: item[0][3]):
        elements = names[3] * names[4]
        for peer, row in peers.items():
            curves[peer].append((elements, gigabytes(row)))
        if names[2:] in limits:
            limit.append((elements, limits[names[2:]]))
    if limit:
        axes.plot(*zip(*limit), color="#888888", linestyle="--", linewidth=1, label="copy")
    for peer in (*PEERS, "ours"):
        if curve := curves.get(peer):
            width = 2 if peer == "ours" else 1.2
            axes.plot(*zip(*curve), "o-", color=COLOURS[peer], linewidth=width, ms=3, label=peer)
    axes.set_title(title, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)


def plot(result, path):
    """One panel an operator and pass: GB/s of the least bytes over elements, at 1024 columns in bf16."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "peers"}
    from matplotlib import pyplot

    points = by_point(result["rows"])
    limits = copies(points)
    panels = defaultdict(dict)
    for names, peers in points.items():
        if names[2] == "bf16" and names[4] == 1024 and names[0] != "copy":
            panels[f"{names[0]} {names[1]}"][names] = peers
    if not panels:
        return False
    down = -(-len(panels) // 4)
    figure, grid = pyplot.subplots(
        down,
        min(4, len(panels)),
        figsize=(12, 2.4 * down + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    labels = {}
    for axes, (title, panel) in zip(grid.flat, panels.items()):
        plot_panel(axes, title, panel, limits)
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    name = result["device"]["device"]
    figure.suptitle(
        f"{name}, bf16, 1024 columns: GB/s of the least bytes over elements", fontsize=10
    )
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
