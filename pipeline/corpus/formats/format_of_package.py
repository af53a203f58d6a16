"""Corpus formats of other packages, which entry points of the group ``ray_distill.corpus_formats`` name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_distill.pipeline.corpus.formats.corpus_format import CorpusFormat
from ray_distill.pipeline.corpus.found import FoundFile, FoundFiles, Search
from ray_distill.plugins import Plugin, PluginError, find_plugin


@dataclass(frozen=True)
class FormatOfPackage:
    """A format of another package. What it raises, other than ValueError, is said with the package's name."""

    plugin: Plugin
    format: CorpusFormat

    def matches(self, path: Path) -> bool:
        """See `CorpusFormat.matches`."""
        return bool(self.plugin.run("matches", lambda: self.format.matches(path)))

    def find(self, path: Path, search: Search) -> Sequence[FoundFile]:
        """See `CorpusFormat.find`."""

        def listed() -> Sequence[FoundFile]:
            found = self.format.find(path, search)
            return found if isinstance(found, FoundFiles) else list(found)

        try:
            found: Sequence[FoundFile] = self.plugin.run("find", listed)
        except PluginError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.plugin} can't read {path}: {error}") from error
        if not isinstance(found, FoundFiles) and not all(isinstance(item, FoundFile) for item in found):
            raise self.plugin.lacks("returns something else than FoundFile from find")
        return found


def format_of_package(name: str) -> FormatOfPackage:
    """Import and return the format of that name of an installed package, which there must be.

    Raises:
        PluginError: It can't be imported, or is no `CorpusFormat`.
    """
    plugin = find_plugin("corpus format", name)
    assert plugin is not None, f"no package has the corpus format {name}"
    found = plugin.load()
    for function in ("matches", "find"):
        if not callable(getattr(found, function, None)):
            raise plugin.lacks(f"has no function {function}")
    return FormatOfPackage(plugin, found)
