"""Effects of configuration keys, stated once beside each key as metadata of its type.

A key without an effect changes the result of a run.

Example:
    >>> class Settings(pydantic.BaseModel):
    ...     workers: Annotated[int, CHANGES_NO_RESULT] = 1
    >>> class Config(pydantic.BaseModel):
    ...     train: Settings
    >>> fields_with(Settings, CHANGES_NO_RESULT)
    ['workers']
    >>> keys_with(Config, CHANGES_NO_RESULT)
    ['train.workers']
"""

from enum import Enum

import pydantic


class FieldEffect(Enum):
    """A statement about a configuration key."""

    NO_RESULT = "changes how a run is carried out, but not its result"
    LOSS_MEANING = "changes the definition of the loss, so losses under different values can't be compared"
    SAME_IN_ABLATION = "has the same value in all runs of an ablation, which share a corpus, a teacher and a cache"


CHANGES_NO_RESULT = FieldEffect.NO_RESULT
CHANGES_LOSS_MEANING = FieldEffect.LOSS_MEANING
SAME_IN_ABLATION = FieldEffect.SAME_IN_ABLATION


def fields_with(model: type[pydantic.BaseModel], effect: FieldEffect) -> list[str]:
    """Return the names of a model's fields that carry an effect, in order."""
    return [name for name, field in model.model_fields.items() if effect in field.metadata]


def keys_with(model: type[pydantic.BaseModel], effect: FieldEffect) -> list[str]:
    """Return the dotted keys that carry an effect, in order, including those of nested sections.

    A section that carries the effect itself stands for all of its keys and is returned as one key.
    """
    return [key for key, effects in key_effects(model).items() if effect in effects]


def key_effects(model: type[pydantic.BaseModel]) -> dict[str, set[FieldEffect]]:
    """Return the effects of each dotted key, in order. Sections are keys too, followed by their own keys."""
    found: dict[str, set[FieldEffect]] = {}
    for name, field in model.model_fields.items():
        found[name] = {item for item in field.metadata if isinstance(item, FieldEffect)}
        section = field.annotation
        if isinstance(section, type) and issubclass(section, pydantic.BaseModel):
            found |= {f"{name}.{key}": effects for key, effects in key_effects(section).items()}
    return found
