#!/usr/bin/env python3
"""Prints tests/vectors/contract.txt: the known answers of the mask contract, version 1.

Written from CONTRACT.md alone, in plain Python, sharing no code with the crate. To check the file:

    python3 tests/vectors/generate.py | diff - tests/vectors/contract.txt
"""

import hashlib
import struct
from fractions import Fraction

WORD = 2**32 - 1
LONG = 2**64 - 1


def splitmix64(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & LONG
    return z ^ (z >> 31)


def philox4x32_10(counter, key):
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & WORD, (a >> 32) ^ c[3] ^ k1, a & WORD]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


def words(seed, stream, row, octet):
    mixed = splitmix64(seed)
    key = (mixed & WORD, mixed >> 32)
    return philox4x32_10((octet, row, stream & WORD, stream >> 32), key)


def lane(seed, stream, row, col):
    j = col % 8
    return words(seed, stream, row, col // 8)[j // 2] >> (16 * (j % 2)) & 0xFFFF


def threshold(p):
    # round() on a Fraction rounds half to even, and a float's Fraction is exact.
    return round(Fraction(p) * 65536)


def f32_bits(fraction):
    """The bits of a positive fraction rounded to f32, nearest, ties to even, in exact arithmetic."""
    if fraction == 0:
        return 0
    exponent = 0
    while fraction >= 2:
        fraction, exponent = fraction / 2, exponent + 1
    while fraction < 1:
        fraction, exponent = fraction * 2, exponent - 1
    return struct.unpack("<I", struct.pack("<f", round(fraction * 2**23) * 2.0 ** (exponent - 23)))[0]


def scale_bits(t):
    return 0 if t == 65536 else f32_bits(Fraction(65536, 65536 - t))


def logical(rowmap, r):
    kind, *n = rowmap
    if kind == "contiguous":
        return n[0] + r
    if kind == "blocks":
        first, block, stride = n
        return first + r // block * stride + r % block
    if kind == "attention":
        first, heads, queries, head_stride, batch_stride = n
        b, h, q = r // (heads * queries), r // queries % heads, r % queries
        return first + b * batch_stride + h * head_stride + q
    return n[r]


def lines(seed, stream, rowmap, rows, first_col, cols, p, group_rows=1, together=False):
    t = threshold(p)
    for r in range(rows):
        row = logical(rowmap, r) // group_rows
        octets = {}
        line = []
        for col in range(first_col, first_col + cols):
            col = 0 if together else col
            w = octets.setdefault(col // 8, None) or words(seed, stream, row, col // 8)
            octets[col // 8] = w
            j = col % 8
            line.append("0" if (w[j // 2] >> (16 * (j % 2)) & 0xFFFF) < t else "1")
        yield "".join(line)


HEAD = """\
# Known answers of the mask contract, version 1. Printed by generate.py, which shares no code with the crate.
# Fields are separated by blanks; a line's first field says what it is. Numbers are decimal, 0x... hexadecimal.
#
# philox    counter words (4)  key words (2)  output words (4)      the first three: Random123's own vectors
# key       seed  key words (2)
# words     seed stream row octet  words (4)
# lane      seed stream row col  lane
# p         p as f64 bits  threshold  scale as f32 bits  keep probability as f32 bits
# mask      seed stream  p as f64 bits  first_col rows cols  sha256  map...
#           sha256 of the lines of 0 (dropped) and 1 (kept), a line a row, each ended by a newline
#           map: contiguous first | blocks first block stride |
#                attention first heads queries head_stride batch_stride | explicit row...
# groups    seed stream  p as f64 bits  first_col rows cols  sha256  group rows, columns together (0 or 1)  map...
# row       line...   (the lines of the mask above it, where they are few)
"""


def main():
    print(HEAD, end="")
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for counter, key in [((0,) * 4, (0, 0)), ((WORD,) * 4, (WORD, WORD)), pi, ((1, 2, 3, 4), (5, 6))]:
        numbers = [*counter, *key, *philox4x32_10(counter, key)]
        print("philox", *(f"0x{n:08x}" for n in numbers))

    for seed in [0, 1, 42, 0x9E3779B97F4A7C15, LONG]:
        mixed = splitmix64(seed)
        print("key", seed, f"0x{mixed & WORD:08x}", f"0x{mixed >> 32:08x}")

    places = [(42, 7, 0, 0), (42, 7, 1, 0), (42, 7, 0, 1), (42, 8, 0, 0), (43, 7, 0, 0),
              (0, 0, 0, 0), (LONG, LONG, WORD, WORD), (1, 1 << 32, 1 << 31, 1 << 30)]
    for place in places:
        print("words", *place, *(f"0x{w:08x}" for w in words(*place)))
    for seed, stream, row in [(42, 7, 0), (LONG, LONG, WORD)]:
        for col in [0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 2**35 - 8, 2**35 - 1]:
            print("lane", seed, stream, row, col, lane(seed, stream, row, col))

    half = 0.5 / 65536
    probabilities = [0.0, 5e-324, half, 1 / 65536, 3 * half, 5 * half, 0.001, 0.05, 0.1, 0.125, 0.2,
                     0.25, 0.3, 1 / 3, 0.5, 0.9, 0.999, 1 - 3 * half, 1 - 1 / 65536, 1 - half,
                     1 - half / 2, 1.0]
    for p in probabilities:
        bits = struct.unpack("<Q", struct.pack("<d", p))[0]
        t = threshold(p)
        keep = f32_bits(Fraction(65536 - t, 65536))
        print("p", f"0x{bits:016x}", t, f"0x{scale_bits(t):08x}", f"0x{keep:08x}")

    whole = ("contiguous", 0)
    masks = [
        (42, 7, whole, 4, 0, 20, 0.1),
        (42, 7, whole, 8, 0, 64, 0.5),
        (42, 7, ("contiguous", 2), 2, 8, 12, 0.1),
        (0, 0, whole, 3, 0, 33, 0.3),
        (LONG, LONG, ("contiguous", WORD - 1), 2, 2**35 - 40, 40, 0.5),
        (1, 2**40 + 3, ("blocks", 5, 3, 10), 7, 16, 19, 0.2),
        (1, 2**40 + 3, ("attention", 7, 2, 3, 100, 1000), 12, 0, 17, 0.2),
        (1, 2**40 + 3, ("explicit", 9, 9, 0, WORD, 17), 5, 0, 17, 0.2),
        (5, 6, whole, 2, 0, 9, 0.0),
        (5, 6, whole, 2, 0, 9, 1.0),
        (5, 6, whole, 1, 0, 65536, 1 / 65536),
        (3, 4, whole, 100, 0, 1001, 0.9),
        (2026, 11, whole, 257, 0, 1024, 0.1),
        (2026, 11, ("contiguous", 100000), 64, 4096, 1000, 0.1),
    ]
    grouped = [
        (42, 7, whole, 6, 0, 20, 0.5, 2, False),
        (42, 7, whole, 6, 0, 20, 0.5, 2, True),
        (42, 7, whole, 16, 0, 3, 0.5, 1, True),
        (42, 7, ("contiguous", 3), 5, 8, 20, 0.1, 4, False),
        (1, 2**40 + 3, ("attention", 7, 2, 3, 100, 1000), 12, 16, 17, 0.2, 50, False),
        (1, 2**40 + 3, ("explicit", 9, 9, 0, WORD, 17), 5, 0, 17, 0.5, 9, True),
        (LONG, LONG, ("contiguous", WORD - 7), 8, 2**35 - 40, 40, 0.5, WORD, False),
        (2026, 11, whole, 1000, 0, 33, 0.3, 10, True),
        (2026, 11, whole, 257, 0, 1024, 0.1, 128, False),
    ]
    for seed, stream, rowmap, rows, first_col, cols, p, *groups in masks + grouped:
        drawn = list(lines(seed, stream, rowmap, rows, first_col, cols, p, *groups))
        digest = hashlib.sha256("".join(line + "\n" for line in drawn).encode()).hexdigest()
        bits = struct.unpack("<Q", struct.pack("<d", p))[0]
        place = seed, stream, f"0x{bits:016x}", first_col, rows, cols, digest
        print("groups" if groups else "mask", *place, *(int(g) for g in groups), *rowmap)
        if rows * cols <= 600:
            print("row", *drawn)


if __name__ == "__main__":
    main()
