"""Teachers, objectives, codecs and corpus formats of other packages: they are used like our own, and faults name the package."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.config import Config, ConfigError, check_config, dump_config, load_config
from ray_distill.pipeline.corpus.formats import recognise
from ray_distill.pipeline.corpus.labels import read_labels
from ray_distill.pipeline.planning.cache_cost import _bytes_per_frame
from ray_distill.pipeline.planning.teacher_facts import facts_of
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.run_plugins import format_found, note_format, note_plugins, unused_plugins
from ray_distill.pipeline.stages import Run, run_stages
from ray_distill.plugins import GROUPS, Kind, PluginError, find_plugin, plugin_names
from ray_distill.student import load_student
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.student.training.training_loop import train
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.build.codec_fit import CodecSample
from ray_distill.teacher_cache.codecs import check_codec, fit_codec, is_discrete, is_joint, open_codec
from ray_distill.teacher_cache.maintenance.cache_teacher import chosen_teacher
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError
from ray_distill.teacher_cache.storage.shard_plan import plan_shards
from ray_distill.teacher_cache.teachers import Teacher, TeacherError, is_path, load_teacher, resolve_teacher
from tests.tiny import tiny_tree

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = Path(__file__).with_name("installed")
Install = Callable[..., None]


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package ``speech-extras``."""
    monkeypatch.syspath_prepend(str(INSTALLED))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs a package with one module and one entry point, whose package may be given."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(kind: Kind, name: str, code: str, target: str = "", package: str = "broken") -> None:
        module = f"{package}_{len(list(folder.iterdir()))}_{tmp_path.name}".replace("-", "_")
        (folder / f"{module}.py").write_text(code)
        info = folder / f"{package}-2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.1\n")
        (info / "entry_points.txt").write_text(f"[{GROUPS[kind]}]\n{name} = {module}{target}\n")
        monkeypatch.setattr(sys, "path", [*sys.path])
        find_plugin.__globals__["_installed"].cache_clear()

    return make


def tree(folder: Path, corpus: Path, **train_keys: Any) -> dict[str, Any]:
    keys = {"objective": "huber", "batch_seconds": 8, "max_steps": 3, "validate_every": 3}
    return tiny_tree(
        corpus={"path": str(corpus), "format": "filelist"},
        teacher={"checkpoint": "mel:24"},
        cache={"path": str(folder / "cache"), "codec": "float8"},
        masks={"draws": 1},
        runs=str(folder / "runs"),
        train=keys | {"objective_options": {"delta": 0.5}} | train_keys,
    )


@pytest.fixture
def filelists(speech_folder: Path) -> Path:
    for split in ("train", "dev"):
        lines = [
            f"{file.relative_to(speech_folder)}|tone {file.stem}"
            for file in sorted(speech_folder.glob(f"{split}-tones/*/*/*.flac"))
        ]
        (speech_folder / f"{split}.filelist").write_text("\n".join(lines) + "\n")
    return speech_folder


def test_a_run_uses_all_four_kinds(extras: None, filelists: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=300)
    run = Run(check_config(tree(tmp_path, filelists)), console)
    run_stages(run, ["index"])
    assert read_labels(run.folder.corpus)["0-0-0000"].text == "tone 0-0-0000"
    plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
    build_cache(run.cache.location, run.spec, plan, run.checkpoint, teacher_name=run.teacher.name, workers=None)
    readers = [CacheReader(run.cache.location, split, run.layers) for split in ("train", "validation")]
    exact = load_teacher("mel:24")(readers[1][0].waveform[None])[0]
    assert (readers[1][0].targets - exact).abs().max() < 0.07 * exact.abs().max()
    student = run.config.resolve_student(2, 24)
    result = train(student, run.config.train, *readers, run.folder.path)
    assert result.steps == 3 and 0 < result.last_validation_loss < result.first_validation_loss
    assert load_student(run.folder.best).config.target_dim == 24

    said = console.export_text()
    assert "plugin  the teacher 'mel' of the package speech-extras 1.0; the objective 'huber'" in said
    assert "format filelist, with 12 transcripts" in said
    needed = json.loads((run.folder.path / "plugins.json").read_text())
    assert [(item["kind"], item["name"]) for item in needed] == [
        ("teacher", "mel"),
        ("objective", "huber"),
        ("codec", "float8"),
        ("corpus format", "filelist"),
    ]
    assert [item["kind"] for item in Cache.open(run.cache).record["plugins"]] == ["codec", "teacher"]


def test_what_needs_an_absent_package_names_it(
    filelists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(INSTALLED))
        run = Run(check_config(tree(tmp_path, filelists)), Console(quiet=True))
        run_stages(run, ["index"])
        plan = plan_shards(run.utterances, run.spec.shard_seconds, run.teacher.num_frames)
        build_cache(run.cache.location, run.spec, plan, run.checkpoint, teacher_name="mel", workers=None)
        config, folder = run.config, run.folder
        (folder.path / "train.json").write_text('{"steps": 3}')
    absent = r"the package speech-extras 1\.0, which is not installed here; install it on every node"
    with pytest.raises(CacheError, match=f"the cache at .*cache needs the codec 'float8' of {absent}"):
        Cache.open(run.cache)
    with pytest.raises(ConfigError, match=f"the run .*tiny needs the teacher 'mel' of {absent}"):
        RunFolder(folder.path).config()
    with pytest.raises(ConfigError, match=f"the run .*tiny needs the teacher 'mel' of {absent}"), folder.begin(config):
        pass
    other = Config.model_validate(
        json.loads(
            json.dumps(
                tree(tmp_path, filelists, objective="prediction", objective_options={})
                | {"corpus": {"path": "x"}, "cache": {"path": "y"}}
            )
        )
    )
    with pytest.raises(TeacherError, match="there is no teacher 'mel:24'"):
        load_teacher(other.teacher.checkpoint)
    with pytest.raises(ConfigError, match="train.objective: must be 'prediction'.*not 'huber'"):
        check_config(tree(tmp_path, filelists) | {"cache": {"path": "y"}, "corpus": {"path": "x"}})
    with pytest.raises(ConfigError, match="cache.codec: codec 'float8' is not known; known codecs: fp32"):
        check_config(tiny_tree(cache={"path": "y", "codec": "float8"}))
    with pytest.raises(ConfigError, match="corpus.format: there is no corpus format 'filelist'"):
        check_config(tiny_tree(corpus={"path": "y", "format": "filelist"}))
    monkeypatch.syspath_prepend(str(INSTALLED))
    with pytest.raises(CacheError, match="names the teacher 'mel:24', which is not loaded unasked"):
        chosen_teacher(Cache.open(run.cache), None)


def test_the_page_has_the_code_of_the_example() -> None:
    page = (REPOSITORY / "docs" / "how-to" / "extending.md").read_text()
    shown = dict(re.findall(r'^```python title="speech_extras/(\w+\.py)"\n(.*?)^```', page, re.MULTILINE | re.DOTALL))
    files = {
        file.name: file.read_text() for file in (INSTALLED / "speech_extras").glob("*_*.py") if file.stem[0] != "_"
    }
    assert shown == files and len(shown) == 4
    (names,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    entries = (INSTALLED / "speech_extras-1.0.dist-info" / "entry_points.txt").read_text()
    assert names.replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "") == entries


def test_names_are_accepted_where_ours_are(extras: None, filelists: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(check_config(tree(tmp_path, filelists))))
    shown = CliRunner().invoke(application, ["run", str(file), "--print-config"])
    assert shown.exit_code == 0, shown.output
    for line in ("checkpoint: mel:24", "codec: float8", "objective: huber", "delta: 0.5", "format: filelist"):
        assert line in shown.output
    listed = CliRunner().invoke(application, ["teachers", "list"], env={"COLUMNS": "200"})
    assert "mel:..." in listed.output
    facts = facts_of("mel:24")
    assert facts.kind == "teacher of the package speech-extras 1.0" and facts.layers == 2 and facts.frame_rate == 50
    assert not is_path("mel:24") and resolve_teacher("layer-norm:mel:24") == "layer-norm:mel:24"
    assert resolve_teacher(f"mel:{Path('pyproject.toml')}").endswith("/pyproject.toml")


def test_the_example_keeps_the_promises_of_its_kinds(extras: None) -> None:
    teacher = load_teacher("mel:24")
    noise = 0.1 * torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20_000, 9_000])
    mask = torch.zeros(2, teacher.num_frames(20_000), dtype=torch.bool)
    mask[:, 5:9] = True
    alone = teacher(noise[1:, :9_000], frame_mask=mask[1:, : teacher.num_frames(9_000)])
    torch.testing.assert_close(teacher(noise, lengths, mask)[1:, :, : alone.shape[2]], alone)
    assert (teacher(noise, frame_mask=mask) != teacher(noise)).any(-1)[:, 0].equal(mask)
    with pytest.raises(TeacherError, match="mel:BANDS with 1 to 80"):
        load_teacher("mel:x")

    frames = torch.randn(500, 2, 16, generator=torch.Generator().manual_seed(1))
    state = fit_codec("float8", frames, frames)
    codecs = open_codec("float8", [3, 5], 16, state)
    assert [codec.layers for codec in codecs] == [(3,), (5,)] and not is_joint("float8") and not is_discrete("float8")
    decoded = torch.cat([codec.decode(codec.encode(frames[:, [n]])) for n, codec in enumerate(codecs)], 1)
    assert decoded.shape == frames.shape and 0 < float((decoded - frames).abs().max()) < 0.2
    assert codecs[0].error.shape == (1,) and 0 < float(codecs[0].error) < 0.05
    sample = CodecSample()
    sample.add(frames, last=True)
    assert 0 < _bytes_per_frame("float8", sample, [frames]) < 2 * 16 + 1
    with pytest.raises(ValueError, match="codec float8 takes nothing after a colon"):
        check_codec("float8:2")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective_options": {"delta": -1}}, r"objective_options: delta: Input should be greater than 0"),
        (
            {"objective_options": {"dleta": 1}},
            r"objective_options: dleta is unknown; the objective 'huber' of .* has delta",
        ),
        ({"objective_options": {"loss": "l1"}}, "loss is a key of train itself; set train.loss"),
        (
            {"hint_weight": 0.5},
            "train.hint_weight does nothing with train.objective huber: it belongs to objective prediction",
        ),
        (
            {"objective": "star"},
            "objective_options does nothing with train.objective star, whose keys are keys of train",
        ),
        ({"objective": "hubre"}, "Input should be 'prediction', 'star', 'units', 'mvq', 'mixture' or 'huber'"),
    ],
)
def test_wrong_options_are_refused(extras: None, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings.model_validate({"batch_size": 1, "objective": "huber", "objective_options": {"delta": 2}} | keys)


_BROKEN = "import a_module_that_is_not_there"


@pytest.mark.parametrize(
    ("kind", "code", "target", "message"),
    [
        ("teacher", _BROKEN, ":load", "can't be imported .ModuleNotFoundError: No module named"),
        ("teacher", "import sys; sys.exit(3)", ":load", "can't be imported .SystemExit: 3"),
        ("teacher", "load = 3", ":load", "is no function, so it is no teacher"),
        ("teacher", "load = lambda rest, device: 'x'", ":load", "returns no ray_distill"),
        ("teacher", "load = lambda rest: 'x'", ":load", "failed in its loader .TypeError"),
        ("objective", _BROKEN, ":Thing", "can't be imported"),
        ("objective", "class Thing: pass", ":Thing", "is no subclass of ray_distill.student.objectives"),
        ("objective", "", ":Thing", "can't be imported .AttributeError"),
        ("codec", _BROKEN, "", "can't be imported"),
        ("codec", "def check(argument): pass", "", "has no function fit, so it is no codec"),
        ("codec", "check = fit = open = print", "", "has no joint, which is True or False"),
        ("corpus format", _BROKEN, "", "can't be imported"),
        ("corpus format", "def matches(path): return True", "", "has no function find, so it is no corpus format"),
        (
            "corpus format",
            "def matches(p): return 1\ndef find(p, s): return ['x']",
            "",
            "returns something else than FoundFile",
        ),
        ("corpus format", "def matches(p): return 1\ndef find(p): return []", "", "failed in find .TypeError"),
    ],
)
def test_a_broken_package_is_one_sentence_where_it_is_used(
    install: Install, speech_folder: Path, tmp_path: Path, kind: Kind, code: str, target: str, message: str
) -> None:
    install(kind, "thing", code, target)
    assert plugin_names(kind) == ["thing"]
    Run(check_config(tiny_tree(corpus={"path": str(speech_folder)})), Console(quiet=True))  # Nothing of it is used.
    use: dict[Kind, Callable[[], object]] = {
        "teacher": lambda: load_teacher("thing:1"),
        "objective": lambda: TrainSettings.model_validate({"batch_size": 1, "objective": "thing"}),
        "codec": lambda: check_codec("thing"),
        "corpus format": lambda: run_stages(
            Run(
                check_config(
                    tiny_tree(corpus={"path": str(speech_folder), "format": "thing"}, runs=str(tmp_path / "runs"))
                ),
                Console(quiet=True),
            ),
            ["index"],
        ),
    }
    with pytest.raises(ValueError, match=rf"the {kind} 'thing' of the package broken 2\.1 {message}") as caught:
        use[kind]()
    assert "\n" not in str(caught.value).partition("[type=")[0].removeprefix("1 validation error for TrainSettings\n  ")


def test_our_names_come_first_and_that_is_said(install: Install) -> None:
    install("codec", "pca", _BROKEN)
    assert check_codec("pca") == "pca"
    assert unused_plugins() == [
        "the codec 'pca' of the package broken 2.1 is not used, since ray-distill has a codec of that name itself; its authors "
        "can rename it"
    ]
    install("codec", "same", _BROKEN, package="one")
    install("codec", "same", _BROKEN, package="two")
    with pytest.raises(PluginError, match="the packages one and two both have a codec 'same'; uninstall one of them"):
        check_codec("same")


def test_formats_of_packages_are_asked_last(extras: None, install: Install, filelists: Path, tmp_path: Path) -> None:
    install("corpus format", "a_broken_one", _BROKEN)
    assert recognise(filelists) == "folder", "a folder with audio is ours, whatever is installed"
    lists = tmp_path / "lists"
    lists.mkdir()
    shutil.copy(filelists / "train.filelist", lists)
    assert recognise(lists) == recognise(lists / "train.filelist") == "filelist"
    notes = tmp_path / "plugins.json"
    found = format_found("filelist")
    assert found is not None and format_found("folder") is None
    note_format(notes, found)
    note_plugins(notes, load_config(REPOSITORY / "configs" / "demo.yaml"))
    assert [record["package"] for record in json.loads(notes.read_text())] == ["speech-extras"], (
        "kept by the next start"
    )
    (tmp_path / "corpus.xyz").touch()
    with pytest.raises(
        ValueError, match="and of other packages a_broken_one, filelist; the corpus format 'a_broken_one'.*can't be"
    ):
        recognise(tmp_path / "corpus.xyz")


def test_a_teacher_with_other_frames_is_refused(extras: None, install: Install) -> None:
    code = (
        "from fractions import Fraction\nfrom speech_extras.mel_teacher import MelTeacher\n"
        "class Slow(MelTeacher):\n    def num_frames(self, n): return n // 640\n"
        "def load(rest, device):\n    teacher = Slow(8, device)\n"
        "    teacher.frame_rate = Fraction(rest or 50)\n    return teacher\n"
    )
    install("teacher", "slow", code, ":load")
    with pytest.raises(
        TeacherError,
        match="mel:8 has 25 frames in 1 s of audio, but students have 49, one every 20 ms; give the teacher its",
    ):
        load_teacher("slow:")
    assert load_teacher("slow:25").stated_rate == "25"
    with pytest.raises(
        TeacherError,
        match="mel:8 states frame_rate 30, and an utterance of 1.00 s has 25 frames, but at 30 frames per",
    ):
        load_teacher("slow:30")
    assert isinstance(load_teacher("mel:8"), Teacher)
