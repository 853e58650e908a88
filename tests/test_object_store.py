"""Folders on an object store, a stand-in on loopback: shards and models are read through copies in the cache folder."""

import dataclasses
import importlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from bucket_server import serving
from synthetic import write_shards
from tiny_models import train_tokenizer, write_tiny_model

from biomamba_jax import object_store
from biomamba_jax.config import DataConfig, PretrainConfig
from biomamba_jax.config.prepare import InspectConfig
from biomamba_jax.data.inspection import inspect
from biomamba_jax.data.shards import Manifest, TokenizerInfo, open_split
from biomamba_jax.errors import UserError
from biomamba_jax.interop import dialect_of, read_model
from biomamba_jax.object_store import local_copy
from biomamba_jax.pretrain import fetch_shards, with_initial_weights, write_baselines
from biomamba_jax.pretrain import main as pretrain
from biomamba_jax.tasks.documents import read_documents
from biomamba_jax.train.setup import training_documents

URL = "gs://corpora/pubmed/shards"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    """A folder of shards of that tokenizer, with two splits."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), vocab_size=tokenizer.vocab_size, documents=40)
    file = tokenizer.save_to(folder).name
    about = TokenizerInfo(tokenizer.name, tokenizer.sha256, file, tokenizer.vocab_size, tokenizer.eos_id)
    dataclasses.replace(Manifest.load(folder), tokenizer=about).save(folder)
    return folder


@pytest.fixture
def bucket(monkeypatch, tmp_path, shards):
    """The stand-in with these shards, as the only store that is in reach, and an empty cache folder."""
    with serving("corpora") as bucket:
        bucket.upload(shards, "pubmed/shards")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.address)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        monkeypatch.setenv("BIOMAMBA_CACHE", str(tmp_path / "cache"))
        new_start()
        yield bucket
    new_start()


def new_start():
    """Forget what this process has seen of the store."""
    object_store._listed.cache_clear()


def refusal(url):
    """The one line with which a URL is refused."""
    with pytest.raises(UserError) as error:
        local_copy(url)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_split_is_read_from_a_bucket_and_fetched_once_without_the_others(bucket, shards):
    for _ in range(2):
        new_start()
        manifest, reader = open_split(URL, "train")
        assert [d.ids.tolist() for d in reader] == [d.ids.tolist() for d in open_split(shards, "train")[1]]
        assert manifest == Manifest.load(shards)
    assert sorted(bucket.served) == sorted(set(bucket.served))
    assert not any("validation" in name for name in bucket.served)


def test_a_held_out_split_is_evaluated_and_inspected_without_the_training_text(bucket):
    left_out = Counter()
    texts = [*read_documents([URL], "validation", left_out)]
    assert len(texts) + left_out.total() == 4
    found = inspect(InspectConfig(path=URL, split="validation"))
    assert found.name == URL and len(found.lengths) == 4
    assert not any("train" in name for name in bucket.served)


def test_a_replaced_file_is_fetched_alone_and_a_run_keeps_what_it_reads(bucket):
    bucket.put("pubmed/shards/notes.txt", b"first")
    before = local_copy(URL)
    new_start()
    bucket.served.clear()
    bucket.put("pubmed/shards/notes.txt", b"other")
    del bucket.objects["pubmed/shards/validation/lengths.npy"]
    after = local_copy(URL)
    assert bucket.served == ["pubmed/shards/notes.txt"]
    assert (before / "notes.txt").read_text() == "first" and (after / "notes.txt").read_text() == "other"
    assert (before / "validation/lengths.npy").exists() and not (after / "validation/lengths.npy").exists()


def test_a_copy_that_was_cut_is_fetched_again(bucket, shards):
    copy = local_copy(URL)
    (copy / "manifest.json").write_text("{")
    new_start()
    assert Manifest.load(URL) == Manifest.load(shards)


def test_a_process_sees_one_state_of_a_folder(bucket):
    copy = local_copy(URL, "")
    bucket.put("pubmed/shards/manifest.json", b"{}")
    assert local_copy(URL) == copy and Manifest.load(URL)


def test_processes_that_start_together_fetch_each_file_once(bucket):
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: local_copy(URL), range(4)))) == 1
    assert len(bucket.served) == len(set(bucket.served)) == len(bucket.objects)


def test_a_download_that_ends_early_is_refused_and_goes_on_with_the_files_that_lack(bucket):
    bucket.objects = {f"many/{i:02}": (b"x" * 10, 1) for i in range(9)} | {"many/large": (b"x" * 5000, 1)}
    bucket.cut_after = 1000
    assert refusal("gs://corpora/many").endswith("1,000 of the 5,000 bytes of corpora/many/large arrived; try again")
    bucket.cut_after = None
    bucket.served.clear()
    assert (local_copy("gs://corpora/many") / "large").stat().st_size == 5000
    assert sorted(bucket.served) == ["many/08", "many/large"]


def test_a_file_that_is_replaced_while_it_is_fetched_is_never_taken_for_the_earlier_one(bucket):
    bucket.put("one/a", b"early")
    bucket.before_download = lambda name: bucket.put(name, b"later")
    assert refusal("gs://corpora/one").endswith("corpora/one/a was replaced meanwhile; start again")
    bucket.before_download = lambda name: None
    for _ in range(2):
        new_start()
        assert (local_copy("gs://corpora/one") / "a").read_bytes() == b"later"


def test_a_model_of_a_bucket_is_read_and_a_damaged_one_refused(bucket, tokenizer, tmp_path):
    model = write_tiny_model(tmp_path / "model", "mamba2", tokenizer, "hf")
    bucket.upload(model, "model")
    assert dialect_of("gs://corpora/model") == "hf"
    jax.tree.map(np.testing.assert_array_equal, read_model("gs://corpora/model").params, read_model(model).params)
    weights = bytearray(bucket.objects["model/model.safetensors"][0])
    weights[-1] ^= 1
    bucket.put("model/model.safetensors", bytes(weights))
    new_start()
    with pytest.raises(UserError, match=r"model.safetensors: is damaged \(its sha256 is not the one in SHA256SUMS\)"):
        read_model("gs://corpora/model")


def test_what_a_run_reads_is_fetched_before_it_meets_other_hosts(bucket, tokenizer, tmp_path):
    bucket.upload(write_tiny_model(tmp_path / "model", "mamba2", tokenizer), "model")
    config = PretrainConfig(data=DataConfig(path=URL), init_from="gs://corpora/model", run_dir=str(tmp_path / "run"))
    fetch_shards(config)
    bucket.served.clear()
    write_baselines(config)
    started, params = with_initial_weights(config)
    assert len(training_documents(started.data, Manifest.load(URL))) == 40
    assert started.data.path == URL and started.model.vocab_size == tokenizer.vocab_size
    jax.tree.map(np.testing.assert_array_equal, params, read_model(tmp_path / "model").params)
    assert all(name.startswith("model/") for name in bucket.served)


@pytest.mark.long
def test_a_run_trains_on_a_bucket_and_names_it_in_its_config(bucket, tokenizer, tmp_path):
    bucket.upload(write_tiny_model(tmp_path / "model", "mamba2", tokenizer), "model")
    words = ["--data.path", URL, "--init_from", "gs://corpora/model", "--run_dir", str(tmp_path / "run")]
    words += ["--data.sequence_length=32", "--data.batch_size=2", "--data.num_workers=0", "--train.steps=1"]
    for _ in range(2):  # the second start finds the run complete
        new_start()
        pretrain(words)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["path"] == URL
    assert (tmp_path / "run/checkpoints/1").is_dir()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://corpora/other", "gs://corpora/other: no such folder, or no such bucket; check the name"),
        ("gs://corpora/pubmed/shards/manifest.json", "no such folder"),
        ("gs://other/shards", "no such folder, or no such bucket"),
        ("gss://corpora/shards", "cannot be fetched: Protocol not known: gss"),
    ],
)
def test_a_wrong_name_is_one_line(bucket, url, message):
    assert message in refusal(url)


def test_a_store_that_refuses_is_one_line_with_the_remedy(bucket):
    bucket.forbidden = True
    assert "Anonymous caller does not have storage.objects.list access" in refusal(URL)
    assert refusal(URL).endswith("log in with `gcloud auth application-default login`")


def test_a_store_out_of_reach_is_one_line(bucket, monkeypatch):
    async def at_once(seconds):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=at_once))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    assert refusal(URL).startswith(f"{URL}: cannot be fetched: Cannot connect to host 127.0.0.1:9")


@pytest.mark.parametrize("library", ["fsspec", "gcsfs"])
def test_a_missing_library_names_the_extra(monkeypatch, library):
    monkeypatch.setattr(importlib.import_module("fsspec.registry"), "registry", {})
    monkeypatch.setitem(sys.modules, library, None)
    assert refusal("gs://another/folder").endswith("for gs:// pip install 'biomamba-jax[gcs]'")


def test_a_name_that_leads_out_of_the_folder_is_refused(bucket, tmp_path):
    bucket.put("one/../../../escaped", b"")
    assert "holds '../../../escaped', which is not the path of a file below it" in refusal("gs://corpora/one")


def test_what_does_not_fit_is_refused_before_it_is_fetched(bucket, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    assert "free space or set BIOMAMBA_CACHE" in refusal(URL)
    assert not bucket.served
