"""Datasets on the Hugging Face Hub as corpora: their files are downloaded into the hub's cache, and then read as any corpus is.

The library ``datasets`` is not needed, and no code of a dataset is run.
"""

import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ray_distill.pipeline.files import write_text

PREFIX = "hf://datasets/"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(
    rf"(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>refs/[a-z]+/[A-Za-z0-9]+|[A-Za-z0-9][A-Za-z0-9._-]*))?(?:/(?P<folder>.+))?"
)
_FILES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".gz", ".tar", ".arrow", ".flac", ".wav")
"""Suffixes of corpora. A name that ends in one is a path, even if there is no such file."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: Branch, tag or commit; None for the default branch.
        folder: Folder in the repository, such as a configuration; empty for all of it.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repository}{revision}{f'/{self.folder}' if self.folder else ''}"


def parse_hub_dataset(path: str | Path) -> HubDataset | None:
    """Return the dataset that a corpus's path names, or None if it is a path.

    ``hf://datasets/OWNER/NAME`` always names one, and ``OWNER/NAME`` does if there is no file or folder of that name. ``@REVISION``
    may follow both, and after ``hf://`` also ``/FOLDER``.

    Raises:
        ValueError: The path starts with ``hf://`` and is not followed by such a name.
    """
    text = str(path)
    explicit = re.match(r"hf:/{1,2}(datasets/)?", text)  # A Path has one slash.
    if explicit is None and (text.endswith(_FILES) or Path(text).expanduser().exists()):
        return None
    match = _NAME.fullmatch(text if explicit is None else text[explicit.end() :])
    folders = "" if match is None else match["folder"] or ""
    valid = match is not None and ".." not in text and "--" not in match["repository"]
    if valid and match is not None and (explicit is None or explicit[1]) and not (explicit is None and folders):
        return HubDataset(match["repository"], match["revision"], folders.strip("/"))
    if explicit is not None:
        raise ValueError(
            f"corpus.path: {text} is not the name of a dataset on the hub; write {PREFIX}OWNER/NAME, {PREFIX}OWNER/NAME@REVISION or "
            f"{PREFIX}OWNER/NAME/FOLDER"
        )
    return None


def resolve_dataset(dataset: HubDataset) -> HubDataset:
    """Return the dataset at the commit that its revision is now, for which the hub is asked unless it is a whole commit.

    Raises:
        ValueError: The hub has no such dataset or revision, or can't be reached and the dataset is not in its cache.
    """
    from huggingface_hub import snapshot_download

    if dataset.revision is not None and re.fullmatch("[0-9a-f]{40}", dataset.revision):
        return dataset
    with _errors(dataset):
        # The name of the folder is the commit, also without a network.
        found = snapshot_download(
            dataset.repository, repo_type="dataset", revision=dataset.revision, allow_patterns=["README.md"]
        )
    return HubDataset(dataset.repository, Path(found).name, dataset.folder)


def download_dataset(dataset: HubDataset) -> Path:
    """Download the files of a dataset that are missing in the hub's cache, and return the folder with them.

    Raises:
        ValueError: It can't be downloaded, or has no such folder.
    """
    from huggingface_hub import snapshot_download

    pattern = re.sub(r"([*?[])", r"[\1]", dataset.folder) + "/*" if dataset.folder else None
    with _errors(dataset):
        found = Path(
            snapshot_download(
                dataset.repository, repo_type="dataset", revision=dataset.revision, allow_patterns=pattern
            )
        )
    folder = found / dataset.folder
    if not folder.is_dir():
        raise ValueError(f"the dataset {dataset.repository} has no folder {dataset.folder!r} in this revision")
    return folder


def _errors(dataset: HubDataset) -> AbstractContextManager[None]:
    from ray_distill.teacher_cache.teachers.hub.hub_errors import hub_errors
    from ray_distill.teacher_cache.teachers.hub.hub_name import HubName

    return hub_errors(HubName(dataset.repository, dataset.revision), "dataset")


def dataset_of_run(file: Path, requested: HubDataset) -> HubDataset:
    """Return the commit of a dataset for a run: the one that it resolved before, since a branch may move, or else the present one.

    Args:
        file: File of the run that keeps the commit; see `keep_dataset`.
        requested: Dataset of the configuration.

    Raises:
        ValueError: The file is damaged, or as for `resolve_dataset`.
    """
    if file.is_file():
        try:
            kept = json.loads(file.read_text())
            if kept["requested"] == str(requested) and (resolved := parse_hub_dataset(kept["resolved"])) is not None:
                return resolved
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged; restore it from a copy, or remove it") from error
    return resolve_dataset(requested)


def keep_dataset(file: Path, requested: HubDataset | None, resolved: HubDataset | None) -> None:
    """Write the file that `dataset_of_run` reads, or remove it if the corpus is not on the hub."""
    if requested is None:
        file.unlink(missing_ok=True)
    else:
        write_text(file, json.dumps({"requested": str(requested), "resolved": str(resolved)}, indent=2) + "\n")
