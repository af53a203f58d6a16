"""Weights of teachers by the domain of the utterance: losses against a computation in NumPy, what is read, logged and refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_distill.student import Student, StudentConfig
from ray_distill.student.objectives.several_teachers import SeveralDistiller, SeveralLoss
from ray_distill.student.objectives.teacher_heads import TeacherHeads
from ray_distill.student.training.rank import Rank
from ray_distill.student.training.target_source import TeacherCache, several_readers
from ray_distill.student.training.train_settings import SeveralTeacherSettings, TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.student.training.validation import batch_loss, make_distiller, validate
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.targets.domains import Weight
from ray_distill.teacher_cache.targets.several_caches import SeveralCaches

from ..conftest import MASKS

OTHER = "random:2x48"
SPEECH_ONLY: Weight = {"speech": 1.0, "audio": 0.0}
BOTH: Weight = {"speech": 0.5, "audio": 3.0}
NUMBERS = 200.0
"""Frames of the optimiser step of which a batch is a part."""


@pytest.fixture
def domains(source_utterances: list[Utterance]) -> dict[str, str]:
    """The domain of each utterance: audio and speech in turn within each split."""
    seen = {"train": 0, "validation": 0}
    found = {}
    for utterance in source_utterances:
        found[utterance.id] = ("audio", "speech")[seen[utterance.split] % 2]
        seen[utterance.split] += 1
    return found


@pytest.fixture
def labels(tmp_path: Path, domains: dict[str, str]) -> Path:
    columns = {"id": list(domains), "speaker": [""] * 12, "text": [""] * 12, "domain": list(domains.values())}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    return tmp_path / "labels.parquet"


@pytest.fixture
def caches(tmp_path: Path, make_cache: Callable[..., CacheSpec]) -> dict[str, Path]:
    make_cache(tmp_path / "a", masks=MASKS)
    make_cache(tmp_path / "b", OTHER, masks=MASKS)
    return {"a": tmp_path / "a", "b": tmp_path / "b"}


@pytest.fixture
def readers(caches: dict[str, Path], labels: Path) -> Callable[..., tuple[SeveralCaches, SeveralCaches, str]]:
    """Opens both splits of both caches with weights, and returns the key of the source too."""

    def make(a: Weight = SPEECH_ONLY, b: Weight = BOTH) -> tuple[SeveralCaches, SeveralCaches, str]:
        found = [
            TeacherCache(name, str(caches[name]), (1, 2), "clean_and_masked", weight=weight, labels=str(labels))
            for name, weight in (("a", a), ("b", b))
        ]
        one, other, source = several_readers(found, MASKS, fresh=False)
        assert isinstance(one, SeveralCaches) and isinstance(other, SeveralCaches)
        return one, other, source.key

    return make


@pytest.fixture
def several(settings: Callable[..., TrainSettings]) -> Callable[..., SeveralTeacherSettings]:
    def make(a: Weight = SPEECH_ONLY, b: Weight = BOTH, **changes: Any) -> SeveralTeacherSettings:
        terms = [
            {"name": name, "settings": {"objective": "prediction"}, "num_layers": 2, "dim": dim, "weight": weight}
            for name, dim, weight in (("a", 32, a), ("b", 48, b))
        ]
        return SeveralTeacherSettings.model_validate(settings(**changes).model_dump() | {"terms": terms})

    return make


def by_hand(
    distiller: SeveralDistiller, caches: dict[str, Path], domains: dict[str, str], ids: list[str], draw: int | None
) -> tuple[dict[tuple[str, str], float], dict[str, int]]:
    """Return for each teacher and domain the summed error of utterances in NumPy, and the frames of each domain.

    The outputs of the student's layers are the only thing that PyTorch computes, utterance by utterance.
    """
    sums = {(name, domain): 0.0 for name in "ab" for domain in ("speech", "audio")}
    frames = {"speech": 0, "audio": 0}
    heads: dict[str, Any] = {"a": distiller.student.heads}
    others = distiller.parts[1].predictors[0]
    assert isinstance(others, TeacherHeads)
    heads["b"] = others.heads
    split = "train" if draw is not None else "validation"
    for name in ids:
        for k, teacher in enumerate("ab"):
            reader = CacheReader(caches[teacher], split, (1, 2))
            batch = reader.read([reader.ids.index(name)], draw)
            with torch.no_grad():
                outputs = distiller.student.layer_outputs(batch.waveforms, frame_mask=batch.frame_mask)[1]
            targets = batch.targets.numpy()[0].astype(np.float64)
            for layer, (output, head) in enumerate(zip(outputs, heads[teacher], strict=True)):
                weight, bias = (p.detach().numpy().astype(np.float64) for p in (head.weight, head.bias))
                errors = output[0].numpy().astype(np.float64) @ weight.T + bias - targets[layer]
                sums[teacher, domains[name]] += (0.1, 1.0)[layer] * np.square(errors).mean(1).sum()
            frames[domains[name]] += targets.shape[1] if k == 0 else 0
    return sums, frames


@pytest.mark.parametrize("balance", ["weights", "variance", "uncertainty"])
def test_losses_are_those_of_numpy(
    balance: str,
    caches: dict[str, Path],
    domains: dict[str, str],
    readers: Callable[..., tuple[SeveralCaches, SeveralCaches, str]],
    several: Callable[..., SeveralTeacherSettings],
    still: StudentConfig,
) -> None:
    reader, validation, _ = readers()
    chosen = several(balance=balance)
    distiller = make_distiller(Student(still), chosen, reader, validation)
    assert isinstance(distiller, SeveralDistiller)
    if distiller.balance.log_variance_bias is not None:
        distiller.balance.log_variance_bias.data = torch.tensor([0.5, -0.25])
    rows = [0, 3, 4, 5, 8]
    batch = reader.read(rows, 0)
    assert batch.domains == tuple(domains[name] for name in batch.ids) and len(set(batch.domains)) == 2
    found = batch_loss(distiller, batch, chosen, NUMBERS, cosines=True)
    assert isinstance(found, SeveralLoss)
    sums, frames = by_hand(distiller, caches, domains, batch.ids, 0)
    # A frame counts by the weight of its domain; the divisor is the frames of the step, whatever their domain.
    losses = {key: value / NUMBERS for key, value in sums.items()}
    expected = 0.0
    for k, (teacher, weights) in enumerate((("a", SPEECH_ONLY), ("b", BOTH))):
        assert isinstance(weights, dict)
        for domain, weight in weights.items():
            loss = losses[teacher, domain]
            if balance == "variance":
                loss /= _size(caches[teacher], domains, [domain for domain, one in weights.items() if one])
            if balance == "uncertainty":
                log_variance = (0.5, -0.25)[k]
                loss = np.exp(-log_variance) * loss + log_variance * frames[domain] / NUMBERS
            expected += weight * loss
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    assert found.teachers().tolist() == pytest.approx(
        [
            losses["a", "speech"],
            losses["a", "speech"],
            losses["b", "speech"] + losses["b", "audio"],
            losses["b", "speech"],
            losses["b", "audio"],
        ],
        rel=1e-5,
    )
    # Two batches of a step add up to its loss.
    parts = [batch_loss(distiller, reader.read(some, 0), chosen, NUMBERS).total.item() for some in (rows[:2], rows[2:])]
    assert sum(parts) == pytest.approx(found.total.item(), rel=1e-5)


def _size(cache: Path, domains: dict[str, str], counted: list[str]) -> float:
    """Return the weighted sum of the variances of the layers over the validation utterances of some domains."""
    reader = CacheReader(cache, "validation", (1, 2))
    batches = [reader.read([row], None) for row, name in enumerate(reader.ids) if domains[name] in counted]
    values = np.concatenate([batch.targets.numpy()[0] for batch in batches], 1).astype(np.float64)
    variances = values.var(1).mean(1)
    return float(0.1 * variances[0] + variances[1])


def test_equal_weights_are_the_same_as_a_number(
    readers: Callable[..., tuple[SeveralCaches, SeveralCaches, str]],
    several: Callable[..., SeveralTeacherSettings],
    still: StudentConfig,
) -> None:
    gradients = []
    for b in (2.0, {"speech": 2.0, "audio": 2.0}):
        reader, _, _ = readers(1.0, b)
        chosen = several(1.0, b)
        torch.manual_seed(0)
        distiller = make_distiller(Student(still), chosen, reader)
        loss = batch_loss(distiller, reader.read([0, 3, 4, 5], 0), chosen, NUMBERS, cosines=True)
        loss.total.backward()
        gradients.append([loss.total, loss.per_layer, loss.agreement(), *(p.grad for p in distiller.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_targets_without_a_weight_are_not_read(
    readers: Callable[..., tuple[SeveralCaches, SeveralCaches, str]],
    several: Callable[..., SeveralTeacherSettings],
    domains: dict[str, str],
    still: StudentConfig,
) -> None:
    reader, _, _ = readers()
    audio = [row for row, name in enumerate(reader.ids) if domains[name] == "audio"]
    batch = reader.read(audio[:2], 0)
    assert batch.present is not None and batch.present.tolist() == [[False, True]] * 2
    whole, _, _ = readers({"speech": 1.0, "audio": 1.0})
    whole.read(audio[:2], 0)
    assert reader.bytes_read < whole.bytes_read
    chosen = several()
    distiller = make_distiller(Student(still), chosen, reader).train()
    loss = batch_loss(distiller, batch, chosen, NUMBERS)
    loss.total.backward()
    assert loss.teachers().tolist()[:2] == [0, 0] and loss.teachers()[3] == 0
    assert all(head.weight.grad is not None and not head.weight.grad.any() for head in distiller.student.heads)
    assert len(readers({"speech": 1.0, "audio": 0.0}, {"speech": 1.0, "audio": 0.0})[0]) == len(reader) - len(audio)


def test_rows_have_losses_and_weights_by_domain(
    tmp_path: Path,
    caches: dict[str, Path],
    domains: dict[str, str],
    readers: Callable[..., tuple[SeveralCaches, SeveralCaches, str]],
    several: Callable[..., SeveralTeacherSettings],
    still: StudentConfig,
    rows: Callable[..., list[dict[str, Any]]],
) -> None:
    reader, validation, key = readers()
    chosen = several(max_steps=3, validate_every=3)
    distiller = make_distiller(Student(still), chosen, validation)
    assert isinstance(distiller, SeveralDistiller)
    row = validate(distiller, validation, chosen, Rank(), constant=True)
    sums, frames = by_hand(distiller, caches, domains, validation.ids, None)
    assert row["loss"] == pytest.approx(
        (sums["a", "speech"] + 0.5 * sums["b", "speech"] + 3 * sums["b", "audio"]) / sum(frames.values()), rel=1e-5
    )
    for teacher, domain in (("a", "speech"), ("b", "speech"), ("b", "audio")):
        expected = sums[teacher, domain] / frames[domain]
        assert row[f"teacher_loss_{teacher}.{domain}"] == pytest.approx(expected, rel=1e-5)
    assert row["teacher_loss_a"] == row["teacher_loss_a.speech"] and "teacher_loss_a.audio" not in row
    assert "constant_loss" not in row, "it is no function of the variances"
    train(still, chosen, reader, validation, tmp_path / "run")
    last = rows(tmp_path / "run")[-1]
    assert [last[f"teacher_weight_{name}"] for name in ("a.speech", "a.audio", "b.speech", "b.audio")] == [1, 0, 0.5, 3]
    assert last["teacher_loss_b"] == pytest.approx(last["teacher_loss_b.speech"] + last["teacher_loss_b.audio"])
    assert "teacher_weight_b" not in last and key == readers()[2]


def test_other_domains_are_another_source(
    labels: Path, readers: Callable[..., tuple[SeveralCaches, SeveralCaches, str]]
) -> None:
    key = readers()[2]
    assert key != readers(1.0, 1.0)[2]
    table = pq.read_table(labels)
    changed = ["audio" if name == "speech" else "speech" for name in table["domain"].to_pylist()]
    pq.write_table(table.set_column(3, "domain", pa.array(changed)), labels)
    assert key != readers()[2]
    pq.write_table(table.set_column(3, "domain", pa.array(["music", *changed[1:]])), labels)
    with pytest.raises(CacheError, match="^teachers.a.weight: 1 of .* have the domain music, but the weights are for"):
        readers()


def test_losses_of_codebooks_are_those_of_numpy(
    tmp_path: Path,
    make_cache: Callable[..., CacheSpec],
    labels: Path,
    domains: dict[str, str],
    settings: Callable[..., TrainSettings],
    still: StudentConfig,
) -> None:
    """The rule of SPEAR's authors: 1 for the speech teacher everywhere, 0 and 0.1 for the audio teacher."""
    weights: dict[str, dict[str, float]] = {"a": {"speech": 1.0, "audio": 1.0}, "b": {"speech": 0.0, "audio": 0.1}}
    none = MASKS.model_copy(update={"draws": 0})
    objective = {"objective": "mvq", "codebooks": "independent", "masked_weight": 1.0, "unmasked_weight": 0.5}
    found, terms = [], []
    for name, teacher, dim in (("a", "random:2x32", 32), ("b", OTHER, 48)):
        make_cache(tmp_path / name, teacher, masks=none, codec="mvq:2", layers=[2])
        place = {"weight": weights[name], "labels": str(labels)}
        found.append(TeacherCache(name, str(tmp_path / name), (2,), "clean_and_masked", **place))  # type: ignore[arg-type]
        terms.append({"name": name, "settings": objective, "num_layers": 1, "dim": dim, "weight": weights[name]})
    reader, _, _ = several_readers(found, none, fresh=True)
    values = settings(masks="fresh").model_dump() | {"terms": terms}
    chosen = SeveralTeacherSettings.model_validate(values)
    distiller = make_distiller(Student(still.model_copy(update={"heads": "none"})), chosen, reader)
    assert isinstance(distiller, SeveralDistiller)
    batch = reader.read([0, 3, 4, 5], 7)
    loss = batch_loss(distiller, batch, chosen, NUMBERS)
    expected = 0.0
    assert batch.domains is not None and set(batch.domains) == {"speech", "audio"} and batch.frame_mask is not None
    for row, name in enumerate(batch.ids):
        length, frames = int(batch.lengths[row]), int(batch.num_frames[row])
        mask = batch.frame_mask[row, :frames]
        with torch.no_grad():
            outputs = distiller.student.layer_outputs(batch.waveforms[row : row + 1, :length], frame_mask=mask[None])[0]
        x = outputs[-1][0].numpy().astype(np.float64)
        counted = np.where(mask.numpy(), 1.0, 0.5)
        for k, teacher in enumerate("ab"):
            if not weights[teacher][domains[name]]:
                continue  # Its targets are not read.
            predictor: Any = distiller.parts[k].predictors[0]
            symbols = batch.of_teacher(k).symbols[row, 0, :frames].numpy()  # (T, S)
            logits = np.stack(
                [
                    x @ w.T + b
                    for w, b in zip(*(p.detach().numpy() for p in (predictor.direct, predictor.bias)), strict=True)
                ]
            )
            likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))  # (S, T, entries)
            errors = -np.stack([likely[s, np.arange(frames), symbols[:, s]] for s in range(2)]).mean(0)
            expected += weights[teacher][domains[name]] * (errors * counted).sum() / NUMBERS
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
