"""Addresses: their text, pieces of files that equal slices of the whole, and audio inside other files."""

import hashlib
import io
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from ray_distill.teacher_cache import audio
from ray_distill.teacher_cache.audio import AudioError, load_audio, load_identified_audio, read_blocks, read_header
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.sources import parquet_row, remote_file
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.sources.byte_range import ByteRange
from ray_distill.teacher_cache.storage.shard_plan import Utterance


def noise(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.2 * rng.standard_normal((round(seconds * rate), channels))).clip(-1, 1)


def write(path: Path, rate: int = 16_000, channels: int = 1, seconds: float = 6, **kind: str) -> Path:
    soundfile.write(path, noise(seconds, rate, channels), rate, **kind)
    return path


@pytest.mark.parametrize(
    "address",
    [
        AudioAddress("/a b/ü.wav"),
        AudioAddress("/a.wav", start=0, end=5),
        AudioAddress("/a.wav", channel="mix"),
        AudioAddress("/a.tar", offset=512, size=3, name="x/y.flac", channel=1),
        AudioAddress("/a.parquet", row=7, column="audio", start=3),
    ],
)
def test_the_text_of_an_address_gives_it_back(address: AudioAddress) -> None:
    assert AudioAddress.parse(address.encode()) == address
    moved = address.with_file("/b/c.wav")
    assert AudioAddress.parse(moved.encode()) == moved and moved.file == "/b/c.wav"


def test_a_whole_file_is_its_path() -> None:
    assert AudioAddress("/data/a.wav").encode() == "/data/a.wav", "as in indexes and caches of earlier versions"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"file":3}',
        '{"file":"/a","start":-1}',
        '{"file":"/a","end":1.5}',
        '{"file":"/a","row":1}',
        '{"file":"/a","channel":"left"}',
        '{"file":"/a","run":"rm"}',
        '{"file":"/a","size":true}',
    ],
)
def test_damaged_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address of audio"):
        AudioAddress.parse(text)


@pytest.mark.parametrize(
    ("suffix", "rate", "kind", "exact"),
    [
        ("wav", 16_000, {}, True),
        ("flac", 44_100, {}, True),
        ("sph", 16_000, {"format": "NIST", "subtype": "PCM_16"}, True),
        ("wav", 8_000, {"subtype": "ULAW"}, True),
        ("wav", 16_000, {"subtype": "MS_ADPCM"}, True),
        ("wav", 8_000, {"subtype": "GSM610"}, True),
        ("aiff", 16_000, {}, True),
        ("caf", 16_000, {"format": "CAF", "subtype": "ALAC_16"}, True),  # codespell:ignore
        ("ogg", 16_000, {"subtype": "VORBIS"}, True),
        ("opus", 16_000, {"format": "OGG", "subtype": "OPUS"}, True),
        ("mp3", 16_000, {}, False),
    ],
)
def test_a_piece_equals_a_slice_of_the_whole(
    tmp_path: Path, suffix: str, rate: int, kind: dict[str, str], exact: bool
) -> None:
    path = write(tmp_path / f"a.{suffix}", rate, **kind)
    whole = np.concatenate(list(read_blocks(AudioAddress(str(path)))))
    for start in (0, 1, rate // 3, 2 * rate + 17, 5 * rate - 3):
        piece = np.concatenate(list(read_blocks(AudioAddress(str(path), start=start, end=start + rate // 2))))
        assert len(piece) == rate // 2
        # Pieces of mp3 differ in the last bit of float32. Other samples would differ by the noise's amplitude.
        assert np.abs(piece - whole[start : start + rate // 2]).max() <= (0 if exact else 5e-7)
    last = np.concatenate(list(read_blocks(AudioAddress(str(path), start=5 * rate))))
    assert len(last) == len(whole) - 5 * rate


def test_the_identity_of_a_piece_is_that_of_its_samples(tmp_path: Path) -> None:
    stereo = write(tmp_path / "a.wav", 8_000, 2)
    samples, _ = soundfile.read(stereo, dtype="int16")
    for channel, taken in ((0, samples[:, 0]), (1, samples[:, 1]), ("mix", samples), (None, samples)):
        soundfile.write(tmp_path / "piece.flac", taken[8_000:24_000], 8_000)
        address = AudioAddress(str(stereo), start=8_000, end=24_000, channel=channel)  # type: ignore[arg-type]
        waveform, identity = load_identified_audio(address)
        assert len(waveform) == 32_000
        assert identity == load_identified_audio(tmp_path / "piece.flac")[1]
    with pytest.raises(AudioError, match=r"has 2 channels, counted from 0") as caught:
        load_audio(AudioAddress(str(stereo), channel=2))
    assert caught.value.reason == "no_channel"


def test_the_identity_of_a_lossy_piece_names_its_bounds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ogg")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_identified_audio(AudioAddress(str(path), start=16_000, end=32_000, channel=0))[1] == (
        f"file:{digest}:16000-32000:0"
    )
    member = Utterance("a", AudioAddress(str(path), start=16_000, end=32_000).encode(), 16_000, "train", "")
    identity = load_identified_audio(member.address)[1]
    assert len(load_waveform(Utterance(member.id, member.path, 16_000, "train", identity))) == 16_000
    with pytest.raises(ValueError, match=r"a.ogg \(samples 16001 to 32001\) has changed"):
        moved = AudioAddress(str(path), start=16_001, end=32_001).encode()
        load_waveform(Utterance(member.id, moved, 16_000, "train", identity))


def test_a_long_source_is_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", seconds=60)
    read = soundfile.SoundFile.read
    frames = []

    def counting(self: soundfile.SoundFile, *args: object, **options: object) -> np.ndarray:
        block = read(self, *args, **options)
        frames.append(len(block))
        return block

    monkeypatch.setattr(audio.soundfile.SoundFile, "read", counting)
    load_audio(AudioAddress(str(path), start=50 * 16_000, end=51 * 16_000))
    assert sum(frames) == 16_000


@pytest.mark.parametrize("suffix", ["wav", "ogg", "mp3", "aiff"])
def test_a_piece_outside_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", seconds=2)
    for start, end in ((0, 40_000), (40_000, 50_000), (33_000, None)):
        with pytest.raises(AudioError) as caught:
            load_audio(AudioAddress(str(path), start=start, end=end))
        assert caught.value.reason in ("outside", "empty"), (start, end)


def test_bytes_inside_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", seconds=1)
    data = path.read_bytes()
    (tmp_path / "b.tar").write_bytes(b"x" * 700 + data + b"y" * 300)
    rows = pa.array([{"bytes": data, "path": f"{n}.flac"} if n != 3 else None for n in range(10)])
    pq.write_table(pa.table({"audio": rows, "text": ["t"] * 10}), tmp_path / "c.parquet", row_group_size=4)
    waveform, identity = load_identified_audio(path)
    for address in (
        AudioAddress(str(tmp_path / "b.tar"), offset=700, size=len(data)),
        AudioAddress(str(tmp_path / "c.parquet"), row=9, column="audio"),
    ):
        assert load_identified_audio(address)[1] == identity
        assert np.array_equal(load_audio(address.encode()), waveform)
        piece = load_audio(AudioAddress(**(vars(address) | {"start": 4_000, "end": 8_000})))
        assert np.array_equal(piece, waveform[4_000:8_000])
        assert read_header(address).frames == 16_000
    for wrong, message in (
        (AudioAddress(str(tmp_path / "b.tar"), offset=700, size=10**9), "has no 1000000000 bytes from byte 700"),
        (AudioAddress(str(tmp_path / "c.parquet"), row=10, column="audio"), "has 10 rows, so it has no row 10"),
        (AudioAddress(str(tmp_path / "c.parquet"), row=3, column="audio"), "row 3 of .* has no bytes in the column"),
        (AudioAddress(str(tmp_path / "c.parquet"), row=1, column="text"), "row 1 of .* has no bytes in the column"),
        (AudioAddress(str(tmp_path / "c.parquet"), row=1, column="sound"), "has no column 'sound' of bytes"),
        (AudioAddress(str(path), row=1, column="audio"), "row 1 of .*a.flac can't be read"),
        (AudioAddress(str(tmp_path / "no.tar"), offset=0), "No such file"),
    ):
        with pytest.raises(AudioError, match=message):
            load_audio(wrong)


def test_a_huge_row_group_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"audio": [{"bytes": bytes(10_000), "path": ""}]}), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_row, "MAX_GROUP_BYTES", 1_000)
    with pytest.raises(AudioError, match="in one row group, which is read as a whole; write it again with fewer rows"):
        load_audio(AudioAddress(str(tmp_path / "a.parquet"), row=0, column="audio"))


def test_nothing_outside_a_range_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with io.BufferedReader(ByteRange(tmp_path / "a", 10, 20)) as file:
        assert file.read() == bytes(range(10, 30)) and file.read(1) == b""
        assert file.seek(-5, 2) == 15 and file.read(100) == bytes(range(25, 30))
        assert file.seek(1000) == 20 and file.seek(-1000, 1) == 0 and file.read(2) == b"\x0a\x0b"


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", seconds=2)
    lossy = write(tmp_path / "b.ogg", seconds=2)
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/a.flac": path.read_bytes(), "/bucket/b.ogg": lossy.read_bytes()})
    for whole in (10**9, 0):  # Fetched whole, and in parts.
        monkeypatch.setattr(remote_file, "_WHOLE", whole)
        assert load_identified_audio(AudioAddress("memory://bucket/a.flac"))[1] == load_identified_audio(path)[1]
        assert load_identified_audio(AudioAddress("memory://bucket/b.ogg"))[1] == load_identified_audio(lossy)[1]
        piece = load_audio('{"file":"memory://bucket/a.flac","start":16000,"end":20000}')
        assert np.array_equal(piece, load_audio(path)[16_000:20_000])
    for url, message in (
        ("memory://bucket/c.flac", r"memory://bucket/c\.flac can't be read"),
        ("s3://key:secret@bucket/a.flac", "holds credentials"),
        ("nothing://bucket/a.flac", "neither Arrow nor fsspec knows nothing://"),
    ):
        with pytest.raises(AudioError, match=message):
            load_audio(url)
    member = Utterance("a", "memory://bucket/a.flac", 32_000, "train", load_identified_audio(path)[1])
    assert len(load_waveform(member)) == 32_000
    with pytest.raises(ValueError, match="is not fetched unasked, because a cache may come from a stranger"):
        load_waveform(member, exact=True)
