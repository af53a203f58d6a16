"""Names in sentences, and what a mistyped key, value or name may have meant."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

if TYPE_CHECKING:
    import pydantic  # The commands import this module for their recipes, and are to start fast.

_OTHER_NAMES = {
    "gpu": ("use_gpu",),
    "steps": ("max_steps",),
    "num_workers": ("workers",),
    "clip": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
    "ema": ("ema_decay",),
    "model": ("checkpoint",),
    "hidden_size": ("encoder_embed_dim",),
    "width": ("encoder_embed_dim",),
    "dim": ("encoder_embed_dim", "target_dim"),
    "layers": ("encoder_layers",),
    "num_layers": ("encoder_layers",),
    "num_heads": ("encoder_attention_heads",),
}
"""Names of other programs for our keys."""


def nearest(name: str, options: Iterable[str]) -> list[str]:
    """Return the options that a name may stand for, nearest first, at most three.

    A name stands for an option with similar letters, small or capital, for one whose words have its letters as initials (``lr`` for
    ``learning_rate``), and for one that other programs call so.

    Example:
        >>> nearest("lr", ["layers", "learning_rate", "loss"])
        ['learning_rate']
    """
    options, name = list(options), name.lower()
    known = [option for option in _OTHER_NAMES.get(name, ()) if option in options]
    initials = [o for o in options if "_" in o and "".join(word[:1] for word in o.split("_")) == name]
    found = known or initials or difflib.get_close_matches(name, options, n=3)
    if not found:
        other = difflib.get_close_matches(name, _OTHER_NAMES, n=1)
        found = [option for option in _OTHER_NAMES[other[0]] if option in options] if other else []
    return found[:3]


def by_nearness(name: str, options: Sequence[str]) -> list[str]:
    """Return all options, the one most like a name first."""
    return sorted(options, key=lambda option: -difflib.SequenceMatcher(None, name, option).ratio())


def enumerated(names: Iterable[str]) -> str:
    """Return different names as a text.

    Example:
        >>> enumerated(["a", "b", "a", "c"])
        'a, b and c'
    """
    *first, last = [*dict.fromkeys(names)] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def question(names: Sequence[str]) -> str:
    """Return the question whether one of some names was meant, or an empty string without names."""
    return f"did you mean {' or '.join(names)}?" if names else ""


def unknown_key(location: Sequence[int | str], model: "type[pydantic.BaseModel]", prefix: str) -> str:
    """Return what an unknown key may have meant: a key of its section, or else one of that name in another section.

    Args:
        location: Parts of the key.
        model: Model that has the sections.
        prefix: Dotted prefix of the model's keys, with its final dot, or an empty string.
    """
    owner: Any = model
    choices: list[Any] = []
    for part in location[:-1]:
        if isinstance(part, int) or part not in owner.model_fields:  # An index, or the name of a choice between types.
            named = [k for k in choices if part in (field.default for field in k.model_fields.values())]
            owner = named[0] if named and isinstance(part, str) else owner
            continue
        kind = owner.model_fields[part].annotation
        choices = [k for k in (kind, *_parts_of(kind)) if hasattr(k, "model_fields")]
        owner = choices[0] if choices else owner
    name, section = str(location[-1]), prefix + "".join(f"{part}." for part in location[:-1])
    everywhere = list(_all_keys(model, prefix))
    if (dotted := f"{section}{name}") in everywhere and "." in name:  # Only a file has such a key.
        inner = name.rpartition(".")[2]
        return f"in a file, write {inner} in the table {dotted.removesuffix(f'.{inner}')}"
    found = [f"{section}{key}" for key in nearest(name, owner.model_fields)]
    found = found or [key for key in everywhere if key.rpartition(".")[2] == name]
    last = nearest(name, {key.rpartition(".")[2] for key in everywhere}) if not found else []
    found = found or [key for key in everywhere if key.rpartition(".")[2] in last][:3]
    return question(found) or f"allowed here: {', '.join(sorted(owner.model_fields))}"


def wrong_word(message: str, value: Any) -> str:
    """Return pydantic's message about a value that is none of some words, with the nearest of these words.

    Example:
        >>> wrong_word("Input should be 'none' or 'alternate'", "altrnate")
        "must be 'none' or 'alternate', not 'altrnate'; did you mean alternate?"
    """
    near = question(nearest(str(value), re.findall(r"'([^']*)'", message))[:1])
    return f"{message.replace('Input should be', 'must be', 1)}, not {value!r}" + (f"; {near}" if near else "")


def _all_keys(model: "type[pydantic.BaseModel]", prefix: str) -> Iterator[str]:
    """Yield the dotted keys of a model and of the sections in it. Sections in a list have no dotted keys."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if get_origin(field.annotation) in (list, tuple):
            continue
        for kind in (field.annotation, *_parts_of(field.annotation)):
            if hasattr(kind, "model_fields"):
                yield from _all_keys(kind, f"{prefix}{name}.")


def _parts_of(kind: Any) -> Iterator[Any]:
    """Yield the types inside a type, such as those of a union or of a list's items."""
    for part in get_args(kind):
        yield part
        yield from _parts_of(part)
