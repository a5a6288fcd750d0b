"""python3 -m unittest discover -s benches/peers: the verdicts, from rows alone; no PyTorch."""

import io
import unittest

import report

SIZE = (1 << 14, 1 << 10)
BYTES = 1 << 26


def row(operator, peer, median, direction="forward", dtype="bf16", size=SIZE, spread=0.01):
    seconds = {"median": median, "p5": median * (1 - spread), "p95": median * (1 + spread)}
    names = {
        "operator": operator,
        "pass": direction,
        "dtype": dtype,
        "rows": size[0],
        "cols": size[1],
    }
    return names | {
        "peer": peer,
        "bytes": BYTES,
        "timer": "graph",
        "seconds": seconds,
        "samples": 9,
    }


def verdict(ours, *others, **more):
    rows = [row("dropout", "ours", ours, **more)]
    rows += [row("dropout", f"peer {i}", median, **more) for i, median in enumerate(others)]
    (peers,) = report.by_point(rows).values()
    return report.verdict(peers)


def met(rows):
    return {target["target"]: target["met"] for target in report.targets(rows)}


class Report(unittest.TestCase):
    def test_the_best_peer_decides_and_overlapping_ranges_are_a_tie(self):
        self.assertEqual(verdict(1.0, 3.0, 2.0), "met")
        self.assertEqual(verdict(1.0, 3.0, 0.9), "missed")
        self.assertEqual(verdict(1.0, 3.0, 1.01), "tie")
        self.assertEqual(verdict(1.0, 3.0, 0.99), "tie")
        self.assertEqual(verdict(1.0, 2.0, spread=0.4), "tie")
        self.assertIsNone(verdict(1.0))

    def test_one_miss_at_any_size_misses(self):
        name = "never slower than the best peer, at any size"
        rows = [row("dropout", "ours", 1.0), row("dropout", "strong", 2.0)]
        self.assertTrue(met(rows)[name])
        small = [
            row("dropout", "ours", 1.0, size=(64, 1024)),
            row("dropout", "strong", 0.5, size=(64, 1024)),
        ]
        self.assertFalse(met(rows + small)[name])

    def test_one_slow_size_misses_the_target_of_all(self):
        fast = [row("dropout_add", "ours", 1.0), row("dropout_add", "eager", 1.8)]
        name = "dropout_add forward at least 1.8 times faster than eager"
        self.assertTrue(met(fast)[name])
        size = (1 << 16, 1 << 10)
        slow = [
            row("dropout_add", "ours", 1.0, size=size),
            row("dropout_add", "eager", 1.7, size=size),
        ]
        self.assertFalse(met(fast + slow)[name])

    def test_targets_are_of_large_forward_passes_in_bf16(self):
        for other in ({"size": (64, 1024)}, {"dtype": "f32"}, {"direction": "backward"}):
            rows = [row("softmax_dropout", peer, 1.0, **other) for peer in ("ours", "eager")]
            self.assertEqual(list(met(rows)), ["never slower than the best peer, at any size"])

    def test_share_of_the_copy(self):
        def share(operator, seconds):
            rows = [
                row("copy", "eager", 1.0),
                row("copy", "ours", 0.9),
                row(operator, "ours", seconds),
            ]
            (found,) = met(rows).items()
            return found

        self.assertEqual(share("dropout", 0.94), ("streaming operators: 95% of copy", True))
        self.assertEqual(share("dropout", 0.96), ("streaming operators: 95% of copy", False))
        norm = "dropout_add_layernorm"
        self.assertEqual(share(norm, 0.99), ("LayerNorm and softmax: 90% of copy", True))
        self.assertEqual(share(norm, 1.01), ("LayerNorm and softmax: 90% of copy", False))

    def test_without_ours_there_is_nothing_to_reach(self):
        self.assertEqual(
            report.targets([row("dropout", "eager", 1.0), row("copy", "eager", 1.0)]), []
        )

    def test_errors_and_skips_are_listed_and_do_not_count(self):
        failed = {"operator": "dropout", "pass": "forward", "dtype": "bf16", "rows": 1, "cols": 1}
        failed |= {"peer": "compile", "error": "no compiler"}
        result = {name: [] for name in ("attention", "memory", "notes", "targets")}
        result |= {"rows": [row("dropout", "eager", 1.0), failed], "skipped": ["copy of tomorrow"]}
        out = io.StringIO()
        report.print_all(result, out)
        self.assertIn("dropout forward bf16 1x1, compile: no compiler", out.getvalue())
        self.assertIn("  copy of tomorrow\n", out.getvalue())
        self.assertNotIn(
            "compile", report.by_point(result["rows"])[("dropout", "forward", "bf16", 1, 1)]
        )


if __name__ == "__main__":
    unittest.main()
