"""Effects of some differences from the published training, on a small student, a small trained teacher and real speech.

``python -m benchmarks.student.fidelity`` measures

1. ``micro_batches``: the gradient of an optimiser step if each accumulated batch counts by its frames (here) or equally (published);
2. ``padding``: the share of padded frames in a step's batches, by which the published loss is smaller;
3. ``optimizer``: the validation loss after a short training with AdamW (here) and with the published update and schedule, for
   several seeds, and the relative difference of the weights;
4. ``crop``: the teacher's layers for a crop alone (published DistilHuBERT) and for the same frames of the whole utterance (here);
5. ``mask_ramp``: the mask probability of four levels (here) and of a change after each epoch (published).
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances
from ray_distill.pipeline.published_config import DRAWS
from ray_distill.student import Student
from ray_distill.student.objectives.layer_prediction import LayerDistiller
from ray_distill.student.training.optimizer import PublishedUpdate, make_optimizer, schedule_factor
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, num_frames
from ray_distill.teacher_cache.targets.batch_sampler import plan_epoch
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms
from ray_distill.teacher_cache.teachers import Teacher, load_teacher


def step_gradient(distiller: LayerDistiller, micros: list[tuple[Tensor, ...]], weights: list[float]) -> Tensor:
    """Return the gradient of a weighted sum of the losses per frame of accumulated batches."""
    distiller.zero_grad()
    for (waveforms, lengths, targets), weight in zip(micros, weights, strict=True):
        (weight * distiller(waveforms, lengths, None, targets).total).backward()
    return torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])


@torch.no_grad()
def targets_of(teacher: Teacher, waves: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    waveforms, lengths = pad_waveforms(waves)
    return waveforms, lengths, teacher(waveforms, lengths)


def weighting(teacher: Teacher, waves: list[np.ndarray], steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    distiller = LayerDistiller(Student(small_student(teacher.num_layers, teacher.dim))).eval()
    lengths = np.array([len(wave) for wave in waves])
    options: dict[str, Any] = {"batch_seconds": None, "world_size": 1, "seed": 0, "epoch": 0}
    plan = plan_epoch(lengths, batch_size=3, accumulate=4, **options)[:steps]
    differences, cosines, spreads = [], [], []
    for micros in plan:
        batches = [targets_of(teacher, [waves[i] for i in indices]) for ranks in micros for indices in ranks]
        frames = [int(num_frames(batch[1]).sum()) for batch in batches]
        ours = step_gradient(distiller, batches, [count / sum(frames) for count in frames])
        equal = step_gradient(distiller, batches, [1 / len(batches)] * len(batches))
        differences.append(float((ours - equal).norm() / ours.norm()))
        cosines.append(float(torch.cosine_similarity(ours, equal, 0)))
        spreads.append(max(frames) / min(frames))
    padded = [
        1 - lengths[indices].sum() / (lengths[indices].max() * len(indices))
        for micros in plan_epoch(lengths, batch_size=18, accumulate=1, **options)
        for ranks in micros
        for indices in ranks
    ]
    return {
        "micro_batches": {
            "steps": len(plan),
            "largest_over_smallest_batch_in_frames": statistics.median(spreads),
            "relative_difference_of_gradients": statistics.median(differences),
            "cosine_of_gradients": statistics.median(cosines),
        },
        "padding": {"batch_size": 18, "mean_share_of_padding": float(np.mean(padded))},
    }


def train(teacher: Teacher, data: list[Tensor], held_out: list[Tensor], seed: int, steps: int, published: bool) -> Any:
    """Train on batches of four utterances, and return the weights and the validation loss."""
    torch.manual_seed(seed)
    student = Student(small_student(teacher.num_layers, teacher.dim))
    distiller = LayerDistiller(student)
    settings = TrainSettings(batch_size=4, optimizer="published" if published else "adamw")
    optimizer = make_optimizer(student, settings)
    assert isinstance(optimizer, PublishedUpdate) == published

    def order() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(data[0])).split(4)

    for step, rows in zip(range(steps), order(), strict=False):
        factor = schedule_factor(step, steps, settings.warmup_fraction, published=published)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        optimizer.zero_grad()
        waveforms, targets = data[0][rows], data[1][rows]
        distiller(waveforms, torch.full((len(rows),), waveforms.shape[1]), None, targets).total.backward()
        optimizer.step()
    student.eval()
    with torch.no_grad():
        lengths = torch.full((len(held_out[0]),), held_out[0].shape[1])
        loss = float(distiller(held_out[0], lengths, None, held_out[1]).total)
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()]), loss


def optimizers(
    teacher: Teacher, waves: list[np.ndarray], others: list[np.ndarray], seeds: int, steps: int
) -> dict[str, Any]:
    cut = 2 * 16_000

    def tensors(found: list[np.ndarray]) -> list[Tensor]:
        waveforms, _, targets = targets_of(teacher, [wave[:cut] for wave in found if len(wave) >= cut])
        return [waveforms, targets]

    data, held_out = tensors(waves[:80]), tensors(others[:20])
    rows = []
    for seed in range(seeds):
        (ours, ours_loss), (theirs, theirs_loss) = (
            train(teacher, data, held_out, seed, steps, published) for published in (False, True)
        )
        difference = float((ours - theirs).norm() / ours.norm())
        rows.append({"ours": ours_loss, "published": theirs_loss, "relative_difference_of_weights": difference})
    losses = [row["ours"] for row in rows]
    return {
        "steps": steps,
        "seeds": rows,
        "mean_relative_difference_of_losses": statistics.mean(row["published"] / row["ours"] - 1 for row in rows),
        "spread_of_ours_over_seeds": (max(losses) - min(losses)) / statistics.mean(losses),
    }


@torch.no_grad()
def crops(teacher: Teacher, waves: list[np.ndarray], count: int) -> dict[str, Any]:
    """Compare the teacher's layers for the middle 80 % of long utterances with those of the whole."""
    errors = []
    for wave in sorted(waves, key=len)[-count:]:
        start = len(wave) // 10 // FRAME_SAMPLES
        samples = int(0.8 * len(wave))
        whole = teacher(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))[0]
        part = wave[start * FRAME_SAMPLES : start * FRAME_SAMPLES + samples]
        alone = teacher(torch.from_numpy(part)[None], torch.tensor([samples]))[0]
        same = whole[:, start : start + alone.shape[1]]
        errors.append(((alone - same).norm(dim=(1, 2)) / same.norm(dim=(1, 2))).tolist())
    return {
        "utterances": count,
        "mean_relative_difference_by_layer": [statistics.mean(layer) for layer in zip(*errors, strict=True)],
    }


def ramp(first: float, last: float, epochs: int) -> dict[str, Any]:
    published = np.linspace(first, last, epochs + 1)[:epochs]
    levels = np.linspace(first, last, DRAWS)[np.arange(epochs) * DRAWS // epochs]
    difference = np.abs(published - levels)
    return {
        "from": first,
        "to": last,
        "epochs": epochs,
        "mean_difference": float(difference.mean()),
        "largest_difference": float(difference.max()),
    }


def main(
    output: Annotated[Path, typer.Option()] = RESULTS / "student" / "fidelity.json",
    seeds: Annotated[int, typer.Option()] = 3,
    steps: Annotated[int, typer.Option()] = 150,
) -> None:
    torch.set_num_threads(1)
    teacher = load_teacher(str(shared_data() / "teacher" / "hubert_small.pt"))
    waves, others = ([load_audio(u.path) for u in utterances(name, 900)] for name in (TRAIN, HELD_OUT))
    measured = weighting(teacher, waves, 8)
    measured |= {
        "optimizer": optimizers(teacher, waves, others, seeds, steps),
        "crop": crops(teacher, waves, 8),
        "mask_ramp": ramp(0.4, 0.8, 200),
    }
    write_result(output, **measured)
    print(output.read_text())


if __name__ == "__main__":
    typer.run(main)
