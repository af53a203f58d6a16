"""Runs of several teachers: the configuration, the caches and utterances of each, the training, and what names them afterwards."""

import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from rich.console import Console

from ray_distill.pipeline.ablation.definition import load_ablation
from ray_distill.pipeline.composition.config_listing import config_with_origins
from ray_distill.pipeline.config import Config, ConfigError, check_config, dump_config, load_config
from ray_distill.pipeline.planning.dry_run import plan_run
from ray_distill.pipeline.stages import STAGES, Run
from ray_distill.pipeline.stages import audio as audio_stage
from ray_distill.pipeline.stages import plan as plan_stage
from ray_distill.pipeline.stages.audio import store_audio
from ray_distill.pipeline.stages.cache import check_cache
from ray_distill.pipeline.stages.export import export_best
from ray_distill.pipeline.stages.frame_rates import check_frame_rates
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.pipeline.stages.report import report_run
from ray_distill.pipeline.stages.train import initial_student, prepare_training, say_unused, teacher_caches
from ray_distill.pipeline.student_export import export_student, open_student
from ray_distill.student.exporters.origin import describe
from ray_distill.student.objectives.several_teachers import SeveralTeachers
from ray_distill.student.training.metric_rows import read_rows
from ray_distill.teacher_cache.build.audio_store import build_audio_store, plan_audio
from ray_distill.teacher_cache.build.build_cache import build_cache
from ray_distill.teacher_cache.patch_geometry import PatchGeometry
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import plan_shards

from ..tiny import CONFIGS, TEACHER, tiny_tree

OTHER = "random:2x48"
A, B = {"name": "a", "checkpoint": TEACHER}, {"name": "b", "checkpoint": OTHER, "weight": 0.5}

PART, UNITS = {"settings": {"objective": "prediction"}}, {"settings": {"objective": "units"}}


def tree(*entries: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """A run of some teachers, `A` and `B` by default."""
    made = tiny_tree(**{"cache": {"codec": "fp16"}} | sections)
    del made["teacher"]
    return made | {"teachers": [dict(entry) for entry in entries or (A, B)]}


@pytest.fixture
def config(tmp_path: Path, speech_folder: Path) -> Callable[..., Config]:
    """Makes the configuration of a run of the test speech, with caches and runs below the temporary folder."""

    def make(*entries: Mapping[str, Any], train: Mapping[str, Any] | None = None, **sections: Any) -> Config:
        chosen = [
            dict(e) | {"cache": {"path": str(tmp_path / "caches" / e["name"])} | e.get("cache", {})}
            for e in entries or (A, B)
        ]
        steps = {"batch_seconds": 8, "max_steps": 4, "validate_every": 2, "log_every": 1} | dict(train or {})
        corpus, cache = {"path": str(speech_folder)}, {"codec": "fp16", "verify": False}
        common = {"corpus": corpus, "cache": cache, "masks": {"draws": 1, "policy": {"mask_prob": 0.4}}, "train": steps}
        return check_config(tree(*chosen, **common | {"runs": str(tmp_path / "runs")} | sections))

    return make


def begin(config: Config) -> Run:
    run = Run(config, Console(quiet=True))
    with run.folder.begin(config):
        index_audio(run)
    return run


def build(run: Run) -> None:
    """The cache stage without Ray."""
    here: dict[str, Any] = {"init_ray": lambda: None, "quiet_ray": nullcontext, "Workers": lambda: None}
    with mock.patch.multiple(audio_stage, **here):
        store_audio(run)
    for part in run.parts:
        if not Cache.exists(part.cache):
            plan = plan_shards(part.utterances, part.spec.shard_seconds, part.teacher.num_frames)
            audio = part.config.cache.audio_location
            options: dict[str, Any] = {"teacher_name": part.teacher.name, "workers": None, "audio": audio}
            build_cache(part.cache.location, part.spec, plan, part.checkpoint, **options)


def test_each_teacher_has_a_cache_section_of_its_own() -> None:
    config = check_config(
        tree(A, B | {"cache": {"codec": "int8"}, "objective": {"objective": "prediction", "loss": "l1"}})
    )
    assert [part.cache.codec for part in config.parts] == ["fp16", "int8"]
    assert [part.cache.path for part in config.parts] == ["caches/random-2x32-corpus", "caches/random-2x48-corpus"]
    assert [part.teacher.checkpoint for part in config.parts] == [TEACHER, OTHER]
    dumped = dump_config(config)
    assert "teacher" not in yaml.safe_load(dumped) and check_config(yaml.safe_load(dumped)) == config
    assert "teachers" not in yaml.safe_load(dump_config(check_config(tiny_tree())))
    short = check_config(tree(A, B | {"cache": "elsewhere"}, train={"batch_seconds": 8, "balance": "uncertainty"}))
    assert short.parts[1].cache.path == "elsewhere" and short.parts[1].cache.codec == "fp16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"checkpoint": TEACHER}}, "^teacher and teachers are both given; put the teacher into the list"),
        ({"cache": {"path": "cache"}}, r"^cache.path: each of several teachers has a cache of its own; give"),
        ({"cache": {"codek": "fp16"}}, r"^cache.codek: unknown key; did you mean cache.codec\?$"),
        ({"teachers": [A, B | {"weights": 2}]}, r"^teachers.b.weights: unknown key; did you mean teachers.b.weight\?$"),
        ({"teachers": [A, {"name": "b"}]}, "^teachers.b.checkpoint: missing; this key is required$"),
        ({"teachers": ["a"]}, "^teachers: give a list with one table for each teacher"),
        ({"teachers": [A, A | {"checkpoint": OTHER}]}, "^teachers: two have the name a; give each a name of its own$"),
        (
            {"teachers": [A, {"name": "b", "checkpoint": TEACHER, "cache": {"codec": "pca"}}]},
            "^teachers: a and b have the same cache.path caches/random-2x32-corpus, but differ in the checkpoint",
        ),
        (
            {"teachers": [A, B | {"objective": {"objective": "prediction", "los": "l1"}}]},
            r"^teachers.b.objective.prediction.los: unknown key; did you mean teachers.b.objective.prediction.loss\?$",
        ),
        (
            {"teachers": [A, B | {"objective": "mvv"}]},
            r"^teachers.b.objective: .*'mvq', not 'mvv'; did you mean mvq\?$",
        ),
        (
            {"teachers": [A, B | {"objective": "units"}]},
            "^teachers.b: train.objective units learns from a cache of codec units, but teachers.b.cache.codec is fp16; set",
        ),
        (
            {"teachers": [A, B | {"start_step": 5, "stop_step": 5}]},
            "^teachers.b: stop_step 5 is not after start_step 5",
        ),
        (
            {"teachers": [A | {"start_step": 1}, B | {"weight": 0}]},
            "^teachers: no teacher takes part in the first step",
        ),
        (
            {"teachers": [A | {"stop_step": 3}, B | {"start_step": 4}]},
            "^teachers: no teacher takes part in step 3, so nothing would be learnt there; choose start_step and stop_step",
        ),
        (
            {"teachers": [A | {"weight": {"speech": 1, "audio": 0}}, B | {"weight": {"speech": 2, "audio": 0}}]},
            "^teachers.a.weight: no teacher has a weight for the domain audio, so nothing would be learnt from its utterances",
        ),
        (
            {"teachers": [A, B | {"weight": {"speech": -1}}]},
            "^teachers.b.weight: the weight of domain speech is -1; give a number of at least 0, or one for each domain$",
        ),
        ({"teachers": [A, B | {"weight": "much"}]}, "^teachers.b.weight: the weight is 'much'; give a number"),
        (
            {"train": {"batch_seconds": 8, "aggregate": "average"}, "teachers": [A, B | {"weight": {"speech": 1}}]},
            "^teachers.b.weight: with train.aggregate average all teachers have one target and one loss; remove it",
        ),
        (
            {"train": {"batch_seconds": 8, "objective": "mixture", "parts": [PART, UNITS]}},
            "^train.objective mixture is for one teacher; give each of teachers an objective of its own$",
        ),
        (
            {"train": {"batch_seconds": 8, "targets": "online"}},
            "^train.targets online runs one teacher; set it to cached",
        ),
        (
            {"train": {"batch_seconds": 8, "aggregate": "average", "balance": "variance"}},
            "^train.balance variance balances the losses of several teachers, but with aggregate average there is one;",
        ),
        (
            {"train": {"batch_seconds": 8, "aggregate": "concatenate"}},
            "^teachers.b.weight: with train.aggregate concatenate all teachers have one target and one loss; remove it",
        ),
        (
            {"train": {"batch_seconds": 8, "aggregate": "average"}, "teachers": [A | {"start_step": 2}, B]},
            "^teachers.a.start_step: with train.aggregate average all teachers have one target",
        ),
        (
            {
                "train": {"batch_seconds": 8, "aggregate": "average", "objective": "units", "masks": "fresh"},
                "masks": {"draws": 0},
                "cache": {"codec": "units:8"},
                "student": tree()["student"] | {"heads": "none"},
            },
            "^train.aggregate average combines features, which objective units does not learn; set it to heads, or",
        ),
        (
            {"train": {"batch_seconds": 8, "init_teacher": "c"}},
            "^train.init_teacher: there is no teacher c; they are a, b$",
        ),
        (
            {"train": {"batch_seconds": 8, "init_teacher": "b"}},
            "^train.init_teacher does nothing without init_front_end",
        ),
        (
            {"train": {"batch_seconds": 8, "loss": "l1"}, "teachers": [A | {"objective": "prediction"}]},
            "^train.loss does nothing, since every teacher has an objective of its own; remove it, or give it there$",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(tree() | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["balance=variance", "init_teacher=a", "aggregate=average"])
def test_keys_of_several_teachers_are_refused_with_one(key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"train.{key.partition('=')[0]} is for several teachers, but there is one; remove"
    ):
        load_config(CONFIGS / "demo.yaml", [f"train.{key}"])


def test_files_and_the_command_line_change_teachers(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({"base": "demo", "name": "two", "teachers": [A | {"cache": {"path": "mine"}}, B]}))
    listing = config_with_origins(file, ["teachers.b.weight=3", "teachers.b.cache.codec=fp16"])
    config = check_config(yaml.safe_load(listing))
    assert config.teachers == load_config(file, ["teachers.b.weight=3", "teachers.b.cache.codec=fp16"]).teachers
    assert (config.teachers[1].weight, config.teachers[1].cache.codec, config.teachers[0].cache.codec) == (
        3,
        "fp16",
        "pca",
    )
    lines = {line.partition("#")[0].strip(): line.partition("#")[2].strip() for line in listing.splitlines()}
    assert lines["weight: 3.0"] == lines["codec: fp16"] == "command line" and lines["path: mine"] == str(file)
    assert lines["codec: pca"] == "recipe demo" and lines["start_step: 0"] == "default"
    elsewhere = load_config(file, ["corpus=/data/speech"])
    assert [part.cache.path for part in elsewhere.parts] == ["caches/random-2x32-speech", "caches/random-2x48-speech"]
    elsewhere = load_config(file, ["teachers.b.cache.codec=fp16", "teachers.b.cache=2024", "teachers.a.cache=other"])
    assert [(part.cache.path, part.cache.codec) for part in elsewhere.parts] == [("other", "pca"), ("2024", "fp16")]
    with pytest.raises(ConfigError, match="teachers.b.cache= has no value; write teachers.b.cache=PATH"):
        load_config(file, ["teachers.b.cache="])
    with pytest.raises(ConfigError, match="'teachers.c.weight' can't be set: there is no teacher 'c'; they are a, b"):
        load_config(file, ["teachers.c.weight=3"])


@pytest.mark.slow
def test_a_run_of_two_teachers(config: Callable[..., Config], tmp_path: Path) -> None:
    run = begin(config())
    plan_cache(run)
    build(run)
    check_cache(run)
    prepare_training(run, 1, in_process=True)()
    export_best(run)
    summary = report_run(run)
    assert [one["name"] for one in summary["teachers"]] == ["a", "b"]
    assert [one["heads_in_the_student"] for one in summary["teachers"]] == [True, False]
    assert summary["random_teachers"] == [TEACHER, OTHER] and summary["teacher_is_random"]
    assert summary["teacher"] == f"{TEACHER} and {OTHER}" and summary["cache_bytes"] > 0
    last = [row for row in read_rows(run.folder.metrics_file) if row["kind"] == "validation"][-1]
    assert [one["last_validation_loss"] for one in summary["teachers"]] == [
        last["teacher_loss_a"],
        last["teacher_loss_b"],
    ]
    assert last["loss"] == pytest.approx(last["teacher_loss_a"] + 0.5 * last["teacher_loss_b"])
    page = run.folder.report.read_text()
    for text in ("Loss of teacher a", "Loss of teacher b", "Factors of the teachers", "teacher b", "explained"):
        assert text in page, text
    student, origin = open_student(run.folder.path)
    assert student.config.target_dim == 32 and set(origin["cache_fingerprint"]) == {"a", "b"}
    lines = describe(origin)
    assert f"teacher b: {OTHER} ({OTHER}), objective prediction" in lines
    assert any(line.startswith("fingerprint of the teacher cache: a ") and ", b " in line for line in lines)
    assert export_student(student, origin, "s3prl", tmp_path / "s3prl") == "heads"
    plan = plan_run(run.config, list(STAGES))
    assert "weight 0.5" in plan.facts["teacher b"] and plan.stages["cache"].startswith("a: reuse")
    # A run of one of the teachers shares its cache.
    alone = Run(run.config.of_teacher(run.config.teachers[0]).model_copy(update={"name": "alone"}), Console(quiet=True))
    with alone.folder.begin(alone.config):
        index_audio(alone)
    check_cache(alone)
    # Keys of the caches that change no result may differ.
    changed = run.config.model_dump(mode="json")
    changed["teachers"][1]["cache"]["actors"] = 7
    run.folder.refuse_other_config(check_config(changed))
    changed["teachers"][1]["weight"] = 7
    with pytest.raises(ConfigError, match=r"another configuration \(teachers\.b\.weight is 0\.5 there and 7\.0 here\)"):
        run.folder.refuse_other_config(check_config(changed))


def _losses(run: Run) -> list[dict[str, Any]]:
    rows = read_rows(run.folder.metrics_file)
    return [{key: value for key, value in row.items() if "loss" in key} for row in rows]


def _trains_alike_from_audio_that_is_stored_once(run: Run, config: Callable[..., Config], tmp_path: Path) -> None:
    """Train as a run of two teachers did, but from caches that refer to audio."""
    entries = [entry | {"cache": {"path": str(tmp_path / "beside" / str(entry["name"]))}} for entry in (A, B)]
    cache = {
        "codec": "fp16",
        "verify": False,
        "audio": "store",
        "audio_path": str(tmp_path / "audio"),
    }
    other = begin(config(*entries, cache=cache, name="stored"))
    other.parts[1].teacher.max_samples = 30_000
    assert (
        plan_run(other.config, list(STAGES))
        .stages["cache"]
        .startswith(f"store the audio at {tmp_path / 'audio'}; a: build")
    )
    with other.console.capture() as shown:
        other.console.quiet = False
        plan_cache(other)
        other.console.quiet = True
    assert re.search(r"about [\d.]+ kB beside [\d.]+ kB of audio, [\d.]+ kB read per epoch", shown.get())
    assert re.search(f"stored once: about [\\d.]+ kB at {tmp_path}", shown.get())
    build(other)
    check_cache(other)
    assert (
        plan_run(other.config, list(STAGES))
        .stages["cache"]
        .startswith(f"reuse the audio at {tmp_path / 'audio'}; a: re")
    )
    prepare_training(other, 1, in_process=True)()
    assert _losses(run) == _losses(other)
    export_best(other)
    assert [one["audio"] for one in report_run(other)["teachers"]] == [str(tmp_path / "audio")] * 2
    tree = other.config.model_dump(mode="json")
    for entry in tree["teachers"]:
        entry["cache"]["audio_path"] = str(tmp_path / "nowhere")
    here = re.escape(str(tmp_path))
    with pytest.raises(
        ConfigError, match=f"no audio at {here}/nowhere, .* to that at {here}/audio; set cache.audio_path="
    ):
        store_audio(Run(check_config(tree), Console(quiet=True)))
    with pytest.raises(ConfigError, match=f"no audio at {here}/nowhere, .* to that at {here}/audio; set"):
        plan_run(check_config(tree), list(STAGES))
    moved = (tmp_path / "audio").rename(tmp_path / "moved")
    with pytest.raises(
        CacheError, match=f"^the cache at {tmp_path}/beside/a refers to audio at {tmp_path}/audio, but there"
    ):
        check_cache(other)
    for entry in tree["teachers"]:
        entry["cache"]["audio_path"] = str(moved)
    other.folder.refuse_other_config(check_config(tree))
    again = Run(check_config(tree), Console(quiet=True))
    again.parts[1].teacher.max_samples = 30_000
    check_cache(again)
    spec = CacheSpec.of_audio(run.corpus.fingerprint, 7)  # The same audio in other shards.
    build_audio_store(tmp_path / "other", spec, plan_audio(run.utterances, 7), workers=None)
    for entry in tree["teachers"]:
        entry["cache"]["audio_path"] = str(tmp_path / "other")
    with pytest.raises(CacheError, match=f"/beside/a refers to audio with .*, but that at {tmp_path}/other has "):
        check_cache(Run(check_config(tree), Console(quiet=True)))


def _trains_alike_from_the_corpus_itself(
    run: Run, config: Callable[..., Config], tmp_path: Path, speech_folder: Path
) -> None:
    """Train as a run of two teachers did, but from caches that hold no audio."""
    entries = [entry | {"cache": {"path": str(tmp_path / "light" / str(entry["name"]))}} for entry in (A, B)]
    cache = {"codec": "fp16", "audio": "source"}

    def begun(name: str, corpus: Path) -> Run:
        other = begin(config(*entries, cache=cache, name=name, corpus={"path": str(corpus)}))
        other.parts[1].teacher.max_samples = 30_000
        return other

    other = begun("light", speech_folder)
    plan = plan_run(other.config, list(STAGES))
    assert plan.facts["cache a"].endswith(", audio read from the corpus") and plan.stages["cache"].startswith(
        "a: build"
    )
    with other.console.capture() as shown:
        other.console.quiet = False
        plan_cache(other)
        other.console.quiet = True
    assert re.search(r"kB beside [\d.]+ kB of audio in the corpus, ", shown.get()) and "stored once" not in shown.get()
    assert (
        len(re.findall(r"the audio is read from the corpus in each epoch: [\d,]+ s of audio per CPU", shown.get())) == 2
    )
    build(other)
    assert not (tmp_path / "caches" / "audio-corpus").exists()
    # The corpus moves before the training, whose index says where it is.
    moved = begun("moved", speech_folder.rename(tmp_path / "elsewhere"))
    check_cache(moved)
    prepare_training(moved, 1, in_process=True)()
    assert _losses(moved) == _losses(run)
    export_best(moved)
    summary = report_run(moved)
    assert [one["audio"] for one in summary["teachers"]] == [str(tmp_path / "elsewhere")] * 2
    assert f"beside the audio at {tmp_path / 'elsewhere'}" in moved.folder.report.read_text()
    with pytest.raises(
        CacheError,
        match=r"^the cache at \S+ reads its audio .* 12 of 12 files are missing, .*; restore .*, or run the index",
    ):
        check_cache(other)
    (tmp_path / "elsewhere").rename(speech_folder)


def test_the_place_of_the_audio_is_that_of_the_corpus_unless_it_is_given() -> None:
    stored = {"codec": "fp16", "audio": "store"}
    config = check_config(tree(A, B | {"cache": {"audio": "flac"}}, cache=stored | {"audio_path": "mine"}))
    assert [part.cache.audio_path for part in config.parts] == ["mine", None]
    config = check_config(tree(cache=stored))
    assert [part.cache.audio_path for part in config.parts] == ["caches/audio-corpus"] * 2
    assert check_config(yaml.safe_load(dump_config(config))) == config
    one = tiny_tree(cache=stored)
    assert check_config(one).cache.audio_path == "caches/audio-corpus"
    with pytest.raises(
        ConfigError, match="^cache: cache.audio_path does nothing with cache.audio flac; set cache.audio=store"
    ):
        check_config(tiny_tree(cache={"audio_path": "mine"}))
    for audio in ("pcm", "source"):
        with pytest.raises(ConfigError, match=f"^cache: cache.audio_path does nothing with cache.audio {audio}; set"):
            check_config(tiny_tree(cache={"audio": audio, "audio_path": "mine"}))
    mixed = check_config(tree(A, B | {"cache": {"audio": "source"}}, cache=stored))
    assert [part.cache.audio_path for part in mixed.parts] == ["caches/audio-corpus", None]


@pytest.mark.slow
def test_a_run_from_the_layers_of_two_teachers_side_by_side(config: Callable[..., Config]) -> None:
    run = begin(config(A, {"name": "b", "checkpoint": OTHER}, train={"aggregate": "concatenate"}))
    build(run)
    plan = plan_run(run.config, list(STAGES))
    prepare_training(run, 1, in_process=True)()
    export_best(run)
    summary = report_run(run)
    student, _ = open_student(run.folder.path)
    assert student.config.target_dim == run.target_dim == 32 + 48 and plan.facts["student"].startswith(
        f"{summary['student_parameters']:,} parameters"
    )
    assert [one["name"] for one in summary["teachers"]] == ["a", "b"] and summary["constant_loss"] > 0
    assert "the channels side by side of the teachers' layers, of width 80" in run.folder.report.read_text().replace(
        "&#39;", "'"
    )
    with pytest.raises(
        ConfigError, match="^train.aggregate average: the teachers a and b have widths 32 and 48; set it"
    ):
        config(train={"aggregate": "average"}).check_aggregate([(2, 32), (2, 48)])


def test_utterances_that_a_teacher_cant_take_are_left_out_for_it_only(
    config: Callable[..., Config], tmp_path: Path, speech_folder: Path
) -> None:
    run = begin(config())
    run.parts[1].teacher.max_samples = 30_000
    plan_cache(run)
    build(run)
    assert len(run.parts[0].utterances) == 12 and len(run.parts[1].utterances) == 10
    assert run.parts[1].spec.corpus != run.parts[0].spec.corpus
    prepare_training(run, 1, in_process=True)()
    export_best(run)
    assert [one["utterances"] for one in report_run(run)["teachers"]] == [12, 10]
    _trains_alike_from_audio_that_is_stored_once(run, config, tmp_path)
    _trains_alike_from_the_corpus_itself(run, config, tmp_path, speech_folder)
    again = begin(config(A, B, name="again"))
    again.parts[1].teacher.max_samples = 5_000
    with pytest.raises(
        ConfigError, match=r"^teachers.b: corpus.max_seconds: random:2x48 can take no utterance of the split"
    ):
        plan_cache(again)


def test_the_plan_counts_audio_that_is_read_once_for_all_teachers(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(config())
    measured = plan_stage.plan_cost
    large = {"audio_bytes": 5e9, "free_bytes": None}
    monkeypatch.setattr(plan_stage, "plan_cost", lambda *given: replace(measured(*given), **large))
    with run.console.capture() as shown:
        run.console.quiet = False
        plan_cache(run)
    text = " ".join(shown.get().split())
    assert "the 2 caches: about 10.00 GB, 5.00 GB read per epoch" in text
    assert re.search(r"read per epoch, [0-9.e-]+ min of teacher time one after another", text)


def test_the_plan_says_what_a_cache_lacks(config: Callable[..., Config]) -> None:
    run = begin(config())
    build(run)

    def planned() -> str:
        with run.console.capture() as shown:
            run.console.quiet = False
            plan_cache(run)
        return " ".join(shown.get().split())

    assert planned().count("has all layers and draws that are needed") == 2 and "lacks" not in planned()
    commits = Path(run.parts[0].cache.location) / "commits"
    next(commits.rglob("*.json")).unlink()
    assert planned().count("are needed, and lacks 1 shard, which the cache stage builds") == 1


def test_frame_rates_that_cant_be_right_are_refused(config: Callable[..., Config]) -> None:
    run = Run(config(), Console(quiet=True))
    check_frame_rates(run)
    idle = run.sibling(config(A, B | {"frames": "nearest"}), Console(quiet=True))
    with pytest.raises(
        ConfigError,
        match=r"^teachers.b: teachers.b.frames nearest does nothing: random:2x48 has 50 frames per second, as the student; remove",
    ):
        check_frame_rates(idle)
    teacher = run.parts[1].teacher
    teacher.frame_rate = Fraction(100)
    check_frame_rates(run)
    teacher.frame_rate = Fraction(25)
    with pytest.raises(
        ConfigError, match=r"^teachers.b: masks.draws: random:2x48 has 25 frames per second, no multiple of 50, so"
    ):
        check_frame_rates(run)
    clean = run.sibling(config(A, B | {"cache": {"targets": "clean_only"}}), Console(quiet=True))
    check_frame_rates(clean)
    teacher.frame_rate = Fraction(11025, 128)
    with pytest.raises(
        ConfigError,
        match=r"^teachers.b: teachers.b.frames average: with 86.1328 frames per second .* set it to nearest",
    ):
        check_frame_rates(clean)
    teacher.patches = PatchGeometry()
    teacher.num_frames = teacher.patches.num_patches  # type: ignore[method-assign]
    with pytest.raises(
        ConfigError, match=r"^teachers.b: random:2x48 has 108 patches in 1 s of audio, but random:2x32 has 49"
    ):
        check_frame_rates(clean)


def test_a_teacher_that_lacks_something_is_named_once(config: Callable[..., Config]) -> None:
    run = Run(config(A, B | {"layers": [3]}), Console(quiet=True))
    for wrapped in (nullcontext, run.parts[1].named):
        message = "^teachers.b: teachers.b.layers: there is no layer 3; random:2x48 has"
        with pytest.raises(ConfigError, match=message), wrapped():
            _ = run.parts[1].teacher


def test_an_ablation_varies_teachers(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree(A | {"layers": [1, 2]}, B)))

    def ablation(*variants: dict[str, Any]) -> Any:
        named = {f"v{number}": changes for number, changes in enumerate(variants)}
        text = {"name": "teachers", "base": "two.yaml", "variants": named, "seeds": [0]}
        (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(text))
        return load_ablation(tmp_path / "ablation.yaml")

    both = ablation({}, {"teachers.b.weight": 0}, {"teachers.a.layers": None})
    assert [run.config.teachers[1].weight for run in both.runs] == [0.5, 0, 0.5]
    assert both.needs.teachers[0].layers is None and both.needs.teachers[0].cache.path == "caches/random-2x32-corpus"
    with pytest.raises(ConfigError, match="teachers.b.checkpoint: can't differ between runs, which share"):
        ablation({}, {"teachers.b.checkpoint": TEACHER})
    assert json.loads(both.needs.model_dump_json())["teachers"][1]["weight"] == 0.5


def test_a_teacher_without_weight_is_left_out_of_the_training(config: Callable[..., Config]) -> None:
    run = begin(config(A | {"weight": 0}, B))
    assert (
        [entry.name for entry in run.config.teachers] == ["a", "b"] and run.config.owner == 1 and run.main.name == "b"
    )  # type: ignore[attr-defined]
    objective = run.settings().chosen_objective
    assert isinstance(objective, SeveralTeachers) and [term.name for term in objective.terms] == ["b"]
    assert initial_student(run)[0].target_dim == 48 == run.target_dim
    assert [cache.name for cache in teacher_caches(run)] == ["b"]
    build(run)
    Path(run.parts[0].cache.location, "cache.json").unlink()
    prepare_training(run, 1, in_process=True)()
    last = [row for row in read_rows(run.folder.metrics_file) if row["kind"] == "validation"][-1]
    assert "teacher_loss_b" in last and "teacher_loss_a" not in last


def test_the_student_starts_from_the_named_teacher(config: Callable[..., Config]) -> None:
    start = {"mask_embedding": "teacher", "init_teacher": "b"}
    student = tree()["student"] | {"encoder_embed_dim": 48, "encoder_attention_heads": 2}
    run = Run(config(train=start, student=student), Console(quiet=True))
    _, tensors = initial_student(run)
    weights = run.parts[1].teacher.weights  # type: ignore[attr-defined]
    assert tensors["mask_embedding"].equal(weights["mask_embedding"])


def test_a_teacher_that_begins_after_the_training_is_named() -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    run = Run(check_config(tree(A, B | {"start_step": 9})), console)
    say_unused(run, 10)
    assert text.getvalue() == ""
    say_unused(run, 9)
    assert text.getvalue() == (
        "train   b: takes part from step 9, which a training of 9 steps does not reach; it has no effect\n"
    )
    mixture = {
        "train": {
            "batch_seconds": 8,
            "objective": "mixture",
            "masks": "fresh",
            "parts": [PART, UNITS | {"from_step": 20_000}],
        },
        "masks": {"draws": 0},
        "cache": {"path": "cache", "codec": "units:8"},
        "student": tiny_tree()["student"] | {"heads": "split"},
    }
    say_unused(Run(check_config(tiny_tree(**mixture)), console), 100)
    assert text.getvalue().splitlines()[1:] == [
        "train   objective units: takes part from step 20,000, which a training of 100 steps does not reach; it has no effect"
    ]
