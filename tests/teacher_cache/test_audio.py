"""Decoding of audio to 16 kHz mono, and the four reasons of errors."""

import contextlib
import io
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ray_distill.teacher_cache.audio import AudioError, load_audio, load_identified_audio
from ray_distill.teacher_cache.embedded_audio import DECODERS, ENCODERS, AudioFormat
from ray_distill.teacher_cache.sources.address import AudioAddress


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def encode(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def refused(data: bytes, max_seconds: float | None = None) -> AudioError:
    with pytest.raises(AudioError) as caught:
        load_audio(io.BytesIO(data), max_seconds)
    message = str(caught.value)
    assert message and "\n" not in message and "0x" not in message
    return caught.value


def test_16_khz_mono_is_left_as_it_is(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 5000).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", samples, 16_000)
    expected = samples.astype(np.float32) / 32768
    for source in (tmp_path / "a.flac", str(tmp_path / "a.flac"), io.BytesIO((tmp_path / "a.flac").read_bytes())):
        waveform = load_audio(source)
        assert waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform, expected)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_every_format_rate_and_channel_count(kind: str, rate: int) -> None:
    stereo = np.stack([tone(1.0, rate) * 1.5, tone(1.0, rate) * 0.5], axis=1)
    waveform = load_audio(io.BytesIO(encode(stereo, rate, kind)))
    # Encoders of MP3 pad at both ends.
    assert 15_990 <= len(waveform) <= 16_000 + (4000 if kind == "MP3" else 10)
    spectrum = np.abs(np.fft.rfft(waveform[:16_000] * np.hanning(len(waveform[:16_000]))))
    assert spectrum.argmax() == 440
    assert np.sqrt(np.mean(waveform[2000:14_000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("rate", [2_000, 11_025, 22_255, 44_101, 96_000, 191_999, 352_800, 768_000])
def test_unusual_rates(rate: int) -> None:
    """Exact resampling with ratios of large coprime numbers would need gigabytes."""
    waveform = load_audio(io.BytesIO(encode(tone(0.5, rate), rate, subtype="FLOAT")))
    assert len(waveform) == pytest.approx(8_000, abs=3)
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    assert spectrum.argmax() == 220
    assert np.abs(waveform[1000:-1000]).max() == pytest.approx(0.5, rel=0.02)


def test_channels_are_averaged_and_loud_floats_clipped() -> None:
    stereo = np.stack([np.full(1000, 0.75), np.full(1000, -0.25)], axis=1)
    np.testing.assert_allclose(load_audio(io.BytesIO(encode(stereo, 16_000, subtype="FLOAT"))), 0.25)
    np.testing.assert_array_equal(load_audio(io.BytesIO(encode(np.full(1000, 7.0), 16_000, subtype="FLOAT"))), 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_an_error(bad: float) -> None:
    samples = tone(0.5, 16_000)
    samples[4000] = bad
    assert refused(encode(samples, 16_000, subtype="FLOAT")).reason == "undecodable"
    assert refused(encode(np.stack([samples, samples], 1), 44_100, subtype="DOUBLE")).reason == "undecodable"


def test_text_noise_and_lone_headers_are_undecodable(tmp_path: Path) -> None:
    for data in (b"hello, this is not audio", bytes(range(256)) * 40, b"RIFF", b"fLaC", b"OggS" + bytes(100)):
        assert refused(data).reason == "undecodable"
        (tmp_path / "a.wav").write_bytes(data)
        with pytest.raises(AudioError, match="a.wav can't be decoded") as caught:
            load_audio(tmp_path / "a.wav")
        assert caught.value.reason == "undecodable"
    for path in (tmp_path, tmp_path / "nowhere.wav", tmp_path / "a.raw"):
        with pytest.raises(AudioError) as caught:
            load_audio(path)
        assert caught.value.reason == "undecodable"


def test_a_cut_off_flac_is_undecodable() -> None:
    data = encode(np.random.default_rng(0).uniform(-0.5, 0.5, 60_000), 16_000, "FLAC")
    for keep in (0.3, 0.9):
        assert refused(data[: int(keep * len(data))]).reason == "undecodable"


def test_damage_inside_a_flac_never_gives_a_waveform_of_another_length() -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 60_000)
    data = bytearray(encode(samples, 16_000, "FLAC"))
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
    with contextlib.suppress(AudioError):
        assert len(load_audio(io.BytesIO(bytes(data)))) == 60_000


def test_empty_and_too_short() -> None:
    assert refused(b"").reason == "empty"
    assert refused(encode(np.zeros(0), 16_000)).reason == "empty"
    assert refused(encode(np.zeros(0), 44_100, "FLAC")).reason in ("empty", "undecodable")
    assert refused(encode(tone(1, 16_000)[:399], 16_000)).reason == "too_short"
    assert refused(encode(tone(1, 48_000)[:1197], 48_000)).reason == "too_short"
    assert len(load_audio(io.BytesIO(encode(tone(1, 16_000)[:400], 16_000)))) == 400
    assert len(load_audio(io.BytesIO(encode(tone(1, 48_000)[:1200], 48_000)))) == 400


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_too_long(kind: str) -> None:
    data = encode(tone(3.0, 44_100), 44_100, kind)
    assert refused(data, max_seconds=2.5).reason == "too_long"
    assert len(load_audio(io.BytesIO(data), max_seconds=3.5)) >= 47_000


def test_the_maximum_length_is_allowed() -> None:
    assert len(load_audio(io.BytesIO(encode(tone(2.0, 16_000), 16_000)), max_seconds=2.0)) == 32_000
    assert refused(encode(tone(2.001, 16_000), 16_000), max_seconds=2.0).reason == "too_long"


def wav_header(channels: int, rate: int, num_bytes: int) -> bytes:
    block = channels * 2 % 65536
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block % 2**32, block, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", num_bytes)
    )


@pytest.mark.parametrize(
    ("channels", "rate"), [(1, 0), (1, 1), (1, 2**31 - 1), (1, 2**32 - 1), (0, 16_000), (65, 16_000), (32_767, 16_000)]
)
def test_impossible_channel_counts_and_rates(channels: int, rate: int) -> None:
    assert refused(wav_header(channels, rate, 100_000) + bytes(100_000)).reason == "undecodable"


def test_a_wav_header_with_gigabytes_allocates_the_real_size_only() -> None:
    """Streams have the length 0xFFFFFFFF, and damaged headers any length. Neither may allocate memory."""
    samples = (tone(0.5, 16_000) * 32768).astype("<i2").tobytes()
    tracemalloc.start()
    waveform = load_audio(io.BytesIO(wav_header(1, 16_000, 0xFFFFFFFF) + samples), max_seconds=40)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(waveform) == 8_000
    assert peak < 20e6


def test_a_flac_with_a_wrong_length_in_its_header() -> None:
    data = bytearray(encode(tone(0.5, 16_000), 16_000, "FLAC"))
    # The 36-bit number of samples in STREAMINFO is in the low 4 bits of byte 21 and the next four bytes.
    data[22:26] = struct.pack(">I", 4_000_000_000)
    tracemalloc.start()
    assert refused(bytes(data)).reason == "undecodable"
    assert refused(bytes(data), max_seconds=40).reason == "too_long"
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_streamed_flac_without_a_length_is_decoded() -> None:
    data = bytearray(encode(tone(0.5, 16_000), 16_000, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert len(load_audio(io.BytesIO(bytes(data)), max_seconds=40)) == 8_000
    assert refused(bytes(data), max_seconds=0.4).reason == "too_long"


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(1)
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        data = encode(np.stack([tone(0.2, 22_050)] * 2, 1), 22_050, kind)
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 6):
                damaged[at] = rng.integers(256)
            try:
                waveform = load_audio(io.BytesIO(bytes(damaged)), max_seconds=5)
            except AudioError:
                continue
            assert 400 <= len(waveform) <= 80_001
            assert np.isfinite(waveform).all() and np.abs(waveform).max() <= 1


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_on_the_scale_of_integers_are_refused(tmp_path: Path, subtype: str) -> None:
    samples = tone(0.5, 16_000) * 40_000
    error = refused(encode(samples, 16_000, subtype=subtype))
    assert error.reason == "undecodable" and "float samples up to" in str(error) and "32768" in str(error)
    # The channels are considered before they are averaged.
    assert refused(encode(np.stack([samples, -samples], 1), 16_000, subtype=subtype)).reason == "undecodable"
    soundfile.write(tmp_path / "a.aiff", samples, 44_100, subtype=subtype)
    with pytest.raises(AudioError, match="a.aiff has float samples"):
        load_audio(tmp_path / "a.aiff")
    assert np.abs(load_audio(io.BytesIO(encode(samples / 40_000 * 15.9, 16_000, subtype=subtype)))).max() == 1


@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_streamed_wav(tmp_path: Path, kind: str, subtype: str) -> None:
    data = bytearray(encode(tone(0.5, 16_000), 16_000, kind, subtype))
    at = data.index(b"data") + 4
    for riff in (data[4:8], b"\xff" * 4, bytes(4)):
        data[4:8], data[at : at + 4] = riff, b"\xff" * 4
        assert len(load_audio(io.BytesIO(bytes(data)))) == 8000
        data[at : at + 4] = bytes(4)
        error = refused(bytes(data))
        assert error.reason == "undecodable" and "header says 0 samples, but" in str(error)
        (tmp_path / "a.wav").write_bytes(data)
        with pytest.raises(AudioError, match=r"a.wav is an unfinished recording or stream"):
            load_audio(tmp_path / "a.wav")
    # A file without samples may have other chunks after them.
    assert refused(bytes(data[: at + 4])).reason == "empty"
    assert refused(bytes(data[: at + 4]) + b"LIST" + struct.pack("<I", 8) + b"INFOabcd").reason == "empty"


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU"])
@pytest.mark.parametrize("share", [0.5, 0.97, 0.999])
def test_audio_that_was_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    data = encode(tone(4.0, 16_000), 16_000, kind)
    assert len(load_audio(io.BytesIO(data))) == 64_000
    cut = data[: round(share * len(data))]
    (tmp_path / "a.wav").write_bytes(cut)
    if share > 0.99:  # Some programs count a part of the header, or round.
        assert 63_800 < len(load_audio(tmp_path / "a.wav")) < 64_000
        return
    with pytest.raises(
        AudioError, match=r"a\.wav is cut off \(its header says 12\d+ bytes, but it has \d+\); copy or"
    ) as caught:
        load_audio(tmp_path / "a.wav")
    assert caught.value.reason == "undecodable"
    piece = AudioAddress(str(tmp_path / "a.wav"), start=8000, end=24_000)
    assert np.array_equal(load_identified_audio(piece)[0], load_audio(io.BytesIO(data))[8000:24_000])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_chain_of_ogg_streams_is_refused(tmp_path: Path, subtype: str) -> None:
    first, second = (encode(tone(seconds, 16_000), 16_000, "OGG", subtype) for seconds in (1.0, 9.0))
    assert first[14:18] != second[14:18]  # The serial numbers of the streams.
    (tmp_path / "a.ogg").write_bytes(first + second)
    with pytest.raises(
        AudioError, match=r"a\.ogg is a chain of several Ogg streams, of which only the first"
    ) as caught:
        load_audio(tmp_path / "a.ogg")
    assert caught.value.reason == refused(first + second).reason == "undecodable"
    assert len(load_audio(AudioAddress(str(tmp_path / "a.ogg"), start=0, end=8000))) == 8000  # In the first stream.
    for whole in (first, second):
        assert len(load_audio(io.BytesIO(whole))) >= 15_990


TAG_1, TAG_2 = b"TAG" + bytes(125), b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)


@pytest.mark.parametrize("between", [b"", TAG_1, TAG_2, TAG_1 + TAG_2, bytes(300)])
def test_joined_mp3_files_are_refused(tmp_path: Path, between: bytes) -> None:
    first, second = (encode(tone(seconds, 16_000), 16_000, "MP3") for seconds in (1.0, 2.0))
    (tmp_path / "a.mp3").write_bytes(first + between + second)
    with pytest.raises(
        AudioError, match=r"a\.mp3 has 5\d+ samples, of which only the first 16000 would be read"
    ) as caught:
        load_audio(tmp_path / "a.mp3")
    assert caught.value.reason == refused(TAG_2 + first + between + second).reason == "undecodable"
    assert len(load_audio(AudioAddress(str(tmp_path / "a.mp3"), start=0, end=8000))) == 8000  # In the first one.
    assert len(load_audio(io.BytesIO(TAG_2 + first + between + b"APETAGEX" + bytes(3000)))) == 16_000


def test_a_cut_off_mp3(tmp_path: Path) -> None:
    data = encode(tone(3.0, 16_000), 16_000, "MP3")
    (tmp_path / "a.mp3").write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"a\.mp3 is cut off \(its header says 48000 samples, but it has 2\d+\); copy"):
        load_audio(tmp_path / "a.mp3")
    assert len(load_audio(AudioAddress(str(tmp_path / "a.mp3"), start=0, end=8000))) == 8000


@pytest.mark.parametrize("silence", [0.0, 8.0])
def test_an_mp3_that_does_not_count_its_frames(silence: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    waveform = np.concatenate([noise, np.zeros(int(silence * 16_000), np.float32)])
    buffer = io.BytesIO()
    mode = "VARIABLE" if silence else "CONSTANT"
    soundfile.write(buffer, waveform, 16_000, format="MP3", bitrate_mode=mode, compression_level=0)
    assert len(load_audio(io.BytesIO(buffer.getvalue()))) == len(waveform)
    data = buffer.getvalue()
    data = data[data.index(data[:2], 4) :]  # The first frame counts the others.
    if silence:  # The first frame has more bytes than the others, so libsndfile expects too few.
        assert "has a variable bit rate without a header" in str(refused(data))
    else:
        assert len(waveform) - 1600 < len(load_audio(io.BytesIO(data))) < len(waveform) + 3456


def test_mp3_inside_wav() -> None:
    mp3 = encode(tone(1.0, 16_000), 16_000, "MP3")
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16_000, 4000, 1, 0, 12, 1, 2, 288, 1, 0)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(mp3)) + mp3
    waveform = load_audio(io.BytesIO(b"RIFF" + struct.pack("<I", len(chunks)) + chunks))
    assert 15_990 <= len(waveform) <= 20_000
    assert np.sqrt(np.mean(waveform[2000:14_000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_wave_format_extensible(subtype: str) -> None:
    waveform = load_audio(io.BytesIO(encode(tone(0.5, 16_000), 16_000, "WAVEX", subtype)))
    np.testing.assert_allclose(waveform, tone(0.5, 16_000), atol=0.02)


@pytest.mark.parametrize("kind", ["flac", "pcm"])
def test_embedded_audio_keeps_every_value_of_16_bits(kind: AudioFormat) -> None:
    waveform = np.arange(-32768, 32768).astype(np.float32) / 32768
    decoded = DECODERS[kind](ENCODERS[kind](waveform))
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, waveform)
