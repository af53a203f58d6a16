import pytest
import torch

from teacher_cache.codecs import CODECS, get_codec


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 0.0), ("fp16", 2**-11)])
def test_round_trip(name: str, tolerance: float) -> None:
    codec = get_codec(name)
    frames = torch.randn(7, 12) * 10
    data = codec.encode(frames)
    assert len(data) == 7 * codec.bytes_per_frame(12)
    decoded = codec.decode(data, 12)
    assert decoded.dtype == torch.float32
    assert ((decoded - frames).abs() <= tolerance * frames.abs()).all()


@pytest.mark.parametrize("name", sorted(CODECS))
def test_no_frames(name: str) -> None:
    codec = get_codec(name)
    assert codec.decode(codec.encode(torch.zeros(0, 5)), 5).shape == (0, 5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond the range of fp16"):
        get_codec("fp16").encode(torch.full((1, 2), 70_000.0))
    with pytest.raises(ValueError, match="not finite"):
        get_codec("fp32").encode(torch.tensor([[float("nan")]]))


def test_unknown_codec_names_the_known() -> None:
    with pytest.raises(ValueError, match="fp16, fp32"):
        get_codec("mp3")
