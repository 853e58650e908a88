"""The order of files, and which of a document's versions, deletions and copies counts."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from biomamba_jax.data.input_files import in_order
from biomamba_jax.data.records import CODE, DELETION, KEPT
from biomamba_jax.data.resolve import resolve
from biomamba_jax.data.source import INDEX


def test_nlm_files_go_by_year_and_number_and_others_stay_as_given():
    given = [
        "b.xml",
        "x/pubmed26n0002.xml.gz",
        "a.jsonl",
        "pubmed26n0010.xml.gz",
        "pubmed25n1335.xml",
        "y/pubmed26n0001.xml",
    ]
    ordered = [path.name for path in in_order(given)]
    assert ordered[:4] == ["pubmed25n1335.xml", "pubmed26n0001.xml", "pubmed26n0002.xml.gz", "pubmed26n0010.xml.gz"]
    assert ordered[4:] == ["b.xml", "a.jsonl"]


EVENTS = st.tuples(
    st.integers(0, 4), st.integers(1, 3), st.sampled_from([KEPT, KEPT, DELETION, CODE["retracted"]]), st.integers(0, 3)
)


@hypothesis.given(st.lists(st.lists(EVENTS, max_size=12), min_size=1, max_size=4))
@hypothesis.settings(max_examples=300)
def test_resolution_is_that_of_reading_record_by_record(batches):
    """(pmid, version, status, text) per record; the oracle keeps one dictionary and walks through all files."""
    indexes = []
    for batch in batches:
        index = np.zeros(len(batch), INDEX)
        for row, (pmid, version, status, text) in zip(index, batch, strict=True):
            row["pmid"], row["version"], row["status"] = (
                pmid,
                version,
                KEPT if status == DELETION and not pmid else status,
            )
            row["digest"] = (text % 2, text // 2)
        indexes.append(index)
    rows = [(number, i) for number, index in enumerate(indexes) for i in range(len(index))]
    expected = {place: int(indexes[place[0]][place[1]]["status"]) for place in rows}
    current: dict[int, tuple[int, int]] = {}
    for place in rows:
        row = indexes[place[0]][place[1]]
        pmid = int(row["pmid"])
        if pmid == 0:
            continue
        if row["status"] == DELETION:
            for other in rows[: rows.index(place)]:
                if indexes[other[0]][other[1]]["pmid"] == pmid and expected[other] != DELETION:
                    expected[other] = CODE["deleted"]
            current.pop(pmid, None)
        elif pmid in current and indexes[current[pmid][0]][current[pmid][1]]["version"] > row["version"]:
            expected[place] = CODE["superseded"]
        else:
            if pmid in current:
                expected[current[pmid]] = CODE["superseded"]
            current[pmid] = place
    seen: set[tuple[int, ...]] = set()
    for place in rows:
        text = tuple(indexes[place[0]][place[1]]["digest"].tolist())
        if expected[place] == KEPT:
            expected[place] = CODE["duplicate_text"] if text in seen else KEPT
            seen.add(text)
    found = resolve([lambda index=index: index for index in indexes])
    assert {place: int(found[place[0]][place[1]]) for place in rows} == expected
