"""The errors of a configuration's validation, in sentences for the user."""

import re
from typing import Any

import pydantic
from pydantic_core import ErrorDetails

from ray_distill.pipeline.composition.suggestions import unknown_key, wrong_word

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "string": "text",
}
"""What a value must be, by the first word of the type of pydantic's error."""


def explain(error: pydantic.ValidationError, model: type[pydantic.BaseModel], prefix: str) -> str:
    """Describe each validation error: its key, what is wrong, and the nearest known key or word.

    Args:
        error: Errors of pydantic.
        model: Model that was validated.
        prefix: Dotted prefix of the model's keys, with its final dot, or an empty string.
    """
    sentences = []
    for item in _without_alternatives(error.errors()):
        location = [str(part) for part in item["loc"]]
        key = prefix + ".".join(location)
        if item["type"] == "extra_forbidden":
            sentences.append(f"{key}: unknown key; {unknown_key(item['loc'], model, prefix)}")
        elif item["type"] == "missing":
            sentences.append(f"{key}: missing; this key is required")
        elif item["type"] == "literal_error":
            sentences.append(f"{key}: {wrong_word(item['msg'], item['input'])}{_without_unit(key, item['input'])}")
        elif item["type"] == "union_tag_invalid":
            context = item["ctx"]
            sentences.append(f"{key}: {wrong_word('must be ' + context['expected_tags'], context['tag'])}")
        elif item["type"] == "string_pattern_mismatch" and location[-1:] == ["name"]:
            dot = "'.', " if "." in item["ctx"]["pattern"] else ""
            sentences.append(
                f"{key}: {item['input']!r} can't be a name; use letters from a to z, digits, {dot}'_' and '-', and begin with a "
                "letter or digit"
            )
        elif item["type"] in ("model_type", "model_attributes_type", "dict_type"):
            what = {list: "a list", type(None): "no value"}.get(type(item["input"]), "a single value")
            sentences.append(f"{key}: {item['input']!r} is {what}, but this key needs a table of keys and values")
        elif item["type"] == "value_error":
            reason = str(item["ctx"]["error"])
            sentences.append(
                f"{key}: {reason}" if location else f"{prefix.rstrip('.')}: {reason}" if prefix else reason
            )
        else:
            sentences.append(f"{key.removesuffix('.[key]')}: {_wrong_value(key, item)}")
    return "; ".join(sentences)


def _wrong_value(key: str, item: ErrorDetails) -> str:
    """Say what a value must be, and what it is."""
    value, kind = item["input"], _KINDS.get(item["type"].partition("_")[0])
    if value is None:
        return f"has no value; it must be {kind}" if kind else "has no value"
    if item["type"] == "string_type" and isinstance(value, list | dict):
        return f"must be text, not {value!r}"
    if item["type"] == "string_type":
        name = "NAME" if key.endswith("[key]") else key.rpartition(".")[2]
        written = '"NAME":' if key.endswith("[key]") else f'{name}: "TEXT", or on the command line {name}=\'"TEXT"\''
        return f"must be text, but YAML reads it as {value}; put it in quotes, as in {written}"
    if kind and item["type"].endswith(("_type", "_parsing", "_from_float")):
        return f"must be {kind}, not {value!r}{_without_unit(key, value)}"
    message = re.sub("^(Value error, )?Input should be ", "must be ", item["msg"])
    return f"{message}, not {value!r}"


def _without_unit(key: str, value: Any) -> str:
    """Return how a number with a unit is written instead, such as 30 for ``30s``; an empty text for other values."""
    number = re.fullmatch(r"\s*[\d.,_]*\d\s*([A-Za-z]+|%)\s*", str(value))
    if number is None:
        return ""
    if number[1] == "%":
        return "; write a share without %, as in 0.4 for 40 %"
    unit = next((unit for unit in ("seconds", "minutes", "hours", "steps") if key.endswith(unit)), "")
    return f"; write the number alone{', in ' * bool(unit)}{unit}"


def for_teacher(name: str, sentence: str) -> str:
    """Return a sentence about a run of one teacher as one about one of several, with the keys that it has there."""
    sentence = re.sub(r"\bcache\.(?=[a-z_])", f"teachers.{name}.cache.", sentence)
    return f"teachers.{name}: " + re.sub(r"\bteacher\.(?=[a-z_])", f"teachers.{name}.", sentence)


def _without_alternatives(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Return the errors, with one where a key takes some words or another type, and the value is a mistyped word or no number.

    Pydantic reports an error for each type there, and names the type in the location.
    """
    kept: list[ErrorDetails] = []
    for item in errors:
        place, value = item["loc"][:-1], item["input"]
        same = [other for other in errors if other["loc"] and other["loc"][:-1] == place and other["input"] is value]
        words = [other for other in same if str(other["loc"][-1]).startswith("literal[")]
        numbers = [other["type"] for other in same if other["type"].startswith(("float_", "int_"))]
        if not words or not (isinstance(value, str) or len(words) + len(numbers) == len(same)):
            kept.append(item)
        elif item in words:
            message = item["msg"]
            if numbers:
                kind = "a whole number" if numbers[0].startswith("int_") else "a number"
                unit = " of seconds" if str(place[-1]).endswith("_seconds") else ""
                message = message.replace("should be ", f"should be {kind}{unit} or ", 1)
            kept.append(ErrorDetails(**{**item, "loc": place, "msg": message}))
    return kept
