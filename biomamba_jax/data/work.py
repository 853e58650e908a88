"""The folder in which shards are made: what is finished in it survives a kill and is used by the next run.

`OUTPUT.partial` lies beside OUTPUT, on the same disk, and is locked by the run that uses it. OUTPUT itself appears at
the very end by a rename. What a failed run leaves are finished spools and shards, for the same command to go on from;
with none of them finished, nothing.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from biomamba_jax.errors import UserError


class Work:
    """The folders of one run: `spools` and `shards` are kept when it fails, `output` becomes OUTPUT at its end."""

    def __init__(self, root: Path):
        self.root = root
        self.spools, self.shards, self.output = (root / name for name in ("spools", "shards", "output"))
        self.keeps = True
        """Whether what is finished is worth keeping if the run fails."""

    @property
    def worth_keeping(self) -> bool:
        finished = any(self.spools.glob("*.json")) or any(self.shards.glob("*.done"))
        return self.keeps and finished


@contextmanager
def work_folder(output: Path) -> Iterator[Work]:
    """The work folder of `output` for the block; UserError if `output` exists or another run is at it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already exists; remove it or give another --output")
    work = Work(output.parent / f"{output.name}.partial")
    try:
        work.root.mkdir(parents=True, exist_ok=True)
        lock = open(work.root / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{work.root}: cannot be made ({error.strerror}); give another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{work.root}: another run is writing {output}; wait for it or give another") from None
        try:
            shutil.rmtree(work.output, ignore_errors=True)
            for folder in (work.spools, work.shards, work.output):
                folder.mkdir(exist_ok=True)
            yield work
            os.rename(work.output, output)
            work.keeps = False
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{output}: cannot be written ({reason}); free space or give another --output") from None
        finally:
            shutil.rmtree(work.output, ignore_errors=True)
            if not work.worth_keeping:
                shutil.rmtree(work.root, ignore_errors=True)
