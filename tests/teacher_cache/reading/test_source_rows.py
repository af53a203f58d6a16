"""Caches whose audio is read from the corpus: batches, changed and missing files, and what the commands say."""

import io
import pickle
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from rich.console import Console
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.teacher_cache.audio import load_identified_audio
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.maintenance.derive import derive_cache
from ray_distill.teacher_cache.maintenance.info import info_table
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.teachers import load_teacher

from ...tiny import TEACHER
from ..storage.test_audio_store import assert_same_batches

Make = Callable[..., CacheSpec]
NO_DRAWS = MaskDraws(draws=0)


def masks(draws: int) -> MaskDraws:
    return MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=4), draws=draws, seed=3)


def write_index(path: Path, utterances: list[Utterance]) -> str:
    """Write what a run's ``corpus/index.parquet`` has."""
    names = ("id", "path", "num_samples", "split", "sha256")
    pq.write_table(pa.table({name: [getattr(u, name) for u in utterances] for name in names}), path)
    return str(path)


def moved(utterances: list[Utterance], old: Path, new: Path) -> list[Utterance]:
    return [Utterance(u.id, u.path.replace(str(old), str(new)), u.num_samples, u.split, u.sha256) for u in utterances]


@pytest.mark.parametrize("targets", ["clean_and_masked", "composite_only"])
def test_batches_are_those_of_a_cache_with_audio(tmp_path: Path, make_cache: Make, targets: str) -> None:
    for name, audio in (("whole", "flac"), ("cache", "source")):
        # It grows by layers and by draws as the other one does.
        make_cache(tmp_path / name, audio=audio, codec="int8", targets=targets, masks=masks(1), layers=(1,))
        make_cache(tmp_path / name, audio=audio, codec="int8", targets=targets, masks=masks(2))
    assert verify_cache(tmp_path / "cache") == []
    for split in ("train", "validation"):
        one, other = (CacheReader(tmp_path / name, split) for name in ("cache", "whole"))
        assert_same_batches(one, other)
        assert one.prefers_window == other.prefers_window and one.batches_at_once == other.batches_at_once
    cache = Cache.open(tmp_path / "cache")
    assert "audio_path" not in cache.record and cache.spec.audio_store is None
    files = list((tmp_path / "cache").glob("c[lo]*/**/part-*.parquet"))
    assert files and not any("audio" in pq.read_schema(file).names for file in files)
    assert cache_bytes(cache) < cache_bytes(Cache.open(tmp_path / "whole"))


def test_all_kinds_of_sources_give_the_audio_of_a_cache(tmp_path: Path, cache_spec: Make) -> None:
    """Whole files of several rates, pieces, channels, lossy audio, members of a tar file, and rows of a Parquet file."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    noise = (0.2 * np.random.default_rng(0).standard_normal((3 * 44_100, 2))).clip(-1, 1)
    for name, rate in (("a.wav", 44_100), ("b.flac", 16_000), ("c.mp3", 44_100), ("d.ogg", 16_000), ("e.wav", 48_000)):
        soundfile.write(corpus / name, noise[: 2 * rate], rate)
    data = (corpus / "b.flac").read_bytes()
    with tarfile.open(corpus / "f.tar", "w") as archive:
        member = tarfile.TarInfo("b.flac")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    with tarfile.open(corpus / "f.tar") as archive:
        offset = archive.getmembers()[0].offset_data
    rows = pa.table({"audio": [{"bytes": data, "path": "x"}] * 3})
    pq.write_table(rows, corpus / "g.parquet", row_group_size=2, compression="zstd")
    addresses = [
        *(AudioAddress(str(corpus / name)) for name in ("a.wav", "b.flac", "c.mp3", "d.ogg", "e.wav")),
        AudioAddress(str(corpus / "a.wav"), start=10_000, end=60_000, channel=1),
        AudioAddress(str(corpus / "b.flac"), start=8_000),
        AudioAddress(str(corpus / "c.mp3"), start=44_100, end=80_000),
        AudioAddress(str(corpus / "f.tar"), offset=offset, size=len(data), name="b.flac"),
        AudioAddress(str(corpus / "g.parquet"), row=2, column="audio", end=20_000),
    ]
    utterances = []
    for number, address in enumerate(addresses):
        waveform, identity = load_identified_audio(address)
        utterances.append(Utterance(f"u{number}", address.encode(), len(waveform), "train", identity))
    for name, audio in (("whole", "flac"), ("cache", "source")):
        spec = cache_spec(TEACHER, masks=NO_DRAWS, audio=audio)
        build_cache(tmp_path / name, spec, plan_shards(utterances, 5), TEACHER, teacher_name=TEACHER, workers=None)
    assert_same_batches(CacheReader(tmp_path / "cache", "train"), CacheReader(tmp_path / "whole", "train"))
    shutil.move(corpus, tmp_path / "moved")
    index = write_index(tmp_path / "index.parquet", moved(utterances, corpus, tmp_path / "moved"))
    reader = CacheReader(tmp_path / "cache", "train", audio=index)
    assert_same_batches(reader, CacheReader(tmp_path / "whole", "train"))
    assert torch.equal(pickle.loads(pickle.dumps(reader))[3].waveform, reader[3].waveform)


def test_a_changed_or_missing_file_is_one_sentence(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]
) -> None:
    make_cache(tmp_path / "cache", audio="source", codec="fp16")
    reader = CacheReader(tmp_path / "cache", "train")
    by_id = {utterance.id: utterance for utterance in source_utterances}
    changed, lost = by_id[reader.ids[0]], by_id[reader.ids[1]]
    samples, rate = soundfile.read(changed.path)
    samples[100] += 1 / 32768
    soundfile.write(changed.path, samples, rate, subtype="PCM_16")
    Path(lost.path).unlink()
    beginning = rf"^the cache at {tmp_path}/cache reads its audio from the corpus \(cache.audio=source\), but "
    ending = (
        r"restore the corpus as it was, or give the index .*, or build a cache with cache.audio=store, which [^;]*$"
    )
    with pytest.raises(
        CacheError,
        match=f"{beginning}utterance {changed.id} can't be read: {changed.path} has changed since the corpus was .*; {ending}",
    ):
        reader.read([0], 0)
    with pytest.raises(CacheError, match=f"{beginning}utterance {lost.id} can't be read: {lost.path} .*; {ending}"):
        reader[1]
    assert reader.read([0, 1], 0, audio=False).targets.isfinite().all(), "features need no corpus"
    assert len(reader[2].waveform) > 0
    index = write_index(tmp_path / "index.parquet", source_utterances)
    with pytest.raises(CacheError, match="; restore the corpus as it was, or run the index stage again, or build a"):
        CacheReader(tmp_path / "cache", "train", audio=index).read([0], 0)


def test_an_index_must_be_that_of_the_corpus(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]
) -> None:
    make_cache(tmp_path / "cache", audio="source", codec="fp16")
    make_cache(tmp_path / "whole", codec="fp16")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "ids.parquet")
    for wrong in ("folder", "nowhere", "whole/cache.json", "ids.parquet"):
        with pytest.raises(
            CacheError, match=rf"but {tmp_path}/{wrong} is no index of it \(.*\); give corpus/index.par"
        ):
            CacheReader(tmp_path / "cache", "train", audio=str(tmp_path / wrong))
    lost = next(utterance for utterance in source_utterances if utterance.split == "train")
    some = write_index(tmp_path / "some.parquet", [u for u in source_utterances if u != lost])
    with pytest.raises(CacheError, match=f"some.parquet lacks utterance {lost.id} of the cache at .*; give the index"):
        CacheReader(tmp_path / "cache", "train", audio=some)
    # An index of other audio with the same ids gives no audio.
    other = [Utterance(lost.id, source_utterances[-1].path, lost.num_samples, lost.split, "0" * 64)]
    index = write_index(tmp_path / "other.parquet", other + [u for u in source_utterances if u != lost])
    reader = CacheReader(tmp_path / "cache", "train", audio=index)
    with pytest.raises(CacheError, match=f"utterance {lost.id} can't be read: .* has changed since"):
        reader.read([list(reader.ids).index(lost.id)], 0)
    refused = "cache reads its audio from the corpus .*, so the place .*whole of its audio does nothing; leave it out"
    spec = Cache.open(tmp_path / "cache").spec
    with pytest.raises(CacheError, match=refused):
        build_cache(
            tmp_path / "cache",
            spec,
            plan_shards(source_utterances, 5),
            TEACHER,
            teacher_name=TEACHER,
            workers=None,
            audio=str(tmp_path / "whole"),
        )
    with pytest.raises(CacheError, match=r"audio: 'source' -> 'flac'"):
        make_cache(tmp_path / "cache", codec="fp16")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a web server of the temporary folder."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print nothing, to keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_urls_are_read_from_the_index_of_a_run_only(
    tmp_path: Path, cache_spec: Make, make_cache: Make, source_utterances: list[Utterance], server: str
) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads URLs of web servers with it")
    remote = moved(source_utterances, tmp_path, Path("HERE"))
    remote = [Utterance(u.id, u.path.replace("HERE", server), u.num_samples, u.split, u.sha256) for u in remote]
    spec = cache_spec(audio="source", codec="fp16")
    plan = plan_shards(remote, spec.shard_seconds)
    build_cache(tmp_path / "cache", spec, plan, TEACHER, teacher_name=TEACHER, workers=None)
    make_cache(tmp_path / "whole", codec="fp16")
    index = write_index(tmp_path / "index.parquet", remote)
    reader = CacheReader(tmp_path / "cache", "train", audio=index)
    assert_same_batches(reader, CacheReader(tmp_path / "whole", "train"))
    assert reader.batches_at_once > 1 and not reader.prefers_window
    with pytest.raises(CacheError, match="is not fetched unasked, because a cache may come from a stranger; restore"):
        CacheReader(tmp_path / "cache", "train").read([0], 0)


def test_copies_hold_the_files_of_the_cache_alone(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "whole", codec="fp16")
    make_cache(tmp_path / "cache", audio="source", codec="fp16")
    copied = CacheReader(tmp_path / "cache", "train", local=tmp_path / "copies")
    assert not copied.needs_window and copied.read_ahead is not None
    copied.read_ahead.expect([0, 1], 0)
    copied.read_ahead.clear()
    assert_same_batches(copied, CacheReader(tmp_path / "whole", "train"))
    shards = sum(shard.split == "train" for shard in Cache.open(tmp_path / "cache").shards)
    assert len(list((tmp_path / "copies").glob("*.parquet"))) == 3 * shards  # The clean pass and two draws.


def test_the_commands_say_where_the_audio_is(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]
) -> None:
    make_cache(tmp_path / "cache", audio="source", codec="fp16")
    cache, corpus = tmp_path / "cache", tmp_path / "corpus"

    def info() -> str:
        console = Console(width=600, record=True, quiet=True)
        with console.capture() as shown:
            console.quiet = False
            console.print(info_table(cache))
        return shown.get()

    assert "read from the corpus, such as " + str(corpus) in info() and "beside the audio" in info()
    assert all(check.good for check in verify_deep(cache, load_teacher(TEACHER)))
    first = source_utterances[0]
    Path(first.path).rename(tmp_path / "aside")
    (problem,) = verify_cache(cache)
    assert problem.kind == "audio"
    assert f"1 of 12 files are missing, such as {first.path} of utterance {first.id}; re" in problem.text
    (tmp_path / "aside").rename(first.path)
    corpus.rename(tmp_path / "elsewhere")
    assert "12 of 12 files are missing" in info()
    shown = CliRunner().invoke(application, ["cache", "verify", str(cache)], env={"COLUMNS": "600"})
    assert shown.exit_code == 1 and "12 of 12 files are missing" in shown.output
    assert "are sound, but not the audio to which it refers" in shown.output
    index = write_index(tmp_path / "index.parquet", moved(source_utterances, corpus, tmp_path / "elsewhere"))
    assert verify_cache(cache, audio=index) == []
    shown = CliRunner().invoke(application, ["cache", "verify", str(cache), "--audio", index])
    assert shown.exit_code == 0 and "is sound; its audio, in the corpus, was not compared" in shown.output
    shown = CliRunner().invoke(
        application, ["cache", "verify", str(cache), "--audio", index, "--deep", "2", "--teacher", TEACHER]
    )
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("targets", ["clean_and_masked", "composite_only"])
def test_repair_takes_the_audio_from_the_corpus(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance], targets: str
) -> None:
    broken = next(u for u in source_utterances[6:] if u.split == "train")
    sound_audio = Path(broken.path).read_bytes()
    Path(broken.path).write_bytes(b"no audio")
    make_cache(tmp_path / "cache", audio="source", codec="fp16", targets=targets)
    assert list(failed_utterances(Cache.open(tmp_path / "cache"))) == [broken.id]
    files = sorted((tmp_path / "cache").glob("*/**/part-*.parquet"))
    assert len(files) > 6
    sound = {file: file.read_bytes() for file in files}
    for file in files:
        file.write_bytes(sound[file][:-1] + bytes([sound[file][-1] ^ 1]))
        (done,) = repair_cache(tmp_path / "cache")
        assert done.endswith("rebuilt") and file.read_bytes() == sound[file]
    if targets == "clean_and_masked":  # What the file of the clean pass lacks stays out, although it could be read now.
        Path(broken.path).write_bytes(sound_audio)
        for file in (tmp_path / "cache" / "masked").rglob("part-*.parquet"):
            file.write_bytes(b"")
        assert len(repair_cache(tmp_path / "cache")) > 2
        assert all(file.read_bytes() == sound[file] for file in files)
    # Nothing is left out because the corpus is not there.
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    files[-1].write_bytes(b"")
    with pytest.raises(CacheError, match=r"while caching: .*/corpus/.* can't be decoded"):
        repair_cache(tmp_path / "cache")
    with pytest.raises(
        CacheError, match=r"\(cache.audio=source\); if that has moved, give its index as --audio, which"
    ):
        repair_cache(tmp_path / "cache", corpus_moved=("a", "b"))
    there = moved(source_utterances, tmp_path / "corpus", tmp_path / "elsewhere")
    index = write_index(tmp_path / "index.parquet", there)
    (done,) = repair_cache(tmp_path / "cache", audio=index)
    assert done.endswith("rebuilt") and files[-1].read_bytes() == sound[files[-1]]
    assert verify_cache(tmp_path / "cache", audio=index) == []


def test_audio_that_fails_is_left_out(tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]) -> None:
    broken = source_utterances[-2]
    Path(broken.path).write_bytes(b"no audio")
    for name, audio in (("whole", "flac"), ("cache", "source")):
        make_cache(tmp_path / name, audio=audio, codec="fp16", masks=masks(1))
        make_cache(tmp_path / name, audio=audio, codec="fp16", masks=masks(2))
    reader = CacheReader(tmp_path / "cache", broken.split)
    assert_same_batches(reader, CacheReader(tmp_path / "whole", broken.split))
    assert broken.id not in reader.ids and len(reader.failed) == 1
    shutil.rmtree(tmp_path / "corpus")  # A corpus that is not there is no reason to leave it out.
    with pytest.raises(CacheError, match=r"failed while caching, but cache.max_failed=0.001"):
        make_cache(tmp_path / "cache", audio="source", codec="fp16", masks=masks(3))


def test_targets_are_derived_without_the_corpus(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]
) -> None:
    make_cache(tmp_path / "cache", audio="source", codec="fp16")
    make_cache(tmp_path / "whole", codec="fp16")
    spec = CacheSpec.of_audio("test", 5)
    build_audio_store(tmp_path / "audio", spec, plan_audio(source_utterances, 5), workers=None)
    (tmp_path / "corpus").rename(tmp_path / "elsewhere")
    derive_cache(tmp_path / "cache", tmp_path / "units", "units:20", [2])
    derive_cache(tmp_path / "cache", tmp_path / "stored", "units:20", [2], audio=str(tmp_path / "audio"))
    (tmp_path / "elsewhere").rename(tmp_path / "corpus")
    derive_cache(tmp_path / "whole", tmp_path / "copied", "units:20", [2])
    assert [Cache.open(tmp_path / name).spec.audio for name in ("units", "stored")] == ["source", "store"]
    for name in ("units", "stored"):
        assert_same_batches(CacheReader(tmp_path / name, "train"), CacheReader(tmp_path / "copied", "train"))
