"""The page of the configuration: types and defaults in words, effects, and sections inside sections."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest

from ray_distill.student.training.field_effects import CHANGES_NO_RESULT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "site" / "configuration.py"


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("configuration", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Inner(pydantic.BaseModel, use_attribute_docstrings=True):
    """A section inside a section."""

    share: float = 0.5
    """Share | part."""


class Section(pydantic.BaseModel, use_attribute_docstrings=True):
    """A section."""

    path: Path
    """Path of
    the thing."""
    splits: list[str] | None = None
    """Splits."""
    kind: Literal["a", "b"] | tuple[bool, ...] | None = "a"
    """Kind."""
    betas: Annotated[tuple[float, float], CHANGES_NO_RESULT] = (0.5, 1.0)
    """Betas."""
    inner: Inner | None = None
    """Inner section."""


def test_a_table_has_types_in_words(page: Any) -> None:
    assert page._table("s", Section) == [
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        "| `s.path` | path | required | Path of the thing. |",
        "| `s.splits` | list of text or `null` | `null` | Splits. |",
        "| `s.kind` | `a`, `b`, list of `true` or `false` or `null` | `a` | Kind. |",
        "| `s.betas` | [number, number] | `[0.5, 1.0]` | Betas. Can be changed for a run that has results. |",
        "| `s.inner` | section or `null` | `null` | Inner section. |",
        "",
        "### s.inner",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
        "| `s.inner.share` | number | `0.5` | Share &#124; part. |",
        "",
    ]


def test_a_key_without_a_description_is_an_error(page: Any) -> None:
    class Undescribed(pydantic.BaseModel):
        width: int = 3

    with pytest.raises(ValueError, match="Undescribed.width has no description"):
        page._table("", Undescribed)


def test_the_committed_schema_is_that_of_the_code(page: Any) -> None:
    committed = (PAGE.parents[2] / "configs" / "schema.json").read_text()
    assert committed == page.schema(), "run docs/site/configuration.py"
