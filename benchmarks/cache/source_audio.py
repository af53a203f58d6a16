"""Measure the CPU time of reading audio from a corpus (``cache.audio=source``), compared with an audio store.

The same utterances lie in an audio store as FLAC and as PCM, and in corpora of several formats. Each round reads all of them in a new
random order, as a training does, with decoding, comparison of hashes, resampling and rounding. Audio is read alone, without targets;
``reader.py feed`` measures both together. All files are in the memory of the operating system.
"""

import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torchaudio.functional
import typer

from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import TRAIN, utterances
from ray_distill.teacher_cache.audio import load_audio, load_identified_audio
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.embedded_audio import quantize
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reading.audio_place import recorded_place
from ray_distill.teacher_cache.reading.referred_rows import ReferredRows
from ray_distill.teacher_cache.reading.source_rows import SourceRows
from ray_distill.teacher_cache.reading.split_rows import PlanSplits
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.create import create_cache
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store

SHARD_SECONDS = 120.0
GROUP = 100
"""Rows of a row group of Parquet, as Hugging Face's datasets write them."""
COPIES = 10


def written(waveform: np.ndarray, rate: int, format: str) -> bytes:
    """Return the file of an (S,) waveform at 16 kHz as 16-bit audio of a format at a rate."""
    samples = waveform
    if rate != SAMPLE_RATE:
        samples = torchaudio.functional.resample(torch.from_numpy(waveform), SAMPLE_RATE, rate).clamp(-1, 1).numpy()
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=None if format == "MP3" else "PCM_16")
    return buffer.getvalue()


def files_of(folder: Path, waveforms: dict[str, np.ndarray], rate: int, format: str) -> dict[str, AudioAddress]:
    """Write a file for each utterance, and return their addresses by id."""
    folder.mkdir()
    for name, waveform in waveforms.items():
        (folder / f"{name}.{format.lower()}").write_bytes(written(waveform, rate, format))
    return {name: AudioAddress(str(folder / f"{name}.{format.lower()}")) for name in waveforms}


def pieces_of(folder: Path, waveforms: dict[str, np.ndarray], format: str) -> dict[str, AudioAddress]:
    """Write all utterances one after the other to a single file, and return the addresses of its pieces by id."""
    folder.mkdir()
    file, at, addresses = folder / f"long.{format.lower()}", 0, {}
    for name, waveform in waveforms.items():
        addresses[name] = AudioAddress(str(file), start=at, end=at + len(waveform))
        at += len(waveform)
    file.write_bytes(written(np.concatenate(list(waveforms.values())), SAMPLE_RATE, format))
    return addresses


def rows_of(folder: Path, waveforms: dict[str, np.ndarray]) -> dict[str, AudioAddress]:
    """Write the FLAC of each utterance to rows of a Parquet file with compressed columns, and return an address of each by id.

    Every utterance is in the file COPIES times and read once, so that neighbours in the order are seldom in the same row group.
    """
    folder.mkdir()
    file = folder / "rows.parquet"
    rows = [{"bytes": written(waveform, SAMPLE_RATE, "FLAC"), "path": name} for name, waveform in waveforms.items()]
    pq.write_table(pa.table({"audio": rows * COPIES}), file, row_group_size=GROUP, compression="snappy")
    return {
        name: AudioAddress(str(file), row=n % COPIES * len(rows) + n, column="audio")
        for n, name in enumerate(waveforms)
    }


def indexed(addresses: dict[str, AudioAddress]) -> list[Utterance]:
    """Return the utterances of a corpus as its index has them."""
    found = []
    for name, address in addresses.items():
        waveform, identity = load_identified_audio(address)
        found.append(Utterance(name, address.encode(), len(waveform), "train", identity))
    return found


def empty_cache(folder: Path, members: list[Utterance], audio: str, store: Cache | None = None) -> Cache:
    """Create a cache whose features are never computed."""
    spec = CacheSpec.model_validate(
        {
            "teacher": "none",
            "num_layers": 1,
            "dim": 1,
            "layers": (1,),
            "masks": MaskDraws(draws=0),
            "codec": "fp16",
            "corpus": "small speech",
            "shard_seconds": SHARD_SECONDS,
            "batch_seconds": 60,
            "audio": audio,
            "audio_store": None if store is None else store.spec.audio_fingerprint,
        }
    )
    place = Store(folder)
    path = None if store is None else recorded_place(place, store.store)
    plan = plan_shards(members, SHARD_SECONDS)
    return create_cache(place, spec, plan, teacher_name="none", teacher_spec="none", state={}, audio_path=path)


def stored(folder: Path, members: list[Utterance], audio: str) -> ReferredRows:
    """Return the audio of utterances in an audio store."""
    spec = CacheSpec.model_validate(CacheSpec.of_audio("small speech", SHARD_SECONDS).model_dump() | {"audio": audio})
    build_audio_store(folder / "store", spec, plan_audio(members, SHARD_SECONDS), workers=None)
    cache = empty_cache(folder / "cache", members, "store", Cache.open(folder / "store"))
    return ReferredRows(cache, "train", PlanSplits.of(cache, "train")["train"])


def from_corpus(folder: Path, addresses: dict[str, AudioAddress]) -> SourceRows:
    """Return the audio of utterances in a corpus."""
    cache = empty_cache(folder / "cache", indexed(addresses), "source")
    return SourceRows(cache, "train", PlanSplits.of(cache, "train")["train"])


def main(
    seconds: Annotated[float, typer.Option(help="Seconds of audio.")] = 1200,
    rounds: Annotated[int, typer.Option(help="Number of rounds; medians over them are reported.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Run for a moment, only to try the script.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "cache/audio/source_audio.json",
) -> None:
    """Measure seconds of audio per CPU second from an audio store and from corpora of several formats."""
    if quick:
        seconds, rounds = 40, 1
    torch.set_num_threads(1)
    members = utterances(TRAIN, seconds)
    waveforms = {u.id: quantize(load_audio(Path(u.path))) for u in members}
    total = sum(map(len, waveforms.values())) / SAMPLE_RATE
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        places: dict[str, Callable[[Path], dict[str, AudioAddress]]] = {
            "corpus: FLAC, 16 kHz": lambda folder: files_of(folder, waveforms, SAMPLE_RATE, "FLAC"),
            "corpus: WAV, 16 kHz": lambda folder: files_of(folder, waveforms, SAMPLE_RATE, "WAV"),
            "corpus: pieces of one long FLAC, 16 kHz": lambda folder: pieces_of(folder, waveforms, "FLAC"),
            "corpus: FLAC, 48 kHz": lambda folder: files_of(folder, waveforms, 48_000, "FLAC"),
            "corpus: mp3, 44.1 kHz": lambda folder: files_of(folder, waveforms, 44_100, "MP3"),
            "corpus: compressed Parquet, FLAC, 16 kHz": lambda folder: rows_of(folder, waveforms),
        }
        readers: dict[str, ReferredRows | SourceRows] = {}
        for number, (audio, label) in enumerate((("flac", "FLAC"), ("pcm", "PCM"))):
            readers[f"store: {label}"] = stored(root / f"store-{number}", members, audio)
        for number, (label, write) in enumerate(places.items()):
            folder = root / f"corpus-{number}"
            folder.mkdir()
            readers[label] = from_corpus(folder, write(folder / "audio"))
        found: dict[str, list[float]] = {label: [] for label in readers}
        for number in range(rounds + 1):  # The first round warms up.
            for label in list(readers) if number % 2 else reversed(list(readers)):
                order = random.Random(number).sample(range(len(members)), len(members))
                began = time.process_time()
                for index in order:
                    readers[label].waveform(index)
                spent = time.process_time() - began
                if number:
                    found[label].append(total / spent)
    rows = [
        {"audio": label, "audio_seconds_per_cpu_second": statistics.median(rates), "rounds": rates}
        for label, rates in found.items()
    ]
    for row in rows:
        print(f"{row['audio']}: {row['audio_seconds_per_cpu_second']:.0f} s of audio per CPU second")
    write_result(output, seconds=total, utterances=len(members), rows=rows)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
