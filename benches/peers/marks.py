"""Marks that our operators do not meet on the same ground, and memory.

Attention: `scaled_dot_product_attention` by PyTorch's flash kernel (FlashAttention-2, which draws 8 bits an element and
recomputes the mask in the backward pass), without and with dropout: what dropout costs there.
Memory: what a forward pass in training form keeps for its backward pass beyond inputs and outputs, and the peak of both.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import report
import timing
import torch_peers
import work

BATCH, HEADS, LENGTH, WIDTHS = 8, 16, 2048, (64, 128)
SETS = 3  # q, k, v and the output are 134 MB a set at width 64


def attend(p, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def attend_both(p, q, k, v, gradient):
    return torch.autograd.grad(attend(p, q, k, v), (q, k, v), gradient)


def attention_timer(p, width, both, device):
    def tensors(grad):
        size = (BATCH, HEADS, LENGTH, width)
        return torch.randn(size, dtype=torch.bfloat16, device=device, requires_grad=grad)

    calls = []
    for _ in range(SETS):
        q, k, v = (tensors(True) for _ in range(3))
        last = (tensors(False),) if both else ()
        calls.append(partial(attend_both if both else attend, p, q, k, v, *last))
    return timing.timer(calls, device)


def attention(p, width, both, rounds, samples, device):
    """Two rows, without and with dropout; turns alternate."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        timers = {chance: attention_timer(chance, width, both, device) for chance in (0.0, p)}
        seconds = {chance: [] for chance in timers}
        for turn in range(rounds):
            for chance in sorted(timers, reverse=turn % 2 == 1):
                seconds[chance] += timers[chance].sample(samples)
    summaries = {chance: report.summary(times) for chance, times in seconds.items()}
    plain = summaries[0.0]["median"]
    return [
        {
            "width": width,
            "pass": "forward+backward" if both else "forward",
            "p": chance,
            "timer": timers[chance].kind,
            "seconds": found,
            "cost_percent": 100 * (found["median"] / plain - 1),
        }
        for chance, found in summaries.items()
    ]


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def saved_by_autograd(peer, point, p, inputs):
    """Bytes that the forward pass keeps and the caller does not have anyway."""
    saved = {}

    def pack(tensor):
        saved[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = peer.function(point)(p, **inputs)
    known = {storage(tensor) for tensor in (*inputs.values(), *outputs)}
    return sum(size for where, size in saved.items() if where not in known)


def saved_by_triton(point):
    """A seed, which is no tensor; LayerNorm's mean and rstd."""
    return 8 * point.rows if work.OPERATORS[point.operator].stats else 0


def memory(peer, point, p, device):
    """Of a backward point: bytes saved, and the peak of a forward and a backward pass where the peer has both."""
    (inputs, gradients), *_ = work.buffers(point, 1, device)
    both = peer.both(point, p, inputs, gradients, 1)[1] is not None  # compiles, too
    if isinstance(peer, torch_peers.Eager):
        saved = saved_by_autograd(peer, point, p, inputs)
    else:
        saved = saved_by_triton(point)
    row = {"operator": point.operator, "peer": peer.name, "elements": point.elements}
    row |= {"dtype": point.dtype, "saved_bytes": saved, "peak_bytes": None}
    if device == "cpu" or not both:
        return row
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peer.both(point, p, inputs, gradients, 1)
    return row | {"peak_bytes": torch.cuda.max_memory_allocated() - before}
