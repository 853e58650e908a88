"""Launchers run for real, with stand-ins for every command that would reach a cloud or a cluster."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
STAND_IN = Path(__file__).with_name("stand_in.py")
COMMANDS = ("gcloud", "xpk", "kubectl", "srun", "scontrol")
# No pauses, and a checkout that is as it was committed.
SETTINGS = """
source {defaults}
PROJECT=my-project ZONE=us-west4-a NAME=pubmed ACCELERATOR=v5litepod-16
POLL_SECONDS=0 RETRY_SECONDS=0 SETTLE_SECONDS=0 TRIES=3
{more}
"""


@dataclasses.dataclass
class Stage:
    """A folder with stand-ins and settings, in which launchers are run."""

    folder: Path

    def answer(self, *rules: tuple[str, Sequence[tuple[int, str]]]) -> None:
        """Answers of the stand-ins, by pattern; see stand_in.py."""
        (self.folder / "answers.json").write_text(json.dumps(rules))

    def settings(self, more: str = "") -> None:
        path = self.folder / "my settings.env"
        path.write_text(SETTINGS.format(defaults=LAUNCH / "settings.env", more=more))

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
        return kept | {"PATH": path, "STAND_INS": str(self.folder)}

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a launcher with the settings."""
        command = ["bash", str(LAUNCH / script), "--settings", str(self.folder / "my settings.env"), *words]
        return subprocess.run(
            command,
            env=self.environment() | environment,
            cwd=LAUNCH.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        """How the stand-ins were called, in order."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    folder = tmp_path / "it's a stage"  # a space and a quote in every path
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", str(STAND_IN), name])} "$@"\n')
        script.chmod(0o755)
    stage = Stage(folder)
    stage.settings()
    stage.answer()
    return stage
