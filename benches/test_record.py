"""python3 -m unittest discover -s benches: what becomes a record, and what the page then says."""

import json
import pathlib
import tempfile
import unittest

import record

DEVICE = {
    "device": "NVIDIA H200",
    "driver": "580.1",
    "commit": "c0ffee" * 6,
    "date": "2026-12-01T09:00:00Z",
}


def row(operator, peer, median, size=4 << 24, **other):
    seconds = {"median": median, "p5": median, "p95": median}
    point = {"operator": operator, "pass": "forward", **record.SHOWN}
    return point | {"peer": peer, "bytes": size, "seconds": seconds} | other


PEERS = {
    "device": DEVICE,
    "command": "operators.py --ours PROGRAM",
    "rows": [
        row("copy", "eager", 1.0e-3),
        row("copy", "ours", 0.5e-3),
        row("dropout", "eager", 2.0e-3),
        row("dropout", "strong", 1.5e-3),
        row("dropout", "ours", 1.0e-3),
        row("dropout", "ours", 9.0, dtype="f32"),
        row("softmax_dropout", "eager", 1.0),
    ],
    "targets": [{"target": "as fast as light", "result": "1.01", "met": False}],
}
CHECK = {
    "device": DEVICE,
    "clocks": {"before": "1980 MHz", "after": "1975 MHz"},
    "programs": [
        {"name": "conformance", "passed": 812, "failed": 1, "skipped": 3, "notes": ["one is odd"]}
    ],
}
TRAIN = {"rows": [{"dropout": 0.2, "name": "ours", "ms_per_step": 12.345, "best_val_loss": 1.4712}]}


class Record(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.root = pathlib.Path(temporary.name)
        self.run = self.root / "run"
        self.run.mkdir()
        self.write_readme("nothing yet")

    def write_readme(self, inside):
        text = f"# Title\n\n{record.BEGIN}\n{inside}\n{record.END}\n\nThe end.\n"
        record.page(self.root).parent.mkdir(exist_ok=True)
        record.page(self.root).write_text(text)

    def add(self, **files):
        for path in self.run.glob("*.json"):
            path.unlink()
        for name, content in files.items():
            (self.run / f"{name}.json").write_text(json.dumps(content))
        return record.add(self.run, self.root)

    def refused(self, words, **files):
        with self.assertRaisesRegex(record.Refused, words):
            self.add(**files)
        self.assertFalse((self.root / "benches" / "record").exists(), "something was written all the same")

    def lines(self):
        return record.section(self.root).splitlines()

    def test_no_record_is_said_so(self):
        self.assertEqual(self.lines(), [record.NOTHING])

    def test_a_record_keeps_all_that_the_run_left(self):
        (self.run / "peers.svg").write_text("<svg/>")
        path = self.add(peers=PEERS, check=CHECK, train=TRAIN)
        self.assertEqual(path, self.root / "benches/record/nvidia-h200/2026-12-01.json")
        kept = json.loads(path.read_text())
        for name, content in (("peers", PEERS), ("check", CHECK), ("train", TRAIN)):
            self.assertEqual(kept[name], content)
        self.assertEqual((kept["device"], kept["clocks"]), (DEVICE, CHECK["clocks"]))
        self.assertEqual(kept["svg"], ["2026-12-01-peers.svg"])
        self.assertTrue((path.parent / "2026-12-01-peers.svg").exists())

    def test_a_second_run_on_a_date_overwrites_nothing_and_is_newer(self):
        paths = [self.add(check=CHECK) for _ in range(11)]
        self.assertEqual(len(set(paths)), 11)
        self.assertEqual(paths[1].name, "2026-12-01-2.json")
        self.assertEqual(record.newest(self.root), paths[10])

    def test_newest_is_by_date_over_all_devices(self):
        later = self.add(
            check=CHECK | {"device": DEVICE | {"date": "2027-01-01", "device": "A100"}}
        )
        self.add(check=CHECK)
        self.assertEqual(record.newest(self.root), later)

    def test_what_is_no_record_is_refused(self):
        self.refused("no file there names its device")
        self.refused("no file there names its device", train=TRAIN)
        self.refused("without a GPU", check=CHECK | {"device": DEVICE | {"device": "no GPU: host"}})
        self.refused("has no commit", check=CHECK | {"device": DEVICE | {"commit": ""}})
        self.refused("has no date", check=CHECK | {"device": DEVICE | {"date": "unknown"}})
        self.refused("no date", check=CHECK | {"device": DEVICE | {"date": "yesterday, at ten"}})
        other = PEERS | {"device": DEVICE | {"commit": "another"}}
        self.refused("more than one commit", check=CHECK, peers=other)
        other = PEERS | {"device": DEVICE | {"device": "NVIDIA A100"}}
        self.refused("more than one device", check=CHECK, peers=other)

    def test_the_table_has_ours_against_copy_best_peer_and_eager(self):
        self.add(peers=PEERS)
        # 2^26 bytes: 67 GB/s in 1 ms, half of the copy's 134. Not the f32 row, nor what ours did not do.
        found = [
            line for line in self.lines() if line.startswith(("| dropout", "| softmax", "| copy"))
        ]
        self.assertEqual(found, ["| dropout | forward | 67 | 50 % | 1.50 | strong | 2.00 |"])
        self.assertIn("A copy moves 134 GB/s.", record.section(self.root))
        self.assertIn("- **missed**: as fast as light (1.01)", self.lines())

    def test_without_ours_beside_peers_the_table_is_from_the_bench(self):
        ours = row("dropout", "ours", 1.0e-3)
        del ours["peer"]
        bench = {"device": DEVICE, "copy_bytes_per_second": 1e11, "rows": [ours]}
        self.add(bench=bench, peers=PEERS | {"rows": PEERS["rows"][:1]})
        self.assertIn("| dropout | forward | 67 | 67 % |  |  |  |", self.lines())

    def test_checks_training_plots_and_commands_are_shown(self):
        (self.run / "peers.svg").write_text("<svg/>")
        self.add(check=CHECK, train=TRAIN, peers=PEERS)
        for line in (
            "| conformance | 812 | 1 | 3 |",
            "- conformance: one is odd",
            "| 0.2 | ours | 12.35 | 1.4712 |",
            "![2026-12-01-peers.svg](record/nvidia-h200/2026-12-01-peers.svg)",
            "    operators.py --ours PROGRAM",
        ):
            self.assertIn(line, self.lines())
        self.assertRegex(
            self.lines()[0], "NVIDIA H200, driver 580.1, 2026-12-01, commit c0ffeec0ffee"
        )
        self.assertIn("clocks before 1980 MHz, after 1975 MHz", self.lines()[0])

    def test_a_training_row_may_lack_numbers(self):
        self.add(check=CHECK, train={"rows": [{"name": "ours", "ms_per_step": None}]})
        self.assertIn("|  | ours |  |  |", self.lines())

    def test_only_the_section_is_written_and_writing_it_twice_changes_nothing(self):
        self.add(check=CHECK)
        text, wanted = record.readme_text(self.root)
        self.assertNotEqual(text, wanted)
        self.assertTrue(wanted.startswith(f"# Title\n\n{record.BEGIN}\nNVIDIA H200"))
        self.assertTrue(wanted.endswith(f"\n{record.END}\n\nThe end.\n"))
        record.page(self.root).write_text(wanted)
        text, wanted = record.readme_text(self.root)
        self.assertEqual(text, wanted)

    def test_a_readme_without_marks_is_refused(self):
        record.page(self.root).write_text("no marks")
        with self.assertRaises(record.Refused):
            record.readme_text(self.root)


if __name__ == "__main__":
    unittest.main()
