"""Fine-tuning: what is learnt of an example, that packing changes nothing, and that adapters learn and are kept."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from random_weights import random_weights
from tiny_models import CONFIGS, train_tokenizer

from biomamba_jax.config import CheckpointConfig, ExamplesConfig, FinetuneConfig, LoraConfig, LossConfig, TrainConfig
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotations import AnnotatedText
from biomamba_jax.data.examples import Example, encode_examples, encode_texts
from biomamba_jax.data.packing import Piece, fill_row
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model
from biomamba_jax.interop.adapters import fingerprint
from biomamba_jax.model import LanguageModel, lora
from biomamba_jax.parallel.sharding import leaves_by_path
from biomamba_jax.train import supervised
from biomamba_jax.train.metrics import read_metrics
from biomamba_jax.train.step import language_model_loss
from biomamba_jax.train.supervised import adapted, finetune, head_loss

EXAMPLES = [
    Example("the patients were given", " insulin", "insulin"),
    Example("serum glucose fell in", " mice", "mice"),
    Example("with type 2", " diabetes", "diabetes"),
    Example("the patients with type 2 diabetes were given insulin, and serum", " glucose", "glucose"),
    Example("in", " mice (p<0.05).", "mice"),
]
LABELS = ("diabetes", "glucose", "insulin", "mice")
LENGTH = 48
HEAD = HeadConfig("classifier", LABELS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def random_model(kind, tokenizer):
    config = dataclasses.replace(CONFIGS[kind], vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(random_weights(config), tokenizer_file=tokenizer.path)


@pytest.fixture(scope="module", params=list(CONFIGS))
def weights(request, tokenizer):
    return random_model(request.param, tokenizer)


@pytest.fixture(scope="module")
def mamba1(tokenizer):
    return random_model("mamba1", tokenizer)


@pytest.fixture(scope="module")
def run_of_adapters(mamba1, tokenizer, tmp_path_factory):
    """A run directory and its config."""
    config = config_of(mamba1, tmp_path_factory.mktemp("adapters"), lora=LoraConfig(rank=2, targets=["_proj"]))
    assert finetune(config, mamba1, encoded(tokenizer), encoded(tokenizer))
    return config


def graph_of(config):
    return nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def model_of(weights):
    return nnx.merge(graph_of(weights.config), jax.tree.map(jnp.asarray, weights.params))


def padded(ids):
    """A row of one length for all texts, which is one program: what follows a text does not reach it."""
    return np.pad(np.array([ids], np.int32), ((0, 0), (0, LENGTH - len(ids))))


def batch_of(examples, *rows):
    """Rows that hold the examples of these numbers."""

    def read(index):
        return examples[index].inputs, examples[index].targets

    filled = [fill_row([Piece(i, 0, len(examples[i].inputs)) for i in row], LENGTH, read) for row in rows]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}


def encoded(tokenizer, labels=()):
    if not labels:
        return encode_examples(EXAMPLES, tokenizer, LENGTH, source="made-up")
    texts = [AnnotatedText(each.key, each.prompt, labels=(each.label,)) for each in EXAMPLES]
    return encode_texts(texts, tokenizer, LENGTH, HEAD, source="made-up")


# --- The loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_answers_tokens_and_of_the_end(weights, tokenizer):
    """Each example by itself, as a model is used: prompt in, log probabilities of the answer's tokens and EOS out."""
    model, by_hand, count = jax.jit(lambda ids: model_of(weights)(ids)[0]), 0.0, 0
    for example in EXAMPLES:
        prompt, answer = tokenizer.encode_batch([example.prompt, example.answer])
        whole = [tokenizer.eos_id, *prompt, *answer, tokenizer.eos_id]
        logits = np.asarray(model(padded(whole[:-1]))[0, : len(whole) - 1, : tokenizer.vocab_size], np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        for place in range(len(prompt), len(whole) - 1):
            by_hand -= logprobs[place, whole[place + 1]]
            count += 1
    loss = language_model_loss(graph_of(weights.config), LossConfig())
    _, sums = jax.jit(loss)(weights.params, batch_of(encoded(tokenizer), [0, 1, 2], [3, 4]))
    assert sums.weight == count
    np.testing.assert_allclose(sums.nll, by_hand, rtol=1e-5)


def test_a_classifiers_loss_is_that_of_the_class_after_the_last_token(weights, tokenizer):
    random = np.random.default_rng(0)
    head = {"weight": random.standard_normal((4, 32), np.float32), "bias": random.standard_normal(4, np.float32)}
    params = weights.params | {"head": head}
    model, by_hand = jax.jit(lambda ids: model_of(weights).hidden(ids)[0]), 0.0
    for example in EXAMPLES:
        [prompt] = tokenizer.encode_batch([example.prompt])
        state = np.asarray(model(padded([tokenizer.eos_id, *prompt]))[0, len(prompt)], np.float64)
        scores = head["weight"].astype(np.float64) @ state + head["bias"]
        by_hand += np.log(np.exp(scores).sum()) - scores[LABELS.index(example.label)]
    _, sums = jax.jit(head_loss(graph_of(weights.config), HEAD, LossConfig()))(
        params, batch_of(encoded(tokenizer, LABELS), [0, 1, 2], [3, 4])
    )
    assert sums.weight == len(EXAMPLES)
    np.testing.assert_allclose(sums.nll, by_hand, rtol=1e-5)


def test_packed_examples_give_the_loss_and_gradients_of_examples_one_by_one(weights, tokenizer):
    loss, examples = language_model_loss(graph_of(weights.config), LossConfig()), encoded(tokenizer)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (packed, _), packed_gradient = gradient(weights.params, batch_of(examples, [0, 1, 2], [3, 4]))
    single = jax.device_get([gradient(weights.params, batch_of(examples, [i], [])) for i in range(len(EXAMPLES))])
    np.testing.assert_allclose(packed, sum(value for (value, _), _ in single), rtol=1e-5)
    summed = jax.tree.map(lambda *parts: sum(parts), *(part for _, part in single))
    for ours, theirs in zip(*map(jax.tree.leaves, (packed_gradient, summed)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-3)


# --- Adapters --------------------------------------------------------------------------------------------------------


def test_every_adapter_has_a_gradient_once_b_has_moved(weights, tokenizer):
    config = LoraConfig(rank=2, targets=["_proj"])
    adapters = lora.init_adapters(weights.params, config.targets, config.rank, jax.random.key(0))
    gradient = jax.jit(
        jax.grad(adapted(language_model_loss(graph_of(weights.config), LossConfig()), config), has_aux=True)
    )
    batch = batch_of(encoded(tokenizer), [0, 1, 2], [3, 4])
    for moved in (False, True):  # A has none while B is zero, B has one from the start
        found, _ = gradient(adapters, batch, weights.params)
        for path, values in leaves_by_path(found).items():
            norms = np.linalg.norm(np.asarray(values).reshape(values.shape[0], -1), axis=-1)
            assert np.all(norms > 0) == (moved or path.endswith("b")), path
        adapters = jax.tree.map(lambda x, g: x - 0.01 * g, adapters, found)


def test_an_adapter_counts_alpha_over_rank_times(weights, tokenizer):
    config = LoraConfig(rank=2, alpha=8.0, targets=["out_proj"])
    random = np.random.default_rng(0)
    adapters = lora.init_adapters(weights.params, config.targets, config.rank, jax.random.key(0))
    adapters = jax.tree.map(lambda x: 0.1 * random.standard_normal(x.shape).astype(np.float32), adapters)
    plain, batch = language_model_loss(graph_of(weights.config), LossConfig()), batch_of(encoded(tokenizer), [0, 1])
    mixer = weights.params["layers"]["mixer"]
    pair = adapters["layers"]["mixer"]["out"]["kernel"]
    kernel = mixer["out"]["kernel"] + 4 * pair["a"] @ pair["b"]
    by_hand = weights.params | {"layers": weights.params["layers"] | {"mixer": mixer | {"out": {"kernel": kernel}}}}
    found, _ = jax.jit(adapted(plain, config))(adapters, batch, weights.params)
    np.testing.assert_allclose(found, jax.jit(plain)(by_hand, batch)[0], rtol=1e-5)


def config_of(weights, folder, **changes):
    return FinetuneConfig(
        **{
            "run_dir": str(folder),
            "init_from": "base",
            "model": weights.config,
            "data": ExamplesConfig(files=["none"], sequence_length=LENGTH, batch_size=2),
            "train": TrainConfig(steps=6, eval_every=2, log_every=2),
            "checkpoint": CheckpointConfig(every=3, keep_best=True),
            "tensorboard": False,
        }
        | changes
    )


def test_checkpoints_hold_adapters_alone_and_name_the_weights_they_belong_to(mamba1, run_of_adapters):
    with ocp.CheckpointManager(Path(run_of_adapters.run_dir).absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        saved = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), loop=ocp.args.JsonRestore())
        )
    paths = leaves_by_path(saved["state"]["params"])
    assert len(paths) == 2 * len("in_x in_z x_proj dt_proj out".split())
    assert all(path.endswith(("/kernel/a", "/kernel/b")) for path in paths)
    of_model = sum(x.size for x in jax.tree.leaves(mamba1.params))
    assert sum(x.size for x in jax.tree.leaves(saved["state"])) < 0.5 * of_model  # both moments included
    assert saved["loop"]["base_sha256"] == fingerprint(mamba1.params)


def test_a_run_goes_on_only_with_the_weights_it_began_with(mamba1, tokenizer, run_of_adapters):
    other = dataclasses.replace(mamba1, params=mamba1.params | {"embedding": mamba1.params["embedding"] * 1.01})
    longer = dataclasses.replace(run_of_adapters, train=dataclasses.replace(run_of_adapters.train, steps=8))
    with pytest.raises(UserError, match="was started with base_sha256"):
        finetune(longer, other, encoded(tokenizer), encoded(tokenizer))


def test_an_adapter_that_nothing_depends_on_ends_the_run(mamba1, tokenizer, tmp_path, monkeypatch):
    """As where a fused kernel reads the output projection itself: out is merged, then put back."""

    def past_the_adapter(params, trained, scale):
        merged = lora.merge(params, trained, scale)
        merged["layers"]["mixer"]["out"] = params["layers"]["mixer"]["out"]
        return merged

    monkeypatch.setattr(supervised, "merge", past_the_adapter)
    examples = encoded(tokenizer)
    message = r"no gradient has reached layers/mixer/out/kernel/a \(layers 0, 1\); layers/mixer/out/kernel/b .* 3 steps"
    with pytest.raises(UserError, match=message):
        finetune(config_of(mamba1, tmp_path, lora=LoraConfig(rank=2)), mamba1, examples, examples)


# --- Early stopping --------------------------------------------------------------------------------------------------


def test_a_run_stops_when_the_development_split_gets_no_better_and_keeps_the_best_weights(mamba1, tokenizer, tmp_path):
    train = encode_examples(EXAMPLES[:2], tokenizer, LENGTH, source="made-up")
    development = encode_examples(EXAMPLES[2:], tokenizer, LENGTH, source="made-up")
    config = config_of(mamba1, tmp_path, train=TrainConfig(steps=400, eval_every=4, patience=2))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-2))
    assert finetune(config, mamba1, train, development)
    lines = [line for line in read_metrics(tmp_path) if line["split"] == "validation"]
    best = min(lines, key=lambda line: line["loss"])
    assert lines[-1]["step"] < 400 and lines.index(best) == len(lines) - 3
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert {best["step"], lines[-1]["step"]} <= steps

    exported = read_model(tmp_path)
    assert exported.about["steps"] == best["step"]
    loss = jax.jit(language_model_loss(graph_of(mamba1.config), LossConfig()))
    _, sums = loss(exported.params, batch_of(development, [0, 1], [2]))
    np.testing.assert_allclose(sums.nll / sums.weight, best["loss"], rtol=1e-5)
    before = json.dumps(lines)
    finetune(config, mamba1, train, development)  # an ended run is left as it is
    assert json.dumps([line for line in read_metrics(tmp_path) if line["split"] == "validation"]) == before
