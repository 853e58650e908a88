"""Settings of `report`."""

from dataclasses import dataclass, field
from typing import Annotated

from biomamba_jax.config.checks import Limit, Settings


@dataclass(frozen=True)
class ReportConfig(Settings):
    """A page that compares training runs."""

    runs: Annotated[list[str], Limit("one run directory or several", bool)] = field(default_factory=list)
    """Run directories of pretrain or finetune, in the order of the page."""
    output: str = "runs.html"
    """The page to write."""
