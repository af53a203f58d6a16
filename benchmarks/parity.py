"""Cached against online training of one student, on real speech with a trained teacher: how many mask draws are enough?

``measure`` builds one cache with the most draws asked for, then trains the same student from the same start on the same batches: with
the teacher in the loop (a new mask of every utterance in every epoch), and from the cache with fewer and more of its draws. All are
validated on held-out speakers against uncompressed targets. ``plot`` draws the curves and prints the table.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import typer
from result_file import REPOSITORY, RESULTS, write_result
from small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances

from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.codecs import DEFAULT_CODEC
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.target_batch import Batch, TargetReader
from ray_distill.teacher_cache.teachers import load_teacher


class Remembered:
    """A reader that reads each batch once: validation with the teacher, without its cost every time."""

    def __init__(self, reader: TargetReader) -> None:
        self.num_samples, self.num_frames, self.layers, self.dim, self.draws = (
            reader.num_samples,
            reader.num_frames,
            reader.layers,
            reader.dim,
            reader.draws,
        )
        self._reader = reader
        self._batches: dict[tuple[int, ...], Batch] = {}

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See TargetReader; the clean pass only."""
        assert draw is None
        key = tuple(indices)
        if key not in self._batches:
            self._batches[key] = self._reader.read(indices, None)
        return self._batches[key]


def measure(
    seconds: Annotated[float, typer.Option(help="Training audio.")] = 900,
    steps: Annotated[int, typer.Option(help="Of each training.")] = 800,
    batch_seconds: Annotated[float, typer.Option(help="Padded audio of a batch.")] = 30,
    draws: Annotated[str, typer.Option(help="With commas.")] = "1,2,4,8",
    learning_rate: Annotated[float, typer.Option()] = 3e-3,
    seeds: Annotated[int, typer.Option()] = 2,
    codec: Annotated[str, typer.Option()] = DEFAULT_CODEC,
    threads: Annotated[int, typer.Option()] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A moment's training: only tries the script.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "parity.json",
) -> None:
    """Validation curves of online and cached training."""
    if quick:
        seconds, steps, draws, seeds = 20, 4, "1,2", 1
    torch.set_num_threads(threads)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint)
    counts = [int(count) for count in draws.split(",")]
    masks = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=10), draws=max(counts))
    training, validation = utterances(TRAIN, seconds), utterances(HELD_OUT, seconds / 3)
    layers = tuple(range(1, teacher.num_layers + 1))
    student = small_student(teacher.num_layers, teacher.dim)
    spec = CacheSpec(
        teacher=teacher.fingerprint,
        num_layers=teacher.num_layers,
        dim=teacher.dim,
        layers=layers,
        masks=masks,
        codec=codec,
        corpus="small speech",
        shard_seconds=300,
        batch_seconds=60,
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build_cache(cache, spec, plan_shards(training, 300), checkpoint, teacher_name="hubert_small", workers=None)
        # Utterance i is the same one for both readers, so that batch n is the same batch.
        by_id = {u.id: u for u in training}
        in_order = [by_id[name] for name in CacheReader(cache, "train").ids]
        exact = Remembered(OnlineReader(validation, teacher, masks, layers))
        for seed in range(seeds):
            for count in (None, *counts):
                reader: TargetReader = (
                    OnlineReader(in_order, teacher, masks, layers)
                    if count is None
                    else CacheReader(cache, "train", draws=count)
                )
                settings = TrainSettings(
                    epochs=100_000,
                    max_steps=steps,
                    batch_seconds=batch_seconds,
                    learning_rate=learning_rate,
                    validate_every=max(1, steps // 16),
                    log_every=10,
                    seed=seed,
                )
                run = Path(folder) / f"{count}-{seed}"
                result = train(student, settings, reader, exact, run)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                curve = [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]
                train_lines = [line for line in lines if line["kind"] == "train"]
                row = {
                    "targets": "online" if count is None else f"{count} draws" if count > 1 else "1 draw",
                    "seed": seed,
                    "last_validation_loss": result.last_validation_loss,
                    "last_training_loss": statistics.mean(line["loss"] for line in train_lines[-10:]),
                    "epochs": train_lines[-1]["epoch"] + 1,
                    "seconds": result.seconds,
                    "validation": curve,
                }
                rows.append(row)
                print(
                    f"seed {seed} {row['targets']:8} {row['last_validation_loss']:.5f} ({result.seconds:.0f} s)",
                    flush=True,
                )
                write_result(
                    output,
                    teacher="hubert_small",
                    train_seconds=sum(u.num_samples for u in training) / 16_000,
                    validation_seconds=sum(u.num_samples for u in validation) / 16_000,
                    codec=codec,
                    student=student.model_dump(mode="json"),
                    settings=settings.model_dump(mode="json", exclude={"seed"}),
                    rows=rows,
                )


def plot(
    source: Annotated[Path, typer.Option(help="What `measure` wrote.")] = RESULTS / "parity.json",
    output: Annotated[Path, typer.Option()] = REPOSITORY / "docs" / "draws.svg",
) -> None:
    """Curves, and each kind of targets' last loss against online's of the same seed; prints the table as Markdown."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "draws", "font.size": 9}
    from matplotlib import pyplot

    record = json.loads(source.read_text())
    names = list(dict.fromkeys(row["targets"] for row in record["rows"]))
    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    print("| targets | validation loss | change against online (each seed) | training loss |\n|---|---|---|---|")
    for number, name in enumerate(names):
        rows = [row for row in record["rows"] if row["targets"] == name]
        steps = [step for step, _ in rows[0]["validation"]]
        means = [statistics.mean(row["validation"][i][1] for row in rows) for i in range(len(steps))]
        color = "black" if name == "online" else f"C{number - 1}"
        curves.plot(steps[1:], means[1:], color=color, linestyle="--" if name == "online" else "-", label=name)
        online = {row["seed"]: row["last_validation_loss"] for row in record["rows"] if row["targets"] == "online"}
        changes = [100 * (row["last_validation_loss"] / online[row["seed"]] - 1) for row in rows]
        ends.plot([number] * len(changes), changes, "o", color=color)
        loss = statistics.mean(row["last_validation_loss"] for row in rows)
        training = statistics.mean(row["last_training_loss"] for row in rows)
        print(
            f"| {name} | {loss:.4f} | {statistics.mean(changes):+.2f} % "
            f"({', '.join(f'{change:+.2f}' for change in changes)}) | {training:.4f} |"
        )
    curves.set(xlabel="optimiser step", ylabel="validation loss")
    curves.legend(frameon=False)
    ends.axhline(0, color="0.8", zorder=0)
    ends.set_xticks(range(len(names)), names)
    ends.set_ylabel("last validation loss against online, %")
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    for command in (measure, plot):
        app.command()(command)
    app()
