"""What a full disk leaves of files, folders and exports, and what is said about it."""

import errno
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.files import write_text
from ray_distill.student import Student, save_student
from ray_distill.whole_files import filling, replacing

from .tiny import tiny_student


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every write of a file store half of it and then fail as on a full disk, whose errors have no file name."""

    def write(path: Path, data: bytes | str, *_: object) -> None:
        with path.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(Path, "write_text", write)


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    file.write_text("old")
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="summary.json"):
        write_text(file, "new text")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    for text in ("old", "new"):
        with replacing(folder, durable=True) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
        assert [path.name for path in folder.iterdir()] == [text]
    with pytest.raises(KeyboardInterrupt), replacing(folder) as temporary:
        temporary.mkdir()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [folder]


def test_an_empty_folder_is_filled_also_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / ".unfinished.tmp").mkdir()
    (tmp_path / ".unfinished.tmp" / "half").write_text("left by a killed process")
    with filling(tmp_path) as temporary:
        (temporary / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(ValueError, match="not empty"), filling(tmp_path):
        pass
    with pytest.raises(ValueError, match="is a file"), filling(tmp_path / "whole"):
        pass


@pytest.mark.parametrize(
    ("format", "output"), [("s3prl", "out"), ("huggingface", "out"), ("torch", "out.pt2"), ("onnx", "out.onnx")]
)
def test_an_export_to_a_full_disk_leaves_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, output: str
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    save_student(Student(tiny_student()), tmp_path / "model")
    fill_the_disk(monkeypatch)
    result = CliRunner().invoke(
        application, ["export", str(tmp_path / "model"), "--format", format, "--output", str(tmp_path / output)]
    )
    assert result.exit_code == 2, result.output
    assert str(tmp_path / output) in result.output and "free some space" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
