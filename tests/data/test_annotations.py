"""Annotated texts: each format reads into one record, offsets are kept to the character, and what is wrong is named."""

import json

import pytest
import tokenizers
from tiny_models import train_tokenizer, write_byte_level
from tokenizers import models, normalizers, pre_tokenizers

from biomamba_jax.config import ExamplesConfig
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotation_files import read_annotated
from biomamba_jax.data.annotations import (
    AnnotatedText,
    Relation,
    Span,
    check_splits,
    describe,
    encode_words,
    from_tags,
    tag_names,
    to_tags,
)
from biomamba_jax.data.examples import encode_texts
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError

PUBTATOR = """\
12|t|Aspirin-induced asthma
12|a|A cough (mild) after aspirin.
12\t0\t7\tAspirin\tChemical\tD001241
12\t16\t22\tasthma\tDisease\tD001249|D000001\tasthma|cough
12\t44\t51\taspirin\tChemical\tD001241
12\tCID\tD001241\tD001249

13|t|No mention
13|a|
"""
BIOC = """\
<collection><document><id>12</id>
<passage><offset>0</offset><text>Aspirin-induced asthma</text>
<annotation id="T1"><infon key="type">Chemical</infon><infon key="identifier">D001241</infon>
<location offset="0" length="7"/><text>Aspirin</text></annotation></passage>
<passage><offset>23</offset><text>A cough (mild) after aspirin.</text>
<annotation id="T2"><infon key="type">Disease</infon><infon key="identifier">D003371</infon>
<location offset="25" length="5"/><text>cough</text></annotation>
<annotation id="T3"><infon key="type">Disease</infon><location offset="25" length="1"/>
<location offset="29" length="1"/><text>c h</text></annotation></passage>
<relation id="R"><infon key="relation">CID</infon><infon key="Chemical">D001241</infon>
<infon key="Disease">D003371</infon></relation>
<relation id="S"><infon key="type">Cause</infon><node refid="T1" role=""/><node refid="T2" role=""/></relation>
</document></collection>
"""


def read(tmp_path, content, **settings):
    path = tmp_path / "file.txt"
    path.write_text(content, encoding="utf-8")
    return read_annotated(str(path), ExamplesConfig(**settings))


def spelled(text):
    return [(text.text[span.start : span.end], span.type) for span in text.spans]


# --- Formats ---------------------------------------------------------------------------------------------------------


def test_columns_of_words_and_tags_are_sentences_with_spans(tmp_path):
    lines = "-DOCSTART- O\n\nthe O\nT B-Disease\n- I-Disease\ncell I-Disease\n\nasthma\tNN\tB-Disease\n"
    first, second = read(tmp_path, lines, format="conll")
    assert (first.text, spelled(first)) == ("the T - cell", [("T - cell", "Disease")])
    assert (first.key, second.key) == ("file.txt:3", "file.txt:8")
    assert spelled(second) == [("asthma", "Disease")]


@pytest.mark.parametrize("word", ["10\u00a0mg", "type 2"])
def test_white_space_in_a_word_between_tabs_stays_in_the_text(tmp_path, word):
    [text] = read(tmp_path, f"{word}\tNN\tB-Dose\ndaily \tO\n", format="conll")
    assert (text.text, spelled(text)) == (f"{word} daily", [(word, "Dose")])


def test_pubtator_has_mentions_with_their_concepts_and_relations(tmp_path):
    first, second = read(tmp_path, PUBTATOR, format="pubtator")
    assert spelled(first) == [("Aspirin", "Chemical"), ("asthma", "Disease"), ("aspirin", "Chemical")]
    assert first.spans[1].ids == ("D001249", "D000001") and first.relations == (Relation("CID", "D001241", "D001249"),)
    assert (second.key, second.text, second.spans) == ("13", "No mention\n", ())


def test_bioc_has_the_offsets_of_the_document_and_leaves_out_spans_in_parts(tmp_path):
    [text] = read(tmp_path, BIOC, format="bioc")
    assert spelled(text) == [("Aspirin", "Chemical"), ("cough", "Disease")]
    assert set(text.relations) == {Relation("CID", "D001241", "D003371"), Relation("Cause", "D001241", "D003371")}
    assert describe([text], "train") == [
        "train: 1 spans are in several parts or have no place: neither learnt nor counted"
    ]


def test_bioc_documents_without_an_id_are_told_apart(tmp_path):
    [one, other] = read(
        tmp_path, BIOC.replace("<id>12</id>", "").replace("</document>", "</document><document/>"), format="bioc"
    )
    assert one.key != other.key


def test_marked_sentences_have_their_two_entities_and_class(tmp_path):
    line = json.dumps({"text": "<< EGFR >> is blocked by [[ gefitinib ]].", "label": "INHIBITOR", "metadata": []})
    [text] = read(tmp_path, line, format="marked")
    assert (spelled(text), text.labels) == ([("EGFR", "head"), ("gefitinib", "tail")], ("INHIBITOR",))


def test_json_lines_have_spans_labels_and_scores(tmp_path):
    span = {"start": 2, "end": 7, "type": "Disease", "text": "cough"}
    line = {"id": 5, "text": "A cough", "spans": [span], "labels": ["a", "b"], "score": 1.5}
    [text] = read(tmp_path, json.dumps(line), format="spans")
    assert text == AnnotatedText("5", "A cough", (Span(2, 7, "Disease"),), ("a", "b"), score=1.5)


def test_a_table_joins_the_labels_of_a_sentence(tmp_path):
    first, second = read(tmp_path, "a cell grows\tgrowth|death\nnothing\tempty\n", format="tsv")
    assert (first.labels, second.labels) == (("growth", "death"), ())


def test_questions_have_the_offsets_of_their_answers(tmp_path):
    answers = [{"text": "aspirin", "answer_start": 13}]
    qas = [{"id": "1", "question": "What after?", "answers": answers}]
    raw = {"data": [{"title": "", "paragraphs": [{"context": "A cough from aspirin", "qas": qas}]}]}
    [text] = read(tmp_path, json.dumps(raw), format="squad")
    assert (text.question, spelled(text)) == ("What after?", [("aspirin", "answer")])


def test_only_the_types_that_are_asked_for_are_read(tmp_path):
    first, _ = read(tmp_path, PUBTATOR, format="pubtator", types=["Disease"])
    assert spelled(first) == [("asthma", "Disease")]


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("conll", "word\n", r"line 1: is not a word and a tag such as B-Disease or O, but 'word'"),
        ("conll", "word Disease\n", r"line 1: is not a word and a tag"),
        (
            "pubtator",
            PUBTATOR.replace("\t16\t22", "\t17\t23"),
            r"PMID 12: characters 17-23 are 'sthma\\n', not 'asthma'",
        ),
        ("pubtator", PUBTATOR.replace("\t16\t22", "\t16\t99"), r"PMID 12: span 16-99 is not in its 52 characters"),
        ("pubtator", "12|x|text\n", "line 1: is not a title, abstract, mention or relation"),
        ("pubtator", PUBTATOR.replace("\n\n", "\n"), "line 7: is not of PMID 12; put an empty line between two texts"),
        ("pubtator", "12|t|a\n12|a|b\n12|a|c\n", "line 3: is not a title"),
        ("pubtator", "12|a|b\n12|t|a\n", "line 2: is not a title"),
        ("pubtator", PUBTATOR.replace("\tDisease\t", "\t\t"), "PMID 12: span 16-22 has no type"),
        ("conll", "\tO\n", "line 1: is not a word and a tag"),
        ("bioc", BIOC.replace('offset="25" length="5"', 'offset="x" length="5"'), "has an offset that is not a number"),
        ("marked", '{"text": "<< a >> b", "label": "x"}', "does not mark one entity"),
        (
            "bioc",
            BIOC.replace("<offset>23<", "<offset>99999999999<"),
            "has an offset that is not a number, or not in the",
        ),
        ("pubtator", PUBTATOR.replace("\t16\t22", "\t\u00b2\t22"), "is not a title, abstract, mention or relation"),
        ("spans", '{"text": "a", "spans": [{"start": 0}]}', "line 1: lacks"),
        ("spans", '{"text": {"a": 1}}', "line 1: lacks"),
        ("spans", '{"text": "a", "spans": [{"start": 0, "end": 1, "type": "x", "ids": "D01"}]}', "ids that are not a"),
        ("spans", '{"text": "a", "spans": [{"start": 0, "end": 1.5, "type": "x"}]}', "line 1: lacks"),
        ("spans", '{"text": "a", "spans": [{"start": 0, "end": 1, "type": "x", "text": 5}]}', "line 1: lacks"),
        ("spans", '{"text": "a", "spans": [{"start": 0, "end": 1, "type": "x", "text": {}}]}', "line 1: lacks"),
        ("tsv", "no tab\n", "has no tab"),
        ("tsv", "sentence\tlabel\nA cell\tgrowth\n", "line 1: names the columns; remove it"),
        ("squad", "{}", "is not JSON of paragraphs"),
        ("tsv", "", "holds no text"),
    ],
)
def test_what_is_not_of_the_format_is_named(tmp_path, format, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content, format=format)


# --- Words and tags --------------------------------------------------------------------------------------------------

TEXT = "5-HT6 and Cl(-), naïve\u2009T-cell\nlymphoma (ﬁbrosis); TNF-α+ Ångström"
SPANS = ["5-HT", "Cl", "naïve\u2009T-cell\nlymphoma", "ﬁbrosis", "TNF-α", "Ångström"]


def word_piece(folder):
    """A WordPiece tokenizer of letters that lower-cases, strips accents and drops control characters, as BERT's."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-(),;+α"
    pieces = ["[UNK]", "</s>", *letters, *(f"##{letter}" for letter in letters)]
    library = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    library.save(str(folder / "word_piece.json"))
    return load_tokenizer(folder / "word_piece.json")


def byte_level(folder):
    merges = [(")", ","), ("Ġ", "T"), ("o", "m"), ("-", "c")]
    return load_tokenizer(write_byte_level(folder / "bytes", ["</s>"], merges=merges))


@pytest.mark.parametrize("tokenizer", [train_tokenizer, byte_level, word_piece])
def test_spans_come_back_to_the_character_through_every_tokenizer(tokenizer, tmp_path):
    spans = [Span(TEXT.index(part), TEXT.index(part) + len(part), "X") for part in SPANS]
    [encoded] = encode_words([TEXT], tokenizer(tmp_path))
    assert from_tags(encoded.words, to_tags(encoded.words, spans)) == spans
    assert len(encoded.last) == len(encoded.words) and encoded.last[-1] == len(encoded.ids) - 1


def test_words_have_the_tokens_of_the_whole_text_where_none_crosses_a_word(tmp_path):
    tokenizer = byte_level(tmp_path)
    for text, same in (("(om), T", False), (" T (om) and T\nom", True)):
        [whole], [words] = tokenizer.encode_batch([text]), encode_words([text], tokenizer)
        assert (words.ids == whole) == same
        assert tokenizer.decode(words.ids) == text


def test_a_word_without_a_token_is_no_word(tmp_path):
    [encoded] = encode_words(["a\u200b b"], word_piece(tmp_path))
    assert encoded.words == [(0, 1), (3, 4)]


@pytest.mark.parametrize("scheme", ["GPT-NeoX", "SentencePiece", "WordPiece"])
def test_two_thousand_real_sentences_keep_their_spans(scheme, shared_data, tmp_path):
    """BC5CDR names one acid inside a word, "gamma-aminobutyric acidA": no tag of words can."""
    made = {"SentencePiece": train_tokenizer, "WordPiece": word_piece}.get(scheme)
    neox = shared_data / "tokenizers/gpt_neox_20b_tokenizer.json"
    tokenizer, folder = made(tmp_path) if made else load_tokenizer(neox), shared_data / "text_mining"
    texts = read_annotated(str(folder / "ncbi_disease/test.tsv"), ExamplesConfig(format="conll"))
    texts += read_annotated(str(folder / "ncbi_disease/devel.tsv"), ExamplesConfig(format="conll"))
    texts += read_annotated(str(folder / "bc5cdr/CDR_TestSet.PubTator.txt"), ExamplesConfig(format="pubtator"))
    encoded, lost = encode_words([text.text for text in texts], tokenizer), []
    for text, words in zip(texts, encoded, strict=True):
        kept = {span[:3] for span in from_tags(words.words, to_tags(words.words, text.spans))}
        lost += [text.text[span.start : span.end] for span in text.spans if span[:3] not in kept]
    assert len(texts) > 2000 and lost == ["gamma-aminobutyric acid"]
    assert describe(texts, "here") == [
        "here: 1 spans begin or end inside a word: they are not learnt, and count as missed"
    ]


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-x I-x O I-x", ["01x", "33x"]),  # IOB1 and IOB2
        ("I-x I-x B-x I-y", ["01x", "22x", "33y"]),
        ("S-x S-x B-x E-x", ["00x", "11x", "23x"]),
        ("B-x E-x I-x E-y", ["01x", "22x", "33y"]),
        ("O E-x E-x O", ["11x", "22x"]),
    ],
)
def test_entities_are_those_that_conlleval_counts(tags, entities):
    """By hand, from its rules of where a chunk begins and ends."""
    words = [(place, place + 1) for place in range(4)]
    found = from_tags(words, tags.split())
    assert [f"{span.start}{span.end - 1}{span.type}" for span in found] == entities


def test_of_nested_and_overlapping_spans_the_outermost_is_tagged_and_the_others_are_counted():
    spans = (Span(2, 3, "x"), Span(0, 3, "y"), Span(2, 5, "x"), Span(4, 5, "x"))
    text = AnnotatedText("k", "a b cd", spans)
    assert to_tags([(0, 1), (2, 3), (4, 6)], spans) == ["B-y", "I-y", "O"]
    overlapping, misplaced = describe([text], "train split")
    assert overlapping.startswith("train split: 2 spans overlap") and misplaced.startswith("train split: 1 spans begin")


# --- Splits ----------------------------------------------------------------------------------------------------------


def test_a_development_file_that_is_the_test_file_is_refused(tmp_path):
    for name in ("valid.tsv", "test.tsv"):
        (tmp_path / name).write_text("a\tb\n")
    files = {"train": [], "development": [str(tmp_path / "valid.tsv")], "test": [str(tmp_path / "test.tsv")]}
    with pytest.raises(UserError, match=r"test\.tsv \(test\): is byte for byte .*valid\.tsv \(development\)"):
        check_splits(files, {split: [] for split in files})


def test_labels_and_texts_that_splits_do_not_share_are_said():
    texts = {
        "train": [AnnotatedText("1", "a", labels=("x",))],
        "test": [AnnotatedText("2", "a", labels=("x", "y")), AnnotatedText("3", "b", (Span(0, 1, "z"),))],
    }
    assert check_splits({}, texts) == [
        "1 texts of the test split are also in the train split",
        "'y' is not in the train split: 1 in the test split",
        "'z' is not in the train split: 1 in the test split",
    ]


# --- Targets ---------------------------------------------------------------------------------------------------------


def encode(tmp_path, text, kind, labels, length=64, reading="once"):
    head = HeadConfig(kind, tuple(labels), reading)
    [example] = encode_texts([text], byte_level(tmp_path), length, head, source="made-up")._examples
    return example


def test_a_words_tag_sits_on_its_last_token(tmp_path):
    text = AnnotatedText("k", "ab omc", (Span(3, 6, "D"),))
    example = encode(tmp_path, text, "token_classifier", tag_names(["D"]))
    tokens = len("ab") + len(" ") + len(["om", "c"])
    assert example.targets.tolist() == [-1, -1, 0, -1, -1, 1] and len(example.inputs) == tokens + 1


def test_an_echo_is_labelled_on_the_second_reading(tmp_path):
    text = AnnotatedText("k", "ab", (Span(0, 2, "D"),))
    example = encode(tmp_path, text, "token_classifier", tag_names(["D"]), reading="echo")
    once = encode(tmp_path, text, "token_classifier", tag_names(["D"]))
    assert example.inputs.tolist() == 2 * once.inputs.tolist()
    assert example.targets.tolist() == [-1, -1, -1, *once.targets.tolist()]


def test_an_answer_is_its_first_and_its_last_word_behind_the_question(tmp_path):
    text = AnnotatedText("k", "a b c", (Span(0, 3, "answer"),), question="q")
    assert encode(tmp_path, text, "span", ["start", "end"]).targets.tolist() == [-1, -1, -1, 1, -1, 2, -1, 0]


def test_several_labels_and_scores_are_one_integer(tmp_path):
    text = AnnotatedText("k", "ab", labels=("c", "a"), score=1.5)
    assert encode(tmp_path, text, "multi_label", "abc").targets.tolist() == [-1, -1, 5]
    bits = encode(tmp_path, text, "regression", ["score"]).targets[-1:]
    assert bits.view("float32").tolist() == [1.5]


def test_long_texts_are_split_for_tags_and_lose_their_beginning_for_classes(tmp_path):
    text = AnnotatedText("k", "a b c d e f", (Span(8, 9, "D"),), labels=("x",))
    head = HeadConfig("token_classifier", ("O", "B-D", "I-D"))
    parts = encode_texts([text], byte_level(tmp_path), 7, head, source="made-up")
    assert parts.shortened == 1 and [len(part.inputs) for part in parts._examples] == [7, 6]
    assert [t for part in parts._examples for t in part.targets.tolist() if t >= 0] == [0, 0, 0, 0, 1, 0]
    example = encode(tmp_path, text, "classifier", ["x"], length=4)
    assert byte_level(tmp_path).decode(example.inputs[1:]) == "e f" and example.targets.tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize(
    ("text", "kind", "labels", "message"),
    [
        (AnnotatedText("k", "a", labels=("z",)), "classifier", ["x"], "'k' is of class 'z', none of x; check labels"),
        (AnnotatedText("k", "a", labels=("x", "y")), "classifier", ["x", "y"], "has 2 classes"),
        (AnnotatedText("k", "a", score=-1.0), "regression", ["score"], "a regression needs one that is 0 or more"),
        (AnnotatedText("k", "a", (Span(0, 1, "z"),)), "token_classifier", ["O"], "'k' has tags B-z, none of"),
        (AnnotatedText("k", "ab", (Span(0, 1, "answer"),)), "span", ["start", "end"], "no answer is in its text"),
        (AnnotatedText("k", "a"), "multi_label", map(str, range(32)), "multi_label has at most 31"),
    ],
)
def test_what_a_head_cannot_learn_is_refused_by_name(tmp_path, text, kind, labels, message):
    with pytest.raises(UserError, match=message):
        encode(tmp_path, text, kind, labels)
