"""The work that is timed: every operator as a PyTorch function, its inputs, and the least bytes it must move.

The least bytes are those of a fused kernel that draws its mask from a key: every input read once, every output written
once, nothing stored for the backward pass that is not an input or an output already (LayerNorm: two floats a row).
Gradients of parameters count as f32, as ours writes them; PyTorch writes them in the storage type. All peers are held to
the same number, whatever they move in truth. Ours also scales the scores before a softmax; the peers are spared that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
VOCABULARY = 50257  # GPT-2's
# One round over all sets of buffers touches this much at least, so that the L2 cache (50 MB on Hopper) does not answer.
ROUND_BYTES = 256 << 20


@dataclass(frozen=True)
class Point:
    """One thing to time."""

    operator: str
    direction: str  # "forward" or "backward"
    dtype: str
    rows: int
    cols: int

    @property
    def elements(self):
        return self.rows * self.cols

    @property
    def element_bytes(self):
        return self.elements * DTYPES[self.dtype].itemsize

    def request(self):
        """The fields by which the server and the results name it."""
        names = {"operator": self.operator, "pass": self.direction, "dtype": self.dtype}
        return names | {"rows": self.rows, "cols": self.cols}

    def __str__(self):
        return f"{self.operator} {self.direction} {self.dtype} {self.rows}x{self.cols}"


# The operators. p is the probability of dropping. Each returns a tuple of its outputs.


def copy(p, x):
    return (x.clone(),)


def dropout(p, x):
    return (F.dropout(x, p),)


def dropout_add(p, x, residual):
    return (residual + F.dropout(x, p),)


def bias_dropout_add(p, x, bias, residual):
    return (residual + F.dropout(x + bias, p),)


def bias_gelu_dropout(p, x, bias):
    return (F.dropout(F.gelu(x + bias, approximate="tanh"), p),)


def dropout_add_layernorm(p, x, residual, weight, norm_bias):
    s = residual + F.dropout(x, p)
    return s, F.layer_norm(s, s.shape[-1:], weight, norm_bias)


def softmax_dropout(p, x):
    return (F.dropout(torch.softmax(x, -1), p),)


def causal_softmax_dropout(p, x, future):
    return (F.dropout(torch.softmax(x.masked_fill(future, float("-inf")), -1), p),)


def embedding_dropout(p, token, position, ids):
    return (F.dropout(F.embedding(ids, token) + position, p),)


def length(point):
    """Tokens of a sequence, and the entries of the position table: GPT-2's 1024 where there are as many rows."""
    return min(point.rows, 1024)


def queries(point):
    """Rows of a head's scores: a square, or the last queries of it where there are fewer rows than columns."""
    return min(point.rows, point.cols)


def visible(point):
    """Scores that the causal mask leaves."""
    fewest = point.cols - queries(point) + 1
    return point.rows * (fewest + point.cols) // 2


def embedding_entries(point):
    """Entries of the token table that `rows` uniform ids are expected to touch."""
    return int(VOCABULARY * (1 - (1 - 1 / VOCABULARY) ** point.rows))


@dataclass(frozen=True)
class Operator:
    function: Callable
    # The inputs whose gradients the backward pass gives.
    wrt: tuple = ()
    # Tensors of rows x cols that are read and written, forward and backward.
    forward: int = 2
    backward: int = 2
    # Parameters of cols elements that are read, and gradients of such.
    forward_vectors: int = 0
    backward_vectors: int = 0
    vector_gradients: int = 0
    stats: bool = False  # two floats a row, written by the forward pass and read by the backward


OPERATORS = {
    "copy": Operator(copy),
    "dropout": Operator(dropout, ("x",)),
    "dropout_add": Operator(dropout_add, ("x",), forward=3),
    "bias_dropout_add": Operator(
        bias_dropout_add, ("x", "bias"), forward=3, forward_vectors=1, vector_gradients=1
    ),
    "bias_gelu_dropout": Operator(
        bias_gelu_dropout,
        ("x", "bias"),
        backward=3,
        forward_vectors=1,
        backward_vectors=1,
        vector_gradients=1,
    ),
    "dropout_add_layernorm": Operator(
        dropout_add_layernorm,
        ("x", "residual", "weight", "norm_bias"),
        forward=4,
        backward=5,
        forward_vectors=2,
        backward_vectors=1,
        vector_gradients=2,
        stats=True,
    ),
    "softmax_dropout": Operator(softmax_dropout, ("x",), backward=3),
    "causal_softmax_dropout": Operator(causal_softmax_dropout, ("x",)),
    "embedding_dropout": Operator(embedding_dropout, ("token", "position")),
}


def least_bytes(point):
    """The bytes that the operator cannot avoid."""
    itemsize = DTYPES[point.dtype].itemsize
    if point.operator == "causal_softmax_dropout":
        # Masked places are written as zeros, but need not be read.
        read = 1 if point.direction == "forward" else 2
        return point.element_bytes + read * visible(point) * itemsize
    if point.operator == "embedding_dropout":
        # Forward: each touched entry read once. Backward: each is added to, so read and written.
        entries = embedding_entries(point) + length(point)
        element = itemsize if point.direction == "forward" else 2 * 4
        return point.element_bytes + entries * point.cols * element + 4 * point.rows
    operator = OPERATORS[point.operator]
    stats = 8 * point.rows if operator.stats else 0
    if point.direction == "forward":
        vectors = operator.forward_vectors * itemsize
        return operator.forward * point.element_bytes + vectors * point.cols + stats
    vectors = operator.backward_vectors * itemsize + operator.vector_gradients * 4
    return operator.backward * point.element_bytes + vectors * point.cols + stats


def buffer_sets(point):
    """How many sets of buffers are rotated."""
    touched = least_bytes(point)
    if point.operator == "embedding_dropout" and point.direction == "backward":
        # PyTorch's gradient of a table is dense: a call writes all of it.
        touched += VOCABULARY * point.cols * DTYPES[point.dtype].itemsize
    return min(max(-(-ROUND_BYTES // touched), 2), 1024)


def shape(point):
    if point.operator == "causal_softmax_dropout":
        return (point.rows // queries(point), queries(point), point.cols)
    if point.operator == "embedding_dropout":
        return (point.rows // length(point), length(point), point.cols)
    return (point.rows, point.cols)


def names(operator):
    """The inputs of an operator, in order: the function's parameters after p."""
    function = OPERATORS[operator].function
    return function.__code__.co_varnames[1 : function.__code__.co_argcount]


def shared_input(name, point, dtype, device):
    """An input that all sets share: a parameter, small or far above L2's size. None for the others."""
    sizes = {
        "token": (VOCABULARY, point.cols),
        "position": (length(point), point.cols),
        "bias": (point.cols,),
        "weight": (point.cols,),
        "norm_bias": (point.cols,),
    }
    if name in sizes:
        return torch.randn(sizes[name], dtype=dtype, device=device)
    if name == "future":
        head = torch.ones(queries(point), point.cols, dtype=torch.bool, device=device)
        return head.triu(diagonal=1 + point.cols - queries(point))
    return None


def buffers(point, sets, device):
    """`sets` pairs of (inputs by name, gradients of the outputs), random. No gradients for a forward pass."""
    dtype, size = DTYPES[point.dtype], (sets, *shape(point))
    inputs = {}
    for name in names(point.operator):
        shared = shared_input(name, point, dtype, device)
        if name == "ids":
            inputs[name] = torch.randint(VOCABULARY, size[:-1], device=device)
        elif shared is None:
            inputs[name] = torch.randn(size, dtype=dtype, device=device)
        else:
            inputs[name] = shared.expand(sets, *shared.shape)
    outputs = 2 if OPERATORS[point.operator].stats else 1
    wanted = outputs if point.direction == "backward" else 0
    gradients = [torch.randn(size, dtype=dtype, device=device) for _ in range(wanted)]
    return [
        (one_set(point.operator, inputs, i), tuple(gradient[i] for gradient in gradients))
        for i in range(sets)
    ]


def one_set(operator, inputs, i):
    """Set i as leaves of autograd: in training form, where the forward pass saves what the backward needs."""
    wrt = OPERATORS[operator].wrt
    return {name: value[i].detach().requires_grad_(name in wrt) for name, value in inputs.items()}
