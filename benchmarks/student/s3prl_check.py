"""Load an exported student in S3PRL, run S3PRL's upstream test, and train and evaluate two of its downstream tasks on real speech.

``python -m benchmarks.student.s3prl_check MODEL --environment FOLDER`` creates an environment for S3PRL, which doesn't run with this
project's version of torchaudio, exports the student as an upstream, and there

1. compares its features with this project's, on a batch of real speech of unequal lengths;
2. runs S3PRL's own upstream test (``test/test_upstream.py`` of its source package) with this project's features as the ground truth;
3. trains and evaluates ``asr`` (CTC on characters, a BLSTM; frame level) and ``speaker_linear_utter_libri`` (utterance level) with
   S3PRL's ``run_downstream``.

The downstream tasks run for few steps on little speech. Their figures show that the export works, not how good the student is.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from torch import Tensor

from benchmarks.result_file import RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data
from ray_distill.pipeline.student_export import open_student
from ray_distill.student import Student
from ray_distill.student.exporters.s3prl import export_s3prl
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.targets.target_batch import pad_waveforms

S3PRL = "s3prl==0.4.18"
# S3PRL still uses features that torchaudio 2.9, huggingface_hub 1 and transformers 5 removed. Its tasks import the other packages.
PACKAGES = (
    S3PRL,
    "torch==2.8.0",
    "torchaudio==2.8.0",
    "huggingface_hub<1",
    "transformers<5",
    "pandas",
    "editdistance",
    "tensorboardX",
    "librosa",
    "soundfile",
    "pytest",
)
NAME = "exported_student"
_FEATURES = """
import importlib, sys, torch
sys.path.insert(0, {parent!r})
importlib.import_module("exported_student.run_downstream")
from s3prl.nn import S3PRLUpstream
model = S3PRLUpstream("exported_student_local", {folder!r} + "/weights.pt", extra_conf=dict(model_config={folder!r} + "/config.json"))
model.eval()
waves, lengths = torch.load({waves!r})
with torch.no_grad():
    states, counts = model(waves, lengths)
torch.save((states, counts[0]), {result!r})
from s3prl.util.pseudo_data import get_pseudo_wavs
waves, lengths = get_pseudo_wavs(seed=0, padded=True)
torch.save((waves.detach(), lengths), {pseudo!r})
"""
_UPSTREAM_TEST = """
import importlib, sys
from pathlib import Path
sys.path[:0] = [{parent!r}, {tests!r}]
importlib.import_module("exported_student.run_downstream")
import test_upstream
test_upstream.EXTRACTED_GT_DIR = Path({truth!r})
test_upstream._test_specific_upstream("exported_student")
print("upstream test passed")
"""


def run(arguments: Sequence[object], cwd: Path) -> str:
    """Return what a program prints; exit with its last lines if it fails."""
    # Keep this project's packages out of that environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    found = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        # S3PRL's checkpoints hold an argparse.Namespace, which torch.load refuses by default since 2.6.
        env={**environment, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "OMP_NUM_THREADS": "1"},
    )
    if found.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments[:3]))} failed:\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}")
    return found.stdout


def s3prl_python(folder: Path) -> Path:
    """Return the Python of the environment with S3PRL. Create it, with S3PRL's source package for the test, if necessary."""
    folder = folder.absolute()
    python = folder / "bin" / "python"
    if not python.is_file():
        run([sys.executable, "-m", "venv", folder], Path.cwd())
        run([python, "-m", "pip", "install", "--quiet", *PACKAGES], folder)
    if not (folder / "source" / "test" / "test_upstream.py").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            download = [
                "download",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                ":all:",
                "-d",
                temporary,
            ]
            run([sys.executable, "-m", "pip", *download, S3PRL], folder)
            (archive,) = Path(temporary).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            (source,) = (path for path in Path(temporary).iterdir() if path.is_dir())
            shutil.copytree(source, folder / "source")
    return python


@torch.no_grad()
def our_states(student: Student, waves: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the encoder's input and each layer's output, (B, T, d) each, and the numbers of real frames (B,)."""
    inputs: list[Tensor] = []
    hook = student.encoder_dropout.register_forward_hook(lambda module, given, output: inputs.append(output))
    layers, frames = student.encode(waves, lengths)
    hook.remove()
    return [inputs[0], *layers.unbind(1)], frames


def largest_difference(ours: list[Tensor], theirs: list[Tensor], frames: Tensor) -> float:
    """Return the largest absolute difference at real frames."""
    assert len(ours) == len(theirs)
    return max(
        float((a[row, :count] - b[row, :count]).abs().max())
        for a, b in zip(ours, theirs, strict=True)
        for row, count in enumerate(frames.tolist())
    )


def files(split: str, count: int) -> list[Path]:
    """Return the paths, relative to the corpus, of ``count`` utterances of a split, in an order that mixes speakers."""
    root = shared_data() / "speech" / "LibriSpeech"
    found = sorted((root / split).rglob("*.flac"), key=lambda path: hashlib.sha256(path.stem.encode()).digest())
    return [path.relative_to(root) for path in found[:count]]


def table(path: Path, members: list[Path]) -> None:
    """Write S3PRL's table of lengths."""
    root = shared_data() / "speech" / "LibriSpeech"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{n},{member},{len(load_audio(root / member))},x" for n, member in enumerate(members)]
    path.write_text("\n".join([",file_path,length,label", *rows]) + "\n")


def runner(steps: int, splits: list[str]) -> dict[str, Any]:
    return {
        "total_steps": steps,
        "gradient_clipping": 1,
        "gradient_accumulate_steps": 1,
        "log_step": max(1, steps // 4),
        "eval_step": steps,
        "save_step": steps,
        "max_keep": 1,
        "eval_dataloaders": splits,
    }


def asr(work: Path, steps: int, utterances: int) -> dict[str, Any]:
    """Return the configuration of S3PRL's ``asr`` on part of the training and both held-out speakers, with one narrow layer."""
    table(work / "lengths" / f"{TRAIN}.csv", files(TRAIN, utterances))
    table(work / "lengths" / f"{HELD_OUT}.csv", files(HELD_OUT, max(2, utterances // 8)))
    letters = "|ETAONIHSRDLUMWCFGYPBVK'XJQZ"
    (work / "char.dict").write_text("".join(f"{letter} 1\n" for letter in letters))
    rnn = {
        "module": "LSTM",
        "bidirection": True,
        "dim": [64],
        "dropout": [0.2],
        "layer_norm": [False],
    }
    return {
        "runner": runner(steps, ["dev-clean"]),
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-3},
        "downstream_expert": {
            "datarc": {
                "train": [TRAIN],
                "dev-clean": [HELD_OUT],
                "test-clean": [HELD_OUT],
                "num_workers": 0,
                "batch_size": 8,
                "eval_batch_size": 1,
                "libri_root": str(shared_data() / "speech" / "LibriSpeech"),
                "bucket_file": str(work / "lengths"),
                "dict_path": str(work / "char.dict"),
                "zero_infinity": True,
                "decoder_args": {"decoder_type": "None"},
            },
            "modelrc": {
                "project_dim": 64,
                "select": "RNNs",
                "RNNs": rnn | {"total_rate": -1, "proj": [False], "sample_rate": [1], "sample_style": "concat"},
            },
        },
    }


def speakers(work: Path, steps: int, utterances: int) -> dict[str, Any]:
    """Return the configuration of S3PRL's ``speaker_linear_utter_libri`` on the training speakers: a linear layer on mean features."""
    members = files(TRAIN, utterances)
    table(work / "lengths" / "train-clean-100.csv", members)
    names = [member.stem for member in members]
    cut = len(names) * 3 // 4
    (work / "train_split.txt").write_text("\n".join(names[:cut]) + "\n")
    (work / "test_split.txt").write_text("\n".join(names[cut:]) + "\n")
    return {
        "runner": runner(steps, ["dev"]),
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-2},
        "downstream_expert": {
            "datarc": {
                "num_workers": 0,
                "train_batch_size": 8,
                "eval_batch_size": 8,
                "libri_root": str(shared_data() / "speech" / "LibriSpeech"),
                "split_file": str(work),
                "bucket_file": str(work / "lengths"),
                "train_dev_seed": 1337,
            },
            "modelrc": {},
        },
    }


def downstream(python: Path, upstream: Path, task: str, split: str, config: dict[str, Any], work: Path) -> list[str]:
    """Train and evaluate a task. Return the lines of its evaluation."""
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    common = [python, upstream / "run_downstream.py", "-u", f"{NAME}_local", "-k", upstream / "weights.pt"]
    common += ["-g", upstream / "config.json", "-d", task, "-c", work / "config.yaml", "--device", "cpu"]
    print("training  ", *[str(part) for part in common[1:]], flush=True)
    run([*common, "-m", "train", "-p", work / "experiment"], work)
    steps = config["runner"]["total_steps"]
    evaluated = run(
        [*common[:2], "-m", "evaluate", "-t", split, "--device", "cpu", "-e", work / f"experiment/states-{steps}.ckpt"],
        work,
    )
    return [line.strip() for line in evaluated.splitlines() if re.search(r"(acc|uer|wer|loss)[:=]? ?", line)]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a run or of an exported student.")],
    environment_folder: Annotated[
        Path, typer.Option("--environment", help="Folder of the S3PRL environment; created if necessary.")
    ],
    work: Annotated[
        Path | None, typer.Option(help="Folder for the export and experiments. Default: a temporary one.")
    ] = None,
    asr_steps: Annotated[int, typer.Option(help="Training steps of the asr task.")] = 100,
    speaker_steps: Annotated[int, typer.Option(help="Training steps of the speaker task.")] = 60,
    utterances: Annotated[int, typer.Option(help="Training utterances of each task.")] = 96,
    output: Annotated[Path, typer.Option(help="Result file (JSON).")] = RESULTS / "student/s3prl_check.json",
) -> None:
    """Export a student and run it in S3PRL."""
    python = s3prl_python(environment_folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        student, origin = open_student(model)
        export_s3prl(student, folder / NAME, origin)

        root = shared_data() / "speech" / "LibriSpeech"
        waves = [np.asarray(load_audio(root / member)) for member in files(HELD_OUT, 4)]
        torch.save(pad_waveforms(waves), folder / "waves.pt")
        paths = {"parent": folder, "folder": folder / NAME, "waves": folder / "waves.pt"}
        paths |= {"result": folder / "states.pt", "pseudo": folder / "pseudo.pt"}
        run([python, "-c", _FEATURES.format(**{name: str(path) for name, path in paths.items()})], folder)
        ours, frames = our_states(student, *pad_waveforms(waves))
        theirs, _ = torch.load(folder / "states.pt")
        difference = largest_difference(ours, theirs, frames)
        print(f"features differ from ours by at most {difference:.1e}")
        assert difference < 1e-4, "the exported features differ from the student's"

        truth, frames = our_states(student, *torch.load(folder / "pseudo.pt"))
        for row, count in enumerate(frames.tolist()):
            for state in truth:
                state[row, count:] = state[row, count - 1]  # The upstream zeroes padding too.
        (folder / "truth").mkdir()
        torch.save(truth, folder / "truth" / f"{NAME}.pt")
        tests = environment_folder.absolute() / "source" / "test"
        places = {"parent": str(folder), "tests": str(tests), "truth": str(folder / "truth")}
        print(run([python, "-c", _UPSTREAM_TEST.format(**places)], folder).splitlines()[-1])

        found: dict[str, list[str]] = {}
        for task, split, make, steps in (
            ("asr", "test-clean", asr, asr_steps),
            ("speaker_linear_utter_libri", "test", speakers, speaker_steps),
        ):
            (folder / task).mkdir()
            config = make(folder / task, steps, utterances)
            found[task] = downstream(python, folder / NAME, task, split, config, folder / task)
            print(task, *found[task], sep="\n  ")
        versions = json.loads(
            run(
                [
                    python,
                    "-c",
                    "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in "
                    "('s3prl', 'torch', 'torchaudio')}))",
                ],
                folder,
            ).splitlines()[-1]
        )
    write_result(
        output,
        s3prl=versions,
        student=origin.get("run"),
        largest_difference=difference,
        upstream_test="passed",
        training_steps={"asr": asr_steps, "speaker_linear_utter_libri": speaker_steps},
        utterances=utterances,
        evaluated=found,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
