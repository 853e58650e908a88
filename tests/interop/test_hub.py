"""Models by their names on the hub, on a stand-in server: download, resume, revision, offline, wrong name, push."""

import sys
from pathlib import Path

import pytest
from hub_server import files_of, serving
from tiny_models import train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.command_line import run_command
from biomamba_jax.convert import main as convert
from biomamba_jax.errors import UserError
from biomamba_jax.interop import dialect_of
from biomamba_jax.interop.hub import local_folder

NAME = "ba-lab/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder / "hf", "mamba2", train_tokenizer(folder), "hf")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which serves a model, as the only hub that a fresh huggingface_hub knows."""
    pytest.importorskip("huggingface_hub")
    with serving(NAME) as hub:
        hub.revisions = {"main": {"config.json": b'{"model_type": "mamba2"}', "model.safetensors": b"weights"}}
        fresh_client(monkeypatch, HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "cache"), HF_HUB_DISABLE_XET="1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def fresh_client(monkeypatch, **variables):
    """Make the client read its environment anew, which it does when it is imported."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for module in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)


def test_a_model_is_loaded_by_its_name_and_fetched_once(hub, exported):
    hub.revisions["main"] = files_of(exported)
    local_folder(NAME)
    fetched = len(hub.served)
    model, same = biomamba_jax.load(NAME), biomamba_jax.load(exported)
    assert model.logprobs("insulin in mice") == same.logprobs("insulin in mice")
    assert len(hub.served) == fetched


def test_a_revision_is_taken_and_not_the_newest(hub):
    hub.revisions["v1.0"] = dict(hub.revisions["main"], **{"config.json": b'{"model_type": "of v1.0"}'})
    assert (local_folder(f"{NAME}@v1.0") / "config.json").read_bytes() == b'{"model_type": "of v1.0"}'
    assert dialect_of(NAME) == "hf"
    assert (local_folder(NAME) / "config.json").read_bytes() == hub.revisions["main"]["config.json"]


def test_weights_that_only_torch_reads_are_fetched_where_there_are_no_others(hub):
    hub.revisions["both"] = hub.revisions["main"] | {"pytorch_model.bin": b"not needed"}
    assert not (local_folder(f"{NAME}@both") / "pytorch_model.bin").exists()
    hub.revisions["old"] = {"config.json": b"{}", "pytorch_model.bin": b"weights", "flax_model.msgpack": b"no"}
    assert sorted(files_of(local_folder(f"{NAME}@old"))) == ["config.json", "pytorch_model.bin"]


def test_a_download_that_broke_off_goes_on_where_it_was(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.revisions["large"] = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 400}
    hub.cut_after = 70_000
    with pytest.raises(UserError, match=f"{NAME}@large: no such folder, and not to be had from the hub"):
        local_folder(f"{NAME}@large")
    hub.cut_after = None
    folder = local_folder(f"{NAME}@large")
    assert (folder / "model.safetensors").read_bytes() == hub.revisions["large"]["model.safetensors"]
    assert "model.safetensors@70000" in hub.served


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_or_with_the_hub_out_of_reach_a_model_comes_from_the_cache(hub, monkeypatch, setting):
    folder = local_folder(NAME)
    fresh_client(monkeypatch, **setting)
    assert local_folder(NAME) == folder
    with pytest.raises(UserError, match=r"ba-lab/other: .*out of reach, and the model is not in the cache"):
        local_folder("ba-lab/other")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ba-lab/tinny", "the hub has no such model"), (f"{NAME}@v9", "the model has no such revision")],
)
def test_a_wrong_name_is_one_line(hub, name, reason, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run_command(convert, ["--input", name, "--output", str(tmp_path / "out")])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name}: no such folder, and not to be had from the hub: {reason}")


def test_a_path_is_never_asked_of_the_hub(hub, tmp_path):
    for path in (tmp_path / "missing", Path(NAME), "missing", "a/b/c", "./missing/model"):
        assert not local_folder(path).exists()
    assert not hub.served


def test_a_model_is_pushed_with_its_card_and_without_showing_the_token(hub, exported, tmp_path, monkeypatch, capsys):
    fresh_client(monkeypatch, HF_TOKEN="secret-token")
    out = tmp_path / "out"
    convert(["--input", str(exported), "--output", str(out), "--to", "mamba_ssm", "--push", NAME])
    assert hub.created[0].get("visibility") == "private" or hub.created[0].get("private") is True
    assert hub.pushed.keys() >= {"README.md", "config.json", "model.safetensors"}
    assert hub.pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert f'from_pretrained("{NAME}"' in hub.pushed["README.md"].decode()
    shown = "".join(capsys.readouterr())
    assert f"pushed: {hub.address}/{NAME}" in shown and "secret-token" not in shown


def test_a_push_that_nobody_may_do_is_refused_before_the_conversion(hub, exported, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--push ba-lab/tiny: you are not logged in to the hub"):
        convert(["--input", str(exported), "--output", str(out), "--push", NAME])
    assert not out.exists()


def test_a_push_that_the_hub_refuses_leaves_the_folder(hub, exported, tmp_path, monkeypatch):
    fresh_client(monkeypatch, HF_TOKEN="wrong-token")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--push ba-lab/tiny: .*out is written, but not pushed") as refusal:
        convert(["--input", str(exported), "--output", str(out), "--push", NAME])
    assert (out / "model.safetensors").exists() and "wrong-token" not in str(refusal.value)
