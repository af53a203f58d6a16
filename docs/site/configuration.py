"""The page of the configuration: every key of a run's YAML file, with type, default and meaning."""

import json
from collections.abc import Container
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic_core import to_jsonable_python

INTRODUCTION = """\
# Configuration

A run is one YAML file, and `section.key=value` on the command line changes a key. Unknown keys and impossible combinations are
refused before any work begins. The folder `configs/` contains the published recipes. None is `null` in YAML.
Relative paths start at the working directory of the command, wherever the file is; only `base` starts at the file's folder.
`~` is the home folder; variables such as `$HOME` are refused, since only a shell replaces them.

`teacher=`, `corpus=` and `cache=` are short for `teacher.checkpoint=`, `corpus.path=` and `cache.path=`, also in the file. Where
`corpus=` names a corpus with none of the recipe's splits, the corpus's own splits are used, and a short key for teacher or corpus
replaces the recipe's cache with `caches/TEACHER-CORPUS-SPLITS`; the run says so. `ray-distill run RECIPE --print-config` shows the
resolved configuration and where each value comes from.

A file may begin with `base: NAME`, the path of another file (relative to this one) or a recipe, and then contains only what differs:

```yaml
base: armhubert-s-100
name: no-reuse
teacher: microsoft/wavlm-base-plus
student:
  attention_reuse: none
```

Editors that know YAML schemas complete and check keys by the comment in the first line of each recipe, which names
[the JSON schema](schema.json).

<style>.md-typeset td:nth-child(-n+2) code { white-space: nowrap; }</style>
"""
TYPES = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path", NoneType: "`null`"}
CHANGEABLE = " Can be changed for a run that has results."


def configuration() -> str:
    """Return the page as Markdown."""
    from ray_distill.pipeline.composition.sections import TeacherEntry
    from ray_distill.pipeline.config import Config
    from ray_distill.student.model.student_config import StudentConfig

    sections = {name: model for name, field in Config.model_fields.items() if (model := _section(field.annotation))}
    sections |= {"student": StudentConfig, "teachers": TeacherEntry}
    lines = [INTRODUCTION, *_table("", Config, leave_out=sections)]
    for name in (name for name in Config.model_fields if name in sections):
        lines += [f"## {name}", "", f"{Config.model_fields[name].description or ''}", ""]
        # The keys of the teachers' caches are those of `cache`.
        lines += _table(name, sections[name], nested=name != "teachers")
    return "\n".join(lines).replace("``", "`") + "\n"


def schema() -> str:
    """Return the JSON schema of a run's YAML file, for editors. Nothing is required, since a base may contain it."""
    from ray_distill.pipeline.composition.config_tree import SHORT_KEYS
    from ray_distill.pipeline.config import Config
    from ray_distill.student.model.student_config import StudentConfig

    student = StudentConfig.model_json_schema(ref_template="#/$defs/{model}")
    found = Config.model_json_schema()
    found["$defs"] |= student.pop("$defs", {})
    properties = found["properties"]
    for key in ("encoder_layers", "split_heads", "target_dim", "patches"):
        student["properties"][key] = _or(student["properties"][key], {"const": "teacher"})
    properties["student"] = student
    for section in SHORT_KEYS:
        properties[section] = _or(properties[section], {"type": "string"})
    entry = found["$defs"]["TeacherEntry"]["properties"]
    for key in ("cache", "objective"):
        entry[key] = _or(entry[key], {"type": "string"})
    properties["base"] = {"type": "string", "description": "File or recipe that this file changes."}
    text = json.dumps(_without_required(found), indent=1, ensure_ascii=False)
    return text.replace("``", "`") + "\n"


def _or(schema: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of values that fit either of two."""
    return {"description": schema.get("description", ""), "anyOf": [schema, other]}


def _without_required(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_required(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_required(value) for key, value in schema.items() if key != "required" or isinstance(value, dict)
    }


def _table(
    section: str, model: type[pydantic.BaseModel], leave_out: Container[str] = (), *, nested: bool = True
) -> list[str]:
    """Return the table of a section's keys, followed by the tables of the sections inside it if ``nested``."""
    from ray_distill.student.training.field_effects import CHANGES_NO_RESULT

    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    inner = []
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        key = f"{section}.{name}".lstrip(".")
        if not field.description:
            raise ValueError(f"{model.__name__}.{name} has no description; write a docstring under the field")
        meaning = " ".join(field.description.split()) + (CHANGEABLE if CHANGES_NO_RESULT in field.metadata else "")
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        cells = (f"`{key}`", _type(field.annotation), default, meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        if nested and (below := _section(field.annotation)) is not None:
            inner += [f"### {key}", "", *_table(key, below)]
    return [*lines, "", *inner]


def _section(kind: Any) -> type[pydantic.BaseModel] | None:
    """Return the model of a type that is a section, or may be one. None for other types."""
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
            return part
    return None


def _type(kind: Any) -> str:
    """Return a type in words, with values as code."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Literal, Union, UnionType):
        *words, last = _choices(kind)
        return f"{', '.join(words)} or {last}" if words else last
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        item = _type(arguments[0])
        return f"list of {item}{'s' if item in ('integer', 'number', 'section') else ''}"
    if origin is tuple:
        return f"[{', '.join(_type(argument) for argument in arguments)}]"
    return "section" if _section(kind) or origin is dict else TYPES[kind]


def _choices(kind: Any) -> list[str]:
    """Return the alternatives of a type in words, those of nested unions included."""
    if get_origin(kind) is Literal:
        return [f"`{value}`" for value in get_args(kind)]
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return list(dict.fromkeys(word for argument in get_args(kind) for word in _choices(argument)))
    return [_type(kind)]


def _default(value: Any) -> str:
    """Return a default as YAML."""
    if isinstance(value, pydantic.BaseModel):
        return "see below"
    plain = to_jsonable_python(value)
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


if __name__ == "__main__":
    Path(__file__).resolve().parents[2].joinpath("configs", "schema.json").write_text(schema())
