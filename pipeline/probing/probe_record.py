"""Results of probes, stored in the folder of a run or of an ablation."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import Outcome
from ray_distill.pipeline.probing.task import Task, Units
from ray_distill.pipeline.reports.probe_page import probe_page
from ray_distill.pipeline.run_folder import RunFolder

_JSON = "probe.json"
_PAGE = "probe.html"


@dataclass(frozen=True)
class ProbeRecord:
    """A stored probe.

    Attributes:
        title: Title of the task.
        outcomes: One outcome for each feature source.
        settings: Settings that decide the results; see `probe_settings`.
        run_student: Index of the outcome of the run's own student; None if that student was not probed.
    """

    title: str
    outcomes: list[Outcome]
    settings: dict[str, Any]
    run_student: int | None

    @property
    def student(self) -> Outcome | None:
        """Outcome of the run's own student; None if that student was not probed."""
        return None if self.run_student is None else self.outcomes[self.run_student]

    @property
    def key(self) -> str:
        """Text that is equal for probes whose results can be compared."""
        return json.dumps(self.settings, sort_keys=True)


def probe_settings(manifest: Path, units: Units, epochs: int | None, seed: int) -> dict[str, Any]:
    """Return the settings that decide a probe's results, except for its sources: the manifest's SHA-256, units, epochs and seed."""
    return settings_of(hashlib.sha256(manifest.read_bytes()).hexdigest(), units, epochs, seed)


def settings_of(digest: str, units: Units, epochs: int | None, seed: int) -> dict[str, Any]:
    """Return the settings that decide a probe's results, from the digest of its utterances and targets instead of a manifest."""
    return {"manifest": digest, "units": units, "epochs": epochs, "seed": seed}


def probe_folder(folder: Path, title: str, settings: dict[str, Any]) -> Path:
    """Return where the folder of a run or ablation stores a probe; probes with other settings are stored in other folders."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return RunFolder(folder).probes / f"{title}-{digest[:8]}"


def write_outcomes(
    folder: Path,
    outcomes: Sequence[Outcome],
    task: Task,
    title: str,
    origin: dict[str, Any],
    settings: dict[str, Any],
    run_student: int | None = None,
) -> None:
    """Write ``probe.json`` and ``probe.html`` into a folder.

    Args:
        folder: Folder of this probe, as from `probe_folder`; it is created.
        outcomes: One outcome for each feature source.
        task: Labelled utterances.
        title: Title of the task.
        origin: Origin of each student.
        settings: Settings as from `probe_settings`.
        run_student: Index of the outcome of the run's own student, if it was probed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    test = sum(example.test for example in task.examples)
    train = len(task.examples) - test
    record = {
        "title": title,
        "kind": task.kind,
        "metric": task.metric,
        "train_utterances": train,
        "test_utterances": test,
        "vocabulary": len(task.vocabulary),
        "origin": origin,
        "settings": settings,
        "own": run_student,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    write_text(folder / _JSON, json.dumps(record, indent=2) + "\n")
    note = f"{train} training and {test} test utterances, {len(task.vocabulary)} classes or symbols."
    write_text(folder / _PAGE, probe_page(title, outcomes, note))


def read_probes(folder: Path, settings: dict[str, Any] | None = None) -> list[ProbeRecord]:
    """Return the probes stored in the folder of a run or ablation, ordered by title.

    Args:
        folder: Folder of the run or ablation.
        settings: If given, only probes with exactly these settings are returned.

    Raises:
        ValueError: A record is damaged.
    """
    found = [_read_probe(path) for path in RunFolder(folder).probe_records]
    return [probe for probe in found if settings is None or probe.settings == settings]


def refuse_other_results(folder: Path, settings: dict[str, Any], sources: Sequence[FeatureSource]) -> None:
    """Raise ValueError if a folder stores a probe with other settings or sources, which a new probe would overwrite."""
    path = folder / _JSON
    if not path.exists():
        return
    stored = _read_probe(path)
    if stored.settings != settings or [o.source for o in stored.outcomes] != [source.name for source in sources]:
        raise ValueError(
            f"{folder} holds a probe with other settings or sources; remove that folder, or choose another --output"
        )


def distinct_titles(probes: Sequence[ProbeRecord]) -> list[str]:
    """Return a distinct title for each probe: probes that share a title have their settings appended."""
    titles = []
    for probe in probes:
        shown: dict[str, Any] = {
            "manifest": lambda digest: digest[:8],
            "epochs": lambda count: count or "until it stops improving",
        }
        settings = ", ".join(f"{k} {shown.get(k, str)(v)}" for k, v in probe.settings.items())
        unique = sum(other.title == probe.title for other in probes) == 1
        titles.append(probe.title if unique else f"{probe.title} ({settings})")
    return titles


def _read_probe(path: Path) -> ProbeRecord:
    try:
        record = json.loads(path.read_text())
        outcomes = []
        for item in record["outcomes"]:
            difference = item.pop("difference")
            outcomes.append(Outcome(**item, difference=None if difference is None else tuple(difference)))
        probe = ProbeRecord(record["title"], outcomes, record.get("settings", {}), record.get("own"))
        _ = probe.student  # Raises IndexError if the index is out of range.
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a valid probe record ({error}); remove the file and run the probe again"
        ) from error
    return probe
