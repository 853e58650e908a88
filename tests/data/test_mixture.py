"""Mixtures: shares in tokens over whole documents, resumed exactly, every document once in each epoch of its source."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from biomamba_jax.config import DataConfig
from biomamba_jax.config.data import MixtureConfig, SourceConfig
from biomamba_jax.data.mixture import MixedDocuments, MixedRowPlan, mixture_epoch_tokens, open_mixture
from biomamba_jax.data.pipeline import TrainIterator
from biomamba_jax.data.shards import Document, Manifest, TokenizerInfo, write_documents
from biomamba_jax.errors import UserError
from biomamba_jax.train.setup import epoch_tokens

LENGTH, BATCH, STEPS = 32, 4, 30
SIZES = {"pubmed": 80, "c4": 25, "wikipedia": 10}
WEIGHTS = {"pubmed": 8.0, "c4": 1.0, "wikipedia": 1.0}


class Lengths:
    """Documents that are nothing but lengths."""

    def __init__(self, lengths: np.ndarray):
        self.folder, self.lengths = "made up", lengths

    def __len__(self) -> int:
        return len(self.lengths)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of documents whose tokens tell the source: thousands digit 1, 2 or 3."""
    root, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for number, (name, documents) in enumerate(SIZES.items(), 1):
        ids = [[1000 * number + document] * random.integers(1, 60) for document in range(documents)]
        stored = (Document(np.array([*each, 0]), pmid, 1, 0, 5 * len(each)) for pmid, each in enumerate(ids))
        info = write_documents(root / name / "train", stored)
        tokenizer = TokenizerInfo("none", "ab", "none", 9_999, 0)
        Manifest(tokenizer, {"train": info}, {}, [{"name": name, "sha256": ""}], {}).save(root / name)
    return root


def mixture(folders, weights=WEIGHTS, unit="tokens") -> MixtureConfig:
    return MixtureConfig({name: SourceConfig(str(folders / name), weight) for name, weight in weights.items()}, unit)


def iterator(folders, mixed=None, **changes):
    documents = open_mixture(mixed or mixture(folders), tokenizer_sha256="ab")
    how = {"sequence_length": LENGTH, "batch_size": BATCH, "seed": 5, "window": 20}
    return TrainIterator(documents, **{**how, **changes})


def rows_of(batches) -> np.ndarray:
    return np.stack([np.concatenate([b[name] for b in batches]) for name in ("inputs", "targets", "segment_ids")])


@pytest.fixture(scope="module")
def expected(folders):
    with iterator(folders) as batches:
        return [next(batches) for _ in range(STEPS)]


def test_shares_of_ten_million_tokens_are_those_asked_for_within_half_a_percent():
    """With documents as long as those of PubMed, C4 and whole Wikipedia articles: up to 40,000 tokens."""
    random = np.random.default_rng(1)
    shapes = ((300, 0.5, 30_000), (480, 1.0, 3_000), (600, 1.1, 1_500))
    readers = [Lengths(np.ceil(random.lognormal(np.log(m), s, n)).astype(np.uint32)) for m, s, n in shapes]
    documents = MixedDocuments(mixture(Path()), readers)
    plan = MixedRowPlan(documents, 1024, seed=0)
    tokens, row = Counter(), 0
    while tokens.total() < 10_000_000:
        for piece in plan[row]:
            tokens[documents.source_of(piece.document)] += piece.stop - piece.start
        row += 1
    assert [tokens[i] / tokens.total() for i in range(3)] == pytest.approx([0.8, 0.1, 0.1], abs=0.005)
    assert tokens.total() / (row * 1024) > 0.995


def test_every_source_is_within_a_document_of_its_share_at_every_window(folders):
    documents = open_mixture(mixture(folders), tokenizer_sha256="ab")
    plan = MixedRowPlan(documents, LENGTH, seed=3, window=7)
    for window in range(1, 40):
        while plan.window_start(row := plan.next_window_row).window < window:
            plan[row]
        tokens = np.array(plan.drawn_before(window)[3:])
        assert np.abs(tokens - tokens.sum() * np.array([0.8, 0.1, 0.1])).max() <= 60 * 2


def test_a_mixture_by_documents_counts_documents(folders):
    mixed = mixture(folders, {"pubmed": 10.0, "c4": 1.0, "wikipedia": 1.0}, "documents")
    documents = open_mixture(mixed, tokenizer_sha256="ab")
    plan = MixedRowPlan(documents, LENGTH, seed=0, window=120)
    plan[plan.next_window_row]
    assert plan.drawn_before(1)[:3] == (100, 10, 10)


def test_each_epoch_of_a_source_holds_all_its_documents_in_another_order(folders):
    documents = open_mixture(mixture(folders), tokenizer_sha256="ab")
    plan = MixedRowPlan(documents, LENGTH, seed=0, window=50)
    order = [document for window in range(12) for document in plan._documents_of(window)[0].tolist()]
    for source, size in enumerate(SIZES.values()):
        own = [document - documents.first_of(source) for document in order if documents.source_of(document) == source]
        whole = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert len(whole) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) == len(whole)


def test_sources_of_equal_size_are_shuffled_differently(folders):
    mixed = MixtureConfig({name: SourceConfig(str(folders / "c4")) for name in "ab"}, "documents")
    documents = open_mixture(mixed, tokenizer_sha256="ab")
    plan = MixedRowPlan(documents, LENGTH, seed=0, window=20)
    plan[0]
    drawn = {piece.document for row in range(plan.next_window_row) for piece in plan[row]}
    first, second = (
        {d - documents.first_of(source) for d in drawn if documents.source_of(d) == source} for source in (0, 1)
    )
    assert len(first) == len(second) == 10
    assert first != second


def test_documents_stay_whole_and_their_sources_are_counted(folders, expected):
    with iterator(folders) as batches:
        counted = [next(batches) and dict(batches.tokens_by_source) for _ in range(STEPS)]
    targets, segments = rows_of(expected)[1:]
    found = Counter()
    for row, own in zip(targets, segments, strict=True):
        for segment in range(1, own.max() + 1):
            ids = row[own == segment]
            text = set(ids.tolist()) - {0}
            assert len(text) <= 1
            name = list(SIZES)[next(iter(text)) // 1000 - 1] if text else "unknown"
            found[name] += len(ids)
    assert found["unknown"] <= 20  # the last piece of a document of a whole row and an EOS
    last = counted[-1]
    assert sum(last.values()) == int((segments != 0).sum())
    assert all(abs(last[name] - found[name]) <= found["unknown"] for name in SIZES)


@pytest.mark.parametrize(("workers", "cuts"), [(0, range(0, STEPS, 4)), (2, [13])])
def test_stopping_and_going_on_gives_the_same_batches_and_counts(folders, expected, workers, cuts):
    with iterator(folders) as batches:
        for _ in range(STEPS):
            next(batches)
        total = batches.tokens_by_source
    for cut in cuts:
        with iterator(folders, num_workers=workers) as batches:
            before = [next(batches) for _ in range(cut)]
            state = json.loads(json.dumps(batches.get_state()))
        with iterator(folders, num_workers=workers) as batches:
            batches.set_state(state)
            after = [next(batches) for _ in range(STEPS - cut)]
            assert batches.tokens_by_source == total
        np.testing.assert_array_equal(rows_of(before + after), rows_of(expected))


def test_hosts_share_a_step_and_count_all_of_it(folders, expected):
    hosts = [iterator(folders, batch_size=BATCH // 2, process_index=i, process_count=2) for i in range(2)]
    for step in range(6):
        both = [next(host) for host in hosts]
        np.testing.assert_array_equal(np.concatenate([b["targets"] for b in both]), expected[step]["targets"])
    assert hosts[0].tokens_by_source == hosts[1].tokens_by_source
    for host in hosts:
        host.close()


def test_a_run_cannot_go_on_with_other_weights(folders):
    with iterator(folders) as batches:
        state = batches.get_state()
    other = mixture(folders, {**WEIGHTS, "c4": 2.0})
    with iterator(folders, other) as batches, pytest.raises(UserError, match=r"c4\.weight is 2\.0"):
        batches.set_state(state)


@pytest.mark.parametrize("names", [["c4", "pubmed", "wikipedia"], ["pubmed", "wikipedia"]])
def test_a_run_cannot_go_on_with_sources_in_another_order_or_fewer(folders, names):
    with iterator(folders) as batches:
        state = json.loads(json.dumps(batches.get_state()))
    other = mixture(folders, {name: WEIGHTS[name] for name in names})
    with iterator(folders, other) as batches, pytest.raises(UserError, match="mixture_sources is"):
        batches.set_state(state)


def test_a_source_of_another_tokenizer_is_refused(folders):
    with pytest.raises(UserError, match="made with tokenizer"):
        open_mixture(mixture(folders), tokenizer_sha256="cd")


def test_an_epoch_of_a_mixture_goes_through_its_main_source_once(folders):
    sources = {name: SourceConfig(str(folders / name), weight) for name, weight in WEIGHTS.items()}
    data = DataConfig(path=str(folders / "pubmed"), mixture=MixtureConfig(sources))
    manifest = Manifest.load(folders / "pubmed")
    assert epoch_tokens(data, manifest) == round(manifest.splits["train"].tokens / 0.8)
    assert epoch_tokens(DataConfig(path=data.path), manifest) == manifest.splits["train"].tokens


def test_an_epoch_of_the_published_mixture_has_a_tenth_as_many_documents_of_each_other_source(folders):
    mixed = MixtureConfig({name: SourceConfig(str(folders / name)) for name in SIZES}, preset="biomamba_v3")
    info = {name: Manifest.load(folders / name).splits["train"] for name in SIZES}
    others = sum(SIZES["pubmed"] / 10 * info[name].tokens / SIZES[name] for name in ("c4", "wikipedia"))
    assert mixture_epoch_tokens(mixed) == round(info["pubmed"].tokens + others)


def test_the_published_mixture_is_a_preset_by_document(folders):
    sources = {name: SourceConfig(str(folders / name)) for name in SIZES}
    found = MixtureConfig(sources, preset="biomamba_v3")
    weights = np.array(list(found.weights.values()))
    assert found.counts == "documents"
    assert (100 * weights / weights.sum()).round(1).tolist() == [83.3, 8.3, 8.3]
    with pytest.raises(UserError, match="biomamba_v3 needs"):
        MixtureConfig({"pubmed": sources["pubmed"]}, preset="biomamba_v3")
