"""The folder in which shards are made; finished parts of it survive a kill and are reused by the next run.

`OUTPUT.partial` is next to OUTPUT, on the same disk, and locked by the run that uses it. OUTPUT itself appears at the
end by a rename. A failed run leaves finished spools and shards, from which the same command continues; without any, it
leaves nothing.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from biomamba_jax.errors import UserError
from biomamba_jax.folders import locked


class Work:
    """The folders of a run: `spools` and `shards` are kept if it fails, `output` becomes OUTPUT at its end."""

    def __init__(self, root: Path, spools: Path | None = None):
        self.root = root
        self.spools, self.shards, self.output = spools or root / "spools", root / "shards", root / "output"
        self.keeps = True
        """False if finished parts are of no use to the next run."""

    @property
    def worth_keeping(self) -> bool:
        """True if there are finished spools or shards for the next run."""
        finished = any((self.root / "spools").glob("*.json")) or any(self.shards.glob("*.done"))
        return self.keeps and finished


@contextmanager
def work_folder(output: Path, spools: Path | None = None) -> Iterator[Work]:
    """Yield the work folder of `output`, which becomes `output` when the block ends.

    Args:
      output: the folder to write.
      spools: a separate folder for spools, which then stay for later runs.

    Raises:
      UserError: `output` exists or cannot be written, or another run uses a folder.
    """
    work = Work(output.parent / f"{output.name}.partial", spools)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if work.root.exists() and not work.output.exists():  # left by a run that was killed after the rename
            with suppress(UserError), locked(work.root):
                shutil.rmtree(work.root, ignore_errors=True)
        raise UserError(f"{output}: already exists; remove it or give another --output")
    if output.is_symlink() or os.path.ismount(output):
        raise UserError(f"{output}: is a link or a mount point, which no finished folder can replace; name one in it")
    with locked(work.root):
        try:
            shutil.rmtree(work.output, ignore_errors=True)
            for folder in (work.spools, work.shards, work.output):
                folder.mkdir(parents=True, exist_ok=True)
            yield work
            os.rename(work.output, output)
            work.keeps = False
        except OSError as error:
            reason = str(error.strerror or error)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
            remedy = f"{'free space or ' if full else ''}give another --output"
            raise UserError(f"{output}: cannot be written ({reason}); {remedy}") from None
        finally:
            shutil.rmtree(work.output, ignore_errors=True)
            if not work.worth_keeping:
                shutil.rmtree(work.root, ignore_errors=True)
