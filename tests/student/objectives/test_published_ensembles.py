"""The losses of SPEAR (arXiv 2510.25955) and USAD (arXiv 2506.18843) on two teachers, computed again in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch

from ray_distill.student import Student
from ray_distill.student.objectives.codebook_prediction import CodebookPredictor
from ray_distill.student.objectives.objective import TeachersTargets
from ray_distill.student.objectives.several_teachers import SeveralTeachers
from ray_distill.student.objectives.teacher_heads import TeacherHeads
from ray_distill.teacher_cache.targets.target_batch import SymbolLayout

from ...tiny import tiny_student

FRAMES = (19, 9)
PRESENT = torch.tensor([[True, True], [True, False]])
"""The second teacher lacks the second utterance."""


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(5)


def teachers(*settings: dict[str, Any], weights: tuple[float, float]) -> SeveralTeachers:
    names, dims = ("speech", "audio"), (32, 48)
    terms = [
        {"name": name, "settings": chosen, "weight": weight, "num_layers": 2, "dim": dim}
        for name, chosen, weight, dim in zip(names, settings, weights, dims, strict=True)
    ]
    return SeveralTeachers.model_validate({"terms": terms})


def batch(draw: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    waveforms = torch.from_numpy(draw.normal(size=(2, 6400)).astype(np.float32))
    return waveforms, torch.tensor([6400, 3000]), torch.from_numpy(draw.random((2, 19)) < 0.5)


def test_spear_predicts_the_codebooks_of_two_teachers(draw: np.random.Generator) -> None:
    """The mean cross-entropy of independent classifiers, with masked frames weighted against the others, and teachers by alpha."""
    torch.manual_seed(0)
    student = Student(tiny_student(heads="none")).eval()
    settings = {"objective": "mvq", "codebooks": "independent", "masked_weight": 1.0, "unmasked_weight": 0.3}
    objective = teachers(settings, settings, weights=(1.0, 0.1))
    layouts = [SymbolLayout(1, 4, 8), SymbolLayout(1, 2, 8)]
    distiller = objective.distiller_for(student, layouts, spec_augment=None, seed=0).eval()
    waveforms, lengths, mask = batch(draw)
    entries = [draw.integers(0, 8, (2, 1, 19, layout.per_frame)) for layout in layouts]
    found = distiller(waveforms, lengths, mask, TeachersTargets(tuple(map(torch.from_numpy, entries)), PRESENT, None))
    states = student(waveforms, lengths, mask).layer(2).detach().numpy().astype(np.float64)
    expected = 0.0
    for k, (wanted, alpha) in enumerate(zip(entries, (1.0, 0.1), strict=True)):
        predictor = distiller.parts[k].predictors[0]
        assert isinstance(predictor, CodebookPredictor)
        table, bias = predictor.direct.detach().numpy(), predictor.bias.detach().numpy()
        logits = np.einsum("btd,nsd->btns", states, table) + bias
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = -np.take_along_axis(logs, wanted[:, 0, :, :, None], -1)[..., 0].mean(-1)
        weights = np.where(mask.numpy(), 1.0, 0.3) * (np.arange(19) < np.array(FRAMES)[:, None])
        expected += alpha * float((chosen * weights * PRESENT[:, k].numpy()[:, None]).sum()) / sum(FRAMES)
    assert found.total.item() == pytest.approx(expected, rel=1e-5)


def linear(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    assert isinstance(module, torch.nn.Linear)
    product: np.ndarray = x @ module.weight.detach().numpy().T + module.bias.detach().numpy()
    return product


@pytest.mark.parametrize("head_dim", [None, 24])
def test_usad_predicts_layers_of_two_teachers(draw: np.random.Generator, head_dim: int | None) -> None:
    """For some layers and each teacher the L1 error minus the log-sigmoid of the cosine, over unmasked input and real frames."""
    torch.manual_seed(0)
    activation: dict[str, Any] = {"head_activation": "relu"} if head_dim else {}
    student = Student(tiny_student(encoder_layers=4, head_layers=(2, 4), head_dim=head_dim, **activation)).eval()
    settings = {"objective": "prediction", "loss": "l1", "cosine_weight": 1.0, "hint_weight": 0.5, "final_weight": 0.5}
    distiller = teachers(settings, settings, weights=(1.0, 1.0))
    module = distiller.distiller_for(student, [None, None], spec_augment=None, seed=0).eval()
    waveforms, lengths, _ = batch(draw)
    targets = [draw.normal(size=(2, 2, 19, dim)).astype(np.float32) for dim in (32, 48)]
    found = module(waveforms, lengths, None, TeachersTargets(tuple(map(torch.from_numpy, targets)), PRESENT, None))
    own = module.parts[1].predictors[0]
    assert isinstance(own, TeacherHeads)
    states = [student(waveforms, lengths).layer(layer).detach().numpy().astype(np.float64) for layer in (2, 4)]
    expected = 0.0
    for k, (owner, wanted) in enumerate(zip((student, own), targets, strict=True)):
        real = (np.arange(19) < np.array(FRAMES)[:, None]) & PRESENT[:, k].numpy()[:, None]
        for layer, head in enumerate(owner.heads):
            x = states[layer]
            if head_dim is not None:
                x = linear(owner.inner_heads[layer], x)
                x = np.maximum(x, 0)
            x = linear(head, x)
            y = wanted[:, layer].astype(np.float64)
            cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
            loss = np.abs(x - y).mean(-1) + np.log1p(np.exp(-cosine))
            expected += 0.5 * float(loss[real].sum()) / sum(FRAMES)
    assert found.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("heads", [{"head_layers": (2, 4), "head_dim": 5}, {"heads": "split", "split_heads": 2}])
def test_heads_of_another_teacher_give_as_much_gradient_as_the_students_own(
    draw: np.random.Generator, heads: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    student = Student(tiny_student(encoder_layers=4, layer_grad_scale=True, **heads)).eval()
    own = TeacherHeads(student.config, 2, 32)
    own.load_state_dict({name: value for name, value in student.state_dict().items() if name in own.state_dict()})
    waveforms, lengths, _ = batch(draw)
    gradients = []
    for other in (False, True):
        layers, inputs, _ = student.layer_outputs(waveforms, lengths)
        read = own.inputs(inputs, layers) if other else inputs
        (gradient,) = torch.autograd.grad(sum(x.square().sum() for x in read), [student.projection.weight])
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)
