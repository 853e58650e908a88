"""Digests of a folder's files, and the lock by which one process at a time owns it."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.folders import DIGESTS, check_digests, locked, write_digests

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """Files as those of a checkpoint: nested, small and less small, one of them empty."""
    draw = random.Random(0)
    for name, size in (("state/d/9f3", 5000), ("state/_METADATA", 700), ("loop/metadata", 90), ("done.txt", 0)):
        path = tmp_path / "6" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size))
    write_digests(tmp_path / "6")
    return tmp_path / "6"


def test_digests_are_read_by_sha256sum(folder):
    assert check_digests(folder)
    assert not check_digests(folder / "state")  # which has none
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", DIGESTS], cwd=folder, check=True)


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_no_flipped_bit_goes_unnoticed(folder, flips):
    draw = random.Random(1)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    for _ in range(flips):
        path = draw.choice(files)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"is damaged|is missing"):
            check_digests(folder)
        path.write_bytes(whole)
    assert check_digests(folder)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("name", ["state/d/9f3", DIGESTS])
def test_a_truncated_file_is_named(folder, name, kept):
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=name):
        check_digests(folder)


def test_a_file_that_is_gone_or_does_not_belong_there_is_named(folder):
    (folder / "state" / "more").write_text("")
    with pytest.raises(UserError, match="does not list every file"):
        check_digests(folder)
    (folder / "state" / "more").unlink()
    (folder / "loop" / "metadata").unlink()
    with pytest.raises(UserError, match="loop/metadata: is missing"):
        check_digests(folder)


def test_several_processes_share_the_reading(folder):
    (folder / "state" / "d" / "9f3").write_bytes(b"")
    found = 0
    for part in range(4):
        try:
            check_digests(folder, part, 4)
        except UserError:
            found += 1
    assert found == 1


OWNER = """
import sys
from biomamba_jax.folders import locked
with locked(sys.argv[1]):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_the_owner_of_a_folder_is_named_and_a_dead_one_leaves_it_free(tmp_path):
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run")]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout.readline() == b"mine\n"
    for _ in range(2):  # a refused start must not take the owner's name away
        with pytest.raises(UserError, match=rf"run: another run uses it \(process {owner.pid} of host \S+\)"):
            locked(tmp_path / "run").__enter__()
    owner.kill()
    owner.communicate()
    with locked(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path / "run"):
        assert "run: cannot be locked on this file system (Function not implemented)" in caplog.text
