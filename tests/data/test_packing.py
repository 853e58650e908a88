"""Packing: every token of every document exactly once an epoch, in rows that are full, reproducible and indexable."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.data.packing import RowPlan, best_fit_decreasing, fill_row
from biomamba_jax.data.shards import shifted

lengths_of_documents = st.lists(st.integers(1, 70), min_size=1, max_size=60)
plans = {
    "sequence_length": st.integers(1, 32),
    "seed": st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    "window": st.integers(1, 80),
}


def pubmed_like_lengths(documents, seed=0):
    """Lognormal, mean about 250 tokens, a long tail: abstracts with their titles."""
    return np.random.default_rng(seed).lognormal(np.log(215), 0.55, documents).astype(np.uint32) + 1


def rows_of_epoch(plan, epoch=0):
    first = sum(plan.rows_in_epoch(e) for e in range(epoch))
    return [plan[first + i] for i in range(plan.rows_in_epoch(epoch))]


@given(lengths=lengths_of_documents, **plans)
def test_every_token_of_every_document_is_in_an_epoch_exactly_once(lengths, sequence_length, seed, window):
    plan = RowPlan(np.array(lengths), sequence_length, seed=seed, window=window)
    covered = collections.defaultdict(list)
    for row in rows_of_epoch(plan):
        for document, start, stop in row:
            covered[document].append((start, stop))
    assert set(covered) == set(range(len(lengths)))
    for document, spans in covered.items():
        spans.sort()
        assert spans[0][0] == 0
        assert spans[-1][1] == lengths[document]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


@given(lengths=lengths_of_documents, **plans)
def test_no_row_overflows_and_only_documents_longer_than_a_row_are_cut(lengths, sequence_length, seed, window):
    plan = RowPlan(np.array(lengths), sequence_length, seed=seed, window=window)
    for row in rows_of_epoch(plan):
        assert 0 < sum(stop - start for _, start, stop in row) <= sequence_length
        for document, start, stop in row:
            whole = (start, stop) == (0, lengths[document])
            assert whole or lengths[document] > sequence_length
            assert start % sequence_length == 0


@settings(max_examples=30)
@given(lengths=lengths_of_documents, row=st.integers(0, 60), **plans)
def test_a_row_does_not_depend_on_what_was_asked_before(lengths, row, sequence_length, seed, window):
    def plan(**start):
        return RowPlan(np.array(lengths), sequence_length, seed=seed, window=window, **start)

    if seed is None:
        row %= plan().rows_in_epoch()
    walked = plan()
    for i in range(row + 1):
        expected = walked[i]
    assert plan()[row] == expected
    assert plan(start=walked.window_start(row))[row] == expected


def test_epochs_follow_one_another_without_a_gap_in_different_orders():
    plan = RowPlan(pubmed_like_lengths(500), 1024, seed=1, window=100)
    first, second = rows_of_epoch(plan, 0), rows_of_epoch(plan, 1)
    epochs = [plan.window_start(i).window // plan.windows_per_epoch for i in (0, len(first) - 1, len(first))]
    assert epochs == [0, 0, 1]
    order = [[piece.document for row in rows for piece in row if piece.start == 0] for rows in (first, second)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(500))
    assert order[0] != order[1]


def test_the_windows_of_each_epoch_hold_other_documents():
    plan = RowPlan(pubmed_like_lengths(500), 1024, seed=1, window=100)
    first = [set(), set()]
    row = 0
    while (window := plan.window_start(row).window) <= plan.windows_per_epoch:
        if window in (0, plan.windows_per_epoch):
            first[window > 0] |= {piece.document for piece in plan[row]}
        row += 1
    assert len(first[0]) == len(first[1]) == 100
    assert len(first[0] & first[1]) < 50  # 20 are expected


def test_seeds_give_different_orders():
    lengths = pubmed_like_lengths(100)
    assert RowPlan(lengths, 1024, seed=1)[0] != RowPlan(lengths, 1024, seed=2)[0]


def test_the_shuffle_mixes_the_whole_epoch_not_only_a_window():
    plan = RowPlan(pubmed_like_lengths(10_000), 1024, seed=1, window=100)
    first_window = [piece.document for i in range(plan.rows_in_epoch() // 100) for piece in plan[i]]
    # 100 uniform draws from 0 ... 9,999: the mean's standard deviation is 289.
    assert abs(np.mean(first_window) - 5_000) < 4 * 289
    assert max(first_window) - min(first_window) > 9_000


def test_without_seed_documents_stay_in_the_order_of_their_windows_and_rows_end():
    plan = RowPlan(pubmed_like_lengths(300), 1024, seed=None, window=100)
    rows = rows_of_epoch(plan)
    window_of = [piece.document // 100 for row in rows for piece in row]
    assert window_of == sorted(window_of)
    with pytest.raises(IndexError):
        plan[len(rows)]


@pytest.mark.parametrize("sequence_length", [512, 1024, 2048, 8192])
def test_rows_are_fuller_than_97_percent_on_lengths_like_pubmeds(sequence_length):
    lengths = pubmed_like_lengths(9_000)
    plan = RowPlan(lengths, sequence_length, seed=0)
    assert lengths.sum() / (plan.rows_in_epoch() * sequence_length) > 0.97


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_best_fit_decreasing_does_what_its_definition_says(lengths):
    room = []
    expected = np.zeros(len(lengths), int)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row in range(len(room)) if room[row] >= lengths[item]]
        if not fits:
            room.append(40)
            fits = [len(room) - 1]
        best = min(room[row] for row in fits)
        # Rows with equal room are alike: the definition leaves the choice open, the last one emptied is taken.
        row = next(r for r in fits if room[r] == best)
        room[row] -= lengths[item]
        expected[item] = row
    rows = best_fit_decreasing(np.array(lengths), 40)

    def contents(assignment):
        groups = collections.defaultdict(list)
        for length, row in zip(lengths, assignment, strict=True):
            groups[int(row)].append(length)
        return sorted(sum(group) for group in groups.values())

    assert contents(rows) == contents(expected)


def test_a_row_holds_inputs_one_place_behind_targets_and_numbers_its_documents():
    documents = {4: np.array([11, 12, 0]), 7: np.array([0]), 9: np.array([21, 0])}
    row = fill_row([(4, 0, 3), (7, 0, 1), (9, 0, 2)], 8, lambda i: (shifted(documents[i], 9), documents[i]))
    assert row["targets"].tolist() == [11, 12, 0, 0, 21, 0, 0, 0]
    assert row["inputs"].tolist() == [9, 11, 12, 9, 9, 21, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 3, 3, 0, 0]
    assert all(values.dtype == np.int32 for values in row.values())


def test_a_later_piece_of_a_long_document_starts_from_the_token_before_it():
    document = np.array([11, 12, 13, 14, 15, 0])
    rows = [fill_row([(0, start, start + 2)], 2, lambda _: (shifted(document), document)) for start in (0, 2, 4)]
    assert [row["inputs"].tolist() for row in rows] == [[0, 11], [12, 13], [14, 15]]
    assert [row["targets"].tolist() for row in rows] == [[11, 12], [13, 14], [15, 0]]


def test_targets_may_differ_from_the_tokens_that_are_read():
    prompt_and_answer = np.array([0, 11, 12, 21]), np.array([-1, -1, 21, 0])
    row = fill_row([(0, 0, 4), (1, 0, 4)], 9, lambda _: prompt_and_answer)
    assert row["targets"].tolist() == [-1, -1, 21, 0, -1, -1, 21, 0, 0]
    assert row["inputs"].tolist() == [0, 11, 12, 21, 0, 11, 12, 21, 0]


def test_a_row_without_pieces_is_padding():
    assert all(not values.any() for values in fill_row([], 5, {}.__getitem__).values())


def test_nothing_to_pack_is_refused():
    with pytest.raises(ValueError, match="cannot pack 0 documents"):
        RowPlan(np.array([], np.uint32), 8, seed=0)
