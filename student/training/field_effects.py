"""What changing a configuration key does, stated once beside the key, as metadata of its type.

A key without any of these changes what comes out of a run.

Example:
    >>> class Settings(pydantic.BaseModel):
    ...     workers: Annotated[int, CHANGES_NO_RESULT] = 1
    >>> fields_with(Settings, CHANGES_NO_RESULT)
    ['workers']
"""

from enum import Enum

import pydantic


class FieldEffect(Enum):
    """A statement about a configuration key."""

    NO_RESULT = "changes how a run is carried out, not what comes out of it"
    LOSS_MEANING = "changes what a loss means, so that losses under different values can't be compared"


CHANGES_NO_RESULT = FieldEffect.NO_RESULT
CHANGES_LOSS_MEANING = FieldEffect.LOSS_MEANING


def fields_with(model: type[pydantic.BaseModel], effect: FieldEffect) -> list[str]:
    """Names of a model's fields that carry an effect, in order."""
    return [name for name, field in model.model_fields.items() if effect in field.metadata]
