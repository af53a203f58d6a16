"""The folder of a run: paths of its files, typed access to their contents, and the one process that works on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from ray_distill.pipeline.composition.config_difference import told_differences
from ray_distill.pipeline.composition.sections import CacheSection
from ray_distill.pipeline.config import Config, ConfigError, check_config, dump_config
from ray_distill.pipeline.corpus.index import SKIPPED
from ray_distill.pipeline.files import check_room, read_json_object, write_text
from ray_distill.pipeline.run_lock import LockHolder, lock_run
from ray_distill.pipeline.run_plugins import PLUGINS, absent_plugin, note_plugins
from ray_distill.student.training.field_effects import CHANGES_NO_RESULT, fields_with, keys_with
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.student.training.run_files import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    METRICS,
    RAY,
    RESULT,
    TEACHER,
    TENSORBOARD,
)

_LENGTHS = ("epochs", "max_steps")
"""Keys of ``train`` that limit the length of a training."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. Files are read when a method is called.

    Attributes:
        path: Folder of the run, an absolute path.

    Example:
        >>> RunFolder(Path("/data/runs/demo")).report
        PosixPath('/data/runs/demo/report.html')
    """

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """Resolved configuration."""
        return self.path / CONFIG

    @property
    def corpus(self) -> Path:
        """Folder of the corpus index."""
        return self.path / "corpus"

    @property
    def skipped_files(self) -> Path:
        """Table of the audio files that the index skipped, with reasons."""
        return self.corpus / SKIPPED

    @property
    def failed_file(self) -> Path:
        """Table of the utterances that the cache lacks, with reasons. It exists if there are any."""
        return self.corpus / "failed.csv"

    def failed_file_of(self, name: str) -> Path:
        """The same for the cache of one of several teachers."""
        return self.corpus / f"failed-{name}.csv"

    @property
    def result_file(self) -> Path:
        """Result of the training. It exists once the training is finished."""
        return self.path / RESULT

    @property
    def metrics_file(self) -> Path:
        """Metrics: one JSON row per logged step and per validation."""
        return self.path / METRICS

    @property
    def starts_file(self) -> Path:
        """Commands that started or continued the training; see `run_starts`."""
        return self.path / "starts.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / TENSORBOARD

    @property
    def checkpoints(self) -> Path:
        """Folder of the training's state and of the best students."""
        return self.path / CHECKPOINTS

    @property
    def best(self) -> Path:
        """Folder of the student with the lowest validation loss."""
        return self.checkpoints / BEST

    @property
    def export(self) -> Path:
        """Folder of the exported student."""
        return self.path / EXPORT

    @property
    def summary_file(self) -> Path:
        """Summary of the run's results."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """HTML report."""
        return self.path / "report.html"

    @property
    def initial_weights(self) -> Path:
        """Initial weights copied from the teacher, if the configuration requests any."""
        return self.path / "initial.safetensors"

    @property
    def teacher_file(self) -> Path:
        """Commit of a teacher on the hub; see `stages.run_teacher`."""
        return self.path / TEACHER

    def teacher_file_of(self, name: str) -> Path:
        """The same for one of several teachers."""
        return self.teacher_file.with_stem(f"{self.teacher_file.stem}-{name}")

    @property
    def teacher_files(self) -> list[Path]:
        """Existing files with the commits of teachers on the hub."""
        return [
            path
            for path in (self.teacher_file, *sorted(self.path.glob(self.teacher_file_of("*").name)))
            if path.is_file()
        ]

    @property
    def dataset_file(self) -> Path:
        """Commit of a corpus on the hub; see `corpus.hub_dataset`."""
        return self.path / "dataset.json"

    @property
    def plugins_file(self) -> Path:
        """What the run needs of other packages; see `run_plugins`. It exists if there is anything."""
        return self.path / PLUGINS

    @property
    def ray(self) -> Path:
        """Folder of Ray's own records."""
        return self.path / RAY

    @property
    def ray_log(self) -> Path:
        """Standard error of Ray."""
        return self.path / "ray.log"

    @property
    def probes(self) -> Path:
        """Folder of probe results, with one folder per probe."""
        return self.path / "probes"

    @property
    def probe_records(self) -> list[Path]:
        """Records of all probes."""
        return sorted(self.probes.glob("*/probe.json"))

    @property
    def lock_file(self) -> Path:
        """Lock that the process working on the run holds."""
        return self.path / ".lock"

    @property
    def lock_record(self) -> Path:
        """Description of the process that holds the lock."""
        return self.path / ".lock-holder.json"

    @property
    def is_trained(self) -> bool:
        """Whether the training is finished."""
        return self.result_file.is_file()

    @property
    def has_results(self) -> bool:
        """Whether the folder contains anything that a run of another configuration must not replace.

        The configuration, Ray's log, the corpus index, the initial weights, the list of starts, the commits of teachers and corpus,
        and the list of plug-ins are made again where they differ, so they don't count. Neither do hidden files, which are locks and
        unfinished writes.
        """
        made_again = (
            self.config_file,
            self.ray_log,
            self.corpus,
            self.initial_weights,
            self.starts_file,
            self.teacher_file,
            self.plugins_file,
            self.dataset_file,
        )
        replaceable = {path.name for path in (*made_again, *self.path.glob(self.teacher_file_of("*").name))}
        return self.path.is_dir() and any(
            entry.name not in replaceable and not entry.name.startswith(".") for entry in self.path.iterdir()
        )

    def config(self) -> Config:
        """Return the run's configuration.

        Raises:
            ConfigError: The file is missing or damaged, or is not a configuration of this version.
        """
        try:
            tree = yaml.safe_load(self.config_file.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.path} is not the folder of a run: it has no {self.config_file.name}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.config_file} is damaged: {' '.join(str(error).split())}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.config_file} is damaged: it contains no configuration")
        try:
            return check_config(tree)
        except ConfigError as error:
            if (absent := absent_plugin(self.plugins_file)) is not None:
                raise ConfigError(f"the run {self.path} needs {absent}") from error
            raise

    def result(self) -> dict[str, Any] | None:
        """Return the result of the training, or None if it is not finished.

        Raises:
            ValueError: The file is damaged.
        """
        return read_json_object(self.result_file)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of the run, or None if it has no summary yet.

        Raises:
            ValueError: The file is damaged.
        """
        return read_json_object(self.summary_file)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of the metrics so far; see `read_rows`.

        Raises:
            ValueError: A row is damaged.
        """
        return read_rows(self.metrics_file)

    def check_room(self) -> None:
        """Raise a ValueError if nothing can be written into the folder, which need not exist yet."""
        check_room(self.path, "set runs=... to a folder that this user can write to")

    @contextmanager
    def begin(self, config: Config, *, shared: bool = False) -> Iterator[LockHolder | None]:
        """Lock the folder for a run of a configuration while the block runs, and store the configuration.

        If the block fails before it has made anything worth keeping, a folder that did not exist before is removed.

        Args:
            config: Configuration of the run.
            shared: Whether the folder belongs to the work that the runs of an ablation share, whose configuration may change.
                Default: False.

        Yields:
            The previous process that worked on the run if it was killed, or None.

        Raises:
            RunInUseError: Another process is working on the run.
            ConfigError: The folder contains results of another configuration.
            ValueError: Nothing can be written into the folder.
        """
        self.check_room()
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with lock_run(self.lock_file, self.lock_record) as previous:
            try:
                if not shared:
                    self.refuse_other_config(config, may_extend=True)
                    if self.has_results and (absent := absent_plugin(self.plugins_file)) is not None:
                        raise ConfigError(f"the run {self.path} needs {absent}")
                    self._reopen_extended(config)
                write_text(self.config_file, dump_config(config))
                note_plugins(self.plugins_file, config)
                yield previous
            except BaseException:
                if new and not self.has_results and not self.corpus.exists():
                    self._remove(new)
                raise

    def _remove(self, folders: list[Path]) -> None:
        """Remove the run's folder, which has no results, and those of its parents that were made with it and are empty."""
        for file in self.path.iterdir():
            file.unlink()
        for folder in folders:
            if any(folder.iterdir()):
                break
            folder.rmdir()

    @property
    def finished_before(self) -> list[Path]:
        """Results of trainings that were finished, and then made longer."""
        return sorted(self.path.glob("train-[0-9]*.json"))

    def would_continue(self, config: Config) -> bool:
        """Return whether the training is finished, and the configuration makes it longer."""
        return self.result() is not None and _is_longer(config, self._recorded_config())

    def _reopen_extended(self, config: Config) -> None:
        """Set the result of a finished training aside, as ``train-STEPS.json``, if the configuration makes it longer."""
        result = self.result()
        if result is not None and self.would_continue(config):
            self.result_file.rename(self.path / f"train-{result['steps']:06d}.json")

    def refuse_other_config(self, config: Config, *, may_extend: bool = False) -> None:
        """Check that the folder contains no results of another configuration.

        Keys that don't change a run's result (`CHANGES_NO_RESULT`) may differ, and so may everything while the folder has no
        results: a corrected configuration may replace one that failed early.

        Args:
            config: Configuration of the run.
            may_extend: Whether ``train.epochs`` and ``train.max_steps`` may make the recorded training longer. Default: False.

        Raises:
            ConfigError: The folder contains results of another configuration, or of an unknown one.
        """
        if not self.has_results:
            return
        recorded = self._recorded_config()
        mine = _result_keys(config.model_dump(mode="json"))
        if may_extend and _is_longer(config, recorded):
            recorded["train"] |= {key: mine["train"][key] for key in _LENGTHS}
        if None in (mine["cache"]["shard_minutes"], recorded["cache"].get("shard_minutes")):
            # One of them is that of the cache, which is compared when the cache is opened.
            mine["cache"]["shard_minutes"] = recorded["cache"]["shard_minutes"] = None
        theirs = {section: value for section, value in _result_keys(recorded).items() if section in mine}
        if differs := told_differences(theirs, mine):
            raise ConfigError(
                f"{self.path} holds a run with another configuration ({differs}); choose another name=..., or remove that folder"
                + ("; only a larger train.epochs or train.max_steps continues it" if may_extend else "")
            )

    def _recorded_config(self) -> dict[str, Any]:
        """Return the stored configuration, with the defaults of keys that are new since it was written."""
        advice = "choose another name=..., or remove that folder"
        try:
            tree = yaml.safe_load(self.config_file.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.path} contains files but no run (no {self.config_file.name}); {advice}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            tree = None
        if not isinstance(tree, dict) or not all(isinstance(tree.get(section), dict) for section in ("cache", "train")):
            raise ConfigError(
                f"{self.config_file} is damaged, so the configuration of the results in its folder is unknown; {advice}"
            )
        try:
            return Config.model_validate(tree).model_dump(mode="json")
        except pydantic.ValidationError:
            return tree  # It has a key that no longer exists; the comparison names its section.


def _is_longer(config: Config, recorded: dict[str, Any]) -> bool:
    """Return whether a configuration makes the recorded training longer, and no limit of it smaller."""
    train, old = config.train, recorded["train"]
    before, steps = (old.get(key) for key in _LENGTHS)
    if not isinstance(before, int) or train.epochs < before or (train.max_steps is not None and steps is None):
        return False
    if train.max_steps is not None and train.max_steps < steps:
        return False
    return (train.epochs, train.max_steps) != (before, steps)


def _result_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a configuration without the keys that don't change a run's result."""
    for key in keys_with(Config, CHANGES_NO_RESULT):
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node.pop(name, None)
    for entry in tree.get("teachers", ()):
        for name in fields_with(CacheSection, CHANGES_NO_RESULT):
            entry["cache"].pop(name, None)
    return tree
