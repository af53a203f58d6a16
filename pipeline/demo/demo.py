"""``make demo``: the whole job on this machine, then the service, asked over HTTP."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx
import numpy as np
import typer
from rich.console import Console

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.demo.demo_corpus import make_demo_corpus
from ray_distill.pipeline.stages import STAGES, Run, run_stages, summary_table
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import SAMPLE_RATE

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def service(model: Path, log: Path) -> Iterator[str]:
    """Starts ``python -m serve`` on a free port; yields its address once it is healthy, stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--model", str(model), "--port", str(port)],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while True:
                try:
                    if httpx.get(f"{address}/healthz", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start; its output is in {log}")
            yield address
        finally:
            process.terminate()
            process.wait(30)


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as in train.max_steps=20")] = None,
    corpus: Annotated[str, typer.Option(envvar="CORPUS", help="LibriSpeech or any folder of audio.")] = "",
    teacher: Annotated[str, typer.Option(envvar="TEACHER", help="Checkpoint of a real teacher.")] = "",
    config: Annotated[Path, typer.Option(help="Configuration.")] = REPOSITORY / "configs" / "demo.yaml",
) -> None:
    """Run the main job on a demo corpus (or CORPUS, TEACHER), start the service, extract features, stop it."""
    console = Console()
    started = time.monotonic()
    settings = []
    name = "demo"
    try:
        if corpus:
            settings.append(f"corpus.path={Path(corpus).absolute()}")
            name += "-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(corpus).absolute().name)
        else:
            console.print(
                "corpus  speaking a fixed text list in several voices (CORPUS=/path/to/LibriSpeech takes real speech)",
                soft_wrap=True,
            )
            settings.append(f"corpus.path={make_demo_corpus(Path('corpora/demo').absolute())}")
        if teacher:
            spec = str(Path(teacher).absolute()) if Path(teacher).exists() else teacher
            settings.append(f"teacher.checkpoint={spec}")
            name += "-" + re.sub(r"[^A-Za-z0-9._-]+", "-", Path(teacher).stem)
        settings += [f"name={name}", f"cache.path=caches/{name}", f"cache.actors={os.cpu_count() or 1}"]
        run = Run(load_config(config, [*settings, *(overrides or [])]), console)
        summary = run_stages(run, list(STAGES))
        assert summary is not None
        utterance = run.utterances[0]
        # Sent as the file is; mp3, ogg or other rates would do as well.
        with service(Path(summary["export"]), run.folder.path / "service.log") as address:
            console.print(f"serve   {address} is up; sending {utterance.id}", highlight=False)
            response = httpx.post(
                f"{address}/v1/features?format=npy", content=Path(utterance.path).read_bytes(), timeout=120
            )
            response.raise_for_status()
            features = np.load(io.BytesIO(response.content), allow_pickle=False)
    except (ValueError, OSError, RuntimeError, httpx.HTTPError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    seconds = len(load_audio(Path(utterance.path))) / SAMPLE_RATE
    summary["features"] = f"{features.shape} {features.dtype} for {seconds:.2f} s of audio"
    console.print(summary_table(summary))
    console.print(
        f"Done in {time.monotonic() - started:.0f} s. Serve it again: python -m serve --model {summary['export']}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
