"""python -m benchmarks step [--config FILE.yaml] [--model.kind mamba1 ...] [--compare]
python -m benchmarks decode [--model.kind mamba1 ...] [--batch_size 8] [--compare]
python -m benchmarks kernels --target gpu | v5e | v5p | v6e | sm_80 | sm_90 | sm_100
python -m benchmarks prepare [--peer FOLDER]

Measures this machine. `step`: tokens/s, memory and share of peak of the training step of a config, by default the
published 130m shape on one row of 512 tokens; with --compare, in turns with transformers' own model. `decode`:
the same for greedy decoding. `kernels`: are the heavy operations right on this machine's GPU, and how fast; or, for a
TPU that need not be there, the compiler's estimate against their floors, and for an absent GPU registers and spills.
`prepare`: reading NLM's XML, in turns with pubmed_parser where --peer names a folder that holds it.
"""

import sys
from collections.abc import Sequence

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.errors import UserError

# Worker processes import this module again: what needs jax is imported where it is used.


def step(argv: Sequence[str], prog: str) -> None:
    """The training step."""
    from benchmarks.step import StepBenchmark, measure_step

    description = "Tokens/s, memory and share of peak of the training step, on random tokens."
    measure_step(parse(StepBenchmark, argv, f"{prog}\n\n{description}"))


def decode(argv: Sequence[str], prog: str) -> None:
    """Greedy decoding."""
    from benchmarks.decode import DecodeBenchmark, measure_decode

    description = "Tokens/s and memory of greedy decoding, on random prompts."
    measure_decode(parse(DecodeBenchmark, argv, f"{prog}\n\n{description}"))


def kernels(argv: Sequence[str], prog: str) -> None:
    """The heavy operations: timed on this machine's GPU, or by estimate for a TPU or GPU that is not there."""
    from benchmarks import kernels, kernels_gpu

    description = "Time of the kernels and their alternatives on GPU; on TPU by estimate, and the share of the floor."
    settings = parse(kernels.KernelsBenchmark, argv, f"{prog}\n\n{description}")
    if settings.target == "gpu":
        kernels_gpu.measure_kernels_gpu(settings)
    elif settings.target.startswith("sm_"):
        kernels_gpu.print_static(settings)
    else:
        kernels.measure_kernels(settings)


def prepare(argv: Sequence[str], prog: str) -> None:
    """Reading NLM's XML."""
    from benchmarks.parsing import PrepareBenchmark, measure_parsing

    description = "Records/s, MB/s and memory of reading NLM's XML, in turns with pubmed_parser where --peer names it."
    measure_parsing(parse(PrepareBenchmark, argv, f"{prog}\n\n{description}"))


SUBJECTS = {"step": step, "decode": decode, "kernels": kernels, "prepare": prepare}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m benchmarks"
    if words[:1] in (["--help"], ["-h"]):
        print(__doc__, end="")
        return
    if not words or words[0] not in SUBJECTS:
        raise UserError(f"say what to measure: {', '.join(SUBJECTS)}; for instance {prog} step --help")
    SUBJECTS[words[0]](words[1:], f"{prog} {words[0]}")


if __name__ == "__main__":
    run_command(main)
