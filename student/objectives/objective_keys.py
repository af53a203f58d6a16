"""All objectives, as a discriminated union and as the flat keys that configure them in the ``train`` section.

A new objective is a file beside this one and a member of `AnyObjective`; its keys become keys of ``train``. An objective of another
package is named by an entry point of the group ``ray_distill.objectives``, a subclass of `Objective`; its own keys are given in
``objective_options``, since they are not known before it is imported.
"""

import inspect
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic
from pydantic_core import PydanticCustomError

from ray_distill.plugins import find_plugin, plugin_names
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
OBJECTIVES = tuple(_CLASSES)
"""Names of the objectives of this package."""
_ADAPTER: pydantic.TypeAdapter[Objective] = pydantic.TypeAdapter(AnyObjective)


def _known_name(name: object) -> object:
    """Return the name of an objective of this package or of an installed one, which is not imported here."""
    if name in _CLASSES or (isinstance(name, str) and find_plugin("objective", name) is not None):
        return name
    *words, last = (f"'{word}'" for word in dict.fromkeys([*_CLASSES, *plugin_names("objective")]))
    raise PydanticCustomError("literal_error", "Input should be {words}", {"words": f"{', '.join(words)} or {last}"})


def _flat_keys() -> dict[str, tuple[Any, Any]]:
    """Return the fields of all objectives by name. Objectives may share a key that a common base class declares."""
    summaries = (f"``{name}``: {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]}" for name, cls in _CLASSES.items())
    name = pydantic.Field(
        default=next(iter(_CLASSES)),
        description=f"Training objective. {' '.join(summaries)} Or the name of one that an installed package adds.",
    )
    words: Any = Literal[tuple(_CLASSES)]
    kind: Any = Annotated[words | str, pydantic.BeforeValidator(_known_name), CHANGES_LOSS_MEANING]
    options: Any = pydantic.Field(default={}, description="Keys of an objective that an installed package adds.")
    keys: dict[str, tuple[Any, Any]] = {
        "objective": (kind, name),
        "objective_options": (Annotated[dict[str, Any], CHANGES_LOSS_MEANING], options),
    }
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
        objective_options: dict[str, Any] = {}
        loss: ErrorKind = "mse"

else:
    ObjectiveKeys = pydantic.create_model(
        "ObjectiveKeys", __module__=__name__, __doc__="Flat keys of all objectives; see `objective_of`.", **_flat_keys()
    )


def objective_of(keys: ObjectiveKeys) -> Objective:
    """Return the settings of the chosen objective. One of another package is imported.

    Raises:
        ValueError: a key of another objective is not at its default, or an option is unknown or has an impossible value.
        PluginError: the other package can't be imported, or has no `Objective` of that name.
    """
    fields = ObjectiveKeys.model_fields
    # Not a dump, which would leave out the names of a mixture's objectives as defaults.
    given = {key: value for key in fields if (value := getattr(keys, key)) != fields[key].default}
    given = {"objective": keys.objective} | {
        key: value for key, value in given.items() if key not in ("objective", "objective_options")
    }
    if keys.objective not in _CLASSES:
        return _of_package(keys.objective, given, keys.objective_options)
    if keys.objective_options:
        raise ValueError(
            f"train.objective_options does nothing with train.objective {keys.objective}, whose keys are keys of train; remove it"
        )
    try:
        return _ADAPTER.validate_python(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["type"] != "extra_forbidden":
            raise ValueError(str(first.get("ctx", {}).get("error", first["msg"]))) from error
        raise _unused(first["loc"][-1], keys.objective) from error


def _unused(key: object, objective: str) -> ValueError:
    owner = next(name for name, cls in _CLASSES.items() if key in cls.model_fields)
    return ValueError(
        f"train.{key} does nothing with train.objective {objective}: it belongs to objective {owner}; remove it"
    )


def _of_package(name: str, given: dict[str, Any], options: dict[str, Any]) -> Objective:
    """Return the settings of an objective of another package: keys of ``train`` that it shares, and options."""
    plugin = find_plugin("objective", name)
    assert plugin is not None, "the name was checked"
    cls = plugin.load()
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise plugin.lacks("is no subclass of ray_distill.student.objectives.objective.Objective")
    if cls.model_fields["objective"].default != name:
        raise plugin.lacks(f"has no default {name!r} for its field objective")
    for key in given.keys() - cls.model_fields.keys():
        raise _unused(key, name)
    for key in options:
        if key in ObjectiveKeys.model_fields:
            raise ValueError(f"train.objective_options: {key} is a key of train itself; set train.{key}")
    try:
        return cls.model_validate(given | options)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        own = sorted(cls.model_fields.keys() - ObjectiveKeys.model_fields.keys())
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"train.objective_options: {place} is unknown; {plugin} has {', '.join(own) or 'none'}"
            ) from error
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        raise ValueError(f"train.objective_options: {place + ': ' if place else ''}{reason}") from error
