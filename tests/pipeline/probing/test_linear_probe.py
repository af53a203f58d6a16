"""Linear probes: what they find, and how results are shown."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import read_task
from ray_distill.pipeline.reports.probe_page import outcome_table, probe_page
from ray_distill.teacher_cache.frames import num_frames


def useless(layers: int = 1) -> FeatureSource:
    """Noise, which carries no information."""
    generator = torch.Generator().manual_seed(0)
    return FeatureSource("noise", layers, 8, lambda w: torch.randn(layers, num_frames(len(w)), 8, generator=generator))


def test_a_probe_finds_what_is_there_and_not_what_is_not(tones: Path) -> None:
    lines: list[str] = []
    mel, noise = run_probes(
        read_task(tones / "words.csv"), [FeatureSource.log_mel(), useless()], epochs=40, on_progress=lines.append
    )
    assert mel.metric == "error rate" and mel.value < 0.35 < 0.55 < noise.value
    assert mel.low <= mel.value <= mel.high
    assert mel.difference is None and noise.difference is not None
    value, low, high = noise.difference
    assert value == pytest.approx(noise.value - mel.value) and 0 < low <= value <= high
    assert len(lines) == 2 and "noise" in lines[1]


def test_training_until_a_probe_stops_improving(tones: Path) -> None:
    """It needs no number of epochs, and what noise can't teach ends soon."""
    mel, noise = run_probes(read_task(tones / "words.csv"), [FeatureSource.log_mel(), useless()])
    assert mel.value < 0.3 < 0.55 < noise.value
    assert mel.epochs is not None and noise.epochs is not None and 20 < mel.epochs < 500 > noise.epochs


def test_classes(tones: Path) -> None:
    def first_tone(wave: np.ndarray) -> torch.Tensor:
        return (
            FeatureSource.log_mel()
            .features(wave)[:, :19]
            .repeat(1, num_frames(len(wave)), 1)[:, : num_frames(len(wave))]
        )

    task = read_task(tones / "first.csv")
    good, noise = run_probes(task, [FeatureSource("first tone", 1, 80, first_tone), useless()], epochs=40)
    assert good.metric == "accuracy" and good.value > 0.9 > noise.value


def test_frames(tones: Path) -> None:
    """The pitch of each frame is found, and frames without a label don't count."""
    lines = ["path,frame_labels,split"]
    for line in (tones / "words.csv").read_text().splitlines()[1:]:
        name, word, split = line.split(",")
        frames = num_frames(1600 + 6400 * len(word))
        # A tone of 0.3 s follows each silence of 0.1 s; frames at a border have no label.
        places = [20 * n + 12.5 for n in range(frames)]
        labels = ["_" if t % 400 < 80 else word[int(t // 400)] if 120 < t % 400 < 380 else "-" for t in places]
        lines.append(f"{name},{' '.join(labels)},{split}")
    (tones / "frames.csv").write_text("\n".join(lines))
    task = read_task(tones / "frames.csv")
    mel, noise = run_probes(task, [FeatureSource.log_mel(), useless()], epochs=20)
    assert mel.metric == "frame error rate" and mel.value < 0.05 < 0.4 < noise.value


def test_frames_and_labels_must_agree(tones: Path) -> None:
    (tones / "frames.csv").write_text("path,frame_labels,split\n0.flac,a b,train\n1.flac,a a,test\n")
    with pytest.raises(ValueError, match=r"0.flac has 2 frame labels, but log-mel, 80 bands has \d+ frames"):
        run_probes(read_task(tones / "frames.csv"), [FeatureSource.log_mel()])


def test_the_weight_goes_to_the_layer_that_knows(tones: Path) -> None:
    mel, noise = FeatureSource.log_mel(bands=8), useless()

    def both(wave: np.ndarray) -> torch.Tensor:
        return torch.cat([noise.features(wave), mel.features(wave), noise.features(wave)])

    (outcome,) = run_probes(read_task(tones / "words.csv"), [FeatureSource("three layers", 3, 8, both)], epochs=40)
    assert sum(outcome.layer_weights) == pytest.approx(1)
    assert outcome.layer_weights[1] > 0.6


def test_the_same_seed_gives_the_same(tones: Path) -> None:
    task = read_task(tones / "words.csv")
    one, two = (run_probes(task, [FeatureSource.log_mel()], epochs=3)[0] for _ in range(2))
    assert one == two


def test_tables_name_everything(tones: Path) -> None:
    outcomes = run_probes(read_task(tones / "words.csv"), [useless(3), FeatureSource.log_mel()], epochs=1)
    page = probe_page("a < b", outcomes, "A note.")
    assert "a &lt; b" in page and "log-mel, 80 bands" in page and "A note." in page and "relative depth" in page
    assert len(outcome_table(outcomes).rows) == 2
