"""Use Whisper-small's encoder as a teacher on real speech: the effect of omitting its padding to 30 s, and a distilled student.

``python -m benchmarks.student.whisper padding --whisper FOLDER`` compares the features of real frames alone with those of
transformers' encoder on audio padded to 30 s. FOLDER is created by get_whisper_small.py of the shared data. ``distil`` caches
normalised targets of some minutes of speech (clean ones only, since Whisper has no mask embedding), distils a small student from
the cache, and probes phones of two unseen speakers in the teacher, the student, a student with random weights and log-mel bands.
"""

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, small_student, utterances, whisper_folder
from benchmarks.student.probe_tasks import write_manifest
from ray_distill.pipeline.probing.feature_source import FeatureSource
from ray_distill.pipeline.probing.linear_probe import run_probes
from ray_distill.pipeline.probing.task import read_task
from ray_distill.student import Student, load_student
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.codecs import DEFAULT_CODEC
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.teachers import Teacher, load_teacher

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Padded:
    """The encoder of transformers with its own feature extractor, which pads every utterance to 30 s."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        prefix = "model.encoder."
        weights = load_file(folder / "model.safetensors")
        self._encoder = WhisperEncoder(WhisperConfig.from_pretrained(folder)).eval()
        self._encoder.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if prefix in k})
        self._extract = WhisperFeatureExtractor.from_pretrained(folder)

    @torch.inference_mode()
    def hidden_states(self, waveform: Tensor) -> Tensor:
        """Return the layers (L, T, D) of the real frames of a waveform (S,), before the final layer norm."""
        outputs: list[Tensor] = []
        hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in self._encoder.layers]
        self._encoder(self._extract(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_features)
        for hook in hooks:
            hook.remove()
        layers = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return torch.cat(layers)[:, : num_frames(len(waveform))]


def compare(teacher: Teacher, folder: Path, seconds: float) -> dict[str, Any]:
    """Compare real frames alone with 30 s of padded audio: error and cosine of normalised features per layer, and time."""
    padded = Padded(folder)
    found: dict[str, list[Tensor]] = {"short": [], "long": []}
    spent = dict.fromkeys(found, 0.0)
    members = utterances(HELD_OUT, seconds)
    ways = (("short", lambda w: teacher.hidden_states(w[None])[0]), ("long", padded.hidden_states))
    for _, run in ways:
        run(torch.zeros(16_000))  # The first call of each way is slower.
    for member in members:
        waveform = torch.from_numpy(load_audio(Path(member.path)))
        for name, run in ways:
            began = time.perf_counter()
            x = run(waveform)
            spent[name] += time.perf_counter() - began
            found[name].append(F.layer_norm(x, x.shape[-1:]))
    short, long = torch.cat(found["short"], 1), torch.cat(found["long"], 1)
    spread = long - long.mean(1, keepdim=True)
    return {
        "utterances": len(members),
        "seconds_of_audio": sum(member.num_samples for member in members) / 16_000,
        "relative_rms_error": ((short - long).square().mean((1, 2)) / spread.square().mean((1, 2))).sqrt().tolist(),
        "median_cosine": F.cosine_similarity(short, long, dim=-1).median(1).values.tolist(),
        "worst_percent_cosine": F.cosine_similarity(short, long, dim=-1).quantile(0.01, dim=1).tolist(),
        "times_faster": spent["long"] / spent["short"],
    }


def power(teacher: Teacher, seconds: float) -> dict[str, Any]:
    """Return the share of a layer's squared values in its loudest 3 % of frames, without normalisation."""
    members = utterances(HELD_OUT, seconds)
    frames = [teacher.hidden_states(torch.from_numpy(load_audio(Path(m.path)))[None])[0] for m in members]
    loudness = torch.cat(frames, 1).square().mean(2).sort(1, descending=True).values
    share = loudness[:, : loudness.shape[1] * 3 // 100].sum(1) / loudness.sum(1)
    return {"share_of_loudest_3_percent": share.tolist()}


def cached(location: Path, name: str) -> FeatureSource:
    """Return the teacher's features as a probe's source, read from a cache instead of running the teacher."""
    places = {}
    for split in ("train", "validation"):
        reader = CacheReader(location, split)
        for index in range(len(reader.ids)):
            places[reader.read([index], None).waveforms[0].numpy().tobytes()] = reader, index

    def features(waveform: np.ndarray) -> Tensor:
        reader, index = places[waveform.tobytes()]
        return reader.read([index], None).targets[0]

    return FeatureSource(name, len(reader.layers), reader.dim, features)


@app.command("padding")
def padding(
    whisper: Annotated[str, typer.Option(help="Folder with Whisper-small.")] = "",
    seconds: Annotated[float, typer.Option(help="Seconds of unseen speech.")] = 60,
    threads: Annotated[int, typer.Option()] = 1,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/whisper_padding.json",
) -> None:
    """Measure the effect of omitting the padding, and the power of the loudest frames."""
    torch.set_num_threads(threads)
    folder = whisper_folder(whisper)
    teacher = load_teacher(str(folder))
    write_result(output, padding=compare(teacher, folder, seconds), power=power(teacher, seconds))


@app.command("distil")
def distil(
    whisper: Annotated[str, typer.Option(help="Folder with Whisper-small.")] = "",
    seconds: Annotated[
        float, typer.Option(help="Seconds of training speech to cache, and a third of that for validation.")
    ] = 480,
    learnt: Annotated[str, typer.Option(help="Layers that the student learns. All layers are cached.")] = "3,6,9,12",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 700,
    batch_seconds: Annotated[float, typer.Option(help="Seconds of padded audio per batch.")] = 16,
    width: Annotated[int, typer.Option(help="Width of the student.")] = 128,
    epochs: Annotated[int, typer.Option(help="Epochs of each probe.")] = 20,
    threads: Annotated[int, typer.Option()] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to keep the cache in. Default: the cache is deleted.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/whisper.json",
) -> None:
    """Build a cache, distil a small student, and probe phones in teacher, student and log-mel bands."""
    torch.set_num_threads(threads)
    spec = f"layer-norm:{whisper_folder(whisper)}"
    teacher = load_teacher(spec)
    members = [*utterances(TRAIN, seconds), *utterances(HELD_OUT, seconds / 3)]
    with tempfile.TemporaryDirectory() as scratch:
        location = cache or Path(scratch) / "cache"
        needed = CacheSpec(
            teacher=teacher.fingerprint,
            num_layers=teacher.num_layers,
            dim=teacher.dim,
            layers=tuple(range(1, teacher.num_layers + 1)),
            masks=MaskDraws(draws=0),
            codec=DEFAULT_CODEC,
            corpus="small speech",
            shard_seconds=300,
            batch_seconds=60,
        )
        plan = plan_shards(members, needed.shard_seconds, teacher.num_frames)
        build_cache(location, needed, plan, spec, teacher_name="whisper-small", workers=None)
        opened = Cache.open(location)
        layers = tuple(int(layer) for layer in learnt.split(","))
        config = small_student(len(layers), teacher.dim, width)
        settings = TrainSettings(
            epochs=100_000,
            max_steps=steps,
            batch_seconds=batch_seconds,
            learning_rate=2e-3,
            validate_every=max(1, steps // 5),
            log_every=10,
        )
        run = Path(scratch) / "run"
        result = train(
            config, settings, CacheReader(location, "train", layers), CacheReader(location, "validation", layers), run
        )
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        validation = [row for row in rows if row["kind"] == "validation"]
        print([(row["step"], row["loss"]) for row in validation], f"{result.seconds:.0f} s", flush=True)
        torch.manual_seed(0)
        untrained = Student(config).eval()
        student = load_student(run / "checkpoints" / "best")
        manifest = Path(scratch) / "phones.csv"
        write_manifest(manifest, "phone sequences", seconds / 3)
        train_rows = Path(scratch) / "train.csv"
        write_manifest(train_rows, "phone sequences", seconds)
        # Train and test the probes on as much speech as was cached.
        lines = [line for line in train_rows.read_text().splitlines() if not line.endswith(",test")]
        lines += [line for line in manifest.read_text().splitlines() if line.endswith(",test")]
        manifest.write_text("\n".join(lines) + "\n")
        task = read_task(manifest, "words")
        sources = [
            cached(location, "teacher, as cached"),
            FeatureSource.of_student(student, "student"),
            FeatureSource.of_student(untrained, "student with random weights"),
            FeatureSource.log_mel(),
        ]
        outcomes = run_probes(task, sources, epochs=epochs)
        write_result(
            output,
            seconds_of_audio=opened.record["seconds"],
            kilobytes_per_second_of_audio=cache_bytes(opened) / opened.record["seconds"] / 1e3,
            teacher_parameters=teacher.num_parameters,
            student_parameters=sum(p.numel() for p in student.parameters()),
            learnt=layers,
            student=config.model_dump(mode="json"),
            settings=settings.model_dump(mode="json"),
            validation=validation,
            probe_epochs=epochs,
            train_utterances=sum(not example.test for example in task.examples),
            test_utterances=sum(example.test for example in task.examples),
            phones=[asdict(outcome) for outcome in outcomes],
        )


if __name__ == "__main__":
    app()
