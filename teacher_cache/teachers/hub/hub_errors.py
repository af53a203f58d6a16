"""Sentences for what can go wrong between this program and the Hugging Face Hub."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ray_distill.first_line import first_line
from ray_distill.teacher_cache.teachers.hub.hub_name import HubName
from ray_distill.teacher_cache.teachers.known import suggestion
from ray_distill.teacher_cache.teachers.teacher import TeacherError


@contextmanager
def hub_errors(name: HubName, kind: Literal["model", "dataset"] = "model") -> Iterator[None]:
    """Turn the errors of ``huggingface_hub`` in the block into a TeacherError, or for a dataset a ValueError, of one sentence.

    The library passes on errors of its HTTP client and of its transfer library, which change between its versions, so every
    exception in the block counts as one of the library. Only calls of the library belong into the block.

    Args:
        name: Repository.
        kind: Kind of the repository. Default: ``model``.
    """
    try:
        yield
    except TeacherError:
        raise
    except Exception as error:
        raise (TeacherError if kind == "model" else ValueError)(_sentence(name, kind, error)) from error


def _sentence(name: HubName, kind: Literal["model", "dataset"], error: Exception) -> str:
    from huggingface_hub import constants, errors

    model = name.repository
    place, option, near = ("", "", suggestion(model)) if kind == "model" else ("datasets/", " --repo-type dataset", "")
    cause = error.__cause__ or error
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{model} is gated: its owner decides who may read it; accept its conditions on {constants.ENDPOINT}/{place}{model}, "
            "and set HF_TOKEN to a token of your account"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        token = "HF_TOKEN or `hf auth login` sets a token" if _has_no_token() else "your token may not read it"
        return (
            f"there is neither a file or folder {model} here nor a {kind} of that name at {constants.ENDPOINT} that you may read; "
            f"correct the name{near}, or if it is private or gated, note that {token}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {name.revision!r}; give a branch, a tag or a commit of it, or leave out the revision"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{model} is no file or folder here, HF_HUB_OFFLINE is set, and the {kind} of that name is not complete in the hub's "
            f"cache at {constants.HF_HUB_CACHE}; run `hf download {model}{option}` where there is a network, and set HF_HOME "
            "to the folder of that cache"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        advice = {
            401: "set HF_TOKEN to a valid token",
            403: "set HF_TOKEN to a token that may read it",
            404: "check the name and the revision",
            429: "try again later, or set HF_TOKEN, since users with a token have a higher limit",
        }.get(status, "try again later")
        return f"{model} can't be read from {constants.ENDPOINT}, which answers {status}; {advice}"
    if isinstance(cause, errors.FileMetadataError):
        return (
            f"{constants.ENDPOINT} does not answer as a Hugging Face Hub does; correct HF_ENDPOINT, or check the proxy"
        )
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return (
            f"{model} can't be stored in the hub's cache at {constants.HF_HUB_CACHE} ({os.strerror(cause.errno)}); set HF_HOME to a "
            "folder on another disk"
        )
    reason = first_line(cause)[:200].rstrip(".")
    return (
        f"{model} is no file or folder here, and can't be downloaded from {constants.ENDPOINT} ({reason}) and is not "
        f"complete in the hub's cache at {constants.HF_HUB_CACHE}; check the network, or give the path of a folder with the {kind}"
    )


def _has_no_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is None
