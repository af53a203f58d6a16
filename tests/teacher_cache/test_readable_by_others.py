"""A cache can be read with DuckDB and NumPy alone, by the code that docs/cache.md gives."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from teacher_cache.codecs import open_codec
from teacher_cache.layout import Cache
from teacher_cache.reader import CacheReader
from teacher_cache.spec import CacheSpec

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cache.md"
Make = Callable[..., CacheSpec]


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The names that the document's Python block defines."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def rows(pattern: Path) -> dict[str, dict[str, Any]]:
    """All rows of some shards by utterance, as DuckDB reads them."""
    table = duckdb.sql(f"select * from read_parquet('{pattern}')")
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.fetchall()}


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8"])
def test_targets(tmp_path: Path, make_cache: Make, documented: dict[str, Any], codec: str) -> None:
    root = tmp_path / "cache"
    make_cache(root, codec=codec)
    state = documented["read_state"](root / "codec" / "set=0.safetensors") if codec == "int8" else None
    reader = CacheReader(root, "train")
    clean, masked = rows(root / "clean" / "*.parquet"), rows(root / "masked" / "draw=1" / "*.parquet")
    assert set(masked) == set(reader.ids) < set(clean)
    for index, name in enumerate(reader.ids):
        expected = reader.read([index], 1)
        assert masked[name]["mask"] == expected.frame_mask[0].tolist()
        assert clean[name]["num_frames"] == len(masked[name]["mask"])
        assert clean[name]["num_samples"] == int(expected.lengths[0])
        for position, layer in enumerate(("layer_01", "layer_02")):
            parts = [documented["decode"](row[name][layer], codec, 32, state, position) for row in (clean, masked)]
            ours = documented["target"](*parts, masked[name]["mask"])
            assert ours.shape == (clean[name]["num_frames"], 32)
            np.testing.assert_allclose(ours, expected.targets[0, position].numpy(), rtol=1e-6, atol=1e-6)


def test_components(tmp_path: Path, make_cache: Make, documented: dict[str, Any]) -> None:
    """The formula for pca, in NumPy."""
    root = tmp_path / "cache"
    make_cache(root, codec="pca:0.02")  # So fine that some components take two bytes.
    state = documented["read_state"](root / "codec" / "set=0.safetensors")
    (codec,) = Cache.open(root).codecs(0)
    wide = int(state["0.wide"])
    assert 0 < wide < codec.bytes_per_frame
    reader = CacheReader(root, "validation")
    for index, name in enumerate(reader.ids):
        row = rows(root / "clean" / "*.parquet")[name]
        planes = np.frombuffer(row["layers_01_02"], "u1").reshape(-1, row["num_frames"]).T
        signed = planes.view("i1").astype(np.float32)
        code = np.concatenate([planes[:, :wide] + 256 * signed[:, wide : 2 * wide], signed[:, 2 * wide :]], 1)
        for layer in (0, 1):
            basis = state["0.basis"][:, layer].astype(np.float32)
            ours = state["0.mean"][layer] + state["0.spread"][layer] * state["0.step"] * (code @ basis)
            np.testing.assert_allclose(ours, reader.read([index], None).targets[0, layer], rtol=1e-4, atol=1e-4)


def test_audio(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache", audio="pcm")
    reader = CacheReader(tmp_path / "cache", "train")
    found = rows(tmp_path / "cache" / "clean" / "*.parquet")
    for index, name in enumerate(reader.ids):
        samples = np.frombuffer(found[name]["audio"], "<i2") / 32768
        np.testing.assert_allclose(samples, reader.read([index], None).waveforms[0], atol=1e-7)


def test_the_state_is_what_the_codec_was_opened_with(
    tmp_path: Path, make_cache: Make, documented: dict[str, Any]
) -> None:
    make_cache(tmp_path / "cache", codec="int8")
    state = documented["read_state"](tmp_path / "cache" / "codec" / "set=0.safetensors")
    assert sorted(state) == sorted(f"{n}.{key}" for n in (0, 1) for key in ("mean", "scale", "error"))
    import torch

    tensors = {key: torch.from_numpy(value.copy()) for key, value in state.items()}
    ours, theirs = open_codec("int8", (1, 2), 32, tensors), Cache.open(tmp_path / "cache").codecs(0)
    assert [codec.error.tolist() for codec in ours] == [codec.error.tolist() for codec in theirs]
