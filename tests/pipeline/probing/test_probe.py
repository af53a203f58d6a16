"""The probe command and the records it stores."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ray_distill.command_line import Command
from ray_distill.pipeline.commands.probe import probe
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.probing.corpus_task import read_corpus_task
from ray_distill.pipeline.probing.probe_record import distinct_titles, probe_folder, probe_settings, read_probes
from ray_distill.student import Student, save_student

from ...tiny import tiny_student

app = typer.Typer()
app.command(cls=Command)(probe)


def test_command_and_report(tones: Path, tmp_path: Path) -> None:
    config = tiny_student()
    save_student(Student(config), tmp_path / "model", {"step": 5})
    arguments = [str(tones / "first.csv"), "--teacher", "random:2x32", "--student", str(tmp_path / "model")]
    result = CliRunner().invoke(app, [*arguments, "--epochs", "2", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    names = [outcome["source"] for outcome in record["outcomes"]]
    assert names == ["teacher random:2x32", "student model", "log-mel, 80 bands"]
    assert record["origin"]["student model"]["metrics"] == {"step": 5}
    assert (record["train_utterances"], record["test_utterances"]) == (30, 10)
    page = (tmp_path / "out" / "probe.html").read_text()
    assert all(name in page for name in names) and "relative depth" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv", "--teacher", "random:2x32"], "can't be read"),
        (["FIRST", "--no-log-mel"], "nothing to probe"),
        (["FIRST", "--student", "nowhere"], "is not a student"),
        (["FIRST", "--units", "bytes"], "'bytes' is not one of"),
    ],
)
def test_mistakes(tones: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [str(tones / "first.csv") if a == "FIRST" else a for a in arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


def never(*_: object, **__: object) -> None:
    raise AssertionError("the work has begun")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "FILE/probe"], "nothing can be written into"),
        (["--device", "cuda:99"], "--device cuda:99 can't be used on this machine"),
        (["--student", "MODEL", "--student", "MODEL"], "given twice"),
    ],
)
def test_what_would_fail_afterwards_is_told_before_the_work(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("ray_distill.pipeline.probing.linear_probe.run_probes", never)
    given = [o.replace("FILE", str(tmp_path / "file")).replace("MODEL", str(tmp_path / "model")) for o in options]
    result = CliRunner().invoke(app, [str(tones / "first.csv"), *given])
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1


def test_another_probes_record_is_not_replaced(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(tones / "first.csv"), "--epochs", "1"]
    for _ in range(2):  # The same again is no loss.
        assert CliRunner().invoke(app, arguments).exit_code == 0
    before = (tmp_path / "probe" / "probe.json").read_text()
    monkeypatch.setattr("ray_distill.pipeline.probing.linear_probe.run_probes", never)
    for other in ([*arguments, "--seed", "1"], [*arguments, "--teacher", "random:2x32"]):
        result = CliRunner().invoke(app, other)
        assert result.exit_code == 2 and "other settings or sources" in result.output
    assert (tmp_path / "probe" / "probe.json").read_text() == before


def test_two_students_of_one_run_have_two_names(tones: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    for place in ("export", "checkpoints/last"):
        save_student(Student(tiny_student(encoder_layers=1, target_dim=16)), run / place, {})
    (run / "config.yaml").write_text("name: one\nteacher: {checkpoint: none}\ntrain: {}\n")
    students = ["--student", str(run), "--student", str(run / "checkpoints" / "last")]
    arguments = [str(tones / "first.csv"), *students, "--no-log-mel", "--epochs", "1"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    names = [f"student one ({run})", f"student one ({run / 'checkpoints' / 'last'})"]
    assert [outcome["source"] for outcome in record["outcomes"]] == names == list(record["origin"])


def test_a_probe_of_a_run_is_kept_in_its_folder_for_reports(tmp_path: Path, tones: Path) -> None:
    run = tmp_path / "runs" / "one"
    save_student(Student(tiny_student(target_dim=16)), run / "export", {})
    (run / "config.yaml").write_text("name: one\nteacher: {checkpoint: none}\ntrain: {}\n")
    done = CliRunner().invoke(app, [str(tones / "first.csv"), "--run", str(run), "--no-log-mel", "--epochs", "1"])
    assert done.exit_code == 0, done.output
    [probed] = read_probes(run)
    assert probed.title == "first" and [o.source for o in probed.outcomes] == ["student one"]
    settings, others = (probe_settings(tones / "first.csv", "characters", epochs, 0) for epochs in (1, 2))
    assert read_probes(run, settings) == [probed] and read_probes(run, others) == []
    (probe_folder(run, "first", settings) / "probe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"probe.json is not a valid probe record"):
        read_probes(run)


def test_a_probe_of_a_run_does_not_replace_one_with_other_sources(
    tmp_path: Path, tones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "one"
    save_student(Student(tiny_student(target_dim=16)), run / "export", {})
    (run / "config.yaml").write_text("name: one\nteacher: {checkpoint: none}\ntrain: {}\n")
    arguments = [str(tones / "first.csv"), "--run", str(run), "--no-log-mel", "--epochs", "1"]
    with_teacher = [*arguments, "--teacher", "random:2x32"]
    for _ in range(2):  # The same again is no loss.
        done = CliRunner().invoke(app, with_teacher)
        assert done.exit_code == 0, done.output
    [probed] = read_probes(run)
    monkeypatch.setattr("ray_distill.pipeline.probing.linear_probe.run_probes", never)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "other settings or sources; remove that folder, or" in result.output
    assert read_probes(run) == [probed]


def test_probes_with_other_settings_lie_beside_each_other_and_know_the_runs_student(
    tmp_path: Path, tones: Path
) -> None:
    run = tmp_path / "runs" / "one"
    save_student(Student(tiny_student(target_dim=16)), run / "export", {})
    (run / "config.yaml").write_text("name: one\nteacher: {checkpoint: none}\ntrain: {}\n")
    for epochs in ("1", "2"):
        arguments = [str(tones / "first.csv"), "--run", str(run), "--teacher", "random:2x32", "--epochs", epochs]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    probes = sorted(read_probes(run), key=lambda probed: probed.settings["epochs"])
    assert [probed.settings["epochs"] for probed in probes] == [1, 2]
    for probed in probes:
        assert [o.source for o in probed.outcomes] == ["teacher random:2x32", "student one", "log-mel, 80 bands"]
        assert probed.student is not None and probed.student.source == "student one"
    first, second = distinct_titles(probes)
    assert first.startswith("first (manifest ") and "epochs 1" in first and "epochs 2" in second
    assert distinct_titles(probes[:1]) == ["first"]


def test_labels_that_the_corpus_of_a_run_brings(tmp_path: Path, tones: Path) -> None:
    rows = [row.split(",") for row in (tones / "words.csv").read_text().splitlines()[1:]]
    manifest = ["path,end,text,speaker,split"]
    for path, text, split in rows:
        speaker = "" if path == "0.flac" else "once" if path == "1.flac" else f"s{text[0]}"
        manifest.append(f"{path},0.4,{text},{speaker},{'dev' if split == 'test' else split}")
    (tones / "corpus.csv").write_text("\n".join(manifest))
    run = tmp_path / "runs" / "one"
    save_student(Student(tiny_student(target_dim=16)), run / "export", {})
    (run / "config.yaml").write_text("name: one\nteacher: {checkpoint: none}\ntrain: {}\n")
    index_corpus(tones / "corpus.csv", output=run / "corpus")
    texts, digest = read_corpus_task(run, "characters", 1)
    assert texts.kind == "ctc" and texts.vocabulary == ["a", "b", "c"]
    assert [sum(example.test is test for example in texts.examples) for test in (False, True)] == [30, 10]
    speakers, other = read_corpus_task(run, "speakers", 1)
    assert speakers.kind == "class" and speakers.vocabulary == ["sa", "sb", "sc"] and digest != other
    assert len(speakers.examples) == 38 and 6 <= sum(example.test for example in speakers.examples) <= 9
    fewer, _ = read_corpus_task(run, "characters", 5 / 3600)
    assert [sum(example.test is test for example in fewer.examples) for test in (False, True)] == [10, 2]
    done = CliRunner().invoke(app, [str(run), "--task", "characters", "--no-log-mel", "--epochs", "1"])
    assert done.exit_code == 0, done.output
    [probed] = read_probes(run)
    assert probed.title == "characters" and probed.student is not None
    for arguments, message in (
        ([str(run)], "is a folder; give a CSV manifest, or the folder of a run and --task"),
        ([str(tones / "words.csv"), "--task", "speakers"], "is no folder; give a CSV manifest, or the folder of a run"),
        ([str(run), "--task", "speakers", "--units", "words"], "--units is for a CSV manifest"),
        ([str(tones), "--task", "speakers"], "has no complete corpus index"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and message in result.output
    (run / "corpus" / "labels.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"brings no transcripts; give a CSV manifest with the columns path and transcript"
    ):
        read_corpus_task(run, "characters", 1)
