"""python -m biomamba_jax.plan --config configs/mamba2_2.7b.yaml --topology v5e-256 [--slices 2] [--search] [--json]

Compiles a config's real training step for a machine that is not there, and says what it would take: memory of a chip
by kind, what the chips exchange, the time of a step against its floors, days and chip-hours of the run. A config that
does not fit gets the nearest setting that does. Needs no TPU, only its compiler: pip install
'biomamba-jax[tpu-compiler]'. All figures are estimates.
"""

import json
import sys
from collections.abc import Sequence

from biomamba_jax.command_line import parse, run_command

_SWITCHES = ("--json", "--search")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    from biomamba_jax.config.plan import PlanConfig
    from biomamba_jax.planning.plan import make_plan
    from biomamba_jax.planning.report import show

    words = [word + "=true" if word in _SWITCHES else word for word in (sys.argv[1:] if argv is None else argv)]
    description = (__doc__ or "").partition("\n\n")[2]
    config = parse(PlanConfig, words, prog="python -m biomamba_jax.plan", description=description)
    answer = make_plan(config)
    if config.json:
        nearest = answer.nearest and answer.nearest.as_json()
        ranking = [plan.as_json() for plan in answer.ranking]
        print(json.dumps(answer.plan.as_json() | {"nearest": nearest, "ranking": ranking}, indent=1))
    else:
        show(answer)


if __name__ == "__main__":
    run_command(main)
