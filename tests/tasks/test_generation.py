"""What generation promises: the model's own likeliest tokens, no leaks between rows, and an end where it should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx
from random_weights import random_weights
from tiny_models import CONFIGS, train_tokenizer

from biomamba_jax.config.generate import Sampling
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model import LanguageModel
from biomamba_jax.model.decode import InferenceModel, WeightMatrix
from biomamba_jax.tasks.generation import Detokenizer, Generator, prefill
from biomamba_jax.tasks.padding import bucket_length, pad_left

RAGGED = [[5, 9, 200, 31], [7], list(range(3, 40)), [11, 11, 11, 12, 13, 14], [300, 2]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def models(request):
    """The same weights as a `LanguageModel` and laid out for inference; the head has rows that are padding."""
    config = dataclasses.replace(CONFIGS[request.param], vocab_size=310)
    params = random_weights(config).params
    params["norm_f"]["weight"] *= 8
    params["lm_head"][310:] *= 10  # were it not for the rules, padding would be the likeliest
    graph, _ = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params)), InferenceModel.from_params(config, params)


@pytest.fixture(scope="module")
def generator(models, tokenizer):
    return Generator(models[1], tokenizer)


def assert_close(got, want):
    """Within float32's rounding: 1e-5 of the largest value."""
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= 1e-5 * np.abs(np.asarray(want)).max()


def test_layers_laid_apart_give_the_logits_of_the_stacked_model(models):
    stacked, apart = models
    tokens = jnp.array([RAGGED[2]])
    expected, state = nnx.jit(lambda model: model(tokens))(stacked)
    hidden, states = jax.jit(lambda model: model.hidden(tokens))(apart)
    assert_close(apart.logits(hidden), expected)
    for index, layer in enumerate(states):
        for ours, theirs in zip(jax.tree.leaves(layer), jax.tree.leaves(state.layers), strict=True):
            assert_close(ours, theirs[index])


def test_int8_weights_give_the_logits_and_the_text_of_the_weights_that_they_stand_for(models):
    int8 = InferenceModel.from_params(models[1].config, nnx.to_pure_dict(nnx.state(models[0])), "int8")

    def stand_in(weight):
        return WeightMatrix(weight.dense("float32")) if isinstance(weight, WeightMatrix) else weight

    dense = jax.tree.map(stand_in, int8, is_leaf=lambda x: isinstance(x, WeightMatrix))
    dense = dataclasses.replace(dense, weight_dtype=jnp.dtype("float32"))
    assert int8.dtype == dense.dtype and int8.parameters == dense.parameters
    assert_close(*(prefill(model, *pad_left(RAGGED))[0] for model in (int8, dense)))
    by_xla = dataclasses.replace(int8, config=dataclasses.replace(int8.config, kernels=False))
    sampling = Sampling(max_new_tokens=24)
    text = Generator(dense).decode(RAGGED, sampling)
    assert Generator(int8).decode(RAGGED, sampling) == text == Generator(by_xla).decode(RAGGED, sampling)


@nnx.jit
def forward(model, tokens):
    return model(tokens)[0]


def logits_alone(model, text):
    """Logits after each token of one text; what fills its row comes after it."""
    return forward(model, np.pad([text], ((0, 0), (0, 64 - len(text)))))[0, : len(text)]


def test_greedy_text_is_the_argmax_of_full_forward_passes(models, generator):
    for prompt, new in zip(RAGGED, generator.decode(RAGGED, Sampling(max_new_tokens=24)), strict=True):
        logits = logits_alone(models[0], [*prompt, *new])[len(prompt) - 1 : -1, :310]
        assert np.argmax(logits, -1).tolist() == new


def test_a_ragged_batch_gives_the_logits_of_each_prompt_alone(models):
    together, _ = prefill(models[1], *pad_left(RAGGED))
    for row, prompt in enumerate(RAGGED):
        assert_close(together[row], logits_alone(models[0], prompt)[-1])


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.5}])
def test_a_prompt_s_text_does_not_depend_on_the_prompts_beside_it(generator, settings):
    sampling = Sampling(max_new_tokens=24, **settings)
    together = generator.decode(RAGGED, sampling)
    assert [generator.decode([prompt], sampling)[0] for prompt in RAGGED] == together


def test_draws_repeat_with_the_seed_and_differ_between_seeds_and_repeats_of_a_prompt(generator):
    def texts(seed):
        sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=seed)
        return [result.tokens for result in generator(["insulin", "glucose", "insulin"], sampling, batch_size=2)]

    first = texts(0)
    assert first == texts(0)
    assert first != texts(1)
    assert first[0] != first[2]


def test_ids_that_stand_for_nothing_are_never_generated(generator):
    for temperature in (0.0, 5.0):
        for row in generator.decode(RAGGED, Sampling(max_new_tokens=24, temperature=temperature)):
            assert max(row) < 310


def test_the_penalty_of_a_huge_value_never_repeats_a_token(generator):
    prompt = RAGGED[0]
    new = generator.decode([prompt], Sampling(max_new_tokens=24, repetition_penalty=1e9))[0]
    assert len({*prompt, *new}) == len(prompt) + len(new)


def test_rows_end_at_the_end_of_text_token_and_the_others_go_on(generator):
    free = generator.decode(RAGGED, Sampling(max_new_tokens=24))
    eos = free[0][5]
    ended = generator.decode(RAGGED, Sampling(max_new_tokens=24), eos_id=eos)
    assert len(ended[0]) <= 5
    for before, after in zip(free, ended, strict=True):
        assert after == (before[: before.index(eos)] if eos in before else before)


def test_looking_in_between_changes_nothing(generator):
    sampling = Sampling(max_new_tokens=24, temperature=1.0)
    seen = []

    def look(rows, ended):
        seen.append(len(rows[0]))
        return [False] * len(rows)

    assert generator.decode(RAGGED, sampling, should_stop=look, check_every=7) == generator.decode(RAGGED, sampling)
    assert seen == [1, 8, 15, 22]


def test_a_stop_string_ends_the_text_before_it(generator):
    free = next(generator(["the patients"], Sampling(max_new_tokens=24)))
    stop = free.text[len(free.text) // 3 :][:3]
    result = next(generator(["the patients"], Sampling(max_new_tokens=24, stop=["never", stop])))
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.tokens == free.tokens[: len(result.tokens)]
    assert len(result.tokens) < len(free.tokens)


def test_a_text_says_why_it_ended(generator, tokenizer):
    for result in generator(["the patients", "mice", "insulin"], Sampling(max_new_tokens=24, temperature=2.0)):
        assert tokenizer.eos_id not in result.tokens
        assert result.finish_reason == ("length" if len(result.tokens) == 24 else "eos")


def test_pieces_shown_as_the_text_grows_make_up_the_text(generator):
    pieces = {0: "", 1: "", 2: ""}

    def show(index, piece):
        pieces[index] += piece

    prompts = ["the", "serum glucose", ""]
    results = list(generator(prompts, Sampling(max_new_tokens=24, temperature=1.0), batch_size=2, on_text=show))
    assert [pieces[index] for index in range(3)] == [result.text for result in results]


def test_part_of_a_character_and_of_a_stop_string_is_held_back(tokenizer):
    ids = tokenizer.encode_batch(["glucose日 END insulin"])[0]
    detokenizer = Detokenizer(tokenizer, [tokenizer.eos_id], ["END"])
    shown = [detokenizer.update(ids[:count], ended=False) for count in range(1, len(ids) + 1)]
    assert "".join(shown) == "glucose日 "
    assert not any("\ufffd" in piece for piece in shown)
    assert tokenizer.decode(ids[: detokenizer.stopped_at]).endswith("END")


def test_prompts_begin_as_documents_did_in_training(tokenizer, shared_data):
    assert tokenizer.encode_prompts(["insulin"]) == [[tokenizer.eos_id, *tokenizer.encode_batch(["insulin"])[0]]]
    neox = load_tokenizer(shared_data / "tokenizers" / "gpt_neox_20b_tokenizer.json")
    assert neox.encode_prompts(["insulin", ""]) == [neox.encode_batch(["insulin"])[0], [0]]
    assert 0 not in neox.encode_prompts(["a<|endoftext|>"])[0]


def test_lengths_are_rounded_to_few_sizes():
    sizes = [bucket_length(length) for length in range(1, 2000)]
    assert all(length <= size <= max(16, 1.5 * length) for length, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]


def test_a_tokenizer_of_another_model_is_refused(models, tokenizer):
    small = dataclasses.replace(models[1], config=dataclasses.replace(models[1].config, vocab_size=309))
    with pytest.raises(UserError, match="310 ids, the model 309"):
        Generator(small, tokenizer)


@pytest.mark.parametrize("prompt", [[], [310], [-1]])
def test_a_prompt_of_unknown_ids_is_refused(generator, prompt):
    with pytest.raises(UserError, match=r"ids in 0\.\.309"):
        generator.decode([[1], prompt], Sampling())


@pytest.mark.parametrize(("dtype", "temperature"), [("float32", 0.0), ("float32", 1.0), ("int8", 1.0)])
def test_logits_of_nan_are_an_error_and_no_end_of_the_text(models, tokenizer, dtype, temperature):
    params = nnx.to_pure_dict(nnx.state(models[0]))
    params["embedding"] = params["embedding"].at[RAGGED[1][0]].set(jnp.nan)
    broken = InferenceModel.from_params(models[1].config, params, dtype)
    generator = Generator(broken, tokenizer, "some/folder")
    sampling = Sampling(max_new_tokens=24, temperature=temperature, top_k=5, top_p=0.9, stop=["never"])
    assert generator.decode([[5, 9]], Sampling(max_new_tokens=1))  # a token that is not the broken one
    with pytest.raises(UserError, match=f"some/folder: its logits are NaN in {dtype}"):
        generator.decode(RAGGED, sampling, eos_id=tokenizer.eos_id)
    with pytest.raises(UserError, match="some/folder: its logits are NaN"):
        generator.decode(RAGGED, sampling, should_stop=lambda rows, ended: [False] * len(rows))


@pytest.mark.parametrize(
    ("stops", "text"),
    [(["b", "abcX"], "xa"), (["abcX", "b"], "xa"), (["abc", "bc"], "x"), (["yz", "Xyz"], "xabc"), (["q"], "xabcXyz")],
)
def test_which_stop_string_ends_a_text_does_not_depend_on_when_it_is_looked_at(tokenizer, stops, text):
    (ids,) = tokenizer.encode_batch(["xabcXyz"])
    together, growing = Detokenizer(tokenizer, [0], stops), Detokenizer(tokenizer, [0], stops)
    together.update(ids, True)
    pieces = [growing.update(ids[:count], count == len(ids)) for count in range(1, len(ids) + 1)]
    assert together.text == growing.text == "".join(pieces) == text
    assert together.stopped_at == growing.stopped_at


def test_new_tokens_are_spelled_behind_the_prompt(tmp_path):
    """As Llama's tokenizers are made: a space before a text is added, and dropped again from what is spelled."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["insulin and glucose in serum of mice"] * 50),
        model_prefix=str(tmp_path / "spaced"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        eos_id=0,
        unk_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "spaced.model")
    prompt, whole = tokenizer.encode_batch(["insulin and", "insulin and glucose"])
    assert whole[: len(prompt)] == prompt and tokenizer.decode(whole[len(prompt) :]) == "glucose"
    assert Detokenizer(tokenizer, prompt, []).update(whole[len(prompt) :], ended=True) == " glucose"
