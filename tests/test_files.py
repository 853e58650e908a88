"""Errors of files in one line."""

import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_full_disks


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: [OS error 122: Disk quota exceeded]")],
)
def test_a_full_disk_is_one_line_whichever_library_finds_it(tmp_path, error):
    one_line = pytest.raises(UserError, match=f"{tmp_path}: cannot be written .*; free space")
    with one_line, naming_full_disks(tmp_path, "free space"):
        raise error
    with pytest.raises(ValueError, match="other"), naming_full_disks(tmp_path, "free space"):
        raise ValueError("other")
