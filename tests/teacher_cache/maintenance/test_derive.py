"""Caches of discrete targets that are derived from other caches, without the teacher."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.teacher_cache import commands
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance import derive
from ray_distill.teacher_cache.maintenance.derive import derive_cache
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import load_teacher

from ...tiny import TEACHER

Make = Callable[..., CacheSpec]


def test_a_derived_cache_encodes_the_decoded_features_and_names_its_source(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]
) -> None:
    make_cache(tmp_path / "source", codec="fp16")
    source = Cache.open(tmp_path / "source")
    assert "derived_from" not in json.dumps(source.record["spec"]), "fingerprints of earlier versions stay valid"
    place = tmp_path / "units"
    shards = derive_cache(tmp_path / "source", place, "units:20", [2])
    cache = Cache.open(place)
    assert shards == len(cache.shards) == len(source.shards)
    assert cache.spec.derived_from == source.fingerprint
    assert (cache.spec.layers, cache.spec.codec, cache.spec.masks.draws) == ((2,), "units:20", 0)
    assert verify_cache(place) == []
    assert all(check.good for check in verify_deep(place, load_teacher(TEACHER)))
    (codec,) = cache.codecs(0)
    for split in ("train", "validation"):
        ours, theirs = CacheReader(place, split), CacheReader(tmp_path / "source", split, [2], 0)
        assert ours.ids == theirs.ids
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.waveform, other.waveform)
            frames = other.targets.transpose(0, 1)
            assert torch.equal(one.targets.transpose(0, 1), codec.decode(codec.encode(frames)))
    # A run whose configuration asks for these units is served by it.
    needed = source.spec.model_copy(update={"layers": (2,), "codec": "units:20", "masks": cache.spec.masks})
    assert cache.covers(needed)
    plan = plan_shards(source_utterances, needed.shard_seconds)
    assert build_cache(place, needed, plan, TEACHER, teacher_name=TEACHER, workers=None).written == 0
    # Its other layers, and what is lost, can't come from the teacher.
    grown = needed.model_copy(update={"layers": (1, 2)})
    with pytest.raises(
        CacheError,
        match="was derived from another one, .* and lacks layer 1; run `ray-distill cache derive` from that cache again, with another "
        "--output and all layers that are needed",
    ):
        build_cache(place, grown, plan, TEACHER, teacher_name=TEACHER, workers=None)
    damaged = place / "clean" / "part-00000.parquet"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:100])
    with pytest.raises(
        CacheError,
        match="was derived from another one, .* and lacks files; run .* from that cache again$",
    ):
        repair_cache(place)
    assert derive_cache(tmp_path / "source", place, "units:20", [2]) == 1
    assert damaged.read_bytes() == before
    assert verify_cache(place) == []


def test_an_interrupted_derivation_continues(tmp_path: Path, make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "source", codec="pca:0.2")
    write, count = derive._write, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(derive, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        derive_cache(tmp_path / "source", tmp_path / "mvq", "mvq:1", [1, 2])
    assert len(Cache.open(tmp_path / "mvq").missing()) > 0
    shards = len(Cache.open(tmp_path / "mvq").shards)
    assert derive_cache(tmp_path / "source", tmp_path / "mvq", "mvq:1", [1, 2]) == shards - 1
    assert CacheReader(tmp_path / "mvq", "train").read([0], None).symbols.shape[1::2] == (2, 1)
    for codec, layers, message in (
        ("mvq:2", [1, 2], "holds another cache .codec: 'mvq:1' -> 'mvq:2'"),
        ("mvq:1", [2], "holds another cache .other layers"),
        ("mvq:1", [3], r"has no layer 3; it has layers \[1, 2\]"),
    ):
        with pytest.raises(CacheError, match=message):
            derive_cache(tmp_path / "source", tmp_path / "mvq", codec, layers)
    with pytest.raises(CacheError, match="has the codec mvq:1, which keeps too little"):
        derive_cache(tmp_path / "mvq", tmp_path / "other", "units:3", [1])
    with pytest.raises(CacheError, match="can't be derived into its own location"):
        derive_cache(tmp_path / "source", tmp_path / "source", "units:3", [1])
    with pytest.raises(CacheError, match="could not be fitted: codec units:60000 needs at least 60000 frames"):
        derive_cache(tmp_path / "source", tmp_path / "big", "units:60000", [1])
    with pytest.raises(
        CacheError, match=r"^codec 'mvq:0': the number after the colon must be a whole number from 1 to 64"
    ):
        derive_cache(tmp_path / "source", tmp_path / "none", "mvq:0", [1])


def test_a_failed_derivation_leaves_no_folder(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "source", codec="fp16")
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with pytest.raises(CacheError, match="the codec could not be fitted"):
            derive_cache(tmp_path / "source", tmp_path / name, "units:60000", [2])
    assert not (tmp_path / "new").exists() and (tmp_path / "mine").is_dir()


def test_a_cache_without_clean_pass_is_refused(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "source", targets="composite_only")
    with pytest.raises(CacheError, match="has no clean pass of the training split"):
        derive_cache(tmp_path / "source", tmp_path / "units", "units:3", [1])


def test_a_derivation_that_was_killed_before_its_manifest_writes_it(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "source", codec="fp16")
    derive_cache(tmp_path / "source", tmp_path / "units", "units:4", [2])
    sound = (tmp_path / "units" / MANIFEST).read_bytes()
    (tmp_path / "units" / MANIFEST).unlink()
    assert derive_cache(tmp_path / "source", tmp_path / "units", "units:4", [2]) == 0
    assert (tmp_path / "units" / MANIFEST).read_bytes() == sound


def test_the_command_says_how_far_it_is(tmp_path: Path, make_cache: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cache(tmp_path / "source")
    monkeypatch.setattr(commands, "LINE_SECONDS", 0.0)
    command = ["cache", "derive", str(tmp_path / "source"), "--layer", "2"]
    done = CliRunner().invoke(application, [*command, "--units", "20"])
    place, shards = f"{tmp_path}/source-units-20-layer-2", len(Cache.open(tmp_path / "source").shards)
    assert done.exit_code == 0 and shards > 1, done.output
    *lines, last = done.output.splitlines()
    assert lines == [f"{place}: {number} of {shards} shards written" for number in range(1, shards + 1)]
    assert last.startswith(f"{place}: {shards} of {shards} shards written, ") and verify_cache(place) == []
    for codecs in ([], ["--units", "20", "--mvq", "2"]):
        refused = CliRunner().invoke(application, [*command, *codecs])
        assert refused.exit_code == 2 and "give exactly one of --units and --mvq" in refused.output
