"""Contenders are timed in turns, each in a process of its own, under the allocator's setting that it names."""

import functools
import os
import time
from pathlib import Path

import pytest

from benchmarks import contenders
from benchmarks.paired_timing import ALLOCATORS, Contender, ContenderError, Timing, alternate, fastest, try_out
from biomamba_jax.errors import UserError


class Append:
    """Work that notes its name, process and allocator setting in a file."""

    def __init__(self, path: Path, name: str, seconds: float = 0.0) -> None:
        self.path, self.name, self.seconds = path, name, seconds

    def __call__(self) -> None:
        time.sleep(self.seconds)
        with self.path.open("a") as file:
            file.write(f"{self.name} {os.getpid()} {os.environ.get('GLIBC_TUNABLES')}\n")


def refuse() -> Append:
    raise RuntimeError("no such\nlibrary")


def crash() -> Append:
    os._exit(1)


def contender(path: Path, name: str, allocator: str = "default", seconds: float = 0.0) -> Contender:
    return Contender(name, allocator, functools.partial(Append, path, name, seconds))


def test_contenders_take_turns_after_a_round_that_does_not_count(tmp_path):
    pair = [contender(tmp_path / "log", "a"), contender(tmp_path / "log", "b", "huge-pages")]
    timings = alternate(pair, rounds=2, limit_seconds=60)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [name for name, _, _ in lines] == ["a", "b"] * 3
    assert {(name, tunables) for name, _, tunables in lines} == {("a", "None"), ("b", ALLOCATORS["huge-pages"])}
    assert len({process for _, process, _ in lines}) == 2
    assert [len(timing.each) for timing in timings] == [2, 2]
    assert "GLIBC_TUNABLES" not in os.environ


def test_a_candidate_that_cannot_be_prepared_says_why_in_one_line():
    assert try_out(Contender("x", "default", refuse), limit_seconds=60) == "RuntimeError: no such library"
    assert "died" in try_out(Contender("x", "default", crash), limit_seconds=60)


def test_a_candidate_that_takes_too_long_is_given_up(tmp_path):
    with pytest.raises(ContenderError, match="not ready within 1 s"):
        alternate([contender(tmp_path / "log", "slow", seconds=60)], rounds=1, limit_seconds=1)


def test_the_fastest_is_the_one_with_the_shortest_median():
    slow, quick, broken = (Contender(name, "default", refuse) for name in ("slow", "quick", "broken"))
    tried = {slow: Timing([1.0, 4.0, 5.0], 0), quick: Timing([3.0, 3.0, 9.0], 0), broken: "RuntimeError: no"}
    assert fastest(tried, list(tried)) is quick
    with pytest.raises(UserError, match="broken: RuntimeError"):
        fastest(tried, [broken])


def test_the_ratio_is_theirs_over_ours_within_pairs(monkeypatch, capsys):
    pair = Contender("ours", "default", refuse), Contender("theirs", "default", refuse)
    timings = [Timing([1.0, 2.0, 4.0], 10**9), Timing([3.0, 4.0, 20.0], 10**9)]
    monkeypatch.setattr(contenders, "alternate", lambda *arguments: timings)
    contenders.compare("x", 1000, (1.0, 1.0), pair, rounds=3, limit_seconds=1)
    printed = capsys.readouterr().out
    assert "50%" in printed and "25%" in printed  # of the floor
    (line,) = [line for line in printed.splitlines() if "ratio within pairs" in line]
    assert "3.00" in line and "2.00–5.00" in line  # the median, which the mean is not, and the range
