"""Bases, short keys, and the origin of each value of a configuration."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from ray_distill.command_line import application
from ray_distill.pipeline.composition.config_listing import config_with_origins
from ray_distill.pipeline.composition.config_tree import COMMAND_LINE, compose
from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.planning.cluster import ClusterError, load_cluster

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = CONFIGS / "demo.yaml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_changes_its_base(tmp_path: Path) -> None:
    write(tmp_path, "middle.yaml", "base: demo\ntrain: {learning_rate: 1.0e-3}\nmasks: {policy: {mask_length: 5}}\n")
    file = write(tmp_path, "top.yaml", "base: middle.yaml\nname: mine\nteacher: random:2x32\ncorpus: /data/x\n")
    found, demo = load_config(file), load_config(DEMO)
    assert (found.name, found.teacher.checkpoint, str(found.corpus.path)) == ("mine", "random:2x32", "/data/x")
    assert found.train == demo.train.model_copy(update={"learning_rate": 1e-3})
    assert found.masks.policy == demo.masks.policy.model_copy(update={"mask_length": 5})
    assert found.student == demo.student and found.cache == demo.cache
    sources = compose(file, ["train.epochs=3"])
    assert sources.source_of("masks.policy.mask_length") == str(tmp_path / "middle.yaml")
    assert sources.source_of("masks.policy.mask_prob") == "recipe demo"
    assert sources.source_of("train.epochs") == COMMAND_LINE and sources.source_of("train.eps") is None


def test_wrong_bases_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"form a circle: .*a\.yaml is read twice"):
        load_config(a)
    with pytest.raises(ConfigError, match="no configuration file at nothing; the recipes are"):
        load_config(write(tmp_path, "c.yaml", "base: nothing\n"))
    with pytest.raises(ConfigError, match="must be the path of a file or the name of a recipe, not 3"):
        load_config(write(tmp_path, "d.yaml", "base: 3\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.yaml is empty, but must contain sections, such as corpus: and teacher:"),
        (b"- a\n", r"a\.yaml is a list, but must contain sections"),
        (b"base: demo\ntrain:\n\tmax_steps: 3\n", r"at line 3, .*; indent with spaces, not with tabs"),
        (b"\xff\xfen", r"a\.yaml is not UTF-8 \(invalid start byte at byte 0\); save it as UTF-8"),
        (
            b"base: demo\ntrain.epochs: 3\n",
            r"^train\.epochs: unknown key; in a file, write epochs in the table train$",
        ),
        (
            b'base: demo\nname: "\xc3\xbcber"\n',
            "name: 'über' can't be a name; use letters from a to z, digits, '.', '_' and",
        ),
    ],
)
def test_files_that_are_no_configuration_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("change", ["train=3", "masks.policy=3", "student=3"])
def test_a_value_in_the_place_of_a_section_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{change[:-2]}: 3 is a single value, but this key needs a table"):
        load_config(DEMO, [change])


def test_a_key_that_is_given_twice_is_said() -> None:
    assert compose(DEMO, ["train.max_steps=3", "train.max_steps=4"]).notes == [
        "train.max_steps is given twice, and the last value counts: 4"
    ]
    twice = compose(DEMO, ["teacher=random:2x32", "teacher.checkpoint=random:2x48"])
    assert "teacher.checkpoint is given twice, and the last value counts: random:2x48" in twice.notes


def test_short_keys_set_their_long_keys(tmp_path: Path) -> None:
    config = load_config(DEMO, ["teacher=random:2x32", "corpus=/data/x", "cache=/data/c"])
    assert config == load_config(DEMO, ["teacher.checkpoint=random:2x32", "corpus.path=/data/x", "cache.path=/data/c"])
    section = load_config(DEMO, ["teacher={checkpoint: random:2x32, layers: [1]}"])
    assert section.teacher.layers == [1]
    file = write(tmp_path, "a.yaml", "name: a\nteacher: random:2x32\ncorpus: /x\ntrain: {batch_size: 2}\n")
    assert load_config(file, ["teacher.layers=[2]"]).teacher.layers == [2]


def test_paths_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(
        tmp_path,
        "a.yaml",
        "base: demo\nruns: ~/runs\ncorpus: ~/speech\n"
        "cache: {path: ~/cache, audio: store, audio_path: ~/audio, local: ~/copies}\ntrain: {init_from: ~/first}\n",
    )
    config = load_config(file)
    assert (config.runs, config.corpus.path) == (tmp_path / "runs", tmp_path / "speech")
    cache = config.cache
    assert [cache.path, cache.audio_path, cache.local, config.train.init_from] == [
        str(tmp_path / name) for name in ("cache", "audio", "copies", "first")
    ]
    recipe = CONFIGS / "armhubert-s-100.yaml"
    (tmp_path / "speech" / "train-clean-100").mkdir(parents=True)
    assert load_config(recipe, ["corpus=~/speech"]).corpus.train_splits == ["train-clean-100"]
    for change, message in (
        ("cache=$HOME/c", r"^cache.path: \$HOME/c has the variable \$HOME, which is not replaced in a configuration"),
        ("runs=${SCRATCH}/r", r"^runs: .* has the variable \$\{SCRATCH\}"),
        ("corpus=~nobody-here/x", "begins with ~nobody-here, which is no user of this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(DEMO, [change])


def test_one_split_names_the_cache() -> None:
    for value in ("train-a", "[train-a]"):
        config = load_config(DEMO, ["corpus=/data/x", f"corpus.train_splits={value}"])
        assert config.cache.path == "caches/builtin-phone-hubert-x-train-a" and config.corpus.train_splits == [
            "train-a"
        ]


@pytest.mark.parametrize("key", ["teacher", "corpus", "cache"])
def test_a_short_key_needs_a_value(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}= has no value; write {key}="):
        load_config(DEMO, [f"{key}="])
    assert load_config(DEMO, ["corpus=2024"]).corpus.path == Path("2024"), "YAML reads a number"


def test_another_teacher_or_corpus_gets_a_cache_of_its_own() -> None:
    recipe = CONFIGS / "armhubert-s-100.yaml"
    composed = compose(recipe, ["teacher=microsoft/wavlm-base-plus"])
    assert composed.notes == [
        "the cache is caches/wavlm-base-plus-LibriSpeech-train-clean-100, for this teacher and corpus; cache=PATH sets another"
    ]
    assert load_config(recipe, ["teacher=microsoft/wavlm-base-plus"]).cache.path == (
        "caches/wavlm-base-plus-LibriSpeech-train-clean-100"
    )
    for kept in (["teacher.checkpoint=x.pt"], ["teacher=x.pt", "cache.path=caches/hubert-base-train-clean-100"]):
        assert load_config(recipe, kept).cache.path == "caches/hubert-base-train-clean-100"


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("runs/first/export", "first"),
        ("runs/first/export/", "first"),
        ("runs/first", "first"),
        ("runs/first/checkpoints/step-000100", "first-step-000100"),
        ("layer-norm:/models/whisper-small", "layer-norm-whisper-small"),
        ("mean-mask:layer-norm:runs/first/export", "mean-mask-layer-norm-first"),
        ("export", "export"),
    ],
)
def test_caches_are_named_after_the_run_of_a_teacher(teacher: str, name: str) -> None:
    assert load_config(DEMO, [f"teacher={teacher}", "corpus=/data/x"]).cache.path == f"caches/{name}-x"


def test_the_recipes_splits_stay_where_the_corpus_has_them(tmp_path: Path) -> None:
    recipe = CONFIGS / "armhubert-s-100.yaml"
    (tmp_path / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "LibriSpeech"):
        assert load_config(recipe, [f"corpus={path}"]).corpus.train_splits == ["train-clean-100"]
    (tmp_path / "other").mkdir()
    composed = compose(recipe, [f"corpus={tmp_path / 'other'}"])
    assert "has none of the recipe's splits (train-clean-100, dev-clean), so its own are used" in composed.notes[0]
    assert load_config(recipe, [f"corpus={tmp_path / 'other'}"]).corpus.train_splits is None
    named = [f"corpus={tmp_path / 'other'}", "corpus.train_splits=[a]"]
    assert load_config(recipe, named).corpus.train_splits == ["a"], "what the user names is never dropped"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_listing_is_the_configuration(recipe: Path, tmp_path: Path) -> None:
    overrides = ["train.epochs=3", "teacher=random:2x768"]
    text = config_with_origins(recipe, overrides)
    again = load_config(write(tmp_path, "again.yaml", text))
    config = load_config(recipe, overrides)
    assert again.model_copy(update={"student": config.student}) == config
    assert again.resolve_student(12, 768) == config.resolve_student(12, 768)
    lines = {line.split(":")[0].strip(): line.split("  # ")[-1] for line in text.splitlines() if ":" in line}
    assert lines["epochs"] == COMMAND_LINE and lines["name"] == f"recipe {recipe.stem}" and lines["log_every"]


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_for_editors_accepts_recipes_and_names_wrong_keys(recipe: Path) -> None:
    schema = json.loads((CONFIGS / "schema.json").read_text())
    assert recipe.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    tree = yaml.safe_load(recipe.read_text())
    jsonschema.validate(tree, schema)
    jsonschema.validate({"base": "demo", "teacher": "x", "student": {"target_dim": "teacher"}}, schema)
    for wrong in ({"training": {}}, {"train": {"epoch": 3}}, {"student": {"widht": 3}}, {"train": {"epochs": "many"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree | wrong, schema)


def test_the_recipe_may_stand_before_the_changes() -> None:
    def invoke(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(application, ["run", *arguments])
        return done.exit_code, done.output + done.stderr

    listed = invoke("demo", "train.epochs=3", "--print-config")
    assert listed == invoke("--config", "demo", "train.epochs=3", "--print-config") and listed[0] == 0
    bare = CliRunner().invoke(application, ["demo.yaml", "train.epochs=3", "--print-config"])
    assert (bare.exit_code, bare.output + bare.stderr) == listed, "the command run may be left out"
    assert "give one recipe or YAML file, such as demo" in invoke("train.epochs=3")[1]
    assert "give one recipe or YAML file, not demo, demo" in invoke("demo", "--config", "demo")[1]


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = write(
        tmp_path, "twice.yaml", "base: demo\ncache: {codec: fp16}\ntrain: {epochs: 3}\ncache:\n  shard_minutes: 5\n"
    )
    with pytest.raises(
        ConfigError, match=r"twice\.yaml is not valid YAML: the key cache is given twice; .* at line 4, column 1"
    ):
        load_config(file)
    inner = write(tmp_path, "inner.yaml", "base: demo\ntrain:\n  epochs: 3\n  epochs: 4\n")
    with pytest.raises(ConfigError, match="the key epochs is given twice; keep one of them at line 4, column 3"):
        load_config(inner)
    with pytest.raises(ConfigError, match="the key mask_prob is given twice"):
        load_config(DEMO, ["masks.policy={mask_prob: 0.1, mask_prob: 0.2}"])
    with pytest.raises(ClusterError, match="the key name is given twice"):
        load_cluster(write(tmp_path, "cluster.yaml", "name: a\nname: b\n"))
    merged = write(tmp_path, "merged.yaml", "base: demo\ntrain: {<<: {epochs: 3, seed: 1}, epochs: 4}\n")
    assert load_config(merged).train.epochs == 4, "a merge key may be overridden"


def test_an_empty_section_gives_no_key(tmp_path: Path) -> None:
    file = write(tmp_path, "empty.yaml", "base: demo\ncache:\n  # codec: fp16\nmasks:\ntrain:\n")
    assert load_config(file) == load_config(DEMO)
    assert load_config(file, ["corpus=/data/x"]).cache.path == "caches/builtin-phone-hubert-x"
    several = write(tmp_path, "several.yaml", "base: empty.yaml\nteachers:\n  - {name: a, checkpoint: random:2x32}\n")
    assert [part.cache.path for part in load_config(several).parts] == ["caches/random-2x32-demo"]
