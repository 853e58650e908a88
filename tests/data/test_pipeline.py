"""The input pipeline: the same rows whoever asks, a state that is exact, and processes that end when they should."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import write_split

from biomamba_jax.data.pipeline import PaddedDocuments, TrainIterator, evaluation_batches
from biomamba_jax.data.shards import Document, Manifest, TokenizerInfo, open_split, write_documents
from biomamba_jax.errors import UserError

LENGTH, BATCH, WINDOW = 32, 4, 20  # about 13 rows a window, 4 windows an epoch
STEPS = 40  # three epochs
NAMES = ("inputs", "targets", "segment_ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 training and 30 validation documents of 1 to 50 tokens, every token of the folder another one."""
    folder = tmp_path_factory.mktemp("shards")
    random, fresh = np.random.default_rng(0), itertools.count(1)
    splits = {}
    for split, documents in (("train", 80), ("validation", 30)):
        tokens = [[*(next(fresh) for _ in range(random.integers(50))), 0] for _ in range(documents)]
        splits[split] = write_split(folder / split, tokens, per_shard=25)
    sources = [{"name": "made up", "sha256": ""}]
    Manifest(TokenizerInfo("none", "ab", "none", 9_999, 0), splits, {}, sources, {}).save(folder)
    return folder


def iterator(folder, split="train", **changes):
    return TrainIterator(
        open_split(folder, split)[1],
        **{"sequence_length": LENGTH, "batch_size": BATCH, "seed": 5, "window": WINDOW, **changes},
    )


@pytest.fixture(scope="module")
def expected(folder):
    """Rows int32 [3 names, rows, length] of one uninterrupted run of one host without workers."""
    return rows_of(take(iterator(folder), STEPS))


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def rows_of(batches):
    batches = list(batches)
    return np.stack([np.concatenate([batch[name] for batch in batches]) for name in NAMES])


def documents_of(rows):
    """The token lists of all segments of rows [3, rows, length]."""
    found = []
    for _, targets, segments in rows.transpose(1, 0, 2):
        found += [targets[segments == k].tolist() for k in range(1, segments.max(initial=0) + 1)]
    return found


def test_an_epoch_holds_every_token_once_and_the_next_epochs_follow(folder, expected):
    _, reader = open_split(folder, "train")
    tokens = int(reader.lengths.sum())
    stream = expected[1][expected[2] != 0]
    epochs = [stream[i * tokens : (i + 1) * tokens].tolist() for i in range(2)]
    stored = sorted(itertools.chain.from_iterable(document.ids.tolist() for document in reader))
    assert sorted(epochs[0]) == sorted(epochs[1]) == stored
    assert epochs[0] != epochs[1]


def test_batches_are_int32_of_the_shape_asked_for(folder):
    with iterator(folder) as batches:
        batch = next(batches)
    assert set(batch) == set(NAMES)
    assert all(values.shape == (BATCH, LENGTH) and values.dtype == np.int32 for values in batch.values())


@pytest.mark.parametrize(("workers", "cuts"), [(0, range(0, STEPS, 3)), (1, [3, 21]), (2, [14])])
def test_stopping_and_going_on_gives_the_same_batches(folder, expected, workers, cuts):
    for cut in cuts:
        with iterator(folder, num_workers=workers) as batches:
            before = take(batches, cut)
            state = json.loads(json.dumps(batches.get_state()))
        with iterator(folder, num_workers=workers) as batches:
            batches.set_state(state)
            after = take(batches, STEPS - cut)
        np.testing.assert_array_equal(rows_of(before + after), expected)


def test_reading_the_state_does_not_disturb_the_batches_and_a_used_iterator_can_be_set_back(folder, expected):
    with iterator(folder) as batches:
        states = []
        for _ in range(20):
            states.append(batches.get_state())
            next(batches)
        batches.set_state(states[7])
        assert batches.get_state() == states[7]
        np.testing.assert_array_equal(rows_of(take(batches, STEPS - 7)), expected[:, 7 * BATCH :])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_rows_of_a_step_between_them(folder, expected, hosts):
    share = BATCH // hosts
    parts = [
        take(iterator(folder, batch_size=share, process_index=host, process_count=hosts), STEPS)
        for host in range(hosts)
    ]
    np.testing.assert_array_equal(rows_of(itertools.chain.from_iterable(zip(*parts, strict=True))), expected)


def test_hosts_have_equal_states_and_their_number_may_change_on_the_way(folder, expected):
    pair = [iterator(folder, batch_size=2, process_index=host, process_count=2) for host in range(2)]
    for host in pair:
        take(host, 17)
    assert pair[0].get_state() == pair[1].get_state()
    alone = iterator(folder, batch_size=1)
    alone.set_state(pair[1].get_state())
    np.testing.assert_array_equal(rows_of(take(alone, 50)), expected[:, 17 * BATCH : 17 * BATCH + 50])


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"seed": 6}, "seed"), ({"sequence_length": 16}, "sequence_length"), ({"split": "validation"}, "documents")],
)
def test_a_state_of_other_rows_is_refused(folder, changes, name):
    state = iterator(folder).get_state()
    with pytest.raises(UserError, match=f"cannot resume: {name} is"):
        iterator(folder, **changes).set_state(state)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_every_document_once_in_batches_of_one_shape(folder, hosts):
    _, documents = open_split(folder, "validation")
    parts = [
        list(evaluation_batches(documents, sequence_length=64, batch_size=3, process_index=host, process_count=hosts))
        for host in range(hosts)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = list(itertools.chain.from_iterable(parts))
    assert all(batch[name].shape == (3, 64) for batch in batches for name in NAMES)
    assert sorted(documents_of(rows_of(batches))) == sorted(document.ids.tolist() for document in documents)


def test_evaluation_gives_the_same_batches_every_time(folder):
    _, documents = open_split(folder, "validation")
    first, second = (rows_of(evaluation_batches(documents, sequence_length=64, batch_size=3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_ahead_ends_in_the_readers_one_line(folder, tmp_path, workers):
    info = write_documents(tmp_path / "train", [Document(np.array([5, 6, 0]), 1, 1, 0, 2)])
    Manifest(TokenizerInfo("none", "ab", "none", 9, 0), {"train": info}, {}, [], {}).save(tmp_path)
    shard = tmp_path / "train" / "shard-00000-of-00001.array_record"
    shard.write_bytes(shard.read_bytes().replace(b"pmid", b"dimp"))
    with (
        iterator(tmp_path, num_workers=workers) as batches,
        pytest.raises(UserError, match="document 0 cannot be read"),
    ):
        next(batches)


def test_a_killed_worker_is_one_line_with_the_remedy_and_the_place_stays(folder):
    before = set(multiprocessing.active_children())
    with iterator(folder, num_workers=2) as batches:
        next(batches)
        for worker in set(multiprocessing.active_children()) - before:
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a data worker was killed.*give a smaller data\.num_workers"):
            for taken in itertools.count(1):  # noqa: B007
                next(batches)
        state = batches.get_state()
    assert state["row"] == taken * BATCH


def test_a_closed_iterator_says_so(folder):
    batches = iterator(folder)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


PROGRAM = """
import multiprocessing, os, signal, sys, time
from biomamba_jax.data.pipeline import TrainIterator
from biomamba_jax.data.shards import open_split

if __name__ == "__main__":
    documents = open_split(sys.argv[1], "train")[1]
    batches = TrainIterator(documents, sequence_length=32, batch_size=4, seed=5, num_workers=1)
    for _ in range(5):
        next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    {last_act}
"""


@pytest.mark.parametrize(
    ("last_act", "status", "error"),
    [
        ("pass", 0, ""),
        ("raise RuntimeError('boom')", 1, "RuntimeError: boom"),
        ("os.killpg(0, signal.SIGINT); time.sleep(60)", -signal.SIGINT, "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
    ids=["end", "exception", "ctrl-c", "kill"],
)
def test_a_program_ends_at_once_with_its_workers_however_it_ends(folder, tmp_path, last_act, status, error):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(last_act=last_act))
    process = subprocess.Popen(
        [sys.executable, str(program), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = process.stdout.readline().split()
    assert len(workers) == 1
    # Far below the 25 s after which grain kills a worker that will not end.
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert error in errors
    assert "ignored in" not in errors
    deadline = time.monotonic() + 20
    while is_running(workers[0]):
        assert time.monotonic() < deadline, "the worker outlives its program"
        time.sleep(0.1)


def is_running(pid):
    if Path("/proc/self/stat").exists():  # where there may be no ps
        stat = Path(f"/proc/{pid}/stat")
        state = stat.read_text().rpartition(")")[2].strip() if stat.exists() else ""
    else:
        state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_the_data_room_starts_no_jax_device(folder):
    program = f"""
import os
os.environ["JAX_PLATFORMS"] = "no such platform"
from biomamba_jax.data.pipeline import TrainIterator
from biomamba_jax.data.shards import open_split
documents = open_split({os.fspath(folder)!r}, "train")[1]
with TrainIterator(documents, sequence_length=32, batch_size=4, seed=5) as batches:
    next(batches)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_padded_rows_are_a_document_each_with_padding_as_targets(folder):
    documents = open_split(folder, "train")[1]
    padded = PaddedDocuments(documents, LENGTH)
    seen = set()
    with TrainIterator(padded, sequence_length=LENGTH, batch_size=BATCH, seed=5, window=WINDOW) as batches:
        for batch in itertools.islice(batches, len(documents) // BATCH):
            assert (batch["segment_ids"] == 1).all() and (batch["inputs"][:, 0] == 0).all()
            np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
            seen |= {tuple(row) for row in batch["targets"].tolist()}
    rows = [documents[index].ids.tolist()[:LENGTH] for index in range(len(documents))]
    assert seen == {(*row, *[0] * (LENGTH - len(row))) for row in rows}
