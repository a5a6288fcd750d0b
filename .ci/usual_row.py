"""How many instructions a warp executes for a usual row, from a kernel's machine code.

A row is usual where a kernel takes the path that was written for most of them. In the code that is the shortest way from
entry to exit that does all of the row's work: so many of Philox's wide multiplications, of 16-byte loads and stores, of
multi-function instructions, of shuffles and of packed conversions. A way is consistent: a predicate that a branch has read
stays what it was until it is written again. The code of a held row has no loops, so the shortest way is what a warp
executes. One case is not seen: where the code makes a test twice, in different predicates, a way may answer it both ways.
"""

import bisect
import heapq
import re

WORK = ["philox", "loads", "stores", "special", "shuffles", "packs"]

# Philox4x32's multipliers as nvdisasm prints them.
MULTIPLIERS = re.compile(r"-0x326172a9|-0x2daee0ad")


def work_of(name, operands):
    """Which of WORK an instruction is, or None."""
    if name.startswith("IMAD.WIDE.U32") and MULTIPLIERS.search(operands):
        return "philox"
    wide = ".128" in name
    if wide and name.startswith("LDG"):
        return "loads"
    if wide and name.startswith("STG"):
        return "stores"
    kinds = {"MUFU": "special", "SHFL": "shuffles", "F2FP": "packs"}
    return kinds.get(name.split(".")[0])


class Instruction:
    """What the search needs to know of an instruction; `code` is (address, predicate, name, operands)."""

    def __init__(self, code, addresses):
        _, predicate, name, operands = code
        self.is_exit = name == "EXIT"
        self.is_branch = name.startswith("BRA")
        self.work = work_of(name, operands)
        guard = re.match(r"@(!?)(U?P\d)", predicate)
        if not guard and self.is_branch:
            guard = re.match(r"\s*(!?)(U?P\d)\s*,", operands)
        self.guard = (guard[2], guard[1] != "!") if guard else None
        first = [operand.strip() for operand in operands.split(",")[:3]]
        writes = not self.is_exit and not self.is_branch
        self.writes = {operand for operand in first if re.fullmatch(r"U?P\d", operand)} if writes else set()
        target = re.findall(r"0x[0-9a-f]+", operands)
        # A branch may lead to a NOP that was left out: what stands behind it is meant.
        leads = self.is_branch and target
        self.target = bisect.bisect_left(addresses, int(target[-1], 16)) if leads else None

    def skipped(self, known):
        return self.guard is not None and (self.guard[0], not self.guard[1]) in known

    def ways(self, index, known):
        """What may come next: (index, what is known of the predicates then)."""
        known = frozenset(fact for fact in known if fact[0] not in self.writes)
        otherwise = (self.guard[0], not self.guard[1]) if self.guard else None
        if self.is_exit:
            return [(index + 1, known | {otherwise})] if self.guard and self.guard not in known else []
        if self.target is None:
            return [(index + 1, known)]
        ways = []
        if not self.skipped(known):
            ways.append((self.target, known | {self.guard} if self.guard else known))
        if self.guard and self.guard not in known:
            ways.append((index + 1, known | {otherwise}))
        return ways


def instructions(code, work):
    """Instructions on the shortest way that does `work`, {kind: least}; None where there is no such way. `code`:
    [(address, predicate, name, operands)] without NOPs."""
    addresses = [line[0] for line in code]
    parsed = [Instruction(line, addresses) for line in code]
    goal = tuple(work.get(kind, 0) for kind in WORK)
    start = (0, (0,) * len(WORK), frozenset())
    best, queue, order = {start: 0}, [(0, 0, start)], 0
    while queue:
        length, _, state = heapq.heappop(queue)
        if length > best[state]:
            continue
        index, done, known = state
        at = parsed[index]
        if at.work and not at.skipped(known):
            done = tuple(min(n + (kind == at.work), most) for n, kind, most in zip(done, WORK, goal))
        if at.is_exit and not at.skipped(known) and done == goal:
            return length + 1
        for following, then in at.ways(index, known):
            after = (following, done, frozenset(then))
            if following < len(parsed) and length + 1 < best.get(after, 1 << 30):
                best[after] = length + 1
                order += 1
                heapq.heappush(queue, (length + 1, order, after))
    return None
