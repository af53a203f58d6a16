"""All objectives, as a discriminated union and as the flat keys that configure them in the ``train`` section.

A new objective is a file beside this one and a member of `AnyObjective`; its keys become keys of ``train``.
"""

import inspect
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic

from ray_distill.student.objectives.codebook_prediction import CodebookPrediction
from ray_distill.student.objectives.layer_prediction import LayerPrediction
from ray_distill.student.objectives.mixture import Mixture
from ray_distill.student.objectives.objective import ErrorKind, Objective
from ray_distill.student.objectives.temporal_relation import TemporalRelation
from ray_distill.student.objectives.unit_prediction import UnitPrediction
from ray_distill.student.training.field_effects import CHANGES_LOSS_MEANING

AnyObjective = Annotated[
    LayerPrediction | TemporalRelation | UnitPrediction | CodebookPrediction | Mixture,
    pydantic.Field(discriminator="objective"),
]
"""Settings of one of the objectives, distinguished by ``objective``."""

_CLASSES: dict[str, type[Objective]] = {
    cls.model_fields["objective"].default: cls for cls in get_args(get_args(AnyObjective)[0])
}
_ADAPTER: pydantic.TypeAdapter[Objective] = pydantic.TypeAdapter(AnyObjective)


def _flat_keys() -> dict[str, tuple[Any, Any]]:
    """Return the fields of all objectives by name. Objectives may share a key that a common base class declares."""
    summaries = (f"``{name}``: {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]}" for name, cls in _CLASSES.items())
    name = pydantic.Field(default=next(iter(_CLASSES)), description=f"Training objective. {' '.join(summaries)}")
    keys: dict[str, tuple[Any, Any]] = {"objective": (Annotated[Literal[tuple(_CLASSES)], CHANGES_LOSS_MEANING], name)}
    for cls in _CLASSES.values():
        for key, field in cls.model_fields.items():
            if key in keys:
                continue
            having = {name: other for name, other in _CLASSES.items() if key in other.model_fields}
            declared = {_declares(other, key) for other in having.values()}
            assert len(declared) == 1, f"two objectives have a key {key}; declare it in a common base class"
            own = copy(field)
            own.description = (
                f"{field.description} Only with objective {' or '.join(f'``{name}``' for name in having)}."
            )
            keys[key] = (field.annotation, own)
    return keys


def _declares(cls: type[Objective], key: str) -> type:
    """Return the class that declares a key of an objective."""
    return next(base for base in cls.__mro__ if key in inspect.get_annotations(base))


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
    fields = ObjectiveKeys.model_fields
    # Not a dump, which would leave out the names of a mixture's objectives as defaults.
    given = {key: value for key in fields if (value := getattr(keys, key)) != fields[key].default}
    try:
        return _ADAPTER.validate_python(given | {"objective": keys.objective})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] != "extra_forbidden":
            raise ValueError(str(first.get("ctx", {}).get("error", first["msg"]))) from error
        key = first["loc"][-1]
        owner = next(name for name, cls in _CLASSES.items() if key in cls.model_fields)
        raise ValueError(
            f"train.{key} does nothing with train.objective {keys.objective}: it belongs to objective {owner}; remove it"
        ) from error
