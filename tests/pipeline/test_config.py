from pathlib import Path

import pydantic
import pytest
import yaml

from ray_distill.pipeline.ablation.definition import AblationSettings, ProbeSection
from ray_distill.pipeline.config import (
    CacheSection,
    Config,
    ConfigError,
    CorpusSection,
    TeacherSection,
    dump_config,
    load_config,
)
from ray_distill.student.training.field_effects import (
    CHANGES_LOSS_MEANING,
    CHANGES_NO_RESULT,
    SAME_IN_ABLATION,
    key_effects,
    keys_with,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "configs" / "demo.yaml"


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for folder in ("", "discrete", "pruned", "several")
        for path in (REPOSITORY / "configs" / folder).glob("*.yaml")
    ),
    ids=lambda path: path.stem,
)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"train\.epoch: unknown key; did you mean train\.epochs\?$"),
        ("train.lr=1", r"train\.lr: unknown key; did you mean train\.learning_rate\?$"),
        ("train.gpu=1", r"train\.gpu: unknown key; did you mean train\.use_gpu\?$"),
        ("learning_rate=1", r"learning_rate: unknown key; did you mean train\.learning_rate\?$"),
        ("train.codec=fp16", r"train\.codec: unknown key; did you mean cache\.codec\?$"),
        ("train.xyz=1", r"train\.xyz: unknown key; allowed here: accumulate, .*epochs"),
        ("traim.epochs=3", r"traim: unknown key; did you mean train\?$"),
        ("train.epochs=many", r"^train\.epochs: must be a whole number, not 'many'$"),
        ("train.epochs=1.5", r"^train\.epochs: must be a whole number, not 1\.5$"),
        ("train.epochs=", r"^train\.epochs: has no value; it must be a whole number$"),
        ("train.use_gpu=cuda", r"^train\.use_gpu: must be true or false, not 'cuda'$"),
        ("train.batch_seconds=30s", r"or 'auto', not '30s'; write the number alone, in seconds$"),
        ("cache.shard_minutes=3 min", r"must be a number, not '3 min'; write the number alone, in minutes$"),
        ("masks.policy.mask_prob=40%", r"must be a number, not '40%'; write a share without %, as in 0\.4 for 40 %$"),
        (
            "name=7",
            r'^name: must be text, but YAML reads it as 7; put it in quotes, as in name: "TEXT", or on the command',
        ),
        ("name=[a]", r"^name: must be text, not \['a'\]$"),
        ("train=[1]", r"^train: \[1\] is a list, but this key needs a table of keys and values$"),
        ("train.EPOCHS=3", r"^train\.EPOCHS: unknown key; did you mean train\.epochs"),
        ("lr=0.1", r"^lr: unknown key; did you mean train\.learning_rate\?$"),
        ("learning_rate=0.1", r"^learning_rate: unknown key; did you mean train\.learning_rate\?$"),
        ("++train.epochs=3", r"^'\+\+train\.epochs' is not a key; write train\.epochs=3$"),
        ("train.epochs =3", r"^'train\.epochs ' is not a key; write train\.epochs=3$"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1"),
        ("train.targets=both", r"train\.targets: .*'cached' or 'online'"),
        ("train.batch_size=4", "train.batch_size is 4 and train.batch_seconds is 10, .*train.batch_seconds=null"),
        ("train.precision=fp16", "needs train.use_gpu"),
        *(
            (f"{key}={value}", f"^{key}: {message}$")
            for key in ("train.batch_seconds", "cache.batch_seconds")
            for value, message in (
                *(
                    (size, r"\S+ can't be .*; give a positive number of seconds of audio, or auto")
                    for size in ("0", ".nan", ".inf")
                ),
                ("much", r"must be a number of seconds or 'auto', not 'much'"),
                ("[1]", r"must be a number of seconds or 'auto', not \[1\]"),
            )
        ),
        ("corpus.channel=left", r"^corpus\.channel: must be a whole number or 'mix', not 'left'$"),
        ("corpus.channel=0.5", r"^corpus\.channel: must be a whole number or 'mix', not 0.5$"),
        ("train.validate_every=epok", r"be a whole number or 'epoch', not 'epok'; did you mean epoch\?$"),
        ("train.batch_seconds=auto", "auto measures the memory of a GPU, but this training runs on the CPU; give the"),
        (
            "cache.codec=mp3",
            r"cache\.codec: .*known codecs: fp32, fp16, int8, pca, layer-pca, and pca:STEP, layer-pca:STEP",
        ),
        ("cache.codec=pca:0", r"cache\.codec: .*step after the colon must be a positive number"),
        (
            "cache.targets=all",
            r"cache\.targets: .*'clean_and_masked', 'masked_everywhere', 'composite_only' or 'clean_only'",
        ),
        ("masks.policies=[{}, {}, {}]", "3 policies for 2 draws"),
        (
            "masks.policies=[{mask_prb: 0.4}]",
            r"masks\.policies\.0\.mask_prb: unknown key; did you mean masks\.policies\.0\.mask_prob",
        ),
        (
            "train.spec_augment={fil: zero}",
            r"train\.spec_augment\.fil: unknown key; did you mean train\.spec_augment\.fill\?",
        ),
        ("train.trackers=[tensorboard]", r"train\.trackers.*'wandb' or 'mlflow'"),
        ("student.widht=3", r"student\.widht: unknown key; did you mean student\.encoder_embed_dim\?$"),
        ("student.hidden_size=3", r"student\.hidden_size: unknown key; did you mean student\.encoder_embed_dim\?$"),
        (
            "student.attention_reuse=altrnate",
            r"^student\.attention_reuse: must be 'none' or 'alternate', not 'altrnate'; did you mean alternate\?$",
        ),
        ("student.attention_reuse=[1, 7]", r"student\.attention_reuse"),
        ("train.targets=onlin", r"not 'onlin'; did you mean online\?$"),
        ("student.encoder_attention_heads=5", "student"),
        ("masks.policy.selection=often", r"masks\.policy\.selection: .*'static', 'uniform', 'normal' or 'poisson'"),
        ("name=../elsewhere", "name"),
        (
            "train.masks=fresh",
            r"train\.masks fresh draws a mask for each epoch, so masks\.draws 2 does nothing; set masks\.draws=0",
        ),
        ("train.frame_weights=[0,0]", r"train\.frame_weights are both 0; one must be positive"),
        ("train.objective=units", "train.hint_weight does nothing with train.objective units"),
        ("train.codebooks=independent", "it belongs to objective mvq"),
        ("teacher.layers=[]", r"^teacher\.layers: \[\] must name one or more layers, each once, such as"),
        ("teacher.layers=[2, 2]", r"^teacher\.layers: \[2, 2\] must name one or more layers"),
        ("train", "not an override"),
        ("cache.local=copies", "copies is not an absolute path"),
        ("cache.local_gb=5", "cache.local_gb limits the size of cache.local, which is not set"),
        ("name.x=1", "is a value, not a section"),
        ("runs=s3://bucket/runs", "runs: s3://bucket/runs is a URL, but runs are written to a local folder"),
        (
            "corpus.path=s3://bucket/audio",
            "corpus.path: s3://bucket/audio is a URL, but a corpus is a local folder or file",
        ),
        (
            "cache.path=s3:/bucket/cache",
            "cache.path: s3:/bucket/cache is neither a local path nor a URI; write s3://BUCKET",
        ),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(DEMO, [override])
    assert "\n" not in str(caught.value)


def test_masked_targets_need_masks() -> None:
    load_config(DEMO, ["cache.targets=masked_everywhere"])
    with pytest.raises(
        ConfigError, match="masked_everywhere takes targets from masked passes, but masks.draws is 0; set masks"
    ):
        load_config(DEMO, ["cache.targets=masked_everywhere", "masks.draws=0"])


def test_missing_file_and_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match="corpus: missing"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- a list\n")
    with pytest.raises(ConfigError, match="sections"):
        load_config(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "c.yaml")


def test_the_dumped_configuration_loads_again(tmp_path: Path) -> None:
    config = load_config(DEMO, ["train.max_steps=7", "corpus.train_splits=[a, b]"])
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert yaml.safe_load(dump_config(config))["train"]["max_steps"] == 7


def test_a_single_value_stands_for_a_list() -> None:
    given = ["corpus.train_splits=a", "corpus.validation_splits=b", "teacher.layers=4", "train.trackers=wandb"]
    listed = ["corpus.train_splits=[a]", "corpus.validation_splits=[b]", "teacher.layers=[4]", "train.trackers=[wandb]"]
    assert load_config(DEMO, given) == load_config(DEMO, listed)
    with pytest.raises(ConfigError, match="layers: must be a list"):
        load_config(DEMO, ["teacher.layers=true"])


def test_student_follows_the_teacher() -> None:
    student = load_config(DEMO).resolve_student(6, 192)
    sparse = load_config(DEMO, ["student.head_layers=[2,5]"]).resolve_student(2, 192)
    assert (sparse.encoder_layers, sparse.num_predictions) == (5, 2)
    assert (student.encoder_layers, student.target_dim) == (6, 192)


CHANGES_RESULT = {
    "": "student",
    "corpus": "path format channel train_splits validation_splits validation_fraction min_seconds max_seconds long_audio",
    "masks": "policies draws seed",
    "masks.policy": "selection mask_prob mask_length mask_other no_overlap min_space trim_batch",
    "cache": "targets",
    "train": "targets epochs max_steps batch_size batch_seconds crop_seconds shuffle accumulate workers use_gpu precision "
    "learning_rate optimizer warmup_fraction betas eps weight_decay hint_layers count_padding spec_augment mask_embedding "
    "init_from init_front_end init_encoder_layers init_teacher unit_dim codebook_hidden prune "
    "max_grad_norm compile ema_decay draw_order validate_every log_every seed frame_weights",
}
"""Keys without an effect, by section: they change a run's result, keep the loss's meaning, and may differ within an ablation."""


def test_the_effects_of_every_key_are_decided() -> None:
    effects = key_effects(Config)
    sections = {key.rpartition(".")[0] for key in effects if "." in key}
    plain = {key for key, found in effects.items() if not found and key not in sections}
    decided = {f"{section}.{name}".lstrip(".") for section, names in CHANGES_RESULT.items() for name in names.split()}
    assert plain == decided, "decide the effects of a new key (field_effects.py): annotate it, or list it above"
    assert set(keys_with(Config, CHANGES_NO_RESULT)) == {
        *("runs", "cache.actors", "cache.gpus_per_actor", "cache.cpus_per_actor", "cache.max_failed", "cache.verify"),
        *("cache.local", "cache.local_gb", "cache.audio_path"),
        *("train.max_skipped_steps", "train.checkpoint_activations", "train.checkpoint_every", "train.keep_best"),
        *("train.trackers", "train.max_failures"),
    }
    assert set(keys_with(Config, CHANGES_LOSS_MEANING)) == {
        *("teacher.layers", "train.objective", "train.hint_weight", "train.final_weight", "train.loss"),
        *(
            "train.cosine_weight",
            "train.cosine_term",
            "train.relation_weights",
            "train.masks",
            "train.masked_weight",
            "train.unmasked_weight",
        ),
        *("train.unit_temperature", "train.codebooks", "train.parts", "train.objective_options"),
        *("teachers", "teacher.frames", "train.balance", "train.aggregate"),
    }
    shared = [f"cache.{name}" for name in CacheSection.model_fields if name != "targets"]
    assert keys_with(Config, SAME_IN_ABLATION) == ["name", "runs", "corpus", "teacher.checkpoint", *shared]


@pytest.mark.parametrize("model", [Config, CorpusSection, TeacherSection, CacheSection, AblationSettings, ProbeSection])
def test_every_key_is_described(model: type[pydantic.BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
