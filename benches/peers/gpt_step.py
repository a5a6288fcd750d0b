"""What a training step of nanoGPT's small model takes in PyTorch on the CPU: the peer of benches/transformer.rs.

    pip install torch==2.11.0 numpy
    python3 benches/peers/gpt_step.py [--threads 2] [--steps 60]

The same model (4 layers, 4 heads, width 128, 12 sequences of 64 characters out of 65, biases, tied output weights, GELU tanh),
the same work a step: forward, loss, backward, clipping, AdamW. Attention by scaled_dot_product_attention, as nanoGPT has it.
The steps without and with dropout alternate, and medians are printed.
"""

import argparse
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH, HEADS, LAYERS, LENGTH, BATCH, VOCAB = 128, 4, 4, 64, 12, 65


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c_fc, self.mlp_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, width = x.shape
        heads = lambda t: t.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
        q, k, v = (heads(t) for t in self.c_attn(self.ln_1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        x = x + F.dropout(self.c_proj(y), self.p)
        y = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_proj(y), self.p)


class Gpt(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(Block(p) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        for table in (self.wte, self.wpe):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids, labels):
        x = F.dropout(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])), self.p)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), ignore_index=-100)


class Training:
    def __init__(self, p):
        torch.manual_seed(1)
        self.model = Gpt(p)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1
        )
        ids = torch.tensor([i * i * 31 % VOCAB for i in range(BATCH * LENGTH)]).view(BATCH, LENGTH)
        self.ids = ids
        self.labels = torch.cat([ids[:, 1:], torch.full((BATCH, 1), -100)], dim=1)

    def step(self):
        loss = self.model(self.ids, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    trainings = {p: Training(p) for p in (0.0, 0.2)}
    for p, training in trainings.items():
        first = training.step()
        later = [training.step() for _ in range(10)][-1]
        assert later < first, f"dropout {p}: {first}, then {later}"
    times = {p: [] for p in trainings}
    for _ in range(arguments.steps):
        for p, training in trainings.items():
            start = time.perf_counter()
            training.step()
            times[p].append((time.perf_counter() - start) * 1e3)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for p, milliseconds in times.items():
        print(f"dropout {p}: {statistics.median(milliseconds):6.1f} ms a step")


if __name__ == "__main__":
    main()
