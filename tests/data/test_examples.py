"""Supervised examples: which tokens are learnt, what becomes of long ones, and how templates are filled."""

import json
from operator import attrgetter

import numpy as np
import pytest
from tiny_models import train_tokenizer

from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotations import AnnotatedText
from biomamba_jax.data.examples import (
    Example,
    encode_answers,
    encode_examples,
    encode_texts,
    held_out_share,
    read_examples,
)
from biomamba_jax.errors import UserError

PROMPT = "the patients were given insulin"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encode(tokenizer, *examples, length=64):
    return encode_examples(examples, tokenizer, length, source="made-up")


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_half_a_character_is_refused_by_file_and_line(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", {"prompt": "a \U0001f600", "answer": "b"}, {"prompt": "a \ud83d", "answer": "b"}
    )
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: holds half a character"):
        list(read_examples(path, "{prompt}", "{answer}"))


@pytest.mark.parametrize("depth", [201, 100_000])
def test_json_that_is_nested_without_end_is_refused(tmp_path, depth):
    (tmp_path / "a.jsonl").write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: cannot be read as JSON \(nested more than 200 deep"):
        list(read_examples(str(tmp_path / "a.jsonl"), "{prompt}", "{answer}"))


def test_only_the_answer_and_the_end_of_the_text_are_targets(tokenizer):
    [example] = encode(tokenizer, Example(PROMPT, " diabetes"))
    prompt, answer = tokenizer.encode_batch([PROMPT, " diabetes"])
    assert example.inputs.tolist() == [tokenizer.eos_id, *prompt, *answer]
    assert example.targets.tolist() == [-1] * len(prompt) + [*answer, tokenizer.eos_id]


def letters(texts):
    """A tokenizer of letters that marks a text's beginning, as Llama's does, and in which "ab" is one token."""
    return [[*b"_" * bool(text), *text.replace("ab", "#").encode()] for text in texts]


def behind_start(texts):
    return [[0, *ids] for ids in letters(texts)]


@pytest.mark.parametrize(
    ("prompt", "answer", "ids"),
    [
        ("Q:", " no", b" no"),
        ("Q: ", "no", b" no"),  # a space belongs to the word behind it
        ("Q\n\n", "", b"\n\n"),
        ("Qa", "bc", b"_bc"),  # "Qab" is cut otherwise: the answer's own tokens
        ("", "no", b"_no"),
    ],
)
def test_an_answer_s_tokens_are_those_that_it_has_behind_its_prompt(prompt, answer, ids):
    ((before, found),) = encode_answers([(prompt, answer)], letters, behind_start)
    assert before == behind_start([prompt.rstrip()])[0]
    assert bytes(found) == ids


def test_answers_to_one_prompt_come_back_in_their_order():
    pairs = [("Q:", " yes"), ("P:", " no"), ("Q:", " no")]
    found = encode_answers(pairs, letters, behind_start)
    assert [bytes(ids).decode() for _, ids in found] == [" yes", " no", " no"]
    assert [bytes(ids[1:]).decode() for ids, _ in found] == ["_Q:", "_P:", "_Q:"]


def test_a_space_at_the_prompt_s_end_is_learnt_with_the_answer(tokenizer):
    one, other = encode(tokenizer, Example(PROMPT, " diabetes")), encode(tokenizer, Example(PROMPT + " ", "diabetes"))
    assert one[0].inputs.tolist() == other[0].inputs.tolist() and one[0].targets.tolist() == other[0].targets.tolist()


def test_a_classifiers_one_target_stands_behind_the_prompt(tokenizer):
    head = HeadConfig("classifier", ("yes", "no"))
    [example] = encode_texts([AnnotatedText("", PROMPT, labels=("no",))], tokenizer, 64, head, source="")._examples
    [prompt] = tokenizer.encode_batch([PROMPT])
    assert example.inputs.tolist() == [tokenizer.eos_id, *prompt]
    assert example.targets.tolist() == [-1] * len(prompt) + [1]


@pytest.mark.parametrize("reading", ["once", "echo"])
def test_the_class_of_an_empty_text_is_a_target_of_its_start_symbol(tokenizer, reading):
    head = HeadConfig("classifier", ("yes", "no"), reading)
    [example] = encode_texts([AnnotatedText("", "", labels=("no",))], tokenizer, 64, head, source="")._examples
    count = 2 if reading == "echo" else 1
    assert example.inputs.tolist() == [tokenizer.start_id] * count
    assert example.targets.tolist() == [-1] * (count - 1) + [1]


def test_a_prompt_that_does_not_fit_loses_its_beginning_and_is_counted(tokenizer):
    examples = encode(tokenizer, Example(PROMPT, " diabetes"), Example("the", " diabetes"), length=8)
    prompt, answer = tokenizer.encode_batch([PROMPT, " diabetes"])
    room = 8 - len(answer) - 1
    assert examples[0].inputs.tolist() == [tokenizer.eos_id, *prompt[-room:], *answer]
    assert examples[0].targets.tolist() == [-1] * room + [*answer, tokenizer.eos_id]
    assert examples.shortened == 1 and examples.lengths.max() <= 8


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(PROMPT, " diabetes" * 30, key="q7"), "example 'q7': its answer .* raise data.sequence_length"),
        (Example(PROMPT, "", key="q7"), "example 'q7' has an empty answer"),
    ],
    ids=["long", "empty"],
)
def test_an_example_that_cannot_be_learnt_is_refused_by_name(tokenizer, example, message):
    with pytest.raises(UserError, match=message):
        encode(tokenizer, example, length=16)


def test_no_examples_at_all_are_refused(tokenizer):
    with pytest.raises(UserError, match="made-up: holds no example"):
        encode(tokenizer)


def test_templates_take_any_keys_of_a_line(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"title": "Insulin", "ask": "safe?", "reply": "yes", "year": 1999})
    [example] = read_examples(file, "{title} ({year}): {ask} {{}}", " {reply}")
    assert (example.prompt, example.answer, example.label) == ("Insulin (1999): safe? {}", " yes", "yes")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 2: has no text 'answer', which data.answer names; its keys are prompt"),
        ('{"prompt": "a", "answer": null}', "line 2: has no text 'answer'"),
        ("[1]", "line 2: is not a mapping"),
        ("{", "line 2: cannot be read as JSON"),
    ],
)
def test_a_line_without_prompt_and_answer_is_refused_by_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_examples(str(tmp_path / "a.jsonl"), "{prompt}", "{answer}"))


def test_a_template_that_is_none_is_refused(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "a", "answer": "b"})
    with pytest.raises(UserError, match=r"data.prompt = '\{prompt': is not a template"):
        list(read_examples(file, "{prompt", "{answer}"))
    with pytest.raises(UserError, match=r"data.answer = '\{answer:.3\}': names 'answer' with a format"):
        list(read_examples(file, "{prompt}", "{answer:.3}"))


def test_the_development_share_depends_on_each_prompt_alone():
    examples = [Example(f"question {index % 500}", " yes", key=str(index)) for index in range(1000)]
    train, development = held_out_share(examples, 0.2, attrgetter("prompt"))
    assert len(train) + len(development) == 1000 and 140 < len(development) < 260
    assert not {e.prompt for e in train} & {e.prompt for e in development}
    again = held_out_share(examples[::-1][:300], 0.2, attrgetter("prompt"))[1]
    assert {e.key for e in again} == {e.key for e in development if int(e.key) >= 700}


def test_encoded_examples_tell_their_lengths(tokenizer):
    examples = encode(tokenizer, Example("the", " mice"), Example(PROMPT, " mice"))
    np.testing.assert_array_equal(examples.lengths, [len(examples[0].inputs), len(examples[1].inputs)])
