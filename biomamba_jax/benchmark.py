"""The command `python -m biomamba_jax.benchmark`, which names its successor."""

from biomamba_jax.command_line import run_command
from biomamba_jax.errors import UserError


def main(argv: object = None) -> None:
    """Raise UserError with the new command."""
    raise UserError("the benchmarks are now a command of a checkout: python -m benchmarks ...")


if __name__ == "__main__":
    run_command(main)
