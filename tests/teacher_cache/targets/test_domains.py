"""Domains of utterances and weights that depend on them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest

from ray_distill.teacher_cache.targets.domains import (
    Weight,
    counted_domains,
    counts,
    read_domains,
    shown,
    without_weight,
)

WEIGHT = pydantic.TypeAdapter(Weight)
BOTH = {"speech": 1.0, "audio": 0.1}


def test_domains_are_read_by_id(tmp_path: Path) -> None:
    file = tmp_path / "labels.parquet"
    assert read_domains(file, ["a", "b"]) == ["", ""], "the corpus has no labels"
    columns = {"id": ["c", "a", "b"], "speaker": ["s"] * 3, "text": [""] * 3}
    pq.write_table(pa.table(columns), file)
    assert read_domains(file, ["a", "b"]) == ["", ""], "an earlier version made the index"
    pq.write_table(pa.table(columns | {"domain": ["speech", "audio", ""]}), file)
    assert read_domains(file, ["b", "a", "x", "c", "a"]) == ["", "audio", "", "speech", "audio"]
    assert read_domains(file, []) == []
    file.write_bytes(b"PAR1 this is not a table PAR1")
    with pytest.raises(ValueError, match=f"^{file} is damaged; run the index stage again$"):
        read_domains(file, ["a"])


def test_the_first_teacher_without_a_weight_is_named() -> None:
    ids, domains = ["a", "b", "c"], ["speech", "music", "music"]
    assert without_weight({"x": 1.0, "y": BOTH | {"music": 0.0}}, ids, domains) is None
    assert without_weight({"x": 1.0, "y": BOTH}, ids, domains) == (
        "teachers.y.weight: 2 of 3 utterances, such as b, have the domain music, but the weights are for speech, audio; add the "
        "domain to the weights, with 0 if the teacher is not to learn from it"
    )
    assert without_weight({"y": BOTH}, ids, ["speech", "", "audio"]) == (
        "teachers.y.weight: 1 of 3 utterances, such as b, have no domain, but the weights are for speech, audio; give the manifest "
        "of the corpus a column domain, or run the index stage again if it has one"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "the weight is -1; give a number of at least 0, or one for each domain"),
        ("much", "the weight is 'much'; give a number"),
        (float("inf"), "the weight is inf; give"),
        ([1, 2], r"the weight is \[1, 2\]; give"),
        ({}, r"there is no domain; give a number, or a number for each domain, such as \{speech: 1, audio: 0.1\}"),
        ({"speech": -0.5}, "the weight of domain speech is -0.5; give a number of at least 0"),
        ({"speech": {"clean": 1}}, "the weight of domain speech is {'clean': 1}; give"),
        ({"a b": 1}, "'a b' can't be a domain, whose name has letters"),
        ({2: 1}, "2 can't be a domain"),
        ({"a.b": 1}, "'a.b' can't be a domain"),
        ({"speech": 0, "audio": 0}, "the weights of all domains are 0; give one number, 0, to leave the teacher out"),
    ],
)
def test_impossible_weights_are_refused(value: Any, message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        WEIGHT.validate_python(value)


def test_weights() -> None:
    assert WEIGHT.validate_python("1e-3") == 1e-3 and WEIGHT.validate_python({"a": "2", "b": 0}) == {"a": 2.0, "b": 0.0}
    assert counts(0.5) and not counts(0.0) and counts({"a": 0.0, "b": 1.0})
    assert counted_domains({"a": 0.0, "b": 1.0, "c": 2.0}) == ("b", "c") and counted_domains(2.0) == ()
    assert shown(0.5) == "0.5" and shown(BOTH) == "speech 1, audio 0.1"
