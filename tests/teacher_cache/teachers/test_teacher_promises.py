"""The promises of `Teacher`, checked for every kind of teacher. A new kind is another line in KINDS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.frames import padding_mask
from ray_distill.teacher_cache.precision import Precision
from ray_distill.teacher_cache.teachers import Teacher, TeacherError, load_teacher
from ray_distill.teacher_cache.teachers.wav2vec2 import Wav2Vec2Teacher
from tests.tiny import sharpen_attention, tiny_student

from .batch_invariance import assert_batch_invariant
from .huggingface_folders import save_tiny

TRANSFORMERS = (
    "hubert",
    "wavlm",
    "unispeech-sat",
    "data2vec-audio",
    "wav2vec2-bert",
    "whisper",
    "audio-spectrogram-transformer",
)


def save_tiny_student(folder: Path, **changes: Any) -> str:
    """Save a student with random weights and return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_student(sharpen_attention(Student(tiny_student(**changes))), folder)
    return str(folder)


KINDS: dict[str, Callable[[Path], str]] = {
    "random": lambda _: "random:3x48",
    **{kind: lambda folder, kind=kind: save_tiny(kind, folder) for kind in TRANSFORMERS},  # type: ignore[misc]
    "student": save_tiny_student,
    "student, time reduction": lambda folder: save_tiny_student(
        folder, attention_reuse="none", time_reduction="conv1d", time_reduction_index=1
    ),
    "AST, mean-mask": lambda folder: f"mean-mask:{save_tiny('audio-spectrogram-transformer', folder)}",
    "whisper, options": lambda folder: f"layer-norm:mean-mask:{save_tiny('whisper', folder)}",
}


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Specifications for `load_teacher` by kind."""
    return {kind: make(tmp_path_factory.mktemp("teacher")) for kind, make in KINDS.items()}


@pytest.fixture(params=KINDS)
def spec(request: pytest.FixtureRequest, specs: dict[str, str]) -> str:
    return specs[request.param]


@pytest.fixture
def teacher(spec: str) -> Teacher:
    return load_teacher(spec)


def sound(teacher: Teacher, *extra: int) -> list[Tensor]:
    """Return waveforms that are longer than the teacher's minimum by some numbers of samples."""
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(teacher.min_samples + n, generator=generator) for n in extra]


@pytest.mark.parametrize("masked", [False, True])
def test_batch_invariance(teacher: Teacher, masked: bool) -> None:
    if masked and not teacher.has_mask_embedding:
        with pytest.raises(TeacherError, match=f"{teacher.name} has no mask embedding.*mean-mask:"):
            assert_batch_invariant(teacher, sound(teacher, 0, 4_000), masked)
        return
    assert_batch_invariant(teacher, sound(teacher, 0, 1_200, 8_600, 8_700, 20_000), masked)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_holds_whole_maps_only_if_it_says_so(
    teacher: Teacher, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Tensor, Tensor]] = []
    attention = F.scaled_dot_product_attention

    def remember(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        if attn_mask is not None:
            given.append((query, attn_mask))
        return attention(query, key, value, attn_mask, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", remember)
    longer, shorter = sound(teacher, 9_000, 0)
    batch = torch.nn.utils.rnn.pad_sequence([longer, shorter], batch_first=True)
    teacher(batch, torch.tensor([len(longer), len(shorter)]), precision=precision)
    if isinstance(teacher, Wav2Vec2Teacher):
        assert len(given) == teacher.num_layers
    for query, mask in given:
        _, heads, frames, _ = query.shape
        if promised := teacher.map_bytes(len(longer)):
            assert promised == 2 * heads * frames**2 * 4 and mask.numel() == len(batch) * heads * frames**2
        else:
            # PyTorch converts masks of other dtypes, and a converted mask has memory for all entries.
            assert mask.untyped_storage().nbytes() <= len(batch) * frames * 4
            assert mask.dtype == query.dtype or mask.numel() == len(batch) * frames


def test_frames_layers_and_padding(teacher: Teacher) -> None:
    longer, shorter = sound(teacher, 9_000, 0)
    batch = torch.full((2, len(longer) + 3_000), torch.nan)
    batch[0, : len(longer)], batch[1, : len(shorter)] = longer, shorter
    every = teacher.hidden_states(batch, torch.tensor([len(longer), len(shorter)]))
    shape = (2, teacher.num_layers, teacher.num_frames(batch.shape[1]), teacher.dim)
    assert every.shape == shape and every.dtype == torch.float32 and not every.requires_grad
    assert torch.isfinite(every).all()
    assert teacher.num_frames(len(shorter)) >= 1 > teacher.num_frames(len(shorter) - 1)
    lengths = torch.tensor([len(longer), len(shorter)])
    assert teacher.num_frames(lengths).tolist() == [teacher.num_frames(n) for n in lengths.tolist()]
    some = teacher.hidden_states(batch, torch.tensor([len(longer), len(shorter)]), layers=[2, 1])
    assert torch.equal(some, every[:, [1, 0]])
    assert float((every[:, 0] - every[:, 1]).abs().max()) > 0.01
    torch.nn.functional.mse_loss(torch.zeros(shape, requires_grad=True), every).backward()


def test_masks_replace_the_input_where_they_are_set(teacher: Teacher) -> None:
    if not teacher.has_mask_embedding:
        pytest.skip(f"{teacher.name} has no mask embedding")
    (waveform,) = sound(teacher, 12_000)
    mask = torch.zeros(1, teacher.num_frames(len(waveform)), dtype=torch.bool)
    clean = teacher.hidden_states(waveform[None])
    assert torch.equal(teacher.hidden_states(waveform[None], frame_mask=mask), clean)
    mask[:, 3:5] = True
    changed = (teacher.hidden_states(waveform[None], frame_mask=mask) - clean).norm(dim=-1)[0, 0]
    assert float(changed[3:5].min()) > 2 * float(changed[mask[0].logical_not()].median())
    with pytest.raises(TeacherError, match="frame_mask must be a bool tensor of shape"):
        teacher.hidden_states(waveform[None], frame_mask=mask[:, 1:])


def test_outputs_are_deterministic_and_the_random_state_is_kept(spec: str) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = load_teacher(spec), load_teacher(spec)
    waveforms = torch.stack(sound(first, 5_000))
    assert torch.equal(first.hidden_states(waveforms), second.hidden_states(waveforms))
    assert torch.equal(torch.rand(1), expected)


def test_the_fingerprint_depends_on_weights_and_not_on_names(spec: str, teacher: Teacher) -> None:
    other = load_teacher(spec, torch.device("cpu"))
    other.name = "another"
    assert other.fingerprint == teacher.fingerprint
    prints = {teacher.fingerprint}
    tensors = teacher.model.state_dict()
    for value in tensors.values():
        value.view(-1)[0] += 0.5
        del teacher.fingerprint
        prints.add(teacher.fingerprint)
    assert len(prints) == len(tensors) + 1
    assert teacher.num_parameters >= sum(parameter.numel() for parameter in teacher.model.parameters())


def test_invalid_arguments(teacher: Teacher) -> None:
    (waveform,) = sound(teacher, 0)
    with pytest.raises(TeacherError, match=f"at least {teacher.min_samples}"):
        teacher.hidden_states(waveform[None, 1:])
    with pytest.raises(TeacherError, match=f"must be one or more of 1 to {teacher.num_layers}"):
        teacher.hidden_states(waveform[None], layers=[0])
    if teacher.max_samples is not None:
        with pytest.raises(TeacherError, match=f"takes at most {teacher.max_samples}"):
            teacher.hidden_states(torch.zeros(1, teacher.max_samples + 1))
        longest = teacher.hidden_states(
            torch.zeros(1, teacher.max_samples + 9_000), torch.tensor([teacher.max_samples])
        )
        assert torch.isfinite(longest).all()


def test_options_of_a_specification(specs: dict[str, str]) -> None:
    plain = load_teacher(specs["whisper"])
    normalised, stand_in, both = (
        load_teacher(options + specs["whisper"]) for options in ("layer-norm:", "mean-mask:", "mean-mask:layer-norm:")
    )
    assert len({teacher.fingerprint for teacher in (plain, normalised, stand_in, both)}) == 4
    assert both.fingerprint == load_teacher(specs["whisper, options"]).fingerprint
    assert stand_in.name.startswith("mean-mask:") and stand_in.has_mask_embedding and not plain.has_mask_embedding
    waveforms = torch.stack(sound(plain, 5_000))
    raw = plain.hidden_states(waveforms)
    expected = torch.nn.functional.layer_norm(raw, (plain.dim,))
    torch.testing.assert_close(normalised.hidden_states(waveforms), expected)
    assert float((raw - expected).abs().max()) > 0.1
    x_BTD = torch.tensor([[[1.0], [3.0], [8.0]], [[1.0], [5.0], [900.0]]])
    masked = stand_in.masked(x_BTD, torch.tensor([[True, False, False]] * 2), torch.tensor([3, 2]))
    assert masked.squeeze(2).tolist() == [[4.0, 3.0, 8.0], [3.0, 5.0, 900.0]], "the mean uses real frames only"
    with pytest.raises(TeacherError, match="has a mask embedding, so it needs no replacement"):
        load_teacher("mean-mask:random:2x32")


class Network(torch.nn.Module):
    """The network of the documentation's example: linear layers over the 400 samples of a frame, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.heads, self.mask_embedding = 16, 2, torch.ones(16)
        self.linear = torch.nn.Linear(400, 16)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def front_end(self, waveforms: Tensor) -> Tensor:
        out: Tensor = self.linear(waveforms.unfold(1, 400, 320))
        return out


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        mixed = torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attended)
        out: Tensor = x + self.linear(mixed[:, 0])
        return out


def test_the_documented_example_keeps_the_promises() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "in-depth" / "teachers.md").read_text()
    names: dict[str, Any] = {"Teacher": Teacher, "MyNetwork": Network, "torch": torch, "padding_mask": padding_mask}
    exec(text.split("```python\n")[1].split("```")[0], names)
    example: Teacher = names["MyTeacher"](Network(), name="example")
    for masked in (False, True):
        assert_batch_invariant(example, sound(example, 0, 3_000, 9_000), masked)
    test_frames_layers_and_padding(example)
    test_invalid_arguments(example)
