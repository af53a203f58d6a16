"""The demo: the whole job on this machine, a probe for phones, then features requested from the service over HTTP."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console

import ray_distill
from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.demo.phone_probe import conclusion, phone_table, probe_phones
from ray_distill.pipeline.probing.task import PHONES_FILE
from ray_distill.pipeline.stages import STAGES, Run, run_stages, summary_table
from ray_distill.teacher_cache.embedded_audio import to_flac
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.source_audio import load_waveform

_READY_SECONDS = 120.0
_TIMEOUT_SECONDS = 120.0


@contextmanager
def running_service(model: Path, log: Path) -> Iterator[str]:
    """Start the service on a free port, yield its address once it is healthy, and stop it at the end.

    Args:
        model: Absolute path of an exported student.
        log: File for the output of the service.

    Raises:
        ChildProcessError: The service ended, or was not healthy within 120 s.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_distill", "serve", "--model", str(model), "--port", str(port)],
            cwd=Path(ray_distill.__file__).parents[1],  # `-m` finds the package there, installed or not.
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + _READY_SECONDS
            while not _is_healthy(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ChildProcessError(f"the service did not start; its output is in {log}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def request_features(address: str, audio: bytes) -> np.ndarray:
    """Request the features of audio from a service.

    Args:
        address: Base URL of the service.
        audio: Content of an audio file, in any format and with any sample rate that the service decodes.

    Returns:
        Features of the last layer, (T, D).

    Raises:
        OSError: The service can't be reached, or answers with an error.
    """
    try:
        response = httpx.post(f"{address}/v1/features?format=npy", content=audio, timeout=_TIMEOUT_SECONDS)
    except httpx.TransportError as error:
        raise OSError(f"the service at {address} can't be reached: {error}") from error
    if not response.is_success:
        raise OSError(f"the service at {address} refused the audio ({response.status_code}): {response.text.strip()}")
    return np.asarray(np.load(io.BytesIO(response.content), allow_pickle=False))


def run_demo(
    recipe: Path, overrides: Sequence[str] = (), corpus: Path | None = None, teacher: str | None = None
) -> None:
    """Run all stages, probe the student for phones, request features of one utterance from the service, and print a summary.

    A corpus without ``phones.csv`` has no phones to probe, which is said. The run is called ``demo``, followed by the names of
    the corpus and the teacher where they are given.

    Args:
        recipe: YAML configuration.
        overrides: Changes to the configuration, as in ``train.max_steps=20``.
        corpus: LibriSpeech or any folder of audio. Default: a corpus synthesised into ``corpora/demo``.
        teacher: Checkpoint of a teacher. Default: that of the recipe.

    Raises:
        ValueError, OSError: The configuration, corpus, teacher or a stage failed, or the service did.
    """
    console = Console(soft_wrap=True, highlight=False)
    started = time.monotonic()
    settings = []
    name = "demo"
    if corpus is not None:
        settings.append(f"corpus.path={corpus.absolute()}")
        name += f"-{_as_name(corpus.absolute().name)}"
    else:
        console.print(
            "corpus  synthesising sentences in several voices (set CORPUS=/path/to/LibriSpeech to use real speech)"
        )
        settings.append(f"corpus.path={make_demo_corpus(Path('corpora/demo').absolute())}")
    if teacher is not None:
        specification = str(Path(teacher).absolute()) if Path(teacher).exists() else teacher
        settings.append(f"teacher.checkpoint={specification}")
        name += f"-{_as_name(Path(teacher).stem)}"
    settings += [f"name={name}", f"cache.path=caches/{name}", f"cache.actors={os.cpu_count() or 1}"]
    run = Run(load_config(recipe, [*settings, *overrides]), Console())
    *before_report, report = STAGES
    run_stages(run, before_report)
    phones = run.config.corpus.path / PHONES_FILE
    outcomes = None
    if phones.is_file():
        console.print(f"probe   training linear classifiers of phones on frozen features ({phones})")
        outcomes = probe_phones(run, phones)
    else:
        console.print(
            f"probe   no phone errors are measured, since the corpus has no {PHONES_FILE} (see ray-distill probe)"
        )
    summary = run_stages(run, [report])
    assert summary is not None
    utterance = run.utterances[0]
    waveform = load_waveform(utterance)
    with running_service(Path(summary["export"]), run.folder.path / "service.log") as address:
        console.print(f"serve   {address} is ready; requesting features of {utterance.id}")
        features = request_features(address, to_flac(waveform))
    seconds = len(waveform) / SAMPLE_RATE
    summary["features"] = f"{features.shape} {features.dtype} for {seconds:.2f} s of audio"
    console.print(summary_table(summary))
    if outcomes is not None:
        console.print(phone_table(outcomes))
        console.print(conclusion(outcomes))
    console.print(
        f"Finished in {time.monotonic() - started:.0f} s. To serve the student again: "
        f"ray-distill serve --model {summary['export']}"
    )


def _as_name(text: str) -> str:
    """Return a text with everything that a run's name can't contain replaced by a dash."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
