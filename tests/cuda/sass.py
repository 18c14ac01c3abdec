"""Counts instructions in the machine code of kernels."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Loop:
    """One loop that has no other in it."""

    operations: list[str]  # with their modifiers, e.g. "LDS.128"

    def count(self, *names: str) -> int:
        return sum(operation.split(".")[0] in names for operation in self.operations)

    @property
    def per_mma(self) -> float:
        """Instructions for each product of 16 x 32 x 8 (of m8n8k16, of which sm_75 needs four, each a quarter)."""
        quarter = any(operation.startswith("IMMA.8816") for operation in self.operations)
        return len(self.operations) / (self.count("IMMA") / (4 if quarter else 1))


def disassemble(nvdisasm: Path, cubin: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Of each kernel: labels and instructions, as (label, operation, operands)."""
    done = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True)
    kernels: dict[str, list[tuple[str, str, str]]] = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        name = part.split(",")[0].split()[0]
        lines = kernels.setdefault(name, [])
        for line in part.splitlines():
            if label := re.match(r"\s*(\.L_\S+):", line):
                lines.append((label[1], "", ""))
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
                lines.append(("", found[1], found[2]))
    return kernels


def innermost_loops(lines: list[tuple[str, str, str]]) -> list[Loop]:
    """Those with products of the tensor cores."""
    at = {label: i for i, (label, _, _) in enumerate(lines) if label}
    spans = []
    for i, (_, operation, operands) in enumerate(lines):
        target = re.search(r"\.L_\w+", operands) if operation.startswith("BRA") else None
        if target and at.get(target[0], i) < i:
            spans.append((at[target[0]], i))
    loops = []
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) and has_mma(lines[a:b]) for a, b in spans):
            continue
        if has_mma(lines[first : last + 1]):
            loops.append(Loop([operation for _, operation, _ in lines[first : last + 1] if operation]))
    return loops


def has_mma(lines: list[tuple[str, str, str]]) -> bool:
    return any(operation.startswith("IMMA") for _, operation, _ in lines)
