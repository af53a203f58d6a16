"""The sections of a run's configuration before they are checked: YAML files with a base, short keys, and changes by ``key=value``.

A file may begin with ``base:``, the path of another file (relative to this one) or the name of a recipe. It then contains only what
differs. Sections are merged key by key; lists and values replace those of the base. ``teacher``, ``corpus`` and ``cache`` may be given
as one text, which stands for ``teacher.checkpoint``, ``corpus.path`` and ``cache.path``.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_distill.local_paths import in_home
from ray_distill.pipeline.composition.yaml_text import load_yaml, read_yaml
from ray_distill.pipeline.corpus.hub_dataset import parse_hub_dataset
from ray_distill.pipeline.recipes import find_recipe, other_kind, other_recipes, recipe_name

SHORT_KEYS = {"teacher": "checkpoint", "corpus": "path", "cache": "path"}
"""Sections that one text may stand for, with the key that it sets."""

COMMAND_LINE = "command line"
_SECTIONS = ("corpus", "teacher", "masks", "cache", "student", "train")
_MAX_BASES = 16


class ConfigError(ValueError):
    """A configuration that can't be used. The message names the key and what would be allowed."""


@dataclass
class ConfigTree:
    """Sections of a configuration, and where their values come from.

    Attributes:
        tree: Sections by name, not yet checked.
        sources: By dotted key, the file or ``recipe NAME`` that set the value, or `COMMAND_LINE`. A key that is missing has a default.
        notes: Sentences about values of the recipe that a short key replaced, and about keys that were given twice.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def merge(self, sections: dict[str, Any], source: str) -> None:
        """Merge the sections of a file into this tree. Several teachers replace the teacher and its cache, and the other way round."""
        for given, replaced in (("teachers", ("teacher", "cache.path")), ("teacher", ("teachers",))):
            if sections.get(given):
                for key in replaced:
                    self._drop(key)
        _merge(self.tree, _expanded(sections), self.sources, source, "")

    def _drop(self, key: str) -> None:
        *sections, name = key.split(".")
        node = self.tree
        for section in sections:
            node = node.get(section, {})
        node.pop(name, None)
        for old in [old for old in self.sources if old == key or old.startswith(f"{key}.")]:
            del self.sources[old]

    def set(self, key: str, value: Any) -> None:
        """Set a dotted or short key from the command line; see `set_key`. A note says so if it replaces another value from there."""
        set_key(self.tree, key, value)
        long = long_key(key, value)
        if self.sources.get(long) == COMMAND_LINE:
            self.notes.append(f"{long} is given twice, and the last value counts: {value}")
        self.sources[long] = COMMAND_LINE

    def source_of(self, key: str) -> str | None:
        """Return where the value of a dotted key comes from; None for a default."""
        while key:
            if key in self.sources:
                return self.sources[key]
            key = key.rpartition(".")[0]
        return None

    def adapt_recipe(self, keys: Sequence[str]) -> None:
        """Drop what a recipe says about its own teacher and corpus, where the command line gave others by their short keys.

        The recipe's splits are dropped if the corpus has none of them, and the path of the recipe's cache is dropped, so that another
        teacher or corpus gets a cache of its own. Values from the command line stay.

        Args:
            keys: Keys that were given, as they were written.
        """
        if "corpus" in keys:
            self._drop_foreign_splits()
        if {"teacher", "corpus"} & set(keys) and self.source_of("cache.path") not in (None, COMMAND_LINE):
            del self.tree["cache"]["path"]
            self.sources.pop("cache.path", None)
            self.notes.append(
                f"the cache is {default_cache(self.tree)}, for this teacher and corpus; cache=PATH sets another"
            )
        if "corpus" in keys:
            self._drop_caches_of_teachers()
            if self.source_of("cache.audio_path") not in (None, COMMAND_LINE):
                del self.tree["cache"]["audio_path"]
                self.sources.pop("cache.audio_path", None)

    def _drop_caches_of_teachers(self) -> None:
        """Drop the paths of the caches of several teachers, unless they are from the command line."""
        names = []
        for entry in self.tree.get("teachers") or ():
            if not isinstance(entry, dict):
                continue
            name, cache = str(entry.get("name")), entry.get("cache")
            cache = {"path": cache} if isinstance(cache, str) else cache
            given = any(key.startswith(f"teachers.{name}.cache") for key in self.sources)
            if isinstance(cache, dict) and "path" in cache and not given:
                set_key(self.tree, f"teachers.{name}.cache", {k: v for k, v in cache.items() if k != "path"})
                names.append(name)
        if names:
            self.notes.append(
                f"the teachers {', '.join(names)} have caches for this corpus in caches/TEACHER-CORPUS-SPLITS"
            )

    def _drop_foreign_splits(self) -> None:
        corpus = self.tree["corpus"]
        lists = [key for key in ("train_splits", "validation_splits") if corpus.get(key)]
        recipes = [key for key in lists if self.source_of(f"corpus.{key}") != COMMAND_LINE]
        path = Path(str(in_home(corpus["path"])))
        names = [name for key in recipes for name in _names(corpus[key])]
        on_hub = parse_hub_dataset(path) is not None  # Its splits are known once it is downloaded.
        if not names or not (on_hub or path.exists()) or any(_has_folder(path, name) for name in names):
            return
        for key in recipes:
            del corpus[key]
            self.sources.pop(f"corpus.{key}", None)
        why = "is on the hub, and takes none of the recipe's splits" if on_hub else "has none of the recipe's splits"
        self.notes.append(
            f"{corpus['path']} {why} ({', '.join(names)}), so its own are used; corpus.train_splits and "
            "corpus.validation_splits name others"
        )


def compose(path: Path, overrides: Sequence[str] = ()) -> ConfigTree:
    """Read a YAML file with its bases, and apply changes.

    Args:
        path: YAML file.
        overrides: Changes of the form ``section.key=value``, where the value is YAML. Default: none.

    Raises:
        ConfigError: A file can't be read, the bases form a circle, or a change is malformed.
    """
    found = _read_with_bases(path)
    changes = [parse_override(text) for text in overrides]
    for key, value in changes:
        found.set(key, value)
    found.adapt_recipe([key for key, value in changes if long_key(key, value) != key])
    return found


def _read_with_bases(path: Path) -> ConfigTree:
    files: list[tuple[Path, dict[str, Any]]] = []
    current: Path | None = path
    while current is not None:
        if any(current.resolve() == known.resolve() for known, _ in files) or len(files) == _MAX_BASES:
            raise ConfigError(f"the bases of {path} form a circle: {current} is read twice; remove one `base:`")
        sections = read_tree(current)
        if other := other_kind(sections, "run"):
            raise ConfigError(f"{current} {other}")
        base = sections.pop("base", None)
        files.append((current, sections))
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"base in {current} must be the path of a file or the name of a recipe, not {base!r}")
        current = None if base is None else find_base(current, base)
    found = ConfigTree()
    for file, sections in reversed(files):
        recipe = recipe_name(file)
        found.merge(sections, str(file) if recipe is None else f"recipe {recipe}")
    return found


def find_base(file: Path, name: str) -> Path:
    """Return the base that a file names: a file relative to it, or a recipe."""
    beside = file.parent / name
    return beside if beside.is_file() else find_recipe(name)


def read_tree(path: Path) -> dict[str, Any]:
    """Return the sections of one YAML file without checking their keys.

    Raises:
        ConfigError: The file does not exist, is not valid YAML, or has no sections.
    """
    if not path.is_file():
        raise ConfigError(f"there is no configuration file at {path}; {other_recipes(path)}")
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"is a {type(tree).__name__}"
        raise ConfigError(f"{path} {what}, but must contain sections, such as corpus: and teacher:")
    return tree


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``section.key=value`` into the key and the value, which is parsed as YAML.

    Raises:
        ConfigError: The text has no key or no ``=``, or its value is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not an override; write section.key=value, such as train.epochs=3")
    if (plain := key.strip("+-~ ")) != key:
        raise ConfigError(f"{key!r} is not a key; write {plain}={value}")
    try:
        return key, load_yaml(value)
    except ValueError as error:
        raise ConfigError(f"the value of {key!r} is not valid YAML: {value!r} ({error})") from error


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, or a short key of `SHORT_KEYS`, in place. ``teachers.NAME.KEY`` is a key of one of several teachers,
    and ``teachers.NAME.cache`` with a text is the path of its cache.

    Raises:
        ConfigError: A part of the key before its last dot names a value instead of a section, or there is no such teacher.
    """
    *sections, name = long_key(key, value).split(".")
    node = tree
    if sections[:1] == ["teachers"] and len(sections) > 1:
        node, sections = _teacher_named(tree, sections[1], key), sections[2:]
    for section in sections:
        if section in SHORT_KEYS and isinstance(node.get(section), str):
            node[section] = {SHORT_KEYS[section]: node[section]}
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key!r} can't be set: {section!r} is a value, not a section")
    # YAML reads a path such as 2024 as a number.
    node[name] = str(value) if long_key(key, value) != key and not isinstance(value, list) else value


def _teacher_named(tree: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    """Return a copy of the table of one of several teachers, put in its place, so that a base's own list is unchanged."""
    entries = tree.get("teachers")
    names = [str(entry.get("name")) if isinstance(entry, dict) else "" for entry in entries or ()]
    if not isinstance(entries, list) or name not in names:
        known = f"they are {', '.join(names)}" if names else "the configuration has no list teachers"
        raise ConfigError(f"{key!r} can't be set: there is no teacher {name!r}; {known}")
    tree["teachers"] = copy.deepcopy(entries)
    entry: dict[str, Any] = tree["teachers"][names.index(name)]
    return entry


def default_cache(tree: dict[str, Any]) -> str:
    """Return the path of the cache of a configuration that names none: ``caches/TEACHER-CORPUS-SPLITS``.

    Runs with equal teachers, corpora and training splits thus share a cache, whatever their names. A discrete codec follows,
    as in ``caches/TEACHER-CORPUS-SPLITS-units-500``, since one teacher may have such a cache beside that of its layers.

    Args:
        tree: Sections with the keys ``teacher.checkpoint`` and ``corpus.path``.
    """
    from ray_distill.teacher_cache.codecs import is_discrete  # Imports PyTorch, which a command line can do without.

    cache = tree.get("cache")
    codec = str(cache.get("codec", "")) if isinstance(cache, dict) else ""
    kind = [codec] if codec and is_discrete(codec) else []
    return _in_caches(_teacher_name(str(tree["teacher"]["checkpoint"])), tree["corpus"], kind)


def with_default_audio(cache: dict[str, Any], corpus: dict[str, Any]) -> dict[str, Any]:
    """Return a section ``cache`` with the place of its audio, ``caches/audio-CORPUS``, if it needs one and names none."""
    if cache.get("audio") != "store" or cache.get("audio_path") is not None:
        return cache
    return cache | {"audio_path": _in_caches("audio", corpus)}


def _in_caches(name: str, corpus: dict[str, Any], more: Sequence[str] = ()) -> str:
    parts = [name, _last_part(str(corpus["path"])), *_names(corpus.get("train_splits")), *more]
    return "caches/" + re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-.")


def _names(value: Any) -> list[str]:
    """Return the names in a list that has not been checked; a single text or number stands for a list of one."""
    return [str(name) for name in value or ()] if isinstance(value, list | tuple) or value is None else [str(value)]


def _teacher_name(spec: str) -> str:
    """Return a name for a teacher: its options and the last part of its path, for a student the name of its run.

    Example:
        >>> _teacher_name("layer-norm:runs/first/export"), _teacher_name("runs/first/checkpoints/best")
        ('layer-norm:first', 'first-best')
    """
    match = re.fullmatch(r"((?:layer-norm:|mean-mask:)*)(.*?)/*", spec)
    options, path = match.groups() if match else ("", spec)
    folders = path.split("/")
    if len(folders) > 1 and folders[-1] == "export":
        path = folders[-2]
    elif len(folders) > 2 and folders[-2] == "checkpoints":
        path = f"{folders[-3]}-{folders[-1]}"
    return options + _last_part(path)


def _last_part(path: str) -> str:
    path = path.rstrip("/")
    name = Path(path.rpartition("/")[2])
    return name.stem if name.suffix in (".pt", ".csv", ".tsv", ".parquet", ".jsonl", ".yaml") else name.name


def _has_folder(path: Path, name: str) -> bool:
    return (path / name).is_dir() or (path.is_dir() and any((inner / name).is_dir() for inner in path.iterdir()))


def long_key(key: str, value: Any) -> str:
    """Return the dotted key that a short key stands for; other keys as they are. ``teachers.NAME.cache`` is short for its path.

    Raises:
        ConfigError: A short key has no value.
    """
    of_teacher = re.fullmatch(r"teachers\.[^.]+\.cache", key) is not None
    if not (key in SHORT_KEYS or of_teacher) or isinstance(value, dict):
        return key
    if value is None:
        raise ConfigError(f"{key}= has no value; write {key}={'NAME' if key == 'teacher' else 'PATH'}")
    return f"{key}.{SHORT_KEYS[key.rpartition('.')[2]]}"


def _expanded(sections: dict[str, Any]) -> dict[str, Any]:
    """Return the sections with short keys written out, without those that are empty and thus give no key."""
    return {
        name: {SHORT_KEYS[name]: str(value)} if long_key(name, value) != name else value
        for name, value in sections.items()
        if value is not None or name not in _SECTIONS
    }


def _merge(tree: dict[str, Any], addition: dict[str, Any], sources: dict[str, str], source: str, prefix: str) -> None:
    for name, value in addition.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            if not isinstance(tree.get(name), dict):
                tree[name] = {}
            _merge(tree[name], value, sources, source, f"{key}.")
            continue
        for old in [old for old in sources if old == key or old.startswith(f"{key}.")]:
            del sources[old]
        tree[name], sources[key] = value, source
