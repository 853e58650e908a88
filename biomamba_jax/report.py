"""Show training runs side by side: final figures, settings that differ and curves, on one page.

python -m biomamba_jax.report RUN [RUN ...] [--output runs.html]

The page is one file that needs no server and can be sent to a colleague. Its curves zoom: drag over a range of steps.
"""

from collections.abc import Sequence
from pathlib import Path

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.report import ReportConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    config = parse(ReportConfig, argv, __doc__, positional="runs")
    from biomamba_jax.train.comparison import write_comparison

    print(f"report: {write_comparison(config.runs, Path(config.output))}")


if __name__ == "__main__":
    run_command(main)
