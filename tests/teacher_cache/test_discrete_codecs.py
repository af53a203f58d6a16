"""Discrete codecs: clusters and codebooks, their errors, symbols and error messages."""

from typing import cast

import pytest
import torch
from torch import Tensor

from ray_distill.teacher_cache.codecs import (
    DiscreteCodec,
    check_codec,
    discrete_bytes,
    fit_codec,
    open_codec,
    relative_error,
    sample_frames,
)
from ray_distill.teacher_cache.codecs.direct_sum import SIZE, best_codebooks, choose_entries, sum_entries
from ray_distill.teacher_cache.codecs.kmeans import cluster, nearest

DIM = 12
NAMES = ("units:300", "mvq:2")


def features(count: int, seed: int, layers: int = 1) -> Tensor:
    """Return (count, layers, DIM) features of rank 4, around 7."""
    mixing = torch.randn(4, DIM, generator=torch.Generator().manual_seed(0))
    return 7 + torch.randn(count, layers, 4, generator=torch.Generator().manual_seed(seed)) @ mixing


@pytest.fixture(scope="module")
def codecs() -> dict[str, DiscreteCodec]:
    """A codec of each kind for layer 4."""
    found = {}
    for name in (*NAMES, "mvq:1"):
        (codec,) = open_codec(name, (4,), DIM, fit_codec(name, features(3000, 1), features(500, 2)))
        found[name] = cast(DiscreteCodec, codec)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_codes_have_the_stated_size_and_error_and_decode_in_any_shape(
    name: str, codecs: dict[str, DiscreteCodec]
) -> None:
    codec, frames = codecs[name], features(400, 3)
    codes = codec.encode(frames)
    assert isinstance(codec, DiscreteCodec)
    assert codes.dtype == torch.uint8
    assert codes.shape == (400, codec.bytes_per_frame) == (400, 2) == (400, discrete_bytes(name))
    decoded = codec.decode(codes)
    assert decoded.dtype == torch.float32
    assert decoded.shape == frames.shape
    found = relative_error(frames, decoded)
    assert 0.5 * codec.error < found < 1.25 * codec.error
    assert codec.error < {"units:300": 0.35, "mvq:2": 0.12}[name]
    symbols = codec.symbols(codes)
    assert symbols.dtype == torch.int64
    assert symbols.shape == (400, 1, codec.symbols_per_frame)
    assert 0 <= symbols.min() <= symbols.max() < codec.alphabet
    pieces = codes.view(2, 200, -1)
    assert torch.equal(codec.decode(pieces), decoded.view(2, 200, 1, DIM))
    assert torch.equal(codec.symbols(pieces), symbols.view(2, 200, 1, -1))
    # One frame alone has the same code as among others.
    assert all(torch.equal(codec.encode(frames[n : n + 1])[0], codes[n]) for n in range(20))
    assert codec.decode(codec.encode(frames[:0])).shape == (0, 1, DIM)
    frames[3, 0, 5] = torch.inf
    with pytest.raises(ValueError, match="a hidden state of layer 4 is not finite"):
        codec.encode(frames)


def test_units_are_the_nearest_centroids(codecs: dict[str, DiscreteCodec]) -> None:
    state = fit_codec("units:300", features(3000, 1), features(500, 2))
    centroids = state["0.centroids"][:, 0]
    frames = features(50, 3)
    expected = torch.cdist(frames[:, 0], centroids).argmin(1)
    codes = codecs["units:300"].encode(frames)
    assert torch.equal(codes[:, 0] + 256 * codes[:, 1].long(), expected)  # Little-endian.
    assert expected.max() > 255
    assert torch.equal(codecs["units:300"].decode(codes)[:, 0], centroids[expected])
    foreign = torch.tensor([[255, 255]], dtype=torch.uint8)
    assert codecs["units:300"].symbols(foreign).item() == 299


def test_a_second_codebook_more_than_halves_the_error(codecs: dict[str, DiscreteCodec]) -> None:
    assert codecs["mvq:2"].error < 0.5 * codecs["mvq:1"].error


def test_entries_and_codebooks_of_exact_sums_are_found() -> None:
    generator = torch.Generator().manual_seed(5)
    books = torch.randn(2, SIZE, DIM, generator=generator)
    entries = torch.randint(0, SIZE, (6000, 2), generator=generator)
    frames = sum_entries(books, entries)
    assert torch.equal(frames, books[0][entries[:, 0]] + books[1][entries[:, 1]])
    found = choose_entries(frames[:300], books)
    assert (found == entries[:300]).all(1).float().mean() > 0.6, "the search keeps too few candidates"
    solved = best_codebooks(frames, entries, 2)
    assert (sum_entries(solved, entries) - frames).square().mean() < 0.01 * frames.square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_fitting_twice_gives_the_same_state(name: str) -> None:
    sample, held_out = features(600, 6, layers=2), features(100, 7, layers=2)
    one, two = fit_codec(name, sample, held_out), fit_codec(name, sample, held_out)
    assert {key.partition(".")[0] for key in one} == {"0", "1"}
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert len(open_codec(name, (3, 5), DIM, one)) == 2


def test_clustering_finds_separate_groups_and_fills_empty_clusters() -> None:
    centres = 10 * torch.eye(6)
    frames = centres.repeat_interleave(40, 0) + 0.1 * torch.randn(240, 6, generator=torch.Generator().manual_seed(0))
    found = cluster(frames, 6)
    assert (torch.cdist(centres, found).min(1).values < 0.1).all()
    same = torch.ones(10, 6)
    assert cluster(same, 4).isfinite().all()
    assert nearest(frames[:0], found)[0].shape == (0,)


@pytest.mark.parametrize("name", ["units", "units:", "units:0", "units:1.5", "units:65537", "mvq:-1", "mvq:65", "mvq"])
def test_numbers_of_symbols_are_checked(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"the number after the colon must be a whole number from 1 to (64|65536), as in"
    ):
        check_codec(name)


def test_too_few_frames_and_foreign_states_are_refused() -> None:
    with pytest.raises(ValueError, match="units:300 needs at least 300 frames .* but the corpus has 299; choose fewer"):
        fit_codec("units:300", features(299, 1), features(10, 2))
    with pytest.raises(ValueError, match="mvq:1 needs at least 256 frames .* but the corpus has 255"):
        fit_codec("mvq:1", features(255, 1), features(10, 2))
    state = fit_codec("units:9", features(50, 1), features(10, 2))
    with pytest.raises(ValueError, match=r"'units:10' was made for units:9"):
        open_codec("units:10", (1,), DIM, state)
    with pytest.raises(ValueError, match="made for another codec"):
        open_codec("mvq:1", (1,), DIM, state)


def test_codecs_with_many_symbols_are_fitted_to_more_frames() -> None:
    assert sample_frames("pca", 12, 768) == sample_frames("units:100", 1, 768) == 20_000
    assert sample_frames("units:500", 1, 768) == 50_000
    assert sample_frames("mvq:16", 1, 768) == 64_000
    assert 20_000 < sample_frames("mvq:16", 12, 768) < 64_000  # 2 GB


def test_codebooks_are_as_good_as_those_of_multi_quantization() -> None:
    """The package's own training, on features of its taste; an optional check against another implementation."""
    oracle = pytest.importorskip("multi_quantization")
    torch.manual_seed(0)
    sample, held_out = features(4000, 1)[:, 0], features(500, 2)[:, 0]
    trainer = oracle.QuantizerTrainer(DIM, 2, torch.device("cpu"), phase_one_iters=400, phase_two_iters=400)
    mean, scale = sample.mean(0), sample.std()
    while not trainer.done():
        trainer.step((sample[torch.randint(len(sample), (600,))] - mean) / scale)
    quantizer = trainer.get_quantizer()
    with torch.no_grad():
        decoded = quantizer.decode(quantizer.encode((held_out - mean) / scale)) * scale + mean
    theirs = relative_error(held_out[:, None], decoded[:, None])
    state = fit_codec("mvq:2", sample[:, None], held_out[:, None])
    assert state["0.error"] <= theirs
