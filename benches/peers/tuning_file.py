"""Reads a tuning file (kernels/tuning.cuh): its constants, the values to try, the kernels and the cases."""

import dataclasses
import re

# What device_bench times: PASSES in benches/device/operators.rs.
OPERATORS = {
    "copy": ["forward"],
    "dropout": ["forward", "backward"],
    "dropout_add": ["forward", "backward"],
    "strided_dropout_add": ["forward"],
    "bias_dropout_add": ["forward", "backward"],
    "bias_gelu_dropout": ["forward", "backward"],
    "swiglu_dropout": ["forward", "backward"],
    "dropout_add_layernorm": ["forward", "backward"],
    "softmax_dropout": ["forward", "backward"],
    "causal_softmax_dropout": ["forward", "backward"],
    "embedding_dropout": ["forward", "backward"],
    "embedding_layernorm_dropout": ["forward", "backward"],
    "keep_mask": ["forward"],
}


class Bad(Exception):
    """What is wrong with a file, and where in it, or with an argument."""


def read_text(path):
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Bad(f"{path}:{line}: not UTF-8") from None


@dataclasses.dataclass
class Constant:
    name: str
    values: list
    files: list
    cases: dict  # what the file says: the request to the server
    present: dict  # the value by __CUDA_ARCH__; None: on the other chips

    def value(self, capability):
        """The present one on a chip, such as "9.0"."""
        return self.present.get(int(capability.replace(".", "")) * 10, self.present[None])


class Lines:
    """The lines of a tuning file that mean something here: `// word: ..`, and the preprocessor's."""

    def __init__(self, path):
        self.path = path
        marked = re.compile(r"// \w+:|#(?!pragma once$)")
        lines = enumerate(read_text(path).splitlines(), 1)
        self.rest = [(number, line) for number, line in lines if marked.match(line)]

    def begins(self, text):
        return bool(self.rest) and self.rest[0][1].startswith(text)

    def bad(self, number, why):
        return Bad(f"{self.path}:{number}: {why}")

    def take(self, wanted, pattern):
        """The number of the next line, and the groups of the pattern, which must be the whole of it."""
        number, line = self.rest.pop(0) if self.rest else ("end", "nothing")
        found = re.fullmatch(pattern, line)
        if not found:
            raise self.bad(number, f"expected `{wanted}`, got `{line}`")
        return number, found.groups()


def constant(lines):
    number, (values,) = lines.take("// tune: VALUE VALUE..", r"// tune: (\d+(?: \d+)+)")
    values = [int(value) for value in values.split()]
    in_file, (files,) = lines.take("// file: KERNEL.cu..", r"// file: (\w+\.cu(?: \w+\.cu)*)")
    cases = {}
    while not cases or lines.begins("// case:"):
        at, (case, *names, rows, cols) = lines.take(
            "// case: OPERATOR PASS TYPE ROWSxCOLS",
            r"// case: ((\w+) (forward|backward) (bf16|f16|f32) (\d+)x(\d+))",
        )
        names = dict(zip(("operator", "pass", "dtype"), names))
        cases[case] = names | {"rows": int(rows), "cols": int(cols)}
        if names["pass"] not in OPERATORS.get(names["operator"], []):
            raise lines.bad(at, f"device_bench does not time {names['operator']} {names['pass']}")
        if int(cols) % 8 or not 1 <= int(rows) * int(cols) <= 1 << 32:
            raise lines.bad(at, "the columns must be a multiple of 8, the elements 1 to 2^32")
    _, (name,) = lines.take("#ifndef FD_NAME", r"#ifndef (FD_\w+)")

    def define():
        return int(lines.take(f"#define {name} VALUE", rf"#define {name} (\d+)")[1][0])

    present = {}
    if lines.begins("#if "):
        chip = "#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == "
        _, (arch,) = lines.take(f"{chip}NUMBER", rf"{re.escape(chip)}(\d+)")
        present[int(arch)] = define()
        lines.take("#else", "#else")
        present[None] = define()
        lines.take("#endif", "#endif")
    else:
        present[None] = define()
    lines.take("#endif", "#endif")
    if len({*values}) < len(values) or not {*present.values()} <= {*values}:
        raise lines.bad(number, f"the values must differ, and have the present one of {name}")
    for file in files.split():
        if not (lines.path.parent / file).is_file():
            raise lines.bad(in_file, f"there is no {file}")
    return Constant(name, values, files.split(), cases, present)


def read(path):
    """The constants of a tuning file, in its order."""
    lines = Lines(path)
    found = []
    while lines.rest:
        number, _ = lines.rest[0]
        found.append(constant(lines))
        if found[-1].name in [before.name for before in found[:-1]]:
            raise lines.bad(number, f"{found[-1].name} is there twice")
    if not found:
        raise Bad(f"{path} names no constant")
    return found
