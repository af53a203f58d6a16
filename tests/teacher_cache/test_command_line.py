"""``ray-distill cache``: its output and exit codes, and the deep check behind ``verify --deep``."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.teacher_cache.maintenance.verify import DEEP_TOLERANCE, verify_cache, verify_deep
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.storage.cache import Cache, file_record, write_commit
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.teachers import load_teacher

from ..tiny import TEACHER

REPOSITORY = Path(__file__).resolve().parents[2]
Make = Callable[..., CacheSpec]


def run(*arguments: object) -> tuple[int, str]:
    """Run ``ray-distill cache`` in this process, since starting PyTorch anew would take longer than all the rest."""
    done = CliRunner().invoke(application, ["cache", *map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.output


def alter_values(root: Path, layer: str, folder: str = "clean") -> None:
    """Replace one layer of one shard by other numbers, with a matching commit record."""
    cache = Cache.open(root)
    files = [file for shard in cache.shards if shard.split == "train" for file in cache.files(shard)]
    file = next(file for file in files if file.part.folder == folder)
    table = pq.read_table(root / file.name)
    place = table.schema.get_field_index(layer)
    values = [bytes(reversed(value)) for value in table[layer].to_pylist()]
    altered = table.set_column(place, table.schema.field(place), pa.array(values, pa.large_binary()))
    pq.write_table(altered, root / file.name, row_group_size=1)
    write_commit(cache.store, file, file_record(root / file.name, altered.num_rows, file.content))


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "pca:0.3", "layer-pca:0.3", "units:20", "mvq:1"])
def test_the_deep_check_passes_for_a_sound_cache(tmp_path: Path, make_cache: Make, codec: str) -> None:
    make_cache(tmp_path / "cache", codec=codec)
    checks = verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9)
    assert [(check.draw, check.layer) for check in checks] == [(d, n) for d in (None, 0, 1) for n in (1, 2)]
    assert all(check.good for check in checks), checks
    assert all(check.error > 0 for check in checks) or codec == "fp32"


def test_the_deep_check_finds_what_checksums_cannot(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache", codec="int8")
    alter_values(tmp_path / "cache", "layer_02")
    assert verify_cache(tmp_path / "cache") == []
    bad = [check for check in verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9) if not check.good]
    assert {check.layer for check in bad} == {2}
    with pytest.raises(CacheError, match="random:3x32 is not the teacher that the cache at"):
        verify_deep(tmp_path / "cache", load_teacher("random:3x32"))


@pytest.mark.parametrize(
    ("targets", "folder"),
    [
        ("clean_and_masked", "masked/draw=1"),
        ("masked_everywhere", "masked/draw=1"),
        ("composite_only", "composite/draw=1"),
    ],
)
def test_the_deep_check_looks_at_every_draw(tmp_path: Path, make_cache: Make, targets: str, folder: str) -> None:
    make_cache(tmp_path / "cache", codec="fp16", targets=targets)
    assert all(check.good for check in verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9))
    alter_values(tmp_path / "cache", "layer_01", folder)
    assert verify_cache(tmp_path / "cache") == []
    bad = [check for check in verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9) if not check.good]
    assert [(check.draw, check.layer) for check in bad] == [(1, 1)]


@pytest.mark.parametrize("changes", [{"targets": "clean_only"}, {"masks": MaskDraws(draws=0)}])
def test_the_deep_check_of_caches_without_masked_passes(
    tmp_path: Path, make_cache: Make, changes: dict[str, Any]
) -> None:
    make_cache(tmp_path / "cache", codec="fp16", **changes)
    assert all(check.good for check in verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9))
    alter_values(tmp_path / "cache", "layer_02")
    bad = [check for check in verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9) if not check.good]
    assert {check.layer for check in bad} == {2}
    assert bad[0].draw is None


def test_the_deep_check_allows_what_the_codec_explains_and_no_more(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache", codec="pca:1")
    checks = verify_deep(tmp_path / "cache", load_teacher(TEACHER), sample=9)
    stated = Cache.open(tmp_path / "cache").codecs(0)[0].error
    for check in checks:
        assert check.allowed == pytest.approx(DEEP_TOLERANCE * float(stated[check.layer - 1]) + 1e-3)
        assert 0.3 * check.allowed < check.error <= check.allowed
    worse = replace(checks[0], error=1.01 * checks[0].allowed)
    assert not worse.good
    assert not replace(worse, error=float("nan")).good


def test_info_verify_repair(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root, codec="int8")
    code, text = run("info", root)
    assert code == 0
    for wanted in (
        "random:2x32: 2 layers x 32, fp32",
        "codec int8",
        "2, seed 3",
        "masked/draw=1",
        "complete",
        "kB per s",
    ):
        assert wanted in text, text
    assert Cache.open(root).fingerprint[:16] in text
    assert run("verify", root, "--fast")[0] == 0
    code, text = run("verify", root, "--deep", 9)
    assert code == 0
    assert "is sound" in text and "draw 1" in text
    for arguments, message in (
        (
            ("verify", root, "--deep", 1, "--device", "cuda:99"),
            "--device cuda:99 can't be used on this machine",
        ),
        (("repair", root, "--device", "quantum"), "--device quantum can't be used on this machine"),
        (("verify", root, "--deep", 1, "--teacher", "random:3x32"), "random:3x32 is not the teacher that the cache"),
        (("verify", root, "--deep", 1, "--teacher", "nobody"), "there is no teacher 'nobody'"),
    ):
        code, text = run(*arguments)
        assert code == 2 and message in text
    assert run("verify", root, "--deep", -1)[0] == 2

    shard = root / "masked" / "draw=0" / "part-00000.parquet"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert run("verify", root, "--fast")[0] == 0  # Its size is unchanged.
    code, text = run("verify", root)
    assert code == 1
    assert f"{shard} does not match its commit record (SHA-256 differs)" in text
    code, text = run("repair", root)
    assert code == 0
    assert f"{shard} rebuilt" in text and "1 repair made" in text
    assert shard.read_bytes() == sound
    assert "nothing to repair" in run("repair", root)[1]

    shard.unlink()
    code, text = run("repair", root, "--corpus-moved", "/old", "/new")
    assert code == 2 and "no audio file of the cache was below /old" in text
    assert run("repair", root)[0] == 0

    shutil.rmtree(root / "clean")
    assert "files are not finished" not in run("info", root)[1]  # The commit records exist.
    assert "damaged, 4 of 10 files are missing" in run("info", root)[1]
    assert run("verify", root, "--fast")[0] == 1

    alter = tmp_path / "altered"
    make_cache(alter, codec="int8")
    alter_values(alter, "layer_01")
    assert run("verify", alter)[0] == 0
    code, text = run("verify", alter, "--deep", 9)
    assert code == 1
    assert "is damaged; run `ray-distill cache repair" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "message"),
    [
        ("info", "/nowhere", "error: there is no teacher cache at /nowhere"),
        ("repair", "/nowhere", "error: there is no teacher cache at /nowhere"),
        ("verify", "s4://bucket/cache", "error: s4://bucket/cache can't be opened"),
    ],
)
def test_mistakes_are_one_sentence(command: str, place: str, message: str) -> None:
    code, text = run(command, place)
    assert code == 2
    assert text.startswith(message), text
    assert text.count("\n") == 1, text
