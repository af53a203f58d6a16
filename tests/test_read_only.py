"""Folders and files that this user may not write or read are named before any work."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ray_distill.pipeline.config import load_config
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.planning.dry_run import plan_run
from ray_distill.pipeline.ray_session import _need_no_home
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.teacher_cache.audio import AudioError, load_audio

from .tiny import CONFIGS, TEACHER


def refusing(file: Path, opened: Callable[[object], soundfile.SoundFile]) -> Callable[[object], soundfile.SoundFile]:
    """Return a function that opens audio, except a file, which fails as without permission."""

    def open_audio(stream: object) -> soundfile.SoundFile:
        if stream == file:
            raise soundfile.LibsndfileError(2)
        return opened(stream)

    return open_audio


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this user, who may be root, have no right to a folder."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(folder) and real(path, mode))


@pytest.mark.parametrize(
    ("closed", "message"), [("a", "set runs=..."), ("b", "b can't be written to .*another folder")]
)
def test_a_dry_run_names_a_folder_that_is_read_only(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch, closed: str, message: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    places = [f"runs={tmp_path}/a/runs", f"cache.path={tmp_path}/b/cache"]
    config = load_config(
        CONFIGS / "demo.yaml", [*places, f"corpus.path={speech_folder}", f"teacher.checkpoint={TEACHER}"]
    )
    plan_run(config, ["index", "cache"])
    close(tmp_path / closed, monkeypatch)
    with pytest.raises(ValueError, match=message):
        plan_run(config, ["index", "cache"])


def test_a_run_in_a_read_only_folder_says_which_key_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close(tmp_path, monkeypatch)
    with (
        pytest.raises(ValueError, match="set runs=..."),
        RunFolder(tmp_path / "runs" / "demo").begin(load_config(CONFIGS / "demo.yaml", [])),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_audio_without_permission_is_not_called_a_system_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.wav"
    soundfile.write(file, np.zeros(1000), 16_000)
    monkeypatch.setattr(soundfile, "SoundFile", refusing(file, soundfile.SoundFile))
    close(tmp_path, monkeypatch)
    with pytest.raises(AudioError, match="Permission denied"):
        load_audio(file)


def test_ray_needs_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _need_no_home()
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray can keep its token"
    close(tmp_path, monkeypatch)
    _need_no_home()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_audio_that_may_be_read_now_is_indexed(speech_folder: Path, tmp_path: Path) -> None:
    file = next(speech_folder.rglob("*.flac"))
    with pytest.MonkeyPatch.context() as closed:
        close(file, closed)
        closed.setattr(soundfile, "SoundFile", refusing(file, soundfile.SoundFile))
        first = index_corpus(speech_folder, output=tmp_path / "index")
    second = index_corpus(speech_folder, output=tmp_path / "index")
    assert (len(first.skipped), len(second.skipped)) == (1, 0)
    assert len(second.utterances) == len(first.utterances) + 1
