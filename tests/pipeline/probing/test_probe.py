"""Linear probes: what they read, what they find, what they say of themselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import typer
from typer.testing import CliRunner

from ray_distill.command_line import Command
from ray_distill.pipeline.commands.probe import probe
from ray_distill.pipeline.probing.probe import (
    Features,
    Source,
    edit_distance,
    outcome_table,
    probe_folder,
    probe_section,
    probe_settings,
    read_probes,
    read_task,
    run_probes,
    titles_of,
)
from ray_distill.student import Student, save_student
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import num_frames
from ray_distill.teacher_cache.teachers import load_teacher

from ...tiny import tiny_student

app = typer.Typer()
app.command(cls=Command)(probe)


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """A folder of tones: class and sequence are in their pitches; and manifests of both kinds."""
    rng = np.random.default_rng(0)
    pitches = {"a": 300.0, "b": 900.0, "c": 2700.0}
    labels, transcripts = ["path,label,split"], ["path,transcript,split"]
    for n in range(40):
        word = "".join(rng.permutation(list("abc"))[: rng.integers(1, 4)])
        time = np.arange(4800) / 16_000
        silence = np.zeros(1600)
        pieces = [piece for letter in word for piece in (0.3 * np.sin(2 * np.pi * pitches[letter] * time), silence)]
        wave = np.concatenate([silence, *pieces]) + 0.003 * rng.normal(size=1600 + 6400 * len(word))
        soundfile.write(tmp_path / f"{n}.flac", wave, 16_000, subtype="PCM_16")
        split = "test" if n % 4 == 3 else "train"
        labels.append(f"{n}.flac,{word[0]},{split}")
        transcripts.append(f"{n}.flac,{word},{split}")
    (tmp_path / "first.csv").write_text("\n".join(labels))
    (tmp_path / "words.csv").write_text("\n".join(transcripts))
    return tmp_path


def test_manifests(tones: Path) -> None:
    task = read_task(tones / "first.csv")
    assert (task.kind, task.vocabulary, len(task.examples)) == ("class", ["a", "b", "c"], 40)
    assert sum(example.test for example in task.examples) == 10
    task = read_task(tones / "words.csv")
    assert task.kind == "ctc" and all(len(example.target) <= 3 for example in task.examples)
    (tones / "phones.csv").write_text("path,transcript\n" + "".join(f"{n}.flac,AH B AH\n" for n in range(40)))
    task = read_task(tones / "phones.csv", "words")
    assert task.examples[0].target == ("AH", "B", "AH") and task.vocabulary == ["AH", "B"]
    # Without a column split, paths decide: the same on every machine and in any order.
    tested = {example.path.name for example in task.examples if example.test}
    assert 1 <= len(tested) <= 20
    (tones / "phones.csv").write_text("path,transcript\n" + "".join(f"{n}.flac,AH\n" for n in reversed(range(40))))
    assert {e.path.name for e in read_task(tones / "phones.csv", "words").examples if e.test} == tested


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", "no rows"),
        ("path,speaker\n1.flac,x\n", "'label' or 'transcript'"),
        ("path,label\n1.flac,\n", "line 2"),
        ("path,label,split\n1.flac,x,dev\n", "train or test"),
        ("path,label,split\n1.flac,x,train\n", "both to train and to test"),
        ("path,label,split\n1.flac,x,train\n2.flac,y,test\n", "'y'"),
        ("path,label,split\n1.flac,x,train\n2.flac,x,test\n", "only the class 'x'"),
    ],
)
def test_manifests_that_cant_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / "m.csv")


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("abc", "abc") == 0


def test_sources_agree_on_frames(tones: Path) -> None:
    wave = load_audio(tones / "0.flac")
    config = tiny_student(encoder_embed_dim=48)
    teacher = load_teacher("random:2x32")
    student = Student(config).eval()
    for source in (Source.of_teacher(teacher), Source.of_student(student, "student"), Source.log_mel()):
        assert source.features(wave).shape == (source.layers, num_frames(len(wave)), source.dim)
    expected = teacher.hidden_states(torch.from_numpy(wave)[None])[0]
    assert torch.equal(Source.of_teacher(teacher).features(wave), expected)


@pytest.mark.parametrize("kind", ["class", "ctc"])
def test_features_are_normalised_over_training_utterances(tmp_path: Path, tones: Path, kind: str) -> None:
    task = read_task(tones / ("first.csv" if kind == "class" else "words.csv"))
    features = Features(Source.log_mel(), task, tmp_path)
    train = torch.cat([features[n] for n, example in enumerate(task.examples) if not example.test])
    # Frames are kept in half precision.
    torch.testing.assert_close(train.mean(0), torch.zeros(1, 80), rtol=0, atol=5e-3)
    torch.testing.assert_close(train.var(0, unbiased=False), torch.ones(1, 80), rtol=0, atol=5e-3)


def useless(layers: int = 1) -> Source:
    """Noise that knows nothing."""
    generator = torch.Generator().manual_seed(0)
    return Source("noise", layers, 8, lambda w: torch.randn(layers, num_frames(len(w)), 8, generator=generator))


def test_a_probe_finds_what_is_there_and_not_what_is_not(tones: Path) -> None:
    said: list[str] = []
    mel, noise = run_probes(read_task(tones / "words.csv"), [Source.log_mel(), useless()], epochs=40, say=said.append)
    assert mel.metric == "error rate" and mel.value < 0.35 < 0.55 < noise.value
    assert mel.low <= mel.value <= mel.high
    assert mel.difference is None and noise.difference is not None
    value, low, high = noise.difference
    assert value == pytest.approx(noise.value - mel.value) and 0 < low <= value <= high
    assert len(said) == 2 and "noise" in said[1]


def test_classes(tones: Path) -> None:
    def first_tone(wave: np.ndarray) -> torch.Tensor:
        return Source.log_mel().features(wave)[:, :19].repeat(1, num_frames(len(wave)), 1)[:, : num_frames(len(wave))]

    task = read_task(tones / "first.csv")
    good, noise = run_probes(task, [Source("first tone", 1, 80, first_tone), useless()], epochs=40)
    assert good.metric == "accuracy" and good.value > 0.9 > noise.value


def test_the_weight_goes_to_the_layer_that_knows(tones: Path) -> None:
    mel, noise = Source.log_mel(bands=8), useless()

    def both(wave: np.ndarray) -> torch.Tensor:
        return torch.cat([noise.features(wave), mel.features(wave), noise.features(wave)])

    (outcome,) = run_probes(read_task(tones / "words.csv"), [Source("three layers", 3, 8, both)], epochs=40)
    assert sum(outcome.layer_weights) == pytest.approx(1)
    assert outcome.layer_weights[1] > 0.6


def test_the_same_seed_gives_the_same(tones: Path) -> None:
    task = read_task(tones / "words.csv")
    one, two = (run_probes(task, [Source.log_mel()], epochs=3)[0] for _ in range(2))
    assert one == two


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
    assert all(name in page for name in names) and "<svg" in page


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
    assert result.exit_code == 2 and message in result.output


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
    monkeypatch.setattr("ray_distill.pipeline.probing.probe.run_probes", never)
    given = [o.replace("FILE", str(tmp_path / "file")).replace("MODEL", str(tmp_path / "model")) for o in options]
    result = CliRunner().invoke(app, [str(tones / "first.csv"), *given])
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1


def test_another_probes_record_is_not_replaced(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(tones / "first.csv"), "--epochs", "1"]
    for _ in range(2):  # The same again is no loss.
        assert CliRunner().invoke(app, arguments).exit_code == 0
    before = (tmp_path / "probe" / "probe.json").read_text()
    monkeypatch.setattr("ray_distill.pipeline.probing.probe.run_probes", never)
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


def test_tables_name_everything(tones: Path) -> None:
    outcomes = run_probes(read_task(tones / "words.csv"), [useless(3), Source.log_mel()], epochs=1)
    section = probe_section(outcomes, "a < b")
    assert "a &lt; b" in section and "log-mel, 80 bands" in section and "polyline" in section
    assert len(outcome_table(outcomes).rows) == 2


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
    with pytest.raises(ValueError, match=r"probe.json is no probe's record"):
        read_probes(run)


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
    first, second = titles_of(probes)
    assert first.startswith("first (manifest ") and "epochs 1" in first and "epochs 2" in second
    assert titles_of(probes[:1]) == ["first"]
