"""Comparison with the published implementation's results (needs the shared golden tensors)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ray_distill.student import Student, distillation_loss, load_student

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
NAMES = ("armhubert", "maskhubert")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden" / "golden.safetensors")


@pytest.fixture(params=NAMES)
def published(request: pytest.FixtureRequest, shared: Path) -> tuple[str, Student]:
    name = request.param
    return name, load_student(shared / "golden" / f"{name}_mini.ckpt", shared / "golden" / f"{name}_mini.yaml")


def single(golden: dict[str, Tensor], row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return waveform, length and mask of one utterance without padding."""
    length = int((~golden["padding_mask"][row].bool()).sum())
    frames = (length - 400) // 320 + 1
    return (
        golden["wav"][row : row + 1, :length],
        torch.tensor([length]),
        golden["mask_indices"][row : row + 1, :frames].bool(),
    )


@pytest.mark.parametrize("row", [0, 1, 2])
def test_layers_and_projections(golden: dict[str, Tensor], published: tuple[str, Student], row: int) -> None:
    name, student = published
    wav, length, mask = single(golden, row)
    with torch.no_grad():
        plain, masked = student(wav, length), student(wav, length, mask)
    torch.testing.assert_close(plain.hidden_states[0], golden[f"{name}_single_{row}_layers"], **TOLERANCE)
    torch.testing.assert_close(plain.projections[0], golden[f"{name}_single_{row}_projections"], **TOLERANCE)
    torch.testing.assert_close(masked.projections[0], golden[f"{name}_single_{row}_masked_projections"], **TOLERANCE)


def test_losses_and_gradients(golden: dict[str, Tensor], published: tuple[str, Student]) -> None:
    name, student = published
    wav, length, mask = single(golden, 0)
    targets = torch.where(mask[:, None, :, None], golden["teacher_unmasked"][:1], golden["teacher_masked"][:1])
    out = student(wav, length, mask)
    loss = distillation_loss(out.projections, targets, out.num_frames, mask)
    loss.total.backward()
    expected = {
        "loss": loss.total,
        "hint_loss": loss.hint,
        "rec_loss": loss.final,
        "mask_hint_loss": loss.mask_hint,
        "unmask_hint_loss": loss.unmask_hint,
        "mask_rec_loss": loss.mask_final,
        "unmask_rec_loss": loss.unmask_final,
    }
    for key, value in expected.items():
        torch.testing.assert_close(
            value.detach(), golden[f"{name}_{key}"], **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}"
        )
    gradients = {
        "conv0": student.conv_blocks[0].conv.weight.grad,
        "mask_emb": student.mask_embedding.grad,
        "layer1_v": student.layers[1].attention.value.weight.grad,
        "head0": student.heads[0].weight.grad,
    }
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, golden[f"{name}_grad_{key}"], **TOLERANCE, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_validation_loss(golden: dict[str, Tensor], published: tuple[str, Student]) -> None:
    name, student = published
    wav, length, _ = single(golden, 0)
    with torch.no_grad():
        out = student(wav, length)
        loss = distillation_loss(out.projections, golden["teacher_unmasked"][:1], out.num_frames)
    torch.testing.assert_close(loss.total, golden[f"{name}_validation_loss"], **TOLERANCE)


def test_the_padded_batch_of_the_student_without_reuse(golden: dict[str, Tensor], shared: Path) -> None:
    # Only the row without padding can be compared: the published GroupNorm averages over padding.
    student = load_student(shared / "golden" / "maskhubert_mini.ckpt", shared / "golden" / "maskhubert_mini.yaml")
    lengths = (~golden["padding_mask"].bool()).sum(1)
    with torch.no_grad():
        out = student(golden["wav"], lengths, golden["mask_indices"].bool())
    torch.testing.assert_close(out.projections[0], golden["maskhubert_batch_projections"][0], **TOLERANCE)
