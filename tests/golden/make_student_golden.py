"""Write students.safetensors, the inputs and outputs of tiny students, so that the arithmetic can be tested without the shared data.

Run it from the repository's root: ``python -m tests.golden.make_student_golden``. The file was written when this code reproduced the
golden tensors of the published implementation (tests/student/test_published.py). Run it again only if the arithmetic must change.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_distill.student import Student, distillation_loss
from ray_distill.teacher_cache.frames import num_frames, padding_mask

from ..tiny import sharpen_attention, tiny_student

FILE = Path(__file__).with_name("students.safetensors")
TINY = tiny_student(
    conv_layers=((6, 10, 5), (8, 1, 1), *((8, 3, 2),) * 4, (12, 1, 1), *((12, 2, 2),) * 2),
    encoder_layers=4,
    encoder_embed_dim=12,
    encoder_ffn_embed_dim=20,
    encoder_attention_heads=3,
    conv_pos=8,
    conv_pos_groups=2,
    target_dim=16,
)
STUDENTS = {
    "paper": TINY,
    "released": TINY.model_copy(update={"reuse_behaviour": "released"}),
    "none": TINY.model_copy(update={"attention_reuse": "none", "layer_grad_scale": False}),
}


def main() -> None:
    """Write the file: the inputs, and for each student ``NAME/weights/...`` and its outputs in eval mode."""
    torch.manual_seed(0)
    lengths = torch.tensor([6400, 4321])
    waveforms = torch.randn(2, 6400).masked_fill(padding_mask(lengths, 6400), 0)
    frames = num_frames(lengths)
    width = int(frames.max())
    mask = (torch.rand(2, width) < 0.5) & ~padding_mask(frames, width)
    targets = torch.randn(2, TINY.encoder_layers, width, TINY.target_dim)
    tensors = {"waveforms": waveforms, "lengths": lengths, "frame_mask": mask, "targets": targets}
    for name, config in STUDENTS.items():
        student = sharpen_attention(Student(config).eval())  # Otherwise maps are so uniform that reuse changes nothing.
        tensors |= {f"{name}/weights/{key}": value.clone() for key, value in student.state_dict().items()}
        tensors |= {f"{name}/{key}": value for key, value in results(student, tensors).items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, FILE)


def results(student: Student, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored outputs of one student. Padded frames have no meaning and are set to zero."""
    waveforms, lengths, mask = inputs["waveforms"], inputs["lengths"], inputs["frame_mask"]
    student.zero_grad()
    plain = student(waveforms, lengths)
    masked = student(waveforms, lengths, mask)
    loss = distillation_loss(masked.projections, inputs["targets"], masked.num_frames, mask)
    loss.total.backward()
    padded = padding_mask(plain.num_frames, mask.shape[1])[:, None, :, None]
    found = {
        "hidden_states": plain.hidden_states.masked_fill(padded, 0),
        "projections": plain.projections.masked_fill(padded, 0),
        "masked_projections": masked.projections.masked_fill(padded, 0),
        "loss": loss.total,
        "loss_per_layer": loss.per_layer,
        "validation_loss": distillation_loss(plain.projections, inputs["targets"], plain.num_frames).total,
    }
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        if name in {"conv_blocks.0.conv.weight", "mask_embedding"} or name.endswith("attention.value.weight"):
            found[f"gradient/{name}"] = parameter.grad
    return {key: value.detach().clone() for key, value in found.items()}


if __name__ == "__main__":
    main()
