"""`prepare` interrupted, killed and started again: what was finished is used, and the shards are the same bytes."""

import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from corpora import SMALL, abstract, contents, documents, make_shards
from nlm_xml import article, deletions, write_set

from biomamba_jax.config import PrepareConfig
from biomamba_jax.data import build, encode, shards, work
from biomamba_jax.data.build import FileTask
from biomamba_jax.data.shards import ShardReader
from biomamba_jax.errors import UserError
from biomamba_jax.folders import lock_file


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[str]:
    """Six files with updates of one another, large enough to be interrupted in every step."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(1, 7):
        articles = [article(pmid, abstract((pmid, number))) for pmid in range(200 * number, 200 * number + 400)]
        write_set(folder / f"pubmed26n{number:04d}.xml.gz", *articles, deletions(200 * number + 7))
    return [str(path) for path in sorted(folder.iterdir())]


def start(inputs: list[str], output: Path | None, *options: str, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "biomamba_jax.prepare", "--input", *inputs, "--train-tokenizer", "300", *options]
        + (["--output", str(output)] if output else []),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
        **more,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_only_what_it_had_finished(many, tmp_path, number):
    process = start(many, tmp_path / "o", "--workers", "2")
    while not list(tmp_path.glob("o.partial/spools/*.json")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["o.partial"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_while_workers_start_is_an_interruption(many, tmp_path, number):
    """Terminals and schedulers signal workers too, which have not come to ignore it yet."""
    output = tmp_path / "shards"
    process = start(many[:4], output, "--workers", "2", start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 2:  # one is the resource tracker
        time.sleep(0.005)
    time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted")
    assert "Traceback" not in errors


def test_runs_killed_at_random_and_started_again_give_the_same_bytes(many, tmp_path):
    whole = tmp_path / "whole"
    assert start(many, whole, "--workers", "1").wait(60) == 0
    random_ = random.Random(1)
    for attempt in range(12):
        shuffled = random_.sample(many, len(many))
        process = start(shuffled, tmp_path / "o", "--workers", str(random_.randint(1, 3)))
        try:
            _, errors = process.communicate(timeout=1.0 + random_.random() * 0.6 if attempt < 11 else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if (tmp_path / "o").exists():  # also where the kill came after the shards' rename, before the process's end
            break
    if process.returncode != 0:
        assert start(many, tmp_path / "o").wait(60) == 1  # refused, and clears what the kill left
    assert contents(tmp_path / "o") == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"o", "whole"}


def test_what_a_run_killed_after_its_last_step_left_is_removed_by_the_next_start(many, tmp_path):
    with work.work_folder(tmp_path / "o") as folder:
        (folder.spools / "one.json").write_text("{}")
    shutil.copytree(tmp_path / "o", tmp_path / "o.partial")
    (tmp_path / "o" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="already exists"):
        make_shards(many, tmp_path / "o", settings=SMALL, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_finished_files_and_shards_are_not_done_again(many, tmp_path, monkeypatch):
    output, done = tmp_path / "o", []
    make_shards(many, tmp_path / "whole", settings=SMALL, workers=1)

    def stop_at(function, count):
        def stopping(task):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(task)
            return function(task)

        return stopping

    for name, count in (("spool_file", 4), ("write_shard", 2)):
        done.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(build, name, stop_at(getattr(build, name), count))
            make_shards(many, output, settings=SMALL, workers=1)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "o.partial").rglob("*.text")}
    kept |= {path: path.stat().st_mtime_ns for path in (tmp_path / "o.partial").rglob("*.array_record")}
    assert len(kept) == 6 + 2
    with monkeypatch.context() as patch:
        used: list[Path] = []
        link = os.link
        patch.setattr(shards.os, "link", lambda a, b: used.append(Path(a)) or link(a, b))
        make_shards(many, output, settings=SMALL, workers=1)
    assert {path for path in kept if path.suffix == ".array_record"} < set(used)
    assert contents(output) == contents(tmp_path / "whole")


def test_finished_shards_are_kept_when_the_last_step_fails(many, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"o: cannot be written \(No space left"):
        patch.setattr(build.Manifest, "save", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        make_shards(many, tmp_path / "o", settings=SMALL, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_documents", Mock(side_effect=AssertionError("a shard was written again")))
        make_shards(many, tmp_path / "o", settings=SMALL, workers=1)


def test_without_links_between_files_shards_are_moved(many, tmp_path, monkeypatch):
    make_shards(many, tmp_path / "whole", settings=SMALL, workers=1)
    monkeypatch.setattr(shards.os, "link", Mock(side_effect=PermissionError))
    make_shards(many, tmp_path / "o", settings=SMALL, workers=1)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_a_full_disk_ends_in_one_line_and_leaves_no_piece_of_a_shard(many, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            Path(path).touch()

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            raise RuntimeError("close() failed: No space left on device")

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"No space left on device\); free space or give another --output"):
        make_shards(many, tmp_path / "o", settings=SMALL, workers=1)
    assert not [path for path in tmp_path.rglob("shard-*") if path.is_file()]


def test_an_output_that_no_folder_can_replace_is_refused_before_any_work(many, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "o").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="o: is a link or a mount point"):
        make_shards(many, tmp_path / "o", settings=SMALL, workers=1)
    assert not (tmp_path / "o.partial").exists()


def test_a_missing_input_is_refused_before_the_others_are_read(many, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "spool_file", Mock(side_effect=AssertionError("a file was read")))
    with pytest.raises(UserError, match=r"missing\.xml: cannot be read"):
        make_shards([*many, str(tmp_path / "missing.xml")], tmp_path / "o", settings=SMALL, workers=1)


def test_a_tokenizer_trained_anew_in_the_same_place_is_the_one_that_is_used(many, tmp_path):
    given = dataclasses.replace(SMALL, train_tokenizer=None)
    for files in (many[:3], many[3:]):
        make_shards(files, tmp_path / "o", settings=SMALL, workers=1)
        make_shards(files, tmp_path / "by itself", tmp_path / "o" / "tokenizer.model", given, workers=1)
        for split in build.SPLITS:
            both = [ShardReader(tmp_path / name / split) for name in ("o", "by itself")]
            assert all(np.array_equal(a.ids, b.ids) for a, b in zip(*both, strict=True))
        shutil.rmtree(tmp_path / "o")
        shutil.rmtree(tmp_path / "by itself")


@pytest.mark.parametrize("damage", ["text", "json", "npy"])
def test_a_damaged_spool_is_made_again(many, tmp_path, damage):
    make_shards(many[:2], tmp_path / "before", settings=SMALL, workers=1, spools=tmp_path / "spools")
    for file in (tmp_path / "spools").glob(f"*.{damage}"):
        if damage == "text":
            os.truncate(file, file.stat().st_size // 2)
        elif damage == "json":
            file.write_text('{"sums": {}}')
        else:
            np.save(file, np.zeros(3))
    make_shards(many[:2], tmp_path / "after", settings=SMALL, workers=1, spools=tmp_path / "spools")
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


def stem(path: str, evaluation: str = "", **settings) -> str:
    return FileTask(Path(path), Path("spools"), PrepareConfig(**settings), evaluation).stem


@pytest.mark.parametrize(
    "settings",
    [
        {"min_abstract_characters": 60},
        {"languages": ["fre"]},
        {"near_duplicates": 0.8},
        {"evaluation": "ab"},
        {"text": "a"},
    ],
)
def test_a_spool_of_other_settings_is_not_used(many, settings):
    assert stem(many[0], **settings) != stem(many[0])


def test_a_spool_of_another_overlap_is_not_used_and_settings_of_later_steps_do_not_matter(many):
    assert stem(many[0], "ab", decontaminate_overlap=0.5) != stem(many[0], "ab")
    assert stem(many[0], decontaminate_overlap=0.5, seed=1, test_fraction=0.3) == stem(many[0])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_are_stored_in_two_bytes_if_all_of_the_vocabulary_fit(tmp_path, vocab_size, dtype):
    tokenizer = Mock(path=tmp_path / "tokenizer.json", sha256="ab", vocab_size=vocab_size)
    (task,) = encode.plan_shards([], {"train": []}, tokenizer, tmp_path)["train"]
    assert task.token_dtype == dtype


def test_a_file_that_changed_is_read_again(many, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    inputs = [str(shutil.copy2(path, folder)) for path in many[:2]]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "_train_tokenizer", Mock(side_effect=KeyboardInterrupt))
        patch.setattr(work.Work, "worth_keeping", True)
        make_shards(inputs, tmp_path / "o", settings=SMALL, workers=1)
    write_set(Path(inputs[1]), *(article(pmid, abstract(("mended", pmid))) for pmid in range(5000, 5300)))
    make_shards(inputs, tmp_path / "o", settings=SMALL, workers=1)
    assert {5000, 5299} <= documents(tmp_path / "o").keys()


def test_two_runs_into_one_output_are_refused(many, tmp_path):
    with work.work_folder(tmp_path / "o"), pytest.raises(UserError, match="another run uses it"):
        make_shards(many, tmp_path / "o", settings=SMALL, workers=1)


def test_machines_that_each_read_a_share_of_the_files_leave_the_rest_to_one_run(many, tmp_path, monkeypatch):
    """As in a job array: processes at the same time, one folder of spools, then one run over all files."""
    evaluation = tmp_path / "asked.txt"
    evaluation.write_text("one two three four five six seven eight nine ten eleven twelve\n")
    shared = ["--spools", str(tmp_path / "spools"), "--workers", "1", "--decontaminate", str(evaluation)]
    array = [start(many[share::2], None, *shared) for share in range(2)]
    for process in array:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    whole = make_shards(many, tmp_path / "whole", settings=SMALL, workers=1, decontaminate=[str(evaluation)])
    monkeypatch.setattr(build, "read_records", Mock(side_effect=AssertionError("a file was read again")))
    settings = dataclasses.replace(SMALL, decontaminate=[str(evaluation)])
    assert make_shards(many, tmp_path / "o", settings=settings, workers=1, spools=tmp_path / "spools") == whole
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")


def test_a_file_that_another_process_reads_into_the_same_spools_is_refused(many, tmp_path):
    task = FileTask(Path(many[0]), tmp_path, SMALL)
    with open(f"{task.stem}.text", "wb") as file:
        lock_file(file, task.path)
        with pytest.raises(UserError, match=r"n0001\.xml\.gz: another run uses it"):
            build.spool_file(task)


def test_spools_of_a_folder_of_their_own_serve_the_next_run_with_more_files(many, tmp_path, monkeypatch):
    make_shards(many[:4], tmp_path / "before", settings=SMALL, workers=1, spools=tmp_path / "spools")
    make_shards(many, tmp_path / "whole", settings=SMALL, workers=1)
    opened = Mock(side_effect=build.checksums)
    monkeypatch.setattr(build, "checksums", opened)
    make_shards(many, tmp_path / "after", settings=SMALL, workers=1, spools=tmp_path / "spools")
    assert [str(call.args[0]) for call in opened.call_args_list] == many[4:]
    assert contents(tmp_path / "after") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"before", "whole", "after", "spools"}
