"""What a training step of nanoGPT's models for characters takes in PyTorch, without and with dropout.

    pip install torch==2.11.0 numpy
    python3 benches/peers/gpt_step.py                                        # nanoGPT's small model on the CPU
    python3 benches/peers/gpt_step.py --device cuda --preset nanogpt --compile \\
        --data tinyshakespeare.txt --ours target/release/examples/train_gpt --json step.json

A step is nanoGPT's: a random batch of windows of the text, forward, loss, backward, clipping, AdamW; attention by
scaled_dot_product_attention, output weights tied. PyTorch is given its best: the batches lie on the device before the clock
starts; on CUDA bfloat16 by autocast, TF32 allowed, the fused AdamW, and no waiting for the device within a block of steps.
The model has biases, as GPT-2 and examples/train_gpt have them; --no-bias leaves them out, as nanoGPT's own settings do.

All that is compared takes turns: in every round a block of steps without and one with dropout, by PyTorch as it is, with
--compile also by torch.compile, on CUDA in the mode "reduce-overhead", which replays CUDA graphs, and with --ours by our
program. Medians are over the steps of all rounds; ours are over
the medians that the program writes.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

DROPOUTS = (0.0, 0.2)
WARM_UP = 20


@dataclasses.dataclass(frozen=True)
class Size:
    layers: int
    heads: int
    width: int
    length: int
    batch: int


PRESETS = {"nanogpt-cpu": Size(4, 4, 128, 64, 12), "nanogpt": Size(6, 6, 384, 256, 64)}


class Block(nn.Module):
    def __init__(self, size, bias, p):
        super().__init__()
        self.heads, self.p = size.heads, p
        norm = lambda: nn.LayerNorm(size.width, bias=bias)
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=bias)
        self.ln_1, self.ln_2 = norm(), norm()
        self.c_attn, self.c_proj = linear(size.width, 3 * size.width), linear(size.width, size.width)
        self.c_fc, self.mlp_proj = linear(size.width, 4 * size.width), linear(4 * size.width, size.width)

    def forward(self, x):
        batch, length, width = x.shape
        heads = lambda t: t.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
        q, k, v = (heads(t) for t in self.c_attn(self.ln_1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        x = x + F.dropout(self.c_proj(y), self.p)
        y = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_proj(y), self.p)


class Gpt(nn.Module):
    def __init__(self, size, vocab, bias, p):
        super().__init__()
        self.p, self.vocab = p, vocab
        self.wte, self.wpe = nn.Embedding(vocab, size.width), nn.Embedding(size.length, size.width)
        self.h = nn.ModuleList(Block(size, bias, p) for _ in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width, bias=bias)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids, labels):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = F.dropout(self.wte(ids) + self.wpe(positions), self.p)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, self.vocab), labels.view(-1))


class Training:
    def __init__(self, arguments, text, p, compiled):
        torch.manual_seed(1)
        self.size, self.text, self.device = PRESETS[arguments.preset], text, arguments.device
        model = Gpt(self.size, int(text.max()) + 1, arguments.bias, p).to(self.device)
        self.parameters = list(model.parameters())
        decay = lambda decays: [w for w in self.parameters if (w.dim() >= 2) == decays]
        groups = [{"params": decay(True), "weight_decay": 0.1}, {"params": decay(False), "weight_decay": 0.0}]
        fused = self.device == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=fused)
        self.autocast = torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda")
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        self.model = torch.compile(model, mode=mode) if compiled else model
        self.batches = [self.batch() for _ in range(max(arguments.steps, WARM_UP))]

    def batch(self):
        length = self.size.length
        starts = torch.randint(len(self.text) - length, (self.size.batch,))
        parts = (torch.stack([self.text[i + shift : i + shift + length] for i in starts]) for shift in (0, 1))
        return tuple(part.to(self.device) for part in parts)

    def step(self, number):
        """The loss, which is not waited for."""
        ids, labels = self.batches[number % len(self.batches)]
        # What the last step's graphs wrote may be written again.
        torch.compiler.cudagraph_mark_step_begin()
        with self.autocast:
            loss = self.model(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone()

    def times(self, steps):
        """Milliseconds of each of so many steps, with one wait behind all of them."""
        marks = [self.mark()]
        for number in range(steps):
            self.step(number)
            marks.append(self.mark())
        if self.device == "cpu":
            return [(end - start) * 1e3 for start, end in zip(marks, marks[1:])]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(marks, marks[1:])]

    def mark(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def warm_up(self):
        """Compiles, and checks that it learns."""
        first = self.step(0).item()
        later = [self.step(number) for number in range(WARM_UP)][-1].item()
        assert later < first, f"it does not learn: {first}, then {later}"


def tokens(data):
    """The text's part to train on, a token a character; without a text something to learn."""
    if data is None:
        return torch.tensor([i * i * 31 % 65 for i in range(100_000)])
    text = data.read_text(encoding="utf-8-sig")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text[: len(text) * 9 // 10]])


def ours(arguments, p):
    """What our program writes about a training of its own: metrics.json."""
    with tempfile.TemporaryDirectory() as out:
        command = [arguments.ours, "--data", arguments.data, "--preset", arguments.preset]
        command += ["--device", arguments.device, "--dropout", p, "--steps", arguments.our_steps]
        command += ["--eval-interval", 10**9, "--sample", 0, "--out", out]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"gpt_step: {arguments.ours}: {done.stderr}")
        return json.loads((pathlib.Path(out) / "metrics.json").read_text())


def measure(arguments):
    """{(dropout, what): milliseconds}"""
    text = tokens(arguments.data)
    kinds = {"eager": False} | ({"compiled": True} if arguments.compile else {})
    trainings = {(p, kind): Training(arguments, text, p, kinds[kind]) for kind in kinds for p in DROPOUTS}
    for training in trainings.values():
        training.warm_up()
    times = {key: [] for key in trainings}
    for round in range(arguments.rounds):
        # Neither is always the first.
        for key, training in list(trainings.items())[:: 1 if round % 2 == 0 else -1]:
            times[key] += training.times(arguments.steps)
        for p in DROPOUTS if arguments.ours else ():
            times.setdefault((p, "ours"), []).append(ours(arguments, p)["ms_per_step"])
    return {key: statistics.median(values) for key, values in times.items()}


def report(arguments, medians):
    kinds = [kind for kind in ("ours", "eager", "compiled") if (0.0, kind) in medians]
    cuda = arguments.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"preset {arguments.preset}, {'biases' if arguments.bias else 'no biases in PyTorch'}; {device}")
    print(f"torch {torch.__version__}; medians of {arguments.rounds} rounds of {arguments.steps} steps, ms a step\n")
    print(f"{'dropout':>8}" + "".join(f"{kind:>12}" for kind in kinds))
    for p in DROPOUTS:
        print(f"{p:>8}" + "".join(f"{medians[p, kind]:>12.2f}" for kind in kinds))
    cost = {kind: medians[DROPOUTS[1], kind] / medians[DROPOUTS[0], kind] - 1 for kind in kinds}
    print(f"{'cost':>8}" + "".join(f"{100 * cost[kind]:>10.1f} %" for kind in kinds))
    ratios = {}
    if "ours" in kinds:
        ratios = {kind: {p: medians[p, kind] / medians[p, "ours"] for p in DROPOUTS} for kind in kinds[1:]}
        for kind, ratio in ratios.items():
            print(f"\n{kind} / ours: " + ", ".join(f"{ratio[p]:.2f} at dropout {p}" for p in DROPOUTS))
    best = json.loads((arguments.trained / "metrics.json").read_text()) if arguments.trained else {}
    # What PyTorch was given stands in the row: a record without it is one of before.
    compiled = "PyTorch compiled, CUDA graphs" if cuda else "PyTorch compiled"
    names = {"ours": "ours", "eager": "PyTorch eager, batches prepared", "compiled": f"{compiled}, batches prepared"}
    rows = [
        {"dropout": p, "name": names[kind], "ms_per_step": medians[p, kind]} for p in DROPOUTS for kind in kinds
    ]
    for row in rows:
        if row["name"] == "ours" and row["dropout"] == best.get("dropout"):
            row["best_val_loss"] = best["best_val_loss"]
    return {
        "rows": rows,
        "torch": torch.__version__,
        "device": device,
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "ms": {kind: {p: medians[p, kind] for p in DROPOUTS} for kind in kinds},
        "cost_of_dropout": cost,
        "times_ours": ratios,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="nanogpt-cpu")
    parser.add_argument("--compile", action="store_true", help="also by torch.compile")
    parser.add_argument("--no-bias", dest="bias", action="store_false", help="as in nanoGPT's settings")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--data", type=pathlib.Path, help="the text [default: made up]")
    parser.add_argument("--ours", type=pathlib.Path, help="the program train_gpt, which takes turns; with --data")
    parser.add_argument("--our-steps", type=int, default=300, help="of each run of our program")
    parser.add_argument("--trained", type=pathlib.Path, help="the folder that a whole training of ours wrote")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    arguments = parser.parse_args()
    if arguments.ours and not arguments.data:
        parser.error("--ours needs --data: both train on the same text")
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    figures = report(arguments, measure(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
