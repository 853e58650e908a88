"""Compile a training step ahead of time for a machine, and estimate what a run takes.

python -m biomamba_jax.plan --config configs/mamba2_2.7b.yaml --topology v5e-256 [--slices 2] [--search] [--json]

Estimates memory per chip by kind, collectives, the time of a step against its lower bounds, days and chip-hours of the
run. For a config that does not fit, finds the nearest settings that do. Needs no TPU, only its compiler: pip install
'biomamba-jax[tpu-compiler]'.
"""

import json
from collections.abc import Sequence

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.plan import PlanConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    config = parse(PlanConfig, argv, __doc__)
    from biomamba_jax.planning.plan import make_plan
    from biomamba_jax.planning.report import show

    answer = make_plan(config)
    if config.json:
        nearest = answer.nearest and answer.nearest.as_json()
        ranking = [plan.as_json() for plan in answer.ranking]
        print(json.dumps(answer.plan.as_json() | {"nearest": nearest, "ranking": ranking}, indent=1))
    else:
        show(answer)


if __name__ == "__main__":
    run_command(main)
