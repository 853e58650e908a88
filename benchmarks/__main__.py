"""Measures this machine: python -m benchmarks SUBJECT; and claims: reproduce, text_mining.

    python -m benchmarks step [--config FILE.yaml] [--model.kind mamba1 ...] [--compare]
    python -m benchmarks decode [--model.kind mamba1 ...] [--batch_size 8] [--compare]
    python -m benchmarks embed [--model.kind mamba1 ...]
    python -m benchmarks kernels --target gpu | v5e | v5p | v6e | sm_80 | sm_90 | sm_100
    python -m benchmarks prepare [--peer FOLDER]
    python -m benchmarks input [--path SHARDS] [--hosts 64]
    python -m benchmarks plan
    python -m benchmarks startup
    python -m benchmarks reproduce [--pubmedqa ori_pqal.json]
    python -m benchmarks text_mining [--model runs/quickstart] [--data data/text_mining]

`step`: tokens/s, memory and share of peak of a config's training step, by default the published 130m shape on one row
of 512 tokens; with --compare, in paired timing with transformers' model. `decode`: the same for greedy decoding.
`embed`: embeddings of texts, in paired timing with transformers' hidden states.
`kernels`: accuracy and speed of the ops on this machine's GPU; for a TPU, attached or not, the compiler's estimate next
to the roofline; for an absent GPU, registers and spills. `prepare`: reading NLM's XML, in paired timing with
pubmed_parser if --peer names the folder that contains it. `input`: batches of one host of a pod. `plan`: the plan's
time of a transformer's step next to the published one. `startup`: CPU time of each command's --help. `reproduce`:
the paper's claim at laptop scale, see `benchmarks.reproduction`. `text_mining`: pretrained against random weights, and
the readings of a head's text, see `benchmarks.text_mining`.
"""

import sys
from collections.abc import Sequence

from biomamba_jax.command_line import parse, run_command, run_subcommand
from biomamba_jax.errors import UserError

# Worker processes import this module again: modules that need jax are imported where they are used.


def step(argv: Sequence[str], doc: str) -> None:
    """Measure tokens/s, memory and share of peak of the training step, on random tokens."""
    from benchmarks.step import StepBenchmark, measure_step

    measure_step(parse(StepBenchmark, argv, doc))


def decode(argv: Sequence[str], doc: str) -> None:
    """Measure tokens/s and memory of greedy decoding, on random prompts."""
    from benchmarks.decode import DecodeBenchmark, measure_decode

    measure_decode(parse(DecodeBenchmark, argv, doc))


def embed(argv: Sequence[str], doc: str) -> None:
    """Measure tokens/s of embeddings, on random texts, in paired timing with transformers' model."""
    from benchmarks.embed import EmbedBenchmark, measure_embed

    measure_embed(parse(EmbedBenchmark, argv, doc))


def kernels(argv: Sequence[str], doc: str) -> None:
    """Time the kernels and their alternatives: measured on this machine's GPU, the compiler's estimate for others."""
    from benchmarks.kernels import KernelsBenchmark, measure_kernels
    from benchmarks.kernels_gpu import measure_kernels_gpu, print_static

    settings = parse(KernelsBenchmark, argv, doc)
    if settings.target == "gpu":
        measure_kernels_gpu(settings)
    elif settings.target.startswith("sm_"):
        print_static(settings)
    else:
        measure_kernels(settings)


def prepare(argv: Sequence[str], doc: str) -> None:
    """Measure records/s, MB/s and memory of reading NLM's XML; with --peer in paired timing with pubmed_parser."""
    from benchmarks.parsing import PrepareBenchmark, measure_parsing

    measure_parsing(parse(PrepareBenchmark, argv, doc))


def input_(argv: Sequence[str], doc: str) -> None:
    """Measure the tokens/s that one host of a pod reads, shuffles and packs."""
    from benchmarks.input import InputBenchmark, measure_input

    measure_input(parse(InputBenchmark, argv, doc))


def plan(argv: Sequence[str], doc: str) -> None:
    """Compare the plan's model of time with the published speed of a dense transformer on v5e-256."""
    from benchmarks.published_step import PlanBenchmark, compare_with_published_step

    compare_with_published_step(parse(PlanBenchmark, argv, doc))


def startup(argv: Sequence[str], doc: str) -> None:
    """Measure the CPU time of each command's --help."""
    from benchmarks.startup import StartupBenchmark, measure_startup

    measure_startup(parse(StartupBenchmark, argv, doc))


def reproduce(argv: Sequence[str], doc: str) -> None:
    """Train, measure and compare the models of configs/reproduce; a second start goes on where the first one ended."""
    from benchmarks.reproduction import ReproductionBenchmark, reproduce_claim

    reproduce_claim(parse(ReproductionBenchmark, argv, doc))


def text_mining(argv: Sequence[str], doc: str) -> None:
    """Fine-tune on entities and relations, from pretrained and from random weights; a second start goes on."""
    from benchmarks.text_mining import TextMiningBenchmark, compare_text_mining

    compare_text_mining(parse(TextMiningBenchmark, argv, doc))


SUBJECTS = {
    "step": step,
    "decode": decode,
    "embed": embed,
    "kernels": kernels,
    "prepare": prepare,
    "input": input_,
    "plan": plan,
    "startup": startup,
    "reproduce": reproduce,
    "text_mining": text_mining,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, the arguments without the program's name; None for this process's."""
    words = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m benchmarks"
    if words[:1] in (["--help"], ["-h"]):
        print(__doc__, end="")
        return
    if not run_subcommand(SUBJECTS, words, prog):
        raise UserError(f"missing or unknown benchmark: choose {', '.join(SUBJECTS)}; for instance {prog} step --help")


if __name__ == "__main__":
    run_command(main)
