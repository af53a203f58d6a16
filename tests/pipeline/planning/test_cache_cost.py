"""The estimated cost of a cache compared with the cache itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from ray_distill.pipeline.config import ConfigError, load_config
from ray_distill.pipeline.planning.cache_cost import cost_lines, cost_table, plan_cost
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.index import index_audio
from ray_distill.pipeline.stages.plan import plan_cache
from ray_distill.teacher_cache.audio import load_identified_audio
from ray_distill.teacher_cache.build.codec_fit import codec_pass_seconds
from ray_distill.teacher_cache.codecs import sample_frames
from ray_distill.teacher_cache.masks import MaskDraws
from ray_distill.teacher_cache.sources.address import AudioAddress
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, Utterances
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher

from ...tiny import TEACHER

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"
Make = Callable[..., CacheSpec]


@pytest.mark.parametrize("codec", ["fp32", "fp16", "int8", "pca"])
@pytest.mark.parametrize("targets", ["clean_and_masked", "masked_everywhere", "composite_only", "clean_only"])
def test_the_plan_predicts_the_size(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance], codec: str, targets: str
) -> None:
    spec = make_cache(tmp_path / "cache", codec=codec, targets=targets)
    plan = plan_cost(source_utterances, spec, load_teacher(TEACHER), str(tmp_path / "new"))
    cache = Cache.open(tmp_path / "cache")
    # Each of these small shards has a schema, of about 4 kB, which rows share otherwise.
    actual = cache_bytes(cache) - 4000 * sum(len(cache.files(shard)) for shard in cache.shards)
    assert plan.total_bytes(codec, targets) == pytest.approx(actual, rel=0.1)  # type: ignore[arg-type]
    assert plan.utterances == 12
    assert plan.frames == Cache.open(tmp_path / "cache").record["frames"]
    assert plan.there_bytes == 0
    assert plan.teacher_passes == (1 if targets == "clean_only" else 3)
    assert plan.audio_per_second > 0


def test_masked_passes_of_the_training_split_alone_are_planned(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance]
) -> None:
    teacher, place = load_teacher(TEACHER), tmp_path / "cache"
    spec = make_cache(place, codec="int8", layers=(1,))
    seconds = {split: Utterances.of(source_utterances).of_split(split).seconds for split in ("train", "validation")}
    both = sum(seconds.values())
    assert seconds["validation"] > 0.1 * both, "otherwise this shows nothing"
    new = plan_cost(source_utterances, spec, teacher, str(tmp_path / "new"))
    assert new.teacher_seconds == pytest.approx(both + 2 * seconds["train"])
    assert new.train_share == pytest.approx(seconds["train"] / both, abs=0.01)
    # The corpus is shorter than the sample of a codec, which takes the clean and a masked pass of it.
    assert new.fit_seconds == pytest.approx(2 * seconds["train"])
    assert new.teacher_hours == pytest.approx((new.teacher_seconds + new.fit_seconds) / 3600 / new.audio_per_second)
    assert (
        "3 teacher passes, with " in (text := " ".join(cost_lines(new))) and " of audio to fit the codec: about" in text
    )
    # What a cache has is not computed again.
    more = spec.model_copy(update={"masks": MaskDraws.model_validate(spec.masks.model_dump() | {"draws": 3})})
    plan = plan_cost(source_utterances, more, teacher, str(place))
    assert (plan.teacher_seconds, plan.fit_seconds) == (pytest.approx(seconds["train"]), 0)
    assert plan.there_bytes == cache_bytes(Cache.open(place)), (
        "the codec's state, which may be larger, is not planned either"
    )
    assert " and lacks 1 mask draw, which the teacher adds: about" in (text := " ".join(cost_lines(plan)))
    assert "teacher pass" not in text and "pays off" not in text
    layers = spec.model_copy(update={"layers": (1, 2)})
    plan = plan_cost(source_utterances, layers, teacher, str(place))
    assert (plan.teacher_seconds, plan.fit_seconds) == (pytest.approx(new.teacher_seconds), new.fit_seconds)
    assert "lacks layer 2, which the teacher adds, with " in " ".join(cost_lines(plan))


def test_a_plan_for_an_hour_of_speech_knows_how_much_the_codec_is_fitted_to(cache_spec: Make) -> None:
    clean, masked = (cache_spec(codec="pca", masks=MaskDraws(draws=draws)) for draws in (0, 4))
    frames = sample_frames("pca", 1, clean.dim) * 1.1
    assert codec_pass_seconds(clean, 1, 3600, 0) == pytest.approx(frames / 50)
    assert codec_pass_seconds(masked, 1, 3600, 0.75) == pytest.approx(2 * frames / 50 / 1.25)
    assert codec_pass_seconds(clean, 1, 10, 0) == 10


def test_the_plan_shows_how_far_it_is(tmp_path: Path, cache_spec: Make, source_utterances: list[Utterance]) -> None:
    spec, shown = cache_spec(TEACHER, codec="int8"), []
    plan_cost(source_utterances, spec, load_teacher(TEACHER), str(tmp_path), lambda *position: shown.append(position))
    assert [(done, total) for done, total, _ in shown] == [(done, 5) for done in range(5)]
    assert [note for _, _, note in shown] == [TEACHER, "codec int8", "codec fp16", "codec layer-pca", "codec pca"]


def test_what_the_plan_says(tmp_path: Path, cache_spec: Make, source_utterances: list[Utterance]) -> None:
    teacher = load_teacher(TEACHER)
    spec = cache_spec(TEACHER, codec="pca", masks=MaskDraws(draws=5))
    plan = plan_cost(source_utterances, spec, teacher, str(tmp_path))
    text = " ".join(cost_lines(plan))
    assert "5 mask draws" in text and "still reads all of them" in text
    assert "6 teacher passes" in text and "pays off after 3 epochs" in text
    console = Console(width=80, record=True)
    console.print(cost_table(plan))
    table = console.export_text()
    assert "\u2026" not in table and max(map(len, table.splitlines())) <= 80, "the table fits a narrow terminal"
    for wanted in ("pca", "fp16", "int8", "layer-pca", "composite_only", "5 mask draws", "clean_only", "<-"):
        assert wanted in table
    spec = cache_spec(TEACHER, codec="pca", targets="masked_everywhere", masks=MaskDraws(draws=5))
    plan = plan_cost(source_utterances, spec, teacher, str(tmp_path))
    assert "6 teacher passes" in (text := " ".join(cost_lines(plan))) and "pays off after 6 epochs" in text
    console.print(cost_table(plan))
    table = console.export_text()
    assert "\u2026" not in table and max(map(len, table.splitlines())) <= 80
    assert "masked_everywhere" in table and "clean_and_masked" not in table and "<-" in table
    columns = plan_cost(
        source_utterances, cache_spec(TEACHER, codec="fp16", masks=MaskDraws(draws=0)), teacher, str(tmp_path)
    )
    assert columns.masked_fraction == 0
    assert columns.pays_after == 1
    assert "still reads all of them" not in " ".join(cost_lines(columns))


def test_audio_in_the_corpus_is_read_but_not_stored(
    tmp_path: Path, cache_spec: Make, source_utterances: list[Utterance]
) -> None:
    teacher = load_teacher(TEACHER)
    plans = {
        audio: plan_cost(source_utterances, cache_spec(codec="fp16", audio=audio), teacher, str(tmp_path / "new"))
        for audio in ("flac", "source")
    }
    held, beside = plans["flac"], plans["source"]
    files = sum(Path(utterance.path).stat().st_size for utterance in source_utterances)
    assert beside.audio_bytes == pytest.approx(files, rel=1e-3) and held.source_per_second is None
    assert held.total_bytes("fp16", "clean_only") - beside.total_bytes("fp16", "clean_only") == held.audio_bytes
    assert beside.bytes_per_epoch - held.bytes_per_epoch == pytest.approx(beside.audio_bytes - held.audio_bytes)
    lines = " ".join(cost_lines(beside))
    assert "of audio in the corpus, " in lines and "s of audio per CPU second, measured now; if that is too" in lines
    assert "in the corpus" not in " ".join(cost_lines(held))
    # A piece of a long file counts with its share of the file.
    first = source_utterances[0]
    piece = AudioAddress(first.path, start=0, end=4_000)
    waveform, identity = load_identified_audio(piece)
    utterance = Utterance("piece", piece.encode(), len(waveform), "train", identity)
    plan = plan_cost([utterance], cache_spec(codec="fp16", audio="source"), teacher, str(tmp_path / "new"))
    assert plan.audio_bytes == pytest.approx(Path(first.path).stat().st_size * 4_000 / first.num_samples)


def test_a_disk_that_is_too_small_is_refused(
    tmp_path: Path, speech_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        f"runs={tmp_path / 'runs'}",
        f"corpus.path={speech_folder}",
        f"cache.path={tmp_path / 'cache'}",
        f"teacher.checkpoint={TEACHER}",
    ]
    run = Run(load_config(DEMO, overrides), Console(quiet=True))
    index_audio(run)
    plan_cache(run)
    monkeypatch.setattr(Store, "free_bytes", lambda store: 10_000)
    with pytest.raises(
        ConfigError, match=r"cache.path: .*cache has 10.00 kB free, but the cache needs about .* choose another disk"
    ):
        plan_cache(run)
    assert not (tmp_path / "cache").exists()


def test_the_dumped_policies_of_draws_load_again(tmp_path: Path) -> None:
    schedule = "[{mask_prob: 0.4}, {mask_prob: 0.6}]"
    config = load_config(DEMO, [f"masks.policies={schedule}", "train.draw_order=in_order"])
    assert [policy.mask_prob for policy in config.masks.policies] == [0.4, 0.6]
    assert yaml.safe_load(schedule)[1]["mask_prob"] == config.masks.policy_of(1).mask_prob
