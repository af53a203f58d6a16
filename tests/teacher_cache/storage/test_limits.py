"""Records from a stranger: every one that is beyond a limit, or lacks a key, is refused in one sentence before memory is allocated."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from ray_distill.teacher_cache.embedded_audio import from_flac, quantize, to_flac
from ray_distill.teacher_cache.maintenance.cache_teacher import chosen_teacher
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.create import grow_cache
from ray_distill.teacher_cache.storage.json_record import decode_record, encode_record
from ray_distill.teacher_cache.storage.limits import check_commit
from ray_distill.teacher_cache.storage.shard_plan import PLAN_SCHEMA

from .test_cache import create, spec


def forge(root: Path, change: Callable[[dict[str, Any]], object], names: tuple[str, ...] = ("", "copies")) -> None:
    """Change ``cache.json``, and its copy, and give them right seals."""
    for folder in names:
        path = root / folder / "cache.json"
        record = decode_record(path.read_bytes())
        change(record)
        path.write_bytes(encode_record(record))


KEYS = (
    "plan",
    "teacher_name",
    "teacher_spec",
    "fingerprint",
    "utterances",
    "shards",
    "frames",
    "seconds",
    "threads",
    "sets",
    "spec",
)
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"no {key}": lambda record, key=key: record.pop(key) for key in KEYS},
    **{f"text in {key}": lambda record, key=key: record.update({key: ["x"]}) for key in KEYS},
    "draws": lambda record: record["spec"]["masks"].update(draws=100_000_000),
    "threads": lambda record: record.update(threads=1_000_000),
    "no threads at all": lambda record: record.update(threads=0),
    "seconds": lambda record: record.update(seconds=float("nan")),
    "a long name": lambda record: record.update(teacher_name="x" * 4097),
    "a long place": lambda record: record.update(audio_path="x" * 4097),
    "a place of two lines": lambda record: record.update(audio_path="a\nb"),
    "no seconds": lambda record: record["spec"].update(shard_seconds=0.0),
    "escape": lambda record: record.update(teacher_name="\x1b[2J"),
    "dim": lambda record: record["spec"].update(dim=10**9),
    "layers": lambda record: record["spec"].update(num_layers=10**9),
    "other layers": lambda record: record["sets"][0].update(layers=[1, 2]),
    "a layer twice": lambda record: record["sets"].append({"layers": [1], "state": None}),
    "an empty set": lambda record: record["sets"].append({"layers": [], "state": None}),
    "batches": lambda record: record["spec"].update(batch_seconds=float("inf")),
    "mask length": lambda record: record["spec"]["masks"]["policy"].update(mask_length=10**400),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_beyond_the_limits_is_refused(tmp_path: Path, change: str) -> None:
    create(tmp_path)
    forge(tmp_path, CHANGES[change])
    for attempt in (Cache.open, verify_cache, repair_cache):
        with pytest.raises(CacheError, match="cache.json is not valid") as caught:
            attempt(tmp_path)
        assert "\n" not in str(caught.value)


def test_deeply_nested_and_huge_records_are_damaged(tmp_path: Path) -> None:
    create(tmp_path)
    for data in (b"[" * 200_000, b" " * (17 << 20)):
        (tmp_path / "cache.json").write_bytes(data)
        with pytest.raises(CacheError, match="cache.json is damaged"):
            Cache.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"bytes": 2**62 + 1},
        {"rows": True},
        {"sha256": None},
        {"content": 5},
        {"failed": ["a"]},
        {"failed": {"a": 1}},
        {"failed": {"a": "x" * 4097}},
        {"failed": {"a": "\x1b[2J"}},
    ],
)
def test_a_commit_record_beyond_the_limits_is_refused(change: dict[str, Any]) -> None:
    record = {"rows": 0, "bytes": 2**62, "sha256": "", "content": "", "failed": {"a": "x" * 4096}}
    check_commit(record)
    with pytest.raises(ValueError, match=next(iter(change))):
        check_commit(record | change)


def plan_table(rows: int, **columns: Any) -> pa.Table:
    values: dict[str, Any] = {
        "id": [str(n) for n in range(rows)],
        "split": pa.repeat("train", rows),
        "path": pa.repeat("a.wav", rows),
        "sha256": pa.repeat("0", rows),
        "num_samples": np.full(rows, 16_000),
        "num_frames": np.full(rows, 49),
        "shard": np.zeros(rows, np.int32),
        "row": np.arange(rows, dtype=np.int32),
    }
    return pa.table(values | columns).cast(PLAN_SCHEMA)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (plan_table(200_000, id=pa.repeat("u", 200_000), row=np.zeros(200_000)), "200000 rows in .* bytes"),
        (plan_table(2, path=["x" * 5000, "y"]), "a text of 5000 bytes"),
        (plan_table(2, num_samples=[2**40, 16_000]), "an utterance of 1099511627776 samples"),
        (plan_table(2, num_samples=[-1, 16_000]), "an utterance of -1 samples"),
        (plan_table(2, num_frames=[2**40, 49]), "more frames than samples"),
        (plan_table(2, row=[1, 0]), "not in the order of shards"),
        (plan_table(2, shard=[5, 3], row=[0, 0]), "not in the order of shards"),
        (plan_table(2, shard=[-1, 0], row=[0, 0]), "not in the order of shards"),
        (plan_table(2, id=["a", None]), "empty values"),
        (plan_table(2).drop(["row"]), "its columns are not id"),
        (None, "not a plan"),
    ],
)  # fmt: skip
def test_a_plan_beyond_the_limits_is_refused(tmp_path: Path, table: pa.Table | None, message: str) -> None:
    create(tmp_path)
    buffer = io.BytesIO(b"PAR1 nothing")
    if table is not None:
        pq.write_table(table, buffer, compression="zstd")
    for folder in ("", "copies"):
        (tmp_path / folder / "plan.parquet").write_bytes(buffer.getvalue())
    forge(tmp_path, lambda record: record.update(plan=hashlib.sha256(buffer.getvalue()).hexdigest()))
    with pytest.raises(CacheError, match=f"plan.parquet is not valid .*{message}"):
        verify_cache(tmp_path)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path)
    monkeypatch.setattr("ray_distill.teacher_cache.storage.limits.MAX_FILES", 3)
    with pytest.raises(CacheError, match="there would be 6 files; the limit is 3"):
        _ = Cache.open(tmp_path).shards
    with pytest.raises(CacheError, match="can't be created: it has 2 shards, so there would be 6 files"):
        create(tmp_path / "other")
    with pytest.raises(ValueError, match="less than or equal to 1000"):
        MaskDraws(draws=1001)


def test_flac_that_claims_more_samples_than_the_limit_is_refused() -> None:
    data = bytearray(to_flac(quantize(np.zeros(4000, np.float32))))
    assert len(from_flac(bytes(data))) == 4000
    data[21] |= 0x0F  # The 36-bit number of samples is in the last half byte of byte 21 and in bytes 22 to 25.
    data[22:26] = b"\xff" * 4
    with pytest.raises(ValueError, match="samples by its header; the limit"):
        from_flac(bytes(data))
    stereo = io.BytesIO()
    soundfile.write(stereo, np.zeros((400, 2)), 16_000, format="FLAC")
    for other in (stereo.getvalue(), b"", b"fLaC"):
        with pytest.raises(ValueError, match="audio"):
            from_flac(other)


def state_file(header: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        state_file(b"{}", 2**60),
        state_file(b'{"a":1}' + b" " * (2 << 20)),
        state_file(b"{"),
        b"short",
        state_file(json.dumps({"0.mean": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()),
    ],
)
def test_a_huge_or_wrong_state_of_a_codec_is_refused(
    tmp_path: Path, make_cache: Callable[..., CacheSpec], data: bytes
) -> None:
    make_cache(tmp_path / "cache", codec="pca")
    (tmp_path / "cache" / "codec" / "set=0.safetensors").write_bytes(data)
    forge(tmp_path / "cache", lambda record: record["sets"][0].update(state=hashlib.sha256(data).hexdigest()))
    with pytest.raises(CacheError, match="can't be decoded: "):
        Cache.open(tmp_path / "cache").codecs(0)


@pytest.mark.parametrize(
    "named",
    [
        "torchaudio:HUBERT_BASE",
        "/etc/passwd",
        "random:900x65536",
        "random:4x16",
        "layer-norm:teacher.pt",
        "builtin:../../etc",
        "//host/share/a.pt",
        "",
    ],
)
def test_a_teacher_that_a_cache_names_is_not_loaded_unasked(tmp_path: Path, named: str) -> None:
    create(tmp_path)
    forge(tmp_path, lambda record: record.update(teacher_spec=named))
    with pytest.raises(CacheError, match=f"names the teacher {named!r}, .* run again with --teacher"):
        repair_cache(tmp_path)  # It has no finished shards.
    cache = Cache.open(tmp_path)
    assert chosen_teacher(cache, "mine.pt") == "mine.pt"
    forge(tmp_path, lambda record: record.update(teacher_spec="mean-mask:random:4x8"))
    assert chosen_teacher(Cache.open(tmp_path), None) == "mean-mask:random:4x8"
    forge(tmp_path, lambda record: record.update(teacher_spec="builtin:phone-hubert"))
    assert chosen_teacher(Cache.open(tmp_path), None) == "builtin:phone-hubert"


def test_two_intact_records_that_differ_are_left_for_the_user(tmp_path: Path) -> None:
    create(tmp_path)
    sound = (tmp_path / "cache.json").read_bytes()
    message = f"{tmp_path}/cache.json and its copy {tmp_path}/copies/cache.json are both intact but describe different"
    changes: tuple[Callable[[dict[str, Any]], object], ...] = (
        lambda record: record["spec"]["masks"].update(draws=3),
        lambda record: record.update(teacher_spec="random:4x8"),
        lambda record: record["spec"].update(codec="fp32"),
    )
    for change in changes:
        (tmp_path / "cache.json").write_bytes(sound)
        forge(tmp_path, change, ("",))
        forged = (tmp_path / "cache.json").read_bytes()
        with pytest.raises(CacheError, match=message):
            repair_cache(tmp_path)
        assert (tmp_path / "cache.json").read_bytes() == forged
        assert (tmp_path / "copies" / "cache.json").read_bytes() == sound


def test_an_interrupted_extension_is_taken_back_unless_it_has_files(tmp_path: Path) -> None:
    cache = create(tmp_path)
    sound = (tmp_path / "cache.json").read_bytes()
    grow_cache(cache, spec(masks=MaskDraws(draws=3)), {})
    (tmp_path / "cache.json").write_bytes(sound)  # The copy is written first.
    with pytest.raises(CacheError, match="names the teacher 'b'"):
        repair_cache(tmp_path)
    assert (tmp_path / "copies" / "cache.json").read_bytes() == sound
    grow_cache(cache, spec(masks=MaskDraws(draws=3)), {})
    (tmp_path / "cache.json").write_bytes(sound)
    commit = tmp_path / "commits" / "masked" / "draw=2" / "part-00000.json"
    commit.parent.mkdir(parents=True)
    commit.write_text("{}")
    with pytest.raises(CacheError, match="both intact but describe different"):
        repair_cache(tmp_path)
