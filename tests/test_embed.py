"""The embed command: parts written whole and continued, in every format; search; training and what it brings."""

import json

import numpy as np
import pytest
from tiny_models import WORDS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.embed import main
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.vectors import EmbeddingFolder, Part

TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 5 + i % 7)) for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("embed")
    tokenizer = train_tokenizer(path)
    write_tiny_model(path / "model", "mamba2", tokenizer, spread=1)
    write_tiny_model(path / "other", "mamba1", tokenizer, spread=1)
    lines = [{"text": text, "name": f"text {i}"} for i, text in enumerate(TEXTS)] + [{"text": "", "name": "nothing"}]
    (path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(folder, output, *words, model="model"):
    given = ["--model", str(folder / model), "--input", str(folder / "texts.jsonl"), "--id", "name", "--title", "name"]
    main([*given, "--part-size", "4", "--output", str(output), *words])
    return EmbeddingFolder.open(output)


@pytest.fixture(scope="module")
def vectors(folder):
    return biomamba_jax.load(folder / "model").embed([f"text {i}\n{text}" for i, text in enumerate(TEXTS)])


@pytest.mark.parametrize("format", ["parquet", "npy", "jsonl"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_every_format_gives_back_ids_titles_and_embeddings(folder, tmp_path, vectors, format, precision, capsys):
    stored, about = run(folder, tmp_path / "out", "--format", format, "--precision", precision)
    parts = [stored.read(number) for number in range(3)]
    assert [len(part.ids) for part in parts] == about["parts"] == [4, 4, 2]
    assert [key for part in parts for key in part.ids] == [f"text {i}" for i in range(10)]
    assert parts[2].titles == ["text 8", "text 9"]
    found = np.concatenate([part.vectors for part in parts])
    assert format == "jsonl" or found.dtype == precision
    np.testing.assert_allclose(found, vectors, atol=1e-5 if precision == "float32" else 2e-3)
    assert about["left_out"] == {"no_abstract": 1}
    assert "no_abstract" in capsys.readouterr().out


def test_an_interrupted_run_continues_with_the_parts_that_are_missing(folder, tmp_path):
    output = tmp_path / "out"
    run(folder, output)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.glob("part-*")}
    (output / "part-00001.parquet").unlink()
    about = json.loads((output / "embed.json").read_text())
    (output / "SHA256SUMS").unlink()  # which is written last
    (output / "embed.json").write_text(json.dumps({key: about[key] for key in ("model", "settings", "probe")}))
    with pytest.raises(UserError, match="not complete"):
        EmbeddingFolder.open(output)
    run(folder, output)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.glob("part-*")}
    assert [name for name in after if after[name][0] != before[name][0]] == ["part-00001.parquet"]
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in before.items()}


@pytest.mark.parametrize(
    ("words", "model", "named"),
    [(("--pooling", "last"), "model", "pooling"), (("--normalize",), "model", "normalize"), ((), "other", "weights")],
)
def test_a_folder_of_other_embeddings_is_refused(folder, tmp_path, words, model, named):
    run(folder, tmp_path / "out")
    with pytest.raises(UserError, match=named):
        run(folder, tmp_path / "out", *words, model=model)
    assert (tmp_path / "out" / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("embed.json", '{"model": "m", "settings": {"format": "parquet"}, "probe": [], "parts": []}'),
        ("embed.json", '{"model": "m", "settings": [], "probe": [1.0], "parts": [1]}'),
        ("part-00001.jsonl", '{"id": "a", "title": "b"}\n'),
        ("part-00001.jsonl", '{"id": "a", "title": "b", "embedding": [1, "x"]}\n'),
    ],
)
def test_a_damaged_file_of_embeddings_is_named(folder, tmp_path, file, content):
    run(folder, tmp_path / "out", "--format", "jsonl")
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(UserError, match=file):
        EmbeddingFolder.open(tmp_path / "out")[0].read(1)


def test_normalized_embeddings_have_norm_1(folder, tmp_path, vectors):
    stored, _ = run(folder, tmp_path / "out", "--normalize")
    found = np.concatenate([stored.read(number).vectors for number in range(3)])
    np.testing.assert_allclose(found, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), atol=1e-5)


def test_what_overflows_float16_is_refused():
    with pytest.raises(UserError, match="overflows"):
        Part.of([], np.array([[7e4]], np.float32), "float16")


def test_records_of_pubmed_keep_their_pmids_and_those_without_abstract_are_counted(folder, shared_data, tmp_path):
    path = shared_data / "pubmed_xml" / "pubmed_sample_versions_deletes.xml"
    main(["--model", str(folder / "model"), "--input", str(path), "--output", str(tmp_path / "out")])
    stored, about = EmbeddingFolder.open(tmp_path / "out")
    part = stored.read(0)
    assert about["texts"] + sum(about["left_out"].values()) == 7
    assert all(key.isdecimal() for key in part.ids)


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("index")
    run(folder, output, "--index", "exact")
    return output


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_search_finds_a_text_by_itself_first_and_orders_by_cosine(folder, index, vectors, tmp_path, kind, capsys):
    run(folder, index, "--index", kind)
    capsys.readouterr()
    main(["search", f"text 6\n{TEXTS[6]}", "--index", str(index), "--k", "3"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "text" in line and "0" in line]
    shown = [(float(words[1]), int(words[4])) for words in lines if words[0] == "│"]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units[6]
    assert [row for _, row in shown] == np.argsort(-cosines)[:3].tolist()
    np.testing.assert_allclose([score for score, _ in shown], np.sort(cosines)[::-1][:3], atol=1e-4)


def test_search_with_another_model_or_without_an_index_is_refused(folder, index, tmp_path):
    with pytest.raises(UserError, match="is not the model"):
        main(["search", "insulin", "--index", str(index), "--model", str(folder / "other")])
    run(folder, tmp_path / "plain")
    with pytest.raises(UserError, match="--index exact"):
        main(["search", "insulin", "--index", str(tmp_path / "plain")])


@pytest.mark.parametrize("name", ["index.faiss", "part-00000.npy", "part-00000.jsonl"])
def test_a_flipped_byte_is_noticed_by_a_search_and_by_the_next_run(folder, tmp_path, name):
    words = ["--index", "exact", "--format", "npy"]
    run(folder, tmp_path / "out", *words)
    run(folder, tmp_path / "out", *words)  # a finished one is left whole
    content = bytearray((tmp_path / "out" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: is damaged .*; remove it, or .* and run `embed` again"):
        main(["search", "insulin", "--index", str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"{name}: is damaged"):
        run(folder, tmp_path / "out", *words)
    (tmp_path / "out" / name).unlink()
    run(folder, tmp_path / "out", *words)


def test_training_on_json_lines_raises_retrieval_of_the_same_pairs(tmp_path, capsys):
    write_tiny_model(tmp_path / "model", "mamba2", train_tokenizer(tmp_path), spread=1)
    draw = np.random.default_rng(0)
    lines = [{"q": " ".join(draw.choice(WORDS, 3)), "d": " ".join(draw.choice(WORDS, 8))} for _ in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"d": "alone"}]))
    pairs = str(tmp_path / "pairs.jsonl")
    keys = f"--data.input {pairs} --data.title q --data.text d --data.sequence_length 128 --data.batch_size 8"
    length = "--train.steps 24 --train.eval_every 24 --optimizer.learning_rate 5e-3 --tensorboard false"
    run = f"--init_from {tmp_path / 'model'} --run_dir {tmp_path / 'run'} --data.development_fraction 0.2"
    main(["train", *f"{run} {keys} {length}".split()])
    assert "left out: 1 of one line" in capsys.readouterr().out
    models = f"--models.before {tmp_path / 'model'} --models.after {tmp_path / 'run'} --lexical"
    output = tmp_path / "retrieval.json"
    main(["retrieval", *f"{models} --input {pairs} --title q --text d --output {output}".split()])
    found = json.loads(output.read_text())
    assert (found["texts"], found["left_out"], list(found["models"])) == (
        24,
        {"of one line": 1},
        ["before", "after", "BM25"],
    )
    before, after = (found["models"][name]["mrr"]["value"] for name in ("before", "after"))
    assert after > before + 0.2
    assert f"{after:.3f}" in capsys.readouterr().out
