#!/usr/bin/env python3
"""The record of results on GPUs, in benches/record/<device>/<date>.json, and the section of benches/README.md that shows it.

    python3 benches/record.py add DIR   takes check.json, bench.json, peers.json, train.json and the SVG files of DIR,
                                        those that are there, into the record
    python3 benches/record.py readme    writes the section of benches/README.md from the newest record
    python3 benches/record.py check     fails where that is not what `readme` would write

Standard library only. A record is never changed: a second run on a date gets the next number.
"""

import argparse
import json
import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = ("check", "bench", "peers", "train")
BEGIN, END = "<!-- record:begin -->", "<!-- record:end -->"
NOTHING = "No record yet: the kernels have not run on a GPU."
# The point that the page shows.
SHOWN = {"dtype": "bf16", "rows": 1 << 14, "cols": 1 << 10}


class Refused(Exception):
    """Why a folder is no record, or the page cannot be written."""


# Adding.


def load(folder):
    """{name: content} of the files that are there."""
    found = {}
    for name in FILES:
        path = folder / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    return found


def device_of(files):
    """The one device, with its commit, that all files name."""
    devices = {name: f["device"] for name, f in files.items() if isinstance(f.get("device"), dict)}
    if not devices:
        raise Refused("no file there names its device")
    for name, device in devices.items():
        for field in ("device", "commit", "date"):
            if device.get(field) in (None, "", "unknown"):
                raise Refused(f"{name}.json has no {field}")
        if "no gpu" in device["device"].lower():
            raise Refused(f"{name}.json is of a run without a GPU: {device['device']}")
    for field in ("device", "commit"):
        values = {device[field] for device in devices.values()}
        if len(values) > 1:
            raise Refused(f"files of more than one {field}: {', '.join(sorted(values))}")
    return min(devices.values(), key=lambda device: device["date"])


def clocks_of(files):
    return next((f["clocks"] for f in files.values() if f.get("clocks")), None)


def slug(name):
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def free_stem(folder, date):
    stem, number = date, 1
    while (folder / f"{stem}.json").exists():
        number += 1
        stem = f"{date}-{number}"
    return stem


def as_text(value, depth=0):
    """JSON with a line for each row of a table, so that records can be read and compared."""
    flat = json.dumps(value)
    if depth == 3 or len(flat) < 100 or not isinstance(value, (dict, list)):
        return flat
    indent = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {as_text(item, depth + 1)}" for key, item in value.items()]
        return "{" + indent + f",{indent}".join(lines) + "}"
    return "[" + indent + f",{indent}".join(as_text(item, 3) for item in value) + "]"


def add(folder, root):
    """Returns the path of the new record."""
    files = load(folder)
    device = device_of(files)
    date = device["date"][:10]
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise Refused(f"no date: {device['date']}")
    home = root / "benches" / "record" / slug(device["device"])
    home.mkdir(parents=True, exist_ok=True)
    stem = free_stem(home, date)
    plots = {path: f"{stem}-{path.name}" for path in sorted(folder.glob("*.svg"))}
    for path, name in plots.items():
        shutil.copyfile(path, home / name)
    record = {"device": device, "clocks": clocks_of(files), "svg": [*plots.values()], **files}
    path = home / f"{stem}.json"
    path.write_text(as_text(record) + "\n")
    return path


# Showing.


def newest(root):
    """The path of the newest record of all devices, or None."""

    def age(path):
        date, _, number = path.stem[:10], path.stem[10:11], path.stem[11:]
        return date, int(number or 1), str(path)

    return max((root / "benches" / "record").glob("*/*.json"), key=age, default=None)


def table(header, lines):
    """A Markdown table; a header that ends in ":" is a column of numbers."""
    rule = ["---:" if name.endswith(":") else "---" for name in header]
    rows = [[name.rstrip(":") for name in header], rule, *lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def shown(rows):
    """{(operator, pass): {peer: row}} of the point that the page shows; rows without a peer are ours."""
    found = {}
    for row in rows:
        if "seconds" in row and all(row[key] == value for key, value in SHOWN.items()):
            peers = found.setdefault((row["operator"], row["pass"]), {})
            peers[row.get("peer", "ours")] = row
    return found


def rate(row):
    """Bytes a second."""
    return row["bytes"] / row["seconds"]["median"]


def times(peers, name):
    """How many times faster ours is than this peer."""
    if name not in peers or "ours" not in peers:
        return ""
    return f"{peers[name]['seconds']['median'] / peers['ours']['seconds']['median']:.2f}"


def operators(record):
    """Of one run, ours beside the peers where it was timed beside them."""
    rows = shown(record.get("peers", {}).get("rows", []))
    copy = max(map(rate, rows.get(("copy", "forward"), {}).values()), default=None)
    if not any("ours" in peers for peers in rows.values()):
        bench = record.get("bench", {})
        rows, copy = shown(bench.get("rows", [])), bench.get("copy_bytes_per_second")
    lines = []
    for (operator, direction), peers in rows.items():
        if operator == "copy" or "ours" not in peers:
            continue
        others = {name: row for name, row in peers.items() if name != "ours"}
        best = min(others, key=lambda name: others[name]["seconds"]["median"], default="")
        share = f"{100 * rate(peers['ours']) / copy:.0f} %" if copy else ""
        line = (operator, direction, f"{rate(peers['ours']) * 1e-9:.0f}", share)
        lines.append((*line, times(peers, best), best, times(peers, "eager")))
    if not lines:
        return []
    limit = f" A copy moves {copy * 1e-9:.0f} GB/s." if copy else ""
    header = ("operator", "pass", "GB/s:", "of the copy:", "best peer / ours:", "best peer")
    return [
        "bf16, 2^24 elements, 1024 columns, medians. GB/s are of the bytes that the operator cannot avoid, and what",
        f"is divided are times: above 1, ours is faster.{limit}",
        "",
        *table((*header, "PyTorch eager / ours:"), lines),
    ]


def targets(record):
    found = record.get("peers", {}).get("targets", [])
    lines = [
        f"- {'met' if row['met'] else '**missed**'}: {row['target']} ({row['result']})"
        for row in found
    ]
    return (
        ["Targets, in bf16 from 2^24 elements where no size is named:", "", *lines, ""]
        if lines
        else []
    )


def checks(record):
    programs = record.get("check", {}).get("programs", [])
    if not programs:
        return []
    counts = [[row["name"], row["passed"], row["failed"], row["skipped"]] for row in programs]
    notes = [f"- {row['name']}: {note}" for row in programs for note in row.get("notes", [])]
    lines = table(("checks on this device", "passed:", "failed:", "skipped:"), counts)
    return [*lines, *notes, ""] if notes else lines


def training(record):
    rows = record.get("train", {}).get("rows", [])
    if not rows:
        return []

    def number(row, key, digits):
        return f"{row[key]:.{digits}f}" if isinstance(row.get(key), (int, float)) else ""

    lines = [
        (row.get("dropout", ""), row.get("name", ""), number(row, "ms_per_step", 2))
        + (number(row, "best_val_loss", 4),)
        for row in rows
    ]
    return table(("dropout", "training a GPT", "ms a step:", "best validation loss:"), lines)


def commands(record):
    found = [record[name]["command"] for name in FILES if record.get(name, {}).get("command")]
    if not found:
        return []
    return ["The commands:", "", *(f"    {command}" for command in dict.fromkeys(found)), ""]


def clocks(record):
    given = record.get("clocks")
    if not isinstance(given, dict):
        return f"; clocks {given}" if given else ""
    return "; clocks " + ", ".join(f"{when} {what}" for when, what in given.items())


def section(root):
    """What stands between the page's marks."""
    path = newest(root)
    if path is None:
        return NOTHING
    record = json.loads(path.read_text())
    device, home = record["device"], path.parent.relative_to(page(root).parent)
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    lines = [
        f"{device['device']}{driver}, {path.stem[:10]}, commit {device['commit'][:12]}{clocks(record)}. The whole of it is in",
        f"[{path.name}]({home / path.name}).",
        "",
    ]
    for part in (operators, targets, checks, training):
        lines += part(record)
    lines += [f"![{name}]({home / name})\n" for name in record.get("svg", [])]
    return "\n".join(lines + commands(record)).rstrip()


def page(root):
    return root / "benches" / "README.md"


def readme_text(root):
    """(the page, what it should be)."""
    text = page(root).read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Refused(f"benches/README.md lacks {BEGIN} or {END}")
    return text, f"{before}{BEGIN}\n{section(root)}\n{END}{after}"


def main():
    about, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("add", "readme", "check"))
    parser.add_argument("folder", metavar="DIR", nargs="?", type=pathlib.Path)
    chosen = parser.parse_args()
    if (chosen.action == "add") != (chosen.folder is not None):
        parser.error("add, and only add, takes a folder")
    try:
        if chosen.action == "add":
            print(f"wrote {add(chosen.folder, ROOT)}")
            return 0
        text, wanted = readme_text(ROOT)
    except Refused as why:
        print(f"refused: {why}", file=sys.stderr)
        return 1
    if chosen.action == "readme":
        page(ROOT).write_text(wanted)
    elif text != wanted:
        print(
            "benches/README.md is not of the newest record: python3 benches/record.py readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
