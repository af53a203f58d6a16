"""Upload of a student to the Hugging Face Hub, with its card."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_distill.first_line import first_line
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.publishing.public_origin import public_origin
from ray_distill.student.exporters.huggingface import export_huggingface
from ray_distill.student.exporters.origin import Origin
from ray_distill.student.exporters.portable import Features, default_features
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.teachers import TeacherError, split_options
from ray_distill.teacher_cache.teachers.hub.hub_name import PREFIX, HubName, parse_hub_name

_KEPT = (".gitattributes",)
"""Files that the hub itself makes."""


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model card that a run does not record.

    Attributes:
        license: Identifier of the license, such as ``apache-2.0``.
        languages: Codes of the languages of the training audio, such as ``en``.
        datasets: Names of the training data on the hub, such as ``openslr/librispeech_asr``.
    """

    license: str
    languages: Sequence[str] = ()
    datasets: Sequence[str] = ()


def push_student(
    student: Student,
    origin: Origin,
    name: str,
    facts: CardFacts,
    *,
    features: Features | None = None,
    private: bool = False,
    force: bool = False,
) -> str:
    """Export a student for transformers and upload the export in one commit.

    The record of the origin in the export holds no absolute path of this machine.

    Args:
        student: Student to publish.
        origin: Record of its origin.
        name: ``OWNER/NAME`` on the hub. The repository is created if there is none.
        facts: Facts for the card.
        features: Features of the export; see `export_student`. Default: those that the method's authors evaluate.
        private: Whether a new repository is private. Default: False.
        force: Whether to replace the files of a repository that has some. Default: False.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: There is no token, it may not write, the repository has files, or the hub can't be reached.
        ValueError: The student can't be exported.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        hub_name = parse_hub_name(f"hf://{name}")
    except TeacherError:
        raise ConfigError(f"{name!r} is not the name of a repository on the hub; write OWNER/NAME") from None
    assert hub_name is not None, "the prefix makes it a name on the hub or an error"
    if hub_name.revision is not None:
        raise ConfigError(
            f"{name} names a revision, but a student is pushed to the default branch; leave out the revision"
        )
    if constants.is_offline_mode():
        raise ConfigError(f"HF_HUB_OFFLINE is set, so nothing can be pushed to {name}; unset it")
    if get_token() is None:
        raise ConfigError(f"pushing to {name} needs a token that may write there; set HF_TOKEN, or run `hf auth login`")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / hub_name.repository.rpartition("/")[2]
        features = features or default_features(student.config)
        export_huggingface(student, folder, public_origin(origin) | {"features": features}, features)
        write_card(folder, hub_name, origin, facts)
        api = HfApi()
        with _push_errors(hub_name):
            try:
                present = [file for file in api.list_repo_files(hub_name.repository) if file not in _KEPT]
            except RepositoryNotFoundError:
                present = []
                api.create_repo(hub_name.repository, private=private)
        if present and not force:
            raise ConfigError(
                f"{name} already has {len(present)} files, such as {present[0]}; choose another name, or replace them with --force"
            )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        added = [str(path.relative_to(folder)) for path in files]
        with _push_errors(hub_name):
            commit = api.create_commit(
                hub_name.repository,
                [
                    *(CommitOperationDelete(file) for file in present if file not in added),
                    *(CommitOperationAdd(file, path) for file, path in zip(added, files, strict=True)),
                ],
                commit_message="Upload a student distilled by ray-distill",
            )
    return commit.commit_url


def write_card(folder: Path, name: HubName, origin: Origin, facts: CardFacts) -> None:
    """Complete the card of an export for transformers.

    Args:
        folder: Folder of the export, with its README.md.
        name: Name of the model on the hub.
        origin: Record of its origin.
        facts: Facts that the record lacks.
    """
    card = folder / "README.md"
    named = [origin.get("teacher_source"), *(one.get("teacher_source") for one in origin.get("teachers") or ())]
    on_hub = [place for text in named if text and (place := split_options(text)[1]).startswith(PREFIX)]
    sources = [source for place in on_hub if (source := parse_hub_name(place)) is not None]
    metadata = [f"license: {json.dumps(facts.license)}"]
    for key, values in (
        ("language", facts.languages),
        ("datasets", facts.datasets),
        ("base_model", [source.repository for source in sources]),
    ):
        metadata += [f"{key}:", *(f"- {json.dumps(value)}" for value in values)] if values else []
    text = card.read_text().replace("---\n", "\n".join(["---", *metadata, ""]), 1)
    card.write_text(text.replace("FOLDER", f'"{name.repository}"'))


@contextmanager
def _push_errors(name: HubName) -> Iterator[None]:
    """Turn the errors of ``huggingface_hub`` in the block into a ConfigError of one sentence."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.RepositoryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "use a token that may write there" if status in (401, 403) else "try again later"
        raise ConfigError(
            f"{name.repository} can't be written at {constants.ENDPOINT}, which answers {status}; {advice}"
        ) from error
    except Exception as error:  # Those of its HTTP client and its transfer library change between its versions.
        raise ConfigError(
            f"{name.repository} can't be uploaded to {constants.ENDPOINT} ({first_line(error)[:200]}); check the network"
        ) from error
