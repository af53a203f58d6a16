"""A model on the Hugging Face Hub at one commit: its files, and their download into the hub's cache."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ray_distill.teacher_cache.teachers.hub.hub_errors import hub_errors
from ray_distill.teacher_cache.teachers.hub.hub_name import HubName
from ray_distill.teacher_cache.teachers.huggingface_folder import (
    EXTRACTOR_FILE,
    PROCESSOR_FILE,
    WEIGHT_FILES,
    HuggingFaceFolder,
)
from ray_distill.teacher_cache.teachers.teacher import TeacherError
from ray_distill.teacher_cache.teachers.weights import without_wrappers

_DESCRIPTIONS = ["config.json", EXTRACTOR_FILE, PROCESSOR_FILE, *(f"{name}.index.json" for name in WEIGHT_FILES)]
_SPECIAL = re.compile(r"([*?[])")
"""Characters with a meaning in the library's patterns of file names."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class HubModel:
    """A model on the hub whose descriptions (``config.json`` and other small files) are in the hub's cache.

    Attributes:
        name: Repository and commit.
        folder: Folder of the commit in the hub's cache. It may lack the weights.
        files: Sizes in bytes of all files of the commit by path; None if only those in ``folder`` are known, which is so
            without a network if another program downloaded them.
    """

    name: HubName
    folder: Path
    files: dict[str, int] | None

    @property
    def label(self) -> str:
        """Name for people to read, with the start of the commit."""
        return f"{self.name.repository}@{(self.name.revision or '')[:12]}"

    @property
    def description(self) -> HuggingFaceFolder:
        """The folder of the commit, for its configuration."""
        return HuggingFaceFolder(self.folder, self.label)

    @property
    def weight_files(self) -> list[str]:
        """Files with the weights, safetensors if there are any: a single file, or the shards that an index names.

        Raises:
            TeacherError: If there are none of PyTorch, or an index is damaged.
        """
        present = self._present()
        for name in WEIGHT_FILES:
            if name in present:
                return [name]
            if f"{name}.index.json" in present:
                shards = self.description.shard_names(f"{name}.index.json")
                if missing := [shard for shard in shards if self.files is not None and shard not in self.files]:
                    raise TeacherError(
                        f"{self.label} lacks {missing[0]}, a shard that its {name}.index.json names; use another one"
                    )
                return shards
        if self.files is None:
            raise self.incomplete("the weights")
        others = sorted(path for path in present if path.endswith((".h5", ".msgpack", ".onnx", ".gguf", ".pt")))
        has = f"only {', '.join(others[:3])}" if others else "no weights"
        raise TeacherError(
            f"{self.label} has {has}, but a teacher needs {' or '.join(WEIGHT_FILES)}, or one of them in shards with an index"
        )

    @property
    def missing(self) -> dict[str, int]:
        """Sizes in bytes of the files with weights that are still to be downloaded, by path."""
        sizes = self.files or {}
        return {path: sizes.get(path, 0) for path in self.weight_files if not (self.folder / path).is_file()}

    def download(self) -> Path:
        """Download the weights that are missing, and return the folder. Several processes may do so at the same time."""
        from huggingface_hub import snapshot_download

        if self.missing:
            with hub_errors(self.name):
                patterns = [_SPECIAL.sub(r"[\1]", path) for path in self.weight_files]
                snapshot_download(self.name.repository, revision=self.name.revision, allow_patterns=patterns)
        return self.folder

    def shapes(self) -> dict[str, Tensor] | None:
        """Return tensors without memory that have the names, shapes and types of the weights.

        Only the headers of safetensors files are read, over the network. None for other weights.
        """
        from huggingface_hub import HfApi

        if not all(path.endswith(".safetensors") for path in self.weight_files):
            return None
        state: dict[str, Tensor] = {}
        for path in self.weight_files:
            with hub_errors(self.name):
                header = HfApi().parse_safetensors_file_metadata(
                    self.name.repository, path, revision=self.name.revision
                )
            try:
                for key, info in header.tensors.items():
                    state[key] = torch.empty(info.shape, dtype=_DTYPES.get(info.dtype, torch.int64), device="meta")
            except (TypeError, ValueError, RuntimeError) as error:
                raise TeacherError(f"{path} of {self.label} has a header with shapes that are not shapes") from error
        return state

    def incomplete(self, lacking: str) -> TeacherError:
        """Return the error for a copy in the hub's cache that lacks something which the hub might have."""
        return TeacherError(
            f"the copy of {self.label} in the hub's cache at {self.folder} lacks {lacking}, and the hub can't be reached; run "
            f"`hf download {self.name.repository}` where there is a network, or give the path of a folder with the model"
        )

    def _present(self) -> set[str]:
        """Return the paths of the commit's files, or what of them is in the cache if the list is unknown."""
        return {path.name for path in self.folder.iterdir()} if self.files is None else set(self.files)


class RemoteFolder(HuggingFaceFolder):
    """A Hugging Face folder whose weights are still on the hub: tensors of the right names and shapes, without memory."""

    is_local = False

    def __init__(self, model: HubModel, shapes: dict[str, Tensor]) -> None:
        super().__init__(model.folder, model.label)
        self._shapes = shapes

    def weights(self) -> dict[str, Tensor]:
        """See `HuggingFaceFolder.weights`."""
        return without_wrappers(self._shapes, self.name)


def open_hub_model(name: HubName) -> HubModel:
    """Find a model on the hub and download its descriptions, which are a few kilobytes.

    A branch or tag is resolved to its commit by one request. Nothing is requested for a commit that is in the hub's cache.
    The library reads its cache (``HF_HOME``), token (``HF_TOKEN``), mirror (``HF_ENDPOINT``) and offline mode
    (``HF_HUB_OFFLINE``) from the environment. Without a network, it takes what its cache has.

    Raises:
        TeacherError: If the model or revision does not exist, may not be read, or can't be reached and is not in the cache.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    with hub_errors(name):
        folder = Path(
            snapshot_download(name.repository, revision=name.revision, allow_patterns=_DESCRIPTIONS, tqdm_class=Silent)
        )
    commit = HubName(name.repository, folder.name)
    with hub_errors(name):
        try:
            listed = {file.path: file.size for file in get_cached_repo_tree(name.repository, revision=commit.revision)}
        except CachedRepoTreeNotFoundError:
            listed = None
    model = HubModel(commit, folder, listed)
    if listed is None and model.description.preprocessor_file is None:
        # Without a network, it is unknown whether the model has this file, which decides how waveforms are normalised.
        known = try_to_load_from_cache(name.repository, EXTRACTOR_FILE, revision=commit.revision)
        if known is None:
            raise model.incomplete(EXTRACTOR_FILE)
    if "config.json" not in model._present():
        raise TeacherError(
            f"{model.label} has no config.json, so it is not a model of transformers; name another model"
        )
    return model
