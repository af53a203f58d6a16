"""Objectives with discrete targets against independent computations, fresh masks, mixtures, and what they refuse."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.student import Student, StudentConfig
from ray_distill.student.objectives.codebook_prediction import CodebookPrediction, CodebookPredictor
from ray_distill.student.objectives.layer_prediction import LayerPrediction
from ray_distill.student.objectives.mixture import Mixture
from ray_distill.student.objectives.unit_prediction import UnitPrediction, UnitPredictor
from ray_distill.student.training.target_source import cached_source
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.targets.fresh_masks import FreshMasks
from ray_distill.teacher_cache.targets.target_batch import SymbolLayout

Settings = Callable[..., TrainSettings]
WAVEFORMS, LENGTHS = torch.randn(2, 6400, generator=torch.Generator().manual_seed(0)), torch.tensor([6400, 3000])
FRAMES = (19, 9)
MASK = torch.rand(2, 19, generator=torch.Generator().manual_seed(1)) < 0.5
MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=0, seed=3)


@pytest.fixture
def bare(still: StudentConfig) -> Student:
    """A student of two layers without heads and dropout."""
    torch.manual_seed(0)
    return Student(still.model_copy(update={"heads": "none"})).eval()


def symbols(layers: int, per_frame: int, alphabet: int) -> Tensor:
    """Return random targets (2, layers, 19, per_frame)."""
    return torch.randint(0, alphabet, (2, layers, 19, per_frame), generator=torch.Generator().manual_seed(2))


def last_layer(student: Student) -> list[tuple[int, int, bool, Tensor]]:
    """Return for each real frame its utterance, its number, whether it is masked, and the student's last layer."""
    states = student(WAVEFORMS, LENGTHS, MASK).layer(2)
    return [(b, t, bool(MASK[b, t]), states[b, t].detach()) for b, count in enumerate(FRAMES) for t in range(count)]


def frame_loss(projected: Tensor, embeddings: Tensor, unit: int) -> float:
    """Return fairseq's loss of a frame: a list with the right embedding first, and its copy among all embeddings taken out."""
    candidates = [embeddings[unit], *embeddings]
    logits = torch.stack([F.cosine_similarity(projected, candidate, 0) / 0.1 for candidate in candidates])
    logits[1 + unit] = -torch.inf
    return float(F.cross_entropy(logits[None], torch.tensor([0])))


@pytest.mark.parametrize(("masked", "unmasked"), [(1.0, 0.0), (1.0, 0.5), (0.0, 2.0)])
def test_units_as_in_fairseq(bare: Student, masked: float, unmasked: float) -> None:
    settings = UnitPrediction(masked_weight=masked, unmasked_weight=unmasked, unit_dim=6)
    torch.manual_seed(1)
    distiller = settings.distiller(bare, spec_augment=None, seed=0, symbols=SymbolLayout(2, 1, 11))
    targets = symbols(2, 1, 11)
    found = distiller(WAVEFORMS, LENGTHS, MASK, targets, cosines=True)
    sums, right = torch.zeros(2), torch.zeros(2, 3)
    for b, t, is_masked, x in last_layer(bare):
        weight = masked if is_masked else unmasked
        for layer, predictor in enumerate(distiller.predictors):
            assert isinstance(predictor, UnitPredictor)
            projected = predictor.projection(x).detach()
            unit = int(targets[b, layer, t, 0])
            sums[layer] += weight * frame_loss(projected, predictor.embeddings.detach(), unit)
            best = F.cosine_similarity(projected[None], predictor.embeddings, 1).argmax()
            right[1 - is_masked, layer] += float(weight > 0 and best == unit)
        right[1 - is_masked, 2] += float(weight > 0)
    torch.testing.assert_close(found.per_layer, sums / sum(FRAMES))
    torch.testing.assert_close(found.total, sums.sum() / sum(FRAMES))
    assert found.cosines is None
    assert found.accuracies is not None
    torch.testing.assert_close(found.accuracies.float(), right)
    found.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distiller.predictors.parameters())
    assert all(p.grad is not None for p in bare.layers.parameters())


def test_padding_and_batch_do_not_change_the_loss(bare: Student) -> None:
    distiller = UnitPrediction().distiller(bare, spec_augment=None, seed=0, symbols=SymbolLayout(1, 1, 11))
    targets = symbols(1, 1, 11)
    whole = distiller(WAVEFORMS, LENGTHS, MASK, targets)
    targets[1, :, 9:] = 0
    parts = [
        distiller(
            WAVEFORMS[b : b + 1, :n], LENGTHS[b : b + 1], MASK[b : b + 1, :f], targets[b : b + 1, :, :f], 28
        ).total
        for b, (n, f) in enumerate(zip((6400, 3000), FRAMES, strict=True))
    ]
    torch.testing.assert_close(whole.total, sum(parts))
    nothing = distiller(WAVEFORMS, LENGTHS, torch.zeros_like(MASK), targets, cosines=True)
    assert float(nothing.total.detach()) == 0
    nothing.total.backward()  # Batches without masked frames give zero gradients, not an error.
    assert nothing.accuracies is not None and nothing.accuracies[:, -1].tolist() == [0, 0]


def test_units_agree_with_fairseq(bare: Student) -> None:
    """The criterion's arithmetic in fairseq's own code, where it is installed."""
    hubert = pytest.importorskip("fairseq.models.hubert.hubert")
    settings = UnitPrediction(unit_dim=6)
    predictor = UnitPredictor(16, 11, 6, 0.1)
    x, units = torch.randn(7, 16), torch.randint(0, 11, (7,))
    model = type("Model", (), {"logit_temp": settings.unit_temperature})()
    projected = predictor.projection(x)
    positive, negatives = predictor.embeddings[units], predictor.embeddings[:, None].expand(-1, 7, -1)
    logits = hubert.HubertModel.compute_nce(model, projected, positive, negatives)
    expected = F.cross_entropy(logits, torch.zeros(7, dtype=torch.int64), reduction="sum")
    torch.testing.assert_close(F.cross_entropy(predictor(x), units, reduction="sum"), expected)


@pytest.mark.parametrize("kind", ["joint", "independent"])
def test_codebooks_by_hand(bare: Student, kind: Any) -> None:
    settings = CodebookPrediction(codebooks=kind, codebook_hidden=5, unmasked_weight=0.5)
    torch.manual_seed(1)
    distiller = settings.distiller(bare, spec_augment=None, seed=0, symbols=SymbolLayout(1, 3, 8))
    targets = symbols(1, 3, 8)
    found = distiller(WAVEFORMS, LENGTHS, MASK, targets, cosines=True)
    predictor = distiller.predictors[0]
    assert isinstance(predictor, CodebookPredictor)
    total = right = 0.0
    for b, t, is_masked, x in last_layer(bare):
        entries = targets[b, 0, t].tolist()
        for n, entry in enumerate(entries):
            logits = predictor.direct[n] @ x + predictor.bias[n]
            if predictor.hidden is not None:
                hidden = predictor.hidden(x)
                for m in range(n):
                    hidden = hidden + predictor.entries[m, entries[m]]
                logits = logits + predictor.out[n] @ hidden.relu()
            error = -float(logits.log_softmax(0)[entry])
            total += (1.0 if is_masked else 0.5) * error / 3 / sum(FRAMES)
            right += is_masked * float(logits.argmax() == entry) / 3
    assert (kind == "joint") == (predictor.hidden is not None)
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    assert found.accuracies is not None
    assert float(found.accuracies[0, 0]) == pytest.approx(right)


def waves(scale: float, speed: float, *shape: int) -> Tensor:
    """Return values that need no random numbers."""
    return scale * (speed * torch.arange(math.prod(shape)).float()).sin().view(shape)


@pytest.mark.parametrize(
    ("hidden", "total", "first_frame"),
    [
        (12, 105.77219391, [1.06345057, 1.54627430, 10.91454124, 9.30873680]),
        (None, 52.23301697, [1.96698654, 3.29943371, 2.24243212, 2.59823608]),
    ],
    ids=["joint", "independent"],
)
def test_codebooks_have_the_losses_of_multi_quantization(
    hidden: int | None, total: float, first_frame: list[float]
) -> None:
    """Numbers of ``JointCodebookLoss`` in k2-fsa/multi_quantization (commit 0e944e5a), without and with ``is_joint=False``."""
    ours = CodebookPredictor(6, 4, 8, hidden)
    with torch.no_grad():
        ours.direct.copy_(waves(1, 0.7, 4, 8, 6))
        ours.bias.copy_(waves(0.5, 1.3, 4, 8))
        if ours.hidden is not None:
            ours.hidden.weight.copy_(waves(1, 0.9, 12, 6))
            ours.hidden.bias.copy_(waves(0.5, 1.1, 12))
            ours.out.copy_(waves(1, 0.37, 4, 8, 12))
            ours.entries.copy_(waves(0.5 * (12 / 4) ** 0.5, 0.53, 3, 8, 12))
    x, entries = waves(1, 2.1, 5, 6), 5 * torch.arange(20).view(5, 4) % 8
    losses = F.cross_entropy(ours(x, entries).permute(1, 2, 0), entries, reduction="none")
    torch.testing.assert_close(losses[0], torch.tensor(first_frame), rtol=1e-4, atol=0)
    assert losses.sum().item() == pytest.approx(total, rel=1e-5)


def test_joint_codebooks_agree_with_multi_quantization() -> None:
    prediction = pytest.importorskip("multi_quantization.prediction")
    theirs = prediction.JointCodebookLoss(16, 4, hidden_channels=12, codebook_size=8, checkpoint=False)
    ours = CodebookPredictor(16, 4, 8, 12)
    with torch.no_grad():
        theirs.linear2_bias.normal_()
        assert ours.hidden is not None
        ours.hidden.load_state_dict(theirs.linear1.state_dict())
        ours.direct.copy_(theirs.linear2b_weight)
        ours.bias.copy_(theirs.linear2_bias)
        ours.out.copy_(theirs.linear2_weight)
        ours.entries.copy_(theirs.codebook_embedding.weight.view(3, 8, 12) * 0.5 * (12 / 4) ** 0.5)
    x, entries = torch.randn(9, 16), torch.randint(0, 8, (9, 4))
    loss = F.cross_entropy(ours(x, entries).permute(1, 2, 0), entries, reduction="sum")
    torch.testing.assert_close(loss, theirs(x, entries))


def test_mixtures_add_up_and_start_at_their_steps(still: StudentConfig) -> None:
    torch.manual_seed(0)
    student = Student(still)
    settings = Mixture.model_validate(
        {
            "parts": [
                {"settings": {"objective": "prediction"}, "weight": 0.5},
                {"settings": {"objective": "units"}, "weight": 2.0, "from_step": 3},
            ]
        }
    )
    settings.check_student(still)  # The part `units` alone would refuse heads.
    torch.manual_seed(1)
    distiller = settings.distiller(student, spec_augment=None, seed=0, symbols=SymbolLayout(2, 1, 11))
    features, units = torch.randn(2, 2, 19, 32), symbols(2, 1, 11)
    torch.manual_seed(1)
    alone = UnitPrediction().distiller(student, spec_augment=None, seed=0, symbols=SymbolLayout(2, 1, 11))
    first = LayerPrediction().distiller(student, spec_augment=None, seed=0)(WAVEFORMS, LENGTHS, MASK, features)
    second = alone(WAVEFORMS, LENGTHS, MASK, units)
    for step, weight in ((2, 0.0), (3, 2.0)):
        distiller.set_progress(0, step)
        found = distiller(WAVEFORMS, LENGTHS, MASK, (features, units), cosines=True)
        torch.testing.assert_close(found.total, 0.5 * first.total + weight * second.total)
        torch.testing.assert_close(found.per_layer, 0.5 * first.per_layer + weight * second.per_layer)
        assert (found.agreement()[:, 0, -1] > 0).all()
    distiller.set_progress(0, 0)
    distiller.eval()
    torch.testing.assert_close(
        distiller(WAVEFORMS, LENGTHS, MASK, (features, units)).total, 0.5 * first.total + 2.0 * second.total
    )
    names = [name for name, _ in distiller.named_parameters()]
    assert len(names) == len(list(student.parameters())) + 6, (
        "the student appears once, with two predictors of three tensors"
    )
    other = distiller.with_student(Student(still))
    assert other(WAVEFORMS, LENGTHS, MASK, (features, units)).total.item() != pytest.approx(found.total.item())
    assert distiller.student is student


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "units", "loss": "l1"}, "train.loss does nothing with train.objective units"),
        (
            {"objective": "units", "codebooks": "independent"},
            "train.codebooks does nothing .*: it belongs to objective mvq",
        ),
        ({"masked_weight": 0.5}, "train.masked_weight does nothing .*: it belongs to objective units"),
        ({"objective": "mixture"}, r"train.parts of objective mixture has the objectives \[\]; give two or more"),
        ({"masks": "fresh", "draw_order": "in_order"}, "in_order does nothing with train.masks fresh"),
    ],
)
def test_keys_without_effect_are_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (("pca", True, 0, True), "learns from a cache of codec units, but cache.codec is pca; .* such as units:500"),
        (("units:5", False, 0, True), "but train.targets is online"),
        (("units:5", True, 2, False), "no masked pass is cached; set masks.draws=0 and train.masks=fresh"),
        (("units:5", True, 0, False), "needs masked frames"),
    ],
)
def test_unsuitable_sources_are_refused(source: tuple[str, bool, int, bool], message: str) -> None:
    codec, cached, draws, fresh = source
    with pytest.raises(ValueError, match=message):
        UnitPrediction().check_source(codec, cached=cached, draws=draws, fresh_masks=fresh)
    UnitPrediction().check_source("units:5", cached=True, draws=0, fresh_masks=True)
    UnitPrediction(unmasked_weight=1.0).check_source("units:5", cached=True, draws=0, fresh_masks=False)


def test_unsuitable_students_and_targets_are_refused(tiny: StudentConfig, bare: Student) -> None:
    with pytest.raises(ValueError, match=r"train.objective mvq does not go with student.heads layerwise"):
        CodebookPrediction().check_student(tiny)
    with pytest.raises(ValueError, match="are both 0"):
        UnitPrediction(masked_weight=0).check_student(bare.config)
    with pytest.raises(ValueError, match="train.objective units needs discrete targets"):
        UnitPrediction().distiller(bare, spec_augment=None, seed=0)
    distiller = UnitPrediction().distiller(bare, spec_augment=None, seed=0, symbols=SymbolLayout(1, 1, 11))
    with pytest.raises(ValueError, match=r"targets must be \(B, L, T, S\) = \(2, 1, 19\)"):
        distiller(WAVEFORMS, LENGTHS, MASK, symbols(2, 1, 11))


@pytest.fixture
def unit_cache(tmp_path: Path, make_cache: Callable[..., object]) -> Path:
    """A cache of the clean pass with eight units of layer 2."""
    make_cache(tmp_path / "cache", masks=MASKS, codec="units:8", layers=(2,))
    return tmp_path / "cache"


def test_fresh_masks_depend_on_the_epoch_and_the_utterance_only(unit_cache: Path) -> None:
    plain = CacheReader(unit_cache, "train")
    reader = FreshMasks(plain, MASKS)
    batch, again = reader.read([3, 0, 5], 7), reader.read([5], 7)
    assert batch.frame_mask is not None and again.frame_mask is not None
    expected = MASKS.frame_mask(7, batch.ids, batch.num_frames.tolist())
    assert torch.equal(batch.frame_mask, expected)
    count = int(again.num_frames[0])
    assert torch.equal(again.frame_mask[0], batch.frame_mask[2, :count])
    assert not torch.equal(reader.read([5], 8).frame_mask, again.frame_mask)
    assert torch.equal(batch.symbols, plain.read([3, 0, 5], None).symbols)
    assert batch.symbols.shape == (3, 1, int(batch.num_frames.max()), 1)
    assert reader.read([0], None).frame_mask is None
    assert reader.symbols == SymbolLayout(1, 1, 8)
    assert reader.bytes_read == plain.bytes_read and plain.bytes_read > 0
    assert cached_source(plain).key != cached_source(plain, MASKS).key
    with pytest.raises(ValueError, match="the targets are decoded features, not symbols"):
        _ = batch.to("cpu").symbols


def test_a_resumed_training_with_units_ends_like_one_that_ran_through(
    tmp_path: Path,
    unit_cache: Path,
    still: StudentConfig,
    settings: Settings,
    rows: Callable[..., list[dict[str, Any]]],
    assert_same_end: Callable[[Path, Path], None],
) -> None:
    readers = [FreshMasks(CacheReader(unit_cache, split), MASKS) for split in ("train", "validation")]
    student = still.model_copy(update={"heads": "none", "layer_grad_scale": False})
    chosen = settings(objective="units", masks="fresh", unit_dim=8, max_steps=9, validate_every=3, max_grad_norm=1.0)

    class StopError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["kind"] == "train" and row["step"] == 5:
            raise StopError

    train(student, chosen, *readers, tmp_path / "whole")
    with pytest.raises(StopError):
        train(student, chosen, *readers, tmp_path / "parts", on_row=stop)
    train(student, chosen, *readers, tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    first, last = rows(tmp_path / "whole", "validation")[0], rows(tmp_path / "whole", "validation")[-1]
    assert last["loss"] < first["loss"], "it learns"
    assert "accuracy_masked_layer_02" in last and "accuracy_unmasked_layer_02" not in last
    assert "cosine_masked_layer_02" not in last and "constant_loss" not in first
    with pytest.raises(ValueError, match="wrap them in FreshMasks"):
        train(student, chosen, CacheReader(unit_cache, "train"), readers[1], tmp_path / "other")
