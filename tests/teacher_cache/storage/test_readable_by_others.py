"""A cache can be read with DuckDB and NumPy alone, by the code in docs/in-depth/cache-format.md."""

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "in-depth" / "cache-format.md"
Make = Callable[..., CacheSpec]


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The names that the Python block of the document defines."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def rows(pattern: Path) -> dict[str, dict[str, Any]]:
    """Return all rows of some shards by utterance, read with DuckDB."""
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
    """The documented formula of the codec pca, in NumPy."""
    root = tmp_path / "cache"
    make_cache(root, codec="pca:0.02")  # With this small step, some components take two bytes.
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


@pytest.mark.parametrize("audio", ["flac", "pcm"])
def test_audio(tmp_path: Path, make_cache: Make, audio: str) -> None:
    make_cache(tmp_path / "cache", audio=audio)
    reader = CacheReader(tmp_path / "cache", "train")
    found = rows(tmp_path / "cache" / "clean" / "*.parquet")
    for index, name in enumerate(reader.ids):
        value = found[name]["audio"]
        samples = np.frombuffer(value, "<i2") if audio == "pcm" else soundfile.read(io.BytesIO(value), dtype="int16")[0]
        assert len(samples) == found[name]["num_samples"]
        np.testing.assert_array_equal(samples / np.float32(32768), reader.read([index], None).waveforms[0])


@pytest.mark.parametrize("codec", ["fp16", "pca"])
@pytest.mark.parametrize("targets", ["clean_and_masked", "masked_everywhere", "composite_only", "clean_only"])
def test_every_file_and_column_is_documented(tmp_path: Path, make_cache: Make, codec: str, targets: str) -> None:
    root = tmp_path / "cache"
    make_cache(root, "random:3x32", layers=(1,), codec=codec, targets=targets)
    make_cache(root, "random:3x32", codec=codec, targets=targets)
    text = DOCUMENT.read_text()
    listing = text.partition("| file | content |")[2].partition("\nA shard is")[0]
    documented = re.findall(r"^\|.*?\|", listing, re.MULTILINE)
    for path in (path for path in root.rglob("*") if path.is_file()):
        top = path.relative_to(root).parts[0]
        assert any(f"`{top}" in names for names in documented), path
    types: dict[str, str] = {}
    for names, kind in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", text, re.MULTILINE):
        types |= dict.fromkeys(re.findall(r"`(\w+)[`.]", names), kind)
    shards = list(root.rglob("part-*.parquet"))
    for path in shards:
        for field in pq.read_schema(path):
            name = "layer_KK" if re.fullmatch(r"layer_\d\d", field.name) else field.name
            name = re.sub(r"^layers_\d\d_\d\d$", "layers_01_02_", name)
            kind = str(field.type).replace("list<element: bool not null>", "list of bool")
            assert types[name] == kind, f"{path}: {field}"
    assert {path.relative_to(root).parts[0] for path in shards} == {
        "clean_and_masked": {"clean", "masked"},
        "masked_everywhere": {"clean", "masked"},
        "composite_only": {"clean", "composite"},
        "clean_only": {"clean"},
    }[targets]


def test_record_checksums_need_only_a_json_parser(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root, codec="int8")
    records = [root / "cache.json", *(root / "commits").rglob("*.json")]
    assert len(records) > 5
    for path in records:
        record = json.loads(path.read_text())
        seal = record.pop("seal")
        assert hashlib.sha256((json.dumps(record, sort_keys=True, indent=2) + "\n").encode()).hexdigest() == seal
        if path.name != "cache.json":
            data = (root / path.relative_to(root / "commits").with_suffix(".parquet")).read_bytes()
            assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            assert record["rows"] == pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
            assert set(record) == {"rows", "bytes", "sha256", "content"}
    identity = json.loads((root / "cache.json").read_text())
    state = (root / "codec" / "set=0.safetensors").read_bytes()
    assert identity["sets"] == [{"layers": [1, 2], "state": hashlib.sha256(state).hexdigest()}]
