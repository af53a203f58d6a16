"""A run's folder: where each of its files lies, and typed access to what they hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_distill.pipeline.config import Config, ConfigError, check_config
from ray_distill.student.training.run_files import CHECKPOINTS, METRICS, RESULT, TENSORBOARD


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, by what they hold. Nothing is read until it is asked for.

    Attributes:
        path: the folder, absolute.

    Example:
        >>> RunFolder(Path("/data/runs/demo")).report
        PosixPath('/data/runs/demo/report.html')
    """

    path: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def corpus(self) -> Path:
        """Folder of the corpus index."""
        return self.path / "corpus"

    @property
    def result_file(self) -> Path:
        """What the training came to; there once it is finished."""
        return self.path / RESULT

    @property
    def metrics_file(self) -> Path:
        """One JSON row for each logged step and validation."""
        return self.path / METRICS

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / TENSORBOARD

    @property
    def checkpoints(self) -> Path:
        """Folder of the training's state and of its best students."""
        return self.path / CHECKPOINTS

    @property
    def best(self) -> Path:
        """Folder of the student with the lowest validation loss."""
        return self.checkpoints / "best"

    @property
    def export(self) -> Path:
        """Folder of the exported student."""
        return self.path / "export"

    @property
    def summary_file(self) -> Path:
        """What the run came to, in short."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def initial_weights(self) -> Path:
        """First weights taken from the teacher, where the configuration asks for them."""
        return self.path / "initial.safetensors"

    @property
    def ray_log(self) -> Path:
        """What Ray wrote to standard error."""
        return self.path / "ray.log"

    @property
    def probes(self) -> Path:
        """Folder of probe results, one folder for each probe."""
        return self.path / "probes"

    @property
    def probe_records(self) -> list[Path]:
        """Records of all probes."""
        return sorted(self.probes.glob("*/probe.json"))

    @property
    def is_trained(self) -> bool:
        """Whether the training is finished."""
        return self.result_file.is_file()

    def config(self) -> Config:
        """The run's configuration. ConfigError where it is missing or damaged."""
        try:
            tree = yaml.safe_load(self.config_file.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{self.path} holds no run: there is no {self.config_file.name}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.config_file} is damaged: {' '.join(str(error).split())}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.config_file} is damaged: it holds no configuration")
        return check_config(tree)

    def result(self) -> dict[str, Any] | None:
        """What the training came to; None where it is not finished. ValueError where the file is damaged."""
        return _read_json(self.result_file)

    def summary(self) -> dict[str, Any] | None:
        """The run's summary; None where there is none yet. ValueError where the file is damaged."""
        return _read_json(self.summary_file)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of the metrics so far, without a last row that a kill or a write in progress cut off."""
        rows: list[dict[str, Any]] = []
        for line in self.metrics_file.read_text().splitlines() if self.metrics_file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged: it does not hold a JSON object")
    return tree
