"""The main loop of a compiled kernel: which instruction goes down which pipe, read from NVIDIA's machine code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIPES = ("tensor", "exp", "fma", "alu", "shuffle", "shared", "global", "atomic", "issue")

INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);")
LABEL = re.compile(r"^(\.L\w+):")

PIPE_OF = {  # the first that matches; what is left only takes an issue slot
    "tensor": r"HGMMA|HMMA|UTC\w*MMA",
    "exp": r"MUFU",
    "fma": r"FFMA|FMUL|FADD|IMAD|HFMA",
    "shuffle": r"SHFL",
    "atomic": r"ATOM|RED(G|\.|$)",
    "shared": r"LDS|STS|LDTM|STTM",
    "global": r"LDG|STG|UBLKCP|UTMA",
    "alu": r"FMNMX|[FI]SETP|F?SEL|FSET|LOP3|IADD|LEA|SHF|PRMT|MOV|IMNMX|VIMNMX|F2F|I2F|F2I|PLOP3",
}


class Instruction(NamedTuple):
    opcode: str
    operands: str
    conditional: bool

    @property
    def target(self) -> str | None:
        """Where a branch goes. The slow way round that a warp takes when its threads have parted is not followed."""
        if not re.match(r"BRA(?!\.DIV)", self.opcode):
            return None
        found = re.search(r"\.L\w+", self.operands)
        return found and found[0]

    @property
    def ends(self) -> bool:
        """Nothing falls through to the next instruction."""
        jumps = re.match(r"(BRA|EXIT|RET)(?!\.DIV)", self.opcode)
        return bool(jumps) and not self.conditional and not re.search(r"\bU?P\d", self.operands)

    @property
    def pipe(self) -> str | None:
        return next((pipe for pipe, pattern in PIPE_OF.items() if re.match(pattern, self.opcode)), None)

    @property
    def amount(self) -> int:
        """What one warp asks of the pipe: multiply-adds, threads' results, or bytes of a thread."""
        match self.pipe:
            case "tensor":
                return _multiply_adds(self.opcode)
            case "shared" | "global":
                return _width(self.opcode)
        return 2 if re.match(r"\w+2\b", self.opcode) and self.pipe == "fma" else 1


def _multiply_adds(opcode: str) -> int:
    if shape := re.search(r"(\d+)x(\d+)x(\d+)", opcode):  # HGMMA.64x128x16, of four warps
        m, n, k = map(int, shape.groups())
        return m * n * k // 4
    if shape := re.match(r"HMMA\.(16)(8)(\d+)", opcode):
        m, n, k = map(int, shape.groups())
        return m * n * k
    return 0  # tensor memory's products name their shapes in a descriptor


def _width(opcode: str) -> int:
    if found := re.search(r"\.(64|128)(?!\w)", opcode):
        return int(found[1]) // 8
    if matrices := re.search(r"M(?:\.16)?\.M\w+\.(\d)", opcode):  # LDSM.16.M88.4: four 8×8 matrices of 16 bits
        return 4 * int(matrices[1])
    return 1 if re.search(r"\.U?8\b", opcode) else 2 if re.search(r"\.U?16\b", opcode) else 4


def blocks(code: str) -> tuple[list[list[Instruction]], dict[str, int]]:
    """Straight pieces of code, and which one each label begins."""
    found, labels = [[]], {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            if found[-1]:
                found.append([])
            labels[label[1]] = len(found) - 1
        elif read := INSTRUCTION.search(line):
            found[-1].append(Instruction(read["opcode"], read["operands"], bool(read["guard"])))
            if found[-1][-1].target or found[-1][-1].ends:
                found.append([])
    return found, labels


def _successors(found: list[list[Instruction]], labels: dict[str, int]) -> list[list[int]]:
    edges = []
    for i, block in enumerate(found):
        last = block[-1] if block else None
        follows = [] if (last is not None and last.ends) or i + 1 == len(found) else [i + 1]
        if last is not None and last.target in labels:
            follows.append(labels[last.target])
        edges.append(follows)
    return edges


def _loops(edges: list[list[int]]) -> dict[int, set[int]]:
    """Header → body of every natural loop: an edge to a block that every way here has passed closes one."""
    sources: list[list[int]] = [[] for _ in edges]
    for i, follows in enumerate(edges):
        for j in follows:
            sources[j].append(i)
    dominators = _dominators(edges, sources)
    loops: dict[int, set[int]] = {}
    for latch, follows in enumerate(edges):
        for header in follows:
            if header not in dominators[latch]:
                continue
            body, waiting = {header}, [latch]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += sources[block]
            loops[header] = loops.get(header, set()) | body
    return loops


def _dominators(edges: list[list[int]], sources: list[list[int]]) -> list[set[int]]:
    """Which blocks every way from the first one to each block passes; of unreached code, none but itself."""
    reached, waiting = set(), [0]
    while waiting:
        i = waiting.pop()
        if i not in reached:
            reached.add(i)
            waiting += edges[i]
    found = [set(reached) if i in reached and i else {i} for i in range(len(edges))]
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = {i} | set.intersection(*(found[j] for j in sources[i] if j in reached))
            changed |= new != found[i]
            found[i] = new
    return found


def main_loops(code: str, rare: bool = False) -> Iterator[list[Instruction]]:
    """One turn of each innermost loop that multiplies matrices (or, without a matrix unit, takes exponentials).

    Of the ways through a turn, the one with the most floating-point work; with ``rare`` the shortest: the kernel keeps
    an exact way for tiles that are out of the ordinary.
    """
    found, labels = blocks(code)
    edges = _successors(found, labels)
    loops = _loops(edges)
    pipes = [{instruction.pipe for instruction in block} for block in found]
    unit = "tensor" if any("tensor" in p for p in pipes) else "exp"
    working = {header: body for header, body in loops.items() if any(unit in pipes[i] for i in body)}
    for header, body in sorted(working.items()):
        if any(other != header and other in body and inner < body for other, inner in working.items()):
            continue
        yield [x for i in _turn(found, edges, header, body, rare) for x in found[i]]


def _turn(found, edges, header: int, body: set[int], rare: bool) -> list[int]:
    """The blocks of one way from the header round to itself."""

    def worth(i: int) -> float:
        work = sum(x.pipe in ("fma", "exp", "tensor") for x in found[i])
        return -len(found[i]) if rare else work - 1e-3 * len(found[i])

    best: dict[int, tuple[float, list[int]] | None] = {}

    def way(i: int, above: frozenset[int]) -> tuple[float, list[int]] | None:
        """The best way from a block to the header; None where it only leads into an inner loop, a wait."""
        if i not in best:
            ways = [(0.0, [])] if header in edges[i] else []
            onwards = (j for j in edges[i] if j in body and j != header and j not in above)
            ways += [found for j in onwards if (found := way(j, above | {i})) is not None]
            value, path = max(ways, key=lambda x: x[0]) if ways else (0.0, None)
            best[i] = None if path is None else (value + worth(i), [i, *path])
        return best[i]

    found_way = way(header, frozenset())
    assert found_way is not None, "a loop that does not come round"
    return found_way[1]


def usage(instructions: Iterable[Instruction]) -> Counter:
    """What one warp asks of each pipe: see :attr:`Instruction.amount`; "issue" counts every instruction."""
    asked = Counter()
    for instruction in instructions:
        asked["issue"] += 1
        if instruction.pipe is not None:
            asked[instruction.pipe] += instruction.amount
    return asked
