"""Names the command that took this one's place."""

from biomamba_jax.command_line import run_command
from biomamba_jax.errors import UserError


def main(argv: object = None) -> None:
    """Refuses to run.

    Raises:
      UserError: always; names the new command.
    """
    raise UserError("benchmarks moved out of the package: run `python -m benchmarks ...` in a checkout")


if __name__ == "__main__":
    run_command(main)
