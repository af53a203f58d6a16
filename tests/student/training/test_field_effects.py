"""Effects of configuration keys."""

from typing import Annotated

import pydantic

from ray_distill.student.training.field_effects import (
    CHANGES_LOSS_MEANING,
    CHANGES_NO_RESULT,
    fields_with,
    key_effects,
    keys_with,
)


class Inner(pydantic.BaseModel):
    plain: int = 0
    both: Annotated[int, CHANGES_NO_RESULT, CHANGES_LOSS_MEANING] = pydantic.Field(default=1, ge=1)


class Outer(pydantic.BaseModel):
    first: Annotated[str, "another kind of metadata", CHANGES_NO_RESULT] = ""
    inner: Inner = Inner()
    marked: Annotated[Inner, CHANGES_LOSS_MEANING] = Inner()


def test_effects_are_found_in_sections() -> None:
    assert fields_with(Outer, CHANGES_NO_RESULT) == ["first"]
    assert keys_with(Outer, CHANGES_NO_RESULT) == ["first", "inner.both", "marked.both"]
    assert keys_with(Outer, CHANGES_LOSS_MEANING) == ["inner.both", "marked", "marked.both"]
    assert key_effects(Outer)["inner.plain"] == set()
    assert key_effects(Outer)["inner.both"] == {CHANGES_NO_RESULT, CHANGES_LOSS_MEANING}
