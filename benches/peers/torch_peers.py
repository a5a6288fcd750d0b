"""PyTorch as a peer: eager, and torch.compile of the same functions (work.py).

A peer has a `name`, and three methods:

    has(operator, direction)                 whether it does this
    call(point, p, inputs, gradients, seed)  a function that does the pass once and returns what it wrote
    both(point, p, inputs, gradients, seed)  (outputs, gradients of `wrt` or None), of one mask
"""

from functools import partial

import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config

import work


class Eager:
    """PyTorch's own operators, one kernel after another; each reads and writes all of its tensors.

    Random words an element: 1 of 32 bits; `native_dropout` makes 4 from a Philox4x32-10 block and uses all of them.
    Saved for the backward pass: the mask, a byte an element (torch.bool). For softmax also its result, for GELU its
    input, a tensor each. LayerNorm saves mean and rstd, as ours does.
    Bytes an element in 16-bit storage: dropout 5 forward and 5 backward (ours 4 and 4), dropout + add 11 forward (ours
    6), softmax + dropout 9 (ours 4), dropout + add + LayerNorm 15 (ours 8).
    Mask: depends on the generator's state, the grid and the vector width, so on the GPU and on the storage type.
    Right: unbiased, f32 inside, seeds that move on when a CUDA graph is replayed.
    """

    name = "eager"

    def has(self, operator, direction):
        return True

    def function(self, point):
        return work.OPERATORS[point.operator].function

    def call(self, point, p, inputs, gradients, seed):
        forward = partial(self.function(point), p, **inputs)
        if point.direction == "forward":
            return forward
        # What is timed is autograd's walk over the graph of a forward pass that ran before: the backward kernels alone.
        # The graph and all that it saved stay alive, so every replay reads this set's own mask.
        outputs = forward()
        return partial(
            torch.autograd.grad, outputs, self.wrt(point, inputs), gradients, retain_graph=True
        )

    def both(self, point, p, inputs, gradients, seed):
        outputs = self.function(point)(p, **inputs)
        return outputs, torch.autograd.grad(outputs, self.wrt(point, inputs), gradients)

    def wrt(self, point, inputs):
        return [inputs[name] for name in work.OPERATORS[point.operator].wrt]


class Compiled(Eager):
    """torch.compile of the same functions: Inductor fuses what is pointwise, and writes Triton kernels.

    Random words an element: 1 of 32 bits, from a Philox4x32-10 block of its own: three words of four are thrown away.
    On Hopper a block is some 20 wide multiplies, so in 16-bit storage the multiplies and not the memory can be the limit.
    Saved for the backward pass: what the partitioner decides, a seed or the boolean mask, a byte an element. On the CPU
    it was seen to save the mask; the table of memory says what it did in this run.
    Bytes: the least, where everything fits one kernel and a seed is saved; a norm or softmax of long rows reads its input
    twice or thrice.

    Shapes: dynamo's automatic dynamic shapes, as a user meets them. The first shape of an operator is compiled as it is
    (operators.py begins with 2^24 elements at 1024 columns), the next ones with what changed as a variable. A compilation
    a shape would take longer than all measurements.
    """

    name = "compile"

    def __init__(self):
        # Our own CUDA graph holds the calls. A backward pass that runs more than once must not give away what was saved.
        torch._inductor.config.triton.cudagraphs = False
        torch._functorch.config.donated_buffer = False
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.specialize_float = True  # p is a constant, as in a trainer
        self.functions = {}

    def has(self, operator, direction):
        return operator != "copy"

    def function(self, point):
        if point.operator not in self.functions:
            self.functions[point.operator] = torch.compile(super().function(point))
        return self.functions[point.operator]
