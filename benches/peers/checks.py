"""Before the timing: is each peer's dropout a dropout?

On inputs that show the mask in the output and in the gradient, in f32: the rate of kept elements within 5 standard
deviations of its binomial mean, E[y] / x - 1 within 5 of 0, and the same mask in both passes.
"""

import math

import torch

import work

# All ones, except for:
INPUTS = {"residual": 0.0, "bias": 0.0, "norm_bias": 0.0, "position": 0.0}
GELU_INPUT = 8.0  # where GELU is the identity in f32 and its slope 1


def inputs(point, device):
    """Inputs whose mask shows, and ones as gradients (of LayerNorm's s; zeros for its y)."""
    (values, gradients), *_ = work.buffers(point, 1, device)
    with torch.no_grad():
        for name, value in values.items():
            if name == "ids":
                value.copy_(torch.arange(point.rows, device=device).view_as(value))
            elif name != "future":
                value.fill_(INPUTS.get(name, 1.0))
        if point.operator == "bias_gelu_dropout":
            values["x"].fill_(GELU_INPUT)
    gradients[0].fill_(1.0)
    for gradient in gradients[1:]:
        gradient.zero_()
    return values, gradients


def look(point, outputs, gradients):
    """The output as a multiple of what it would be without dropout, and which elements the gradient says are kept.

    Only where both can be told: causal rows of few keys, all of which may be dropped, are left out.
    """
    y, dx = outputs[0].detach(), None if gradients is None else gradients[0]
    if point.operator == "bias_gelu_dropout":
        y = y / GELU_INPUT
    if point.operator == "embedding_dropout" and dx is not None:
        dx = dx[: point.rows].view_as(y)  # row r took entry r
    if not point.operator.endswith("softmax_dropout"):
        return y.flatten(), None if dx is None else (dx != 0).flatten()
    keys = torch.full((point.cols, 1), point.cols, device=y.device)
    if point.operator.startswith("causal"):
        keys = torch.arange(1, point.cols + 1, device=y.device).view(-1, 1)
    column = torch.arange(point.cols, device=y.device)
    visible = (column < keys) & (keys >= 64)
    # P = 1 / keys and dx = P (g - sum P g), where g is the scale or 0: near 0 or above it if kept, near -1 / keys if not.
    square = lambda tensor: (tensor.view(-1, point.cols, point.cols) * keys)[:, visible].flatten()
    if point.operator == "softmax_dropout":
        square = lambda tensor: (tensor * point.cols).flatten()
    return square(y), None if dx is None else square(dx) > -0.5


def check(peer, point, p, device):
    """A row of the table."""
    values, gradients = inputs(point, device)
    outputs, given = peer.both(point, p, values, gradients, 1)
    y, kept_backward = look(point, outputs, given)
    kept = y != 0
    n = y.numel()
    keep_rate = kept.sum().item() / n
    bias = y.double().mean().item() - 1
    bounds = 5 * math.sqrt(p * (1 - p) / n), 5 * math.sqrt(p / (1 - p) / n)
    same = None if kept_backward is None else torch.equal(kept, kept_backward)
    fair = abs(keep_rate - (1 - p)) <= bounds[0] and abs(bias) <= bounds[1] and same is not False
    return {
        "operator": point.operator,
        "peer": peer.name,
        "p": p,
        "elements": n,
        "keep_rate": keep_rate,
        "keep_rate_bound": bounds[0],
        "bias": bias,
        "bias_bound": bounds[1],
        "same_mask": same,
        "passed": fair,
    }
