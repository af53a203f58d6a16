"""All objectives, as a discriminated union and as the flat keys that configure them in the ``train`` section.

A new objective is a file beside this one and a member of `AnyObjective`; its keys become keys of ``train``.
"""

import inspect
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic

from ray_distill.student.objectives.layer_prediction import LayerPrediction
from ray_distill.student.objectives.objective import ErrorKind, Objective
from ray_distill.student.objectives.temporal_relation import TemporalRelation
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING

AnyObjective = Annotated[LayerPrediction | TemporalRelation, pydantic.Field(discriminator="objective")]
"""Settings of one of the objectives, distinguished by ``objective``."""

_CLASSES: dict[str, type[Objective]] = {
    cls.model_fields["objective"].default: cls for cls in get_args(get_args(AnyObjective)[0])
}
_ADAPTER: pydantic.TypeAdapter[Objective] = pydantic.TypeAdapter(AnyObjective)


def _flat_keys() -> dict[str, tuple[Any, Any]]:
    """Return the fields of all objectives by name. Only keys of `Objective` may be shared."""
    summaries = (f"``{name}``: {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]}" for name, cls in _CLASSES.items())
    name = pydantic.Field(default=next(iter(_CLASSES)), description=f"Training objective. {' '.join(summaries)}")
    keys: dict[str, tuple[Any, Any]] = {"objective": (Annotated[Literal[tuple(_CLASSES)], CHANGES_LOSS_MEANING], name)}
    for objective, cls in _CLASSES.items():
        for key, field in cls.model_fields.items():
            if key in Objective.model_fields:
                keys.setdefault(key, (field.annotation, field))
                continue
            assert key not in keys, f"two objectives have a key {key}; declare it in Objective"
            own = copy(field)
            own.description = f"{field.description} Only with objective ``{objective}``."
            keys[key] = (field.annotation, own)
    return keys


if TYPE_CHECKING:

    class ObjectiveKeys(pydantic.BaseModel, frozen=True, extra="forbid"):
        """Flat keys of all objectives; see `objective_of`."""

        objective: str = "prediction"
        loss: ErrorKind = "mse"

else:
    ObjectiveKeys = pydantic.create_model(
        "ObjectiveKeys", __module__=__name__, __doc__="Flat keys of all objectives; see `objective_of`.", **_flat_keys()
    )


def objective_of(keys: ObjectiveKeys) -> Objective:
    """Return the settings of the chosen objective.

    Raises:
        ValueError: a key of another objective is not at its default.
    """
    given = keys.model_dump(include=set(ObjectiveKeys.model_fields), exclude_defaults=True)
    try:
        return _ADAPTER.validate_python(given | {"objective": keys.objective})
    except pydantic.ValidationError as error:
        key = error.errors()[0]["loc"][-1]
        owner = next(name for name, cls in _CLASSES.items() if key in cls.model_fields)
        raise ValueError(
            f"train.{key} does nothing with train.objective {keys.objective}: it belongs to objective {owner}; remove it"
        ) from error
