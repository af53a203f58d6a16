"""Teachers, objectives, codecs and corpus formats of other installed packages, found by their entry points.

A package names them in its ``pyproject.toml``, and nothing in this package is edited:

    [project.entry-points."ray_distill.codecs"]
    half = "my_package.half_codec"

An entry point is imported when its name is first used, so an installed package that is broken stops only what uses it. The names of
this package come first: no installed package can change what a configuration without its names means.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Kind = Literal["teacher", "objective", "codec", "corpus format"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUPS: dict[Kind, str] = {
    "teacher": "ray_distill.teachers",
    "objective": "ray_distill.objectives",
    "codec": "ray_distill.codecs",
    "corpus format": "ray_distill.corpus_formats",
}
"""Groups of entry points."""


class PluginError(ValueError):
    """Something of another package that can't be used. The message names the package."""


@dataclass(frozen=True)
class Plugin:
    """A teacher, objective, codec or corpus format of another package.

    Attributes:
        kind: What it is.
        name: Name in a configuration.
        package: Name of the distribution, as ``pip list`` shows it.
        version: Version of the distribution.
        target: Module or object, as the entry point names it.
    """

    kind: Kind
    name: str
    package: str
    version: str
    target: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r} of the package {self.package} {self.version}"

    def load(self) -> Any:
        """Import and return the object that the entry point names.

        Raises:
            PluginError: The import fails, for whatever reason.
        """
        entry = metadata.EntryPoint(self.name, self.target, GROUPS[self.kind])
        try:
            return entry.load()
        except (Exception, SystemExit) as error:  # Foreign code may raise anything when it is imported.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PluginError(
                f"{self} can't be imported ({reason}); install what it needs, or another version"
            ) from error

    def run(self, function: str, call: Callable[[], T]) -> T:
        """Call a function of the plug-in.

        Args:
            function: Its name, for messages.
            call: What to call.

        Raises:
            ValueError: The function raised it, which is the way to refuse something.
            PluginError: The function doesn't take the arguments of its interface, or has a fault.
        """
        try:
            return call()
        except ValueError:
            raise
        except (AttributeError, ImportError, LookupError, NotImplementedError, TypeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PluginError(
                f"{self} failed in {function} ({reason}); install another version, or tell its authors"
            ) from error

    def lacks(self, what: str) -> PluginError:
        """Return the error for an object that isn't what its group asks for.

        Args:
            what: What is wrong, as a verb phrase, such as ``has no function find``.
        """
        return PluginError(f"{self} {what}, so it is no {self.kind}; install another version, or tell its authors")

    def record(self) -> dict[str, str]:
        """Return what a cache or a run notes of a plug-in that it needs."""
        return {"kind": self.kind, "name": self.name, "package": self.package, "version": self.version}


def find_plugin(kind: Kind, name: str) -> Plugin | None:
    """Return what installed packages call by a name, without importing it. None if there is nothing.

    Raises:
        PluginError: Two packages use the name.
    """
    found = [plugin for plugin in _installed(kind, tuple(sys.path)) if plugin.name == name]
    if len({plugin.package for plugin in found}) > 1:
        packages = " and ".join(sorted({plugin.package for plugin in found}))
        raise PluginError(f"the packages {packages} both have a {kind} {name!r}; uninstall one of them")
    return found[0] if found else None


def plugin_names(kind: Kind) -> list[str]:
    """Return the names that installed packages add, sorted."""
    return sorted({plugin.name for plugin in _installed(kind, tuple(sys.path))})


def of_packages(kind: Kind, own: Iterable[str]) -> str:
    """Return what follows the names of this package in a message: those that installed packages add, or nothing."""
    added = [name for name in plugin_names(kind) if name not in own]
    return f", and of other packages {', '.join(added)}" if added else ""


def shadowed(kind: Kind, own: Iterable[str]) -> list[str]:
    """Return a sentence for each installed package that uses a name of this package, which comes first."""
    return [
        f"{plugin} is not used, since ray-distill has a {kind} of that name itself; its authors can rename it"
        for plugin in _installed(kind, tuple(sys.path))
        if plugin.name in own
    ]


def missing_plugin(records: object, *kinds: Kind) -> str | None:
    """Return a phrase about the first plug-in of a record that is not installed here, or None if all are.

    Args:
        records: List of `Plugin.record`, as it was read from a file, which may be damaged.
        kinds: Kinds to look at. Default: all.
    """
    for record in records if isinstance(records, list) else []:
        if not isinstance(record, dict) or record.get("kind") not in (kinds or KINDS):
            continue
        kind, name = record["kind"], str(record.get("name"))[:100]
        if find_plugin(kind, name) is None:
            package = f"{str(record.get('package'))[:100]} {str(record.get('version'))[:40]}"
            return (
                f"the {kind} {name!r} of the package {package}, which is not installed here; install it on every node"
            )
    return None


@lru_cache(maxsize=16)
def _installed(kind: Kind, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """Return the plug-ins of all distributions on ``sys.path``, whose value makes the answer be looked up again if it changes."""
    found = []
    for entry in metadata.entry_points(group=GROUPS[kind]):
        package = entry.dist
        name, version = ("unknown", "") if package is None else (package.metadata["Name"], package.version)
        found.append(Plugin(kind, entry.name, str(name), version, entry.value))
    return tuple(sorted(set(found), key=lambda plugin: (plugin.name, plugin.package)))
