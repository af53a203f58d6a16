"""Measure how far teacher features can be compressed before the student's loss changes.

``measure --teacher hubert_small`` (masked, with draws) or ``--teacher whisper`` (full size, 12 x 768, clean targets) computes the
teacher's layers of real speech, keeps them in memory and encodes them with each codec, fitted to training utterances. It reports
bytes per second of audio, the relative error of each layer on held-out speakers, and the decoding speed. It also trains students
from the decoded targets, with several seeds and an equal number of steps, and reports their validation loss against
*uncompressed* targets. ``check`` compares how well a layer of HuBERT Base compresses with layers of Whisper. ``loud`` measures the
error of the channels beside loud ones. ``beside`` builds an audio store and whole caches that refer to it, and reports the bytes
of both per second of audio, and for 60,000 h what follows from them. ``plot`` draws the trade-off from the result files.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
import typer
from torch import Tensor

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances, whisper_folder
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build import codec_fit
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.codecs import (
    ColumnCodec,
    discrete_bytes,
    fit_codec,
    open_codec,
    relative_error,
    sample_frames,
)
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy
from ray_distill.teacher_cache.source_audio import load_waveform
from ray_distill.teacher_cache.storage.build_statistics import BUILDS
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.target_batch import Batch, CodedTargets, pad_waveforms
from ray_distill.teacher_cache.teachers import load_teacher

CODECS = "fp32,int8,pca:0.25,pca:0.5,pca:1,pca:2,pca:4"
UNTRAINED = "fp16,layer-pca:0.5,layer-pca:1"
DISCRETE = "fp16,int8,layer-pca:0.5,layer-pca:1,layer-pca:2,layer-pca:4,units:100,units:500,mvq:1,mvq:2,mvq:4,mvq:8"
FEW_FRAMES = 3000
"""Frames to fit a discrete codec to where only its bytes count, which do not depend on the fit."""
BESIDE = "mvq:16,units:100,layer-pca:1,pca:1,pca,int8,fp16"
MASKS = MaskDraws(policy=MaskPolicy(mask_prob=0.5, mask_length=10), draws=2)
FRAMES_PER_SECOND = 50


@dataclass
class Split:
    """Utterances with all layers of the clean pass and of each draw's composite target, each (T, L, D) float32."""

    members: list[Utterance]
    waveforms: list[np.ndarray]
    clean: list[Tensor]
    composites: list[list[Tensor]]
    masks: list[list[Tensor]]


class ResidentReader:
    """A split with encoded targets in memory. It reads like a cache, without a disk."""

    def __init__(self, split: Split, codecs: Sequence[ColumnCodec]) -> None:
        self.num_samples = np.array([u.num_samples for u in split.members])
        self.num_frames = np.array([len(x) for x in split.clean])
        self.layers = tuple(layer for codec in codecs for layer in codec.layers)
        self.dim = codecs[0].dim
        self.draws: int | None = len(split.composites)
        self._split, self._codecs = split, codecs
        self._coded = [[_encode(codecs, x) for x in frames] for frames in (split.clean, *split.composites)]

    def read(self, indices: Sequence[int], draw: int | None) -> Batch:
        """See `TargetReader.read`."""
        split = self._split
        waveforms, lengths = pad_waveforms([split.waveforms[i] for i in indices])
        rows = [self._coded[0 if draw is None else draw + 1][i] for i in indices]
        frames = torch.tensor([len(row[0]) for row in rows])
        columns = tuple(
            (codec, torch.nn.utils.rnn.pad_sequence([row[n] for row in rows], batch_first=True))
            for n, codec in enumerate(self._codecs)
        )
        mask = None
        if draw is not None:
            mask = torch.nn.utils.rnn.pad_sequence([split.masks[draw][i] for i in indices], batch_first=True)
        ids = [split.members[i].id for i in indices]
        return Batch(ids, waveforms, lengths, frames, CodedTargets(self.layers, columns), mask)


def _encode(codecs: Sequence[ColumnCodec], frames: Tensor) -> list[Tensor]:
    return [codec.encode(frames[:, [layer - 1 for layer in codec.layers]]) for codec in codecs]


def load_split(teacher: str, name: str, seconds: float) -> Split:
    """Run the teacher over one split of the speech."""
    members = utterances(name, seconds)
    waveforms = [load_waveform(u) for u in members]
    if teacher == "whisper":
        model = load_teacher(str(whisper_folder(WHISPER[0])))
        clean = [model.hidden_states(*pad_waveforms([waveform]))[0].transpose(0, 1).clone() for waveform in waveforms]
        return Split(members, waveforms, clean, [], [])
    model = load_teacher(str(shared_data() / "teacher" / f"{teacher}.pt"))
    clean, masks, composites = [], [], []
    for waveform in waveforms:
        clean.append(model.hidden_states(*pad_waveforms([waveform]))[0].transpose(0, 1).clone())
    for draw in range(MASKS.draws if name == TRAIN else 0):
        masks.append([MASKS.frame_mask(draw, [u.id], [len(x)])[0] for u, x in zip(members, clean, strict=True)])
        composites.append([])
        for waveform, mask, x in zip(waveforms, masks[-1], clean, strict=True):
            masked = model.hidden_states(*pad_waveforms([waveform]), mask[None])[0].transpose(0, 1)
            composites[-1].append(torch.where(mask[:, None, None], x, masked))
    return Split(members, waveforms, clean, composites, masks)


def standardise(splits: Sequence[Split]) -> None:
    """Subtract each channel's mean over the first split, and divide each layer by its RMS deviation, in place.

    Whisper's residual stream has large offsets, and a short training would mostly learn those. The codecs are not affected, since
    they subtract the mean too.
    """
    frames = sum(len(x) for x in splits[0].clean)
    mean = sum(x.double().sum(0) for x in splits[0].clean) / frames
    spread = sum((x - mean).square().sum(0) for x in splits[0].clean) / frames
    for split in splits:
        for x in split.clean:
            x.sub_(mean).div_(spread.mean(1).sqrt()[:, None])


WHISPER: list[str] = [""]


def stored_bytes(codecs: Sequence[ColumnCodec], split: Split) -> float:
    """Return the bytes per frame of the clean pass, compressed utterance by utterance as in a shard."""
    zstd, stored, frames = pa.Codec("zstd"), 0, 0
    for x in split.clean:
        frames += len(x)
        for codec, codes in zip(codecs, _encode(codecs, x), strict=True):
            values = (codes.T if codec.planar else codes).contiguous().numpy()
            stored += values.size if codec.compression == "none" else len(zstd.compress(values.tobytes(), asbytes=True))
    return stored / frames


def decode_rate(codecs: Sequence[ColumnCodec], frames: Tensor) -> float:
    """Return the decoding speed in GB of float32 targets per second: the median of nine runs on about 2000 frames."""
    coded = [codes[None] for codes in _encode(codecs, frames[:2000])]
    targets = CodedTargets(tuple(n for c in codecs for n in c.layers), tuple(zip(codecs, coded, strict=True)))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        decoded = targets.decode()
        times.append(time.perf_counter() - began)
    return decoded.numel() * 4 / statistics.median(times[1:]) / 1e9


def fit(name: str, split: Split, layers: int, dim: int) -> tuple[ColumnCodec, ...]:
    """Fit a codec as a cache build does: on clean and composite frames of training utterances, with every tenth block held out."""
    blocks: list[Tensor] = []
    for number, x in enumerate(split.clean):
        blocks.append(x)
        blocks += [draw[number] for draw in split.composites[:1]]
        if sum(len(block) for block in blocks) >= sample_frames(name, layers, dim):
            break
    held_out = torch.cat(blocks[::10])
    sample = torch.cat([block for number, block in enumerate(blocks) if number % 10])
    return open_codec(name, range(1, layers + 1), dim, fit_codec(name, sample, held_out))


def measure(
    teacher: Annotated[str, typer.Option(help="hubert_small or whisper.")] = "hubert_small",
    codecs: Annotated[str, typer.Option(help="Codecs, separated by commas; fp32 first.")] = CODECS,
    untrained: Annotated[str, typer.Option(help="Further codecs that no student is trained with.")] = UNTRAINED,
    seconds: Annotated[float, typer.Option(help="Seconds of training audio.")] = 1200,
    steps: Annotated[int, typer.Option(help="Training steps of each run.")] = 600,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of padded audio per batch.")] = 30,
    width: Annotated[int, typer.Option(help="Width of the student.")] = 96,
    learning_rate: Annotated[float, typer.Option()] = 3e-3,
    seeds: Annotated[int, typer.Option()] = 3,
    whisper: Annotated[str, typer.Option(help="Folder with Whisper-small.")] = "",
    threads: Annotated[int, typer.Option()] = 1,
    output: Annotated[Path | None, typer.Option(help="Result file (JSON).")] = None,
) -> None:
    """Measure the size, error and speed of each codec, and its effect on students."""
    torch.set_num_threads(threads)
    WHISPER[:] = [whisper]
    began = time.perf_counter()
    training, validation = load_split(teacher, TRAIN, seconds), load_split(teacher, HELD_OUT, seconds / 4)
    _, layers, dim = training.clean[0].shape
    print(f"{teacher}: {layers} x {dim}, features in {time.perf_counter() - began:.0f} s", flush=True)
    if teacher == "whisper":
        standardise([training, validation])
    exact = ResidentReader(validation, open_codec("fp32", range(1, layers + 1), dim, {}))
    student = small_student(layers, dim, width)
    held_out = torch.cat(validation.clean)
    rows: list[dict[str, Any]] = []
    coders: dict[str, tuple[ColumnCodec, ...]] = {}
    for name in [*codecs.split(","), *filter(None, untrained.split(","))]:
        began = time.perf_counter()
        coders[name] = coder = fit(name, training, layers, dim)
        per_frame = stored_bytes(coder, validation)
        decoded = torch.cat(
            [codec.decode(codes) for codec, codes in zip(coder, _encode(coder, held_out), strict=True)], 1
        )
        rows.append(
            {
                "codec": name,
                "bytes_per_frame": per_frame,
                "kilobytes_per_second": per_frame * FRAMES_PER_SECOND / 1e3,
                "error": relative_error(held_out, decoded).tolist(),
                "decode_gigabytes_per_second": decode_rate(coder, held_out),
                "fit_seconds": time.perf_counter() - began,
                "losses": [],
                "layer_losses": [],
            }
        )
        print(f"{name:12} {per_frame:8.0f} B/frame, error", *(f"{e:.3f}" for e in rows[-1]["error"]), flush=True)
    for seed in range(seeds):
        for row in rows[: len(codecs.split(","))]:
            settings = TrainSettings(
                epochs=10_000,
                max_steps=steps,
                batch_seconds=batch_seconds,
                learning_rate=learning_rate,
                validate_every=steps,
                log_every=50,
                seed=seed,
            )
            with tempfile.TemporaryDirectory() as folder:
                result = train(student, settings, ResidentReader(training, coders[row["codec"]]), exact, Path(folder))
                lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            last = [line for line in map(json.loads, lines) if line["kind"] == "validation"][-1]
            row["losses"].append(result.last_validation_loss)
            row["layer_losses"].append([last[f"layer_{n:02d}"] for n in range(1, layers + 1)])
            print(
                f"seed {seed} {row['codec']:12} {result.last_validation_loss:.5f} ({result.seconds:.0f} s)", flush=True
            )
            summary = summarise(rows)
            write_result(
                output or RESULTS / f"cache/codec_rate_distortion_{teacher}.json",
                teacher=teacher,
                layers=layers,
                dim=dim,
                draws=len(training.composites),
                train_seconds=sum(u.num_samples for u in training.members) / 16_000,
                validation_seconds=sum(u.num_samples for u in validation.members) / 16_000,
                student=student.model_dump(mode="json"),
                settings=settings.model_dump(mode="json", exclude={"seed"}),
                seeds=seed + 1,
                spread_of_seeds=summary,
                rows=rows,
            )


def summarise(rows: list[dict[str, Any]]) -> float:
    """Add each codec's mean relative change of the loss against fp32 with the same seed. Return the spread of fp32 over seeds."""
    reference = rows[0]["losses"]
    for row in rows:
        pairs = list(zip(row["losses"], reference, strict=False))
        if pairs:
            row["loss_change"] = statistics.mean(ours / theirs - 1 for ours, theirs in pairs)
            row["loss_change_of_seeds"] = [ours / theirs - 1 for ours, theirs in pairs]
    return statistics.stdev(reference) / statistics.mean(reference) if len(reference) > 1 else 0.0


def check(
    whisper: Annotated[str, typer.Option(help="Folder with Whisper-small.")] = "",
    output: Annotated[Path, typer.Option()] = RESULTS / "cache/codec_genuine_hubert.json",
) -> None:
    """Compare layer 9 of HuBERT Base on one utterance with layers of Whisper and hubert_small on the same audio."""
    WHISPER[:] = [whisper]
    folder = shared_data() / "hubert-features"
    genuine = torch.from_numpy(np.load(folder / "sample.base.L9.npy"))[:, None]
    (audio,) = folder.glob("*.flac")
    from ray_distill.teacher_cache.audio import load_audio

    waveform = load_audio(audio)
    others = load_teacher(str(whisper_folder(whisper))).hidden_states(*pad_waveforms([waveform]))[0].transpose(0, 1)
    found = {"HuBERT Base, layer 9": genuine} | {f"whisper, layer {n}": others[:, n - 1 : n] for n in (6, 9, 12)}
    rows = []
    for name, frames in found.items():
        frames = frames[: len(genuine)].float()
        # Alternate seconds, so that both halves hold the same kind of speech.
        fitted = (torch.arange(len(frames)) // 50) % 2 == 0
        deviation = (frames - frames.mean(0)).square().mean(0).sqrt().flatten()
        row: dict[str, Any] = {
            "features": name,
            "largest_channel_over_median": float(deviation.max() / deviation.median()),
        }
        centred = (frames - frames.mean(0)).flatten(1)
        share = torch.linalg.svdvals(centred).square()
        row["components_for_90_percent"] = int((share.cumsum(0) < 0.9 * share.sum()).sum()) + 1
        for codec in ("int8", "layer-pca:0.5", "layer-pca:1"):
            (coder,) = open_codec(codec, [1], frames.shape[2], fit_codec(codec, frames[fitted], frames[~fitted]))
            codes = coder.encode(frames[~fitted])
            values = (codes.T if coder.planar else codes).contiguous().numpy().tobytes()
            error = float(relative_error(frames[~fitted], coder.decode(codes)))
            stored = len(pa.Codec("zstd").compress(values, asbytes=True)) / len(codes)
            row[codec] = {"error": error, "bytes_per_frame": stored}
        rows.append(row)
        print(json.dumps(row))
    write_result(output, rows=rows)


def loud(
    codecs: Annotated[str, typer.Option(help="Codecs, separated by commas.")] = "int8,pca:0.5",
    seconds: Annotated[float, typer.Option(help="Seconds of speech to fit the codec on.")] = 300,
    whisper: Annotated[str, typer.Option(help="Folder with Whisper-small.")] = "",
    output: Annotated[Path, typer.Option()] = RESULTS / "cache/codec_loud_channels.json",
) -> None:
    """Measure the error of Whisper's layers with and without their loud channels (deviation above ten times the median)."""
    WHISPER[:] = [whisper]
    training, validation = load_split("whisper", TRAIN, seconds), load_split("whisper", HELD_OUT, seconds / 4)
    held_out = torch.cat(validation.clean)
    _, layers, dim = held_out.shape
    deviation = (held_out - held_out.mean(0)).square().mean(0).sqrt()
    are_loud = deviation > 10 * deviation.median(1, keepdim=True).values
    rows: list[dict[str, Any]] = []
    for name in codecs.split(","):
        coder = fit(name, training, layers, dim)
        parts = [codec.decode(codes) for codec, codes in zip(coder, _encode(coder, held_out), strict=True)]
        decoded = torch.cat(parts, 1)
        for layer in range(layers):
            quiet = ~are_loud[layer]
            rows.append(
                {
                    "codec": name,
                    "layer": layer + 1,
                    "loud_channels": int(are_loud[layer].sum()),
                    "largest_over_median": float(deviation[layer].max() / deviation[layer].median()),
                    "error": float(relative_error(held_out[:, layer, None], decoded[:, layer, None])),
                    "error_of_the_others": float(
                        relative_error(held_out[:, layer, None][..., quiet], decoded[:, layer, None][..., quiet])
                    ),
                }
            )
            print(rows[-1], flush=True)
    write_result(output, rows=rows)


def discrete(
    layer: Annotated[int, typer.Option(help="Layer of hubert_small.")] = 4,
    codecs: Annotated[str, typer.Option(help="Codecs of one layer, separated by commas.")] = DISCRETE,
    seconds: Annotated[float, typer.Option(help="Seconds of training audio to fit the codecs to, at most.")] = 1200,
    output: Annotated[Path, typer.Option()] = RESULTS / "cache/codec_discrete.json",
) -> None:
    """Measure size and error of discrete codecs beside others for the clean pass of one layer, on held-out speakers."""
    torch.set_num_threads(1)
    training, validation = (load_split("hubert_small", name, s) for name, s in ((TRAIN, seconds), (HELD_OUT, 150)))
    training.composites.clear()
    for split in (training, validation):
        split.clean[:] = [x[:, layer - 1 : layer].clone() for x in split.clean]
    held_out = torch.cat(validation.clean)
    rows: list[dict[str, Any]] = []
    for name in codecs.split(","):
        began = time.process_time()
        coder = fit(name, training, 1, held_out.shape[2])
        fitted = time.process_time()
        decoded = coder[0].decode(coder[0].encode(held_out))
        encoded = time.process_time()
        per_frame = stored_bytes(coder, validation)
        rows.append(
            {
                "codec": name,
                "bytes_per_frame": per_frame,
                "kilobytes_per_second": per_frame * FRAMES_PER_SECOND / 1e3,
                "error": float(relative_error(held_out, decoded)),
                "fit_cpu_seconds": fitted - began,
                "code_microseconds_per_frame": 1e6 * (encoded - fitted) / len(held_out),
            }
        )
        print(rows[-1], flush=True)
        frames = sum(map(len, training.clean))
        write_result(
            output, teacher="hubert_small", layer=layer, train_frames=frames, test_frames=len(held_out), rows=rows
        )


def beside(
    layer: Annotated[int, typer.Option(help="Layer of hubert_small; all layers with `pca`.")] = 4,
    codecs: Annotated[str, typer.Option(help="Codecs, separated by commas.")] = BESIDE,
    seconds: Annotated[float, typer.Option(help="Seconds of training audio, at most.")] = 500,
    hours: Annotated[float, typer.Option(help="Hours of audio to compute the size for.")] = 60_000,
    output: Annotated[Path, typer.Option()] = RESULTS / "cache/codec_beside_audio.json",
) -> None:
    """Measure all bytes of caches of the clean pass, and of the audio store to which they refer."""
    torch.set_num_threads(1)
    checkpoint = str(shared_data() / "teacher" / "hubert_small.pt")
    teacher = load_teacher(checkpoint)
    members = utterances(TRAIN, seconds) + utterances(HELD_OUT, 60)
    length = sum(utterance.num_samples for utterance in members) / SAMPLE_RATE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audio = CacheSpec.of_audio("small speech", 600)
        build_audio_store(folder / "audio", audio, plan_audio(members, audio.shard_seconds), workers=None)

        def measured(place: Path) -> dict[str, float]:
            """Return the bytes of any amount of audio, those per second of audio, and from both the size for all hours.

            Records of builds don't count.
            """
            files = {file: size for file, size in Store(place).sizes().items() if not file.startswith(BUILDS)}
            fixed = sum(size for file, size in files.items() if "codec/" in file or file.endswith("cache.json"))
            rate = (sum(files.values()) - fixed) / length
            return {
                "fixed_bytes": fixed,
                "bytes_per_second": rate,
                "computed_gigabytes": (fixed + rate * hours * 3600) / 1e9,
            }

        rows: list[dict[str, Any]] = [{"part": "audio store, flac", **measured(folder / "audio")}]
        for codec in codecs.split(","):
            layers = tuple(range(1, teacher.num_layers + 1)) if codec.startswith("pca") else (layer,)
            spec = CacheSpec(
                teacher=teacher.fingerprint,
                num_layers=teacher.num_layers,
                dim=teacher.dim,
                layers=layers,
                masks=MaskDraws(draws=0),
                codec=codec,
                corpus=audio.corpus,
                shard_seconds=audio.shard_seconds,
                batch_seconds=60,
                audio="store",
                audio_store=audio.audio_fingerprint,
            )
            plan = plan_shards(members, spec.shard_seconds)
            place = folder / codec.replace(":", "-")
            names = {"teacher_name": "hubert_small", "audio": str(folder / "audio")}
            frames = FEW_FRAMES if discrete_bytes(codec) is not None else sample_frames(codec, len(layers), teacher.dim)
            with mock.patch.object(codec_fit, "sample_frames", lambda *_, frames=frames: frames):
                build_cache(place, spec, plan, checkpoint, workers=None, **names)
            part = f"{codec}, {len(layers)} x {teacher.dim}"
            rows.append({"part": part, **measured(place), "share_beside_audio": 0.0})
            rows[-1]["share_beside_audio"] = rows[-1]["bytes_per_second"] / rows[0]["bytes_per_second"]
            print(rows[-1], flush=True)
            facts = {"utterances": len(members), "seconds": length, "hours": hours}
            write_result(output, teacher="hubert_small", layer=layer, **facts, rows=rows)


def plot(output: Annotated[Path, typer.Option()] = REPOSITORY / "docs" / "pictures" / "codecs.svg") -> None:
    """Plot bytes per second against the change of the student's loss, for both teachers, and print the table as Markdown."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "codecs", "font.size": 9}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=False)
    for axis, teacher in zip(axes, ("hubert_small", "whisper"), strict=True):
        record = json.loads((RESULTS / f"cache/codec_rate_distortion_{teacher}.json").read_text())
        spread = 100 * record["spread_of_seeds"]
        axis.axhspan(-spread, spread, color="0.9", label="spread of seeds (fp32)")
        for row in (row for row in record["rows"] if row["losses"]):
            changes = [100 * change for change in row["loss_change_of_seeds"]]
            joint = row["codec"].startswith("pca")
            axis.plot(
                row["kilobytes_per_second"],
                100 * row["loss_change"],
                "o" if joint else "s",
                color="C0" if joint else "C1",
            )
            axis.vlines(row["kilobytes_per_second"], min(changes), max(changes), color="C0" if joint else "C1")
            place = (row["kilobytes_per_second"], max(changes))
            axis.annotate(row["codec"], place, xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7)
        axis.set(
            xscale="log",
            xlabel="kB per second of audio, one pass",
            title=f"{teacher}, {record['layers']} x {record['dim']}",
        )
        axis.set_ylabel("validation loss against fp32, %")
        axis.margins(y=0.15)
        axis.legend(loc="upper right", frameon=False, fontsize=8)
        print(f"\n{teacher}, {record['layers']} x {record['dim']} (spread of seeds {spread:.2f} %)\n")
        print(
            "| codec | kB/s | error per layer | decode GB/s | loss, change against fp32 (each seed) |\n|---|---|---|---|---|"
        )
        for row in record["rows"]:
            low, high = 100 * min(row["error"]), 100 * max(row["error"])
            effect = "not trained"
            if row["losses"]:
                seeds = ", ".join(f"{100 * change:+.2f}" for change in row["loss_change_of_seeds"])
                effect = f"{statistics.mean(row['losses']):.4f}, {100 * row['loss_change']:+.2f} % ({seeds})"
            print(
                f"| `{row['codec']}` | {row['kilobytes_per_second']:.1f} | {low:.1f} to {high:.1f} % | "
                f"{row['decode_gigabytes_per_second']:.2g} | {effect} |"
            )
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    for command in (measure, check, loud, discrete, beside, plot):
        app.command()(command)
    app()
