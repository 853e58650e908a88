"""Reads the innermost loops of TPU kernels from the compiler's dump of their VLIW bundles."""

import glob
import os
import re
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from biomamba_jax.planning.ahead_of_time import Request, estimates


class Loop(NamedTuple):
    """An innermost loop of a kernel."""

    kernel: str
    bundles: int
    """VLIW bundles of one iteration."""
    filled: Mapping[str, float]
    """Share of each kind of slot that is used."""


def inner_loops(request: Request) -> list[Loop]:
    """The innermost loops of all Pallas calls of a program, in order."""
    with tempfile.TemporaryDirectory() as folder:
        estimates([request], flags=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true")
        return _read_loops(folder)


def _read_loops(folder: str) -> list[Loop]:
    """From `*-final_bundles.txt` and the table of slots next to it."""
    loops = []
    for path in sorted(glob.glob(f"{folder}/*-final_bundles.txt")):
        kernel = re.match(r"\d+-(.*)-\d+-final_bundles", os.path.basename(path))
        tables = glob.glob(re.sub(r"-\d+-final_bundles.txt", "-*-final_hlo-static-per-bundle-utilization.txt", path))
        if kernel is None or not tables or re.search(r"schedule-analysis|late-|TLP", path):
            continue
        names, rows = _read_slots(tables[0])
        capacity, used = rows[0], rows[1:]
        with open(path) as f:
            parsed = re.findall(r"^\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2})?)\s*:\s*((?:>\s*)*)\{", f.read(), re.MULTILINE)
        # The grid is the outer loop: a body two deep is a loop inside the kernel.
        depth = [marks.count(">") for _, marks in parsed]
        starts = [i for i, (label, _) in enumerate(parsed) if label == "LB" and depth[i] >= 2]
        for start in starts:
            stop = next((i for i in range(start + 1, len(parsed)) if depth[i] != depth[start]), len(parsed))
            sums = [sum(column) for column in zip(*used[start:stop], strict=True)]
            filled = {n: s / (c * (stop - start)) for n, s, c in zip(names, sums, capacity, strict=True) if s}
            loops.append(Loop(kernel[1], stop - start, filled))
    return loops


def _read_slots(path: str) -> tuple[list[str], list[list[int]]]:
    with open(path) as f:
        lines = f.read().splitlines()
    names = next([name.strip() for name in line.split(",")] for line in lines if "MATMUL" in line)
    return names, [list(map(int, line.split())) for line in lines if re.fullmatch(r"[\d ]+", line.strip() or "-")]
