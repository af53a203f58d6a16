"""A cache that was built without Ray: reading it, and its targets compared with those of the teacher."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_deep
from ray_distill.teacher_cache.masks import MaskDraws, MaskPolicy, draw_mask
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.reading.shard_rows import ShardRows
from ray_distill.teacher_cache.storage.cache import Cache, file_record, write_commit
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec, LayerSet, content_key, parts_of
from ray_distill.teacher_cache.storage.shard_plan import Utterance
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.teachers import load_teacher

from ..tiny import TEACHER

Make = Callable[..., CacheSpec]


@pytest.fixture
def cache(tmp_path: Path, make_cache: Make) -> Path:
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def online(reader: CacheReader, utterances: list[Utterance]) -> OnlineReader:
    by_id = {u.id: u for u in utterances}
    return OnlineReader([by_id[i] for i in reader.ids], load_teacher(TEACHER), reader.cache.spec.masks)


def real(batch) -> torch.Tensor:
    return torch.arange(batch.targets.shape[2]) < batch.num_frames[:, None]


@pytest.mark.parametrize("audio", ["flac", "pcm"])
def test_cached_equals_online(tmp_path: Path, make_cache: Make, source_utterances: list[Utterance], audio: str) -> None:
    make_cache(tmp_path / "cache", audio=audio)
    cached = CacheReader(tmp_path / "cache", "train")
    reference = online(cached, source_utterances)
    assert np.array_equal(cached.num_samples, reference.num_samples)
    for draw in (None, 0, 1):
        ours, theirs = cached.read([3, 0, 5], draw).to("cpu"), reference.read([3, 0, 5], draw)
        assert ours.ids == theirs.ids
        assert torch.equal(ours.waveforms, theirs.waveforms)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert torch.equal(ours.num_frames, theirs.num_frames)
        assert (ours.frame_mask is None) == (draw is None)
        if draw is not None:
            assert torch.equal(ours.frame_mask, theirs.frame_mask)
        frames = real(ours)
        torch.testing.assert_close(
            ours.targets.transpose(1, 2)[frames], theirs.targets.transpose(1, 2)[frames], rtol=1e-4, atol=1e-5
        )
    assert cached.bytes_read > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_and_online_targets_have_the_same_precision(
    tmp_path: Path, make_cache: Make, source_utterances: list[Utterance], precision: str
) -> None:
    # Batches of one utterance on both sides, so that nothing rounds differently.
    make_cache(tmp_path / "cache", precision=precision, batch_seconds=0.1)
    cached = CacheReader(tmp_path / "cache", "train")
    by_id = {u.id: u for u in source_utterances}
    members, masks, teacher = [by_id[i] for i in cached.ids], cached.cache.spec.masks, load_teacher(TEACHER)
    computed = OnlineReader(members, teacher, masks, precision=precision)
    other = OnlineReader(members, teacher, masks, precision="bf16" if precision == "fp32" else "fp32")
    for draw in (None, 0, 1):
        expected = cached.read([4], draw).targets
        assert torch.equal(computed.read([4], draw).targets, expected)
        with torch.autocast("cpu", torch.bfloat16):  # The caller's autocast changes nothing.
            assert torch.equal(computed.read([4], draw).targets, expected)
        assert not torch.equal(other.read([4], draw).targets, expected)
    assert all(check.good for check in verify_deep(tmp_path / "cache", teacher))


def test_deep_verification_allows_for_the_rounding_of_half_precision(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache", precision="bf16")
    teacher = load_teacher(TEACHER)
    assert all(check.good for check in verify_deep(tmp_path / "cache", teacher))
    assert teacher.fingerprint == CacheReader(tmp_path / "cache", "train").cache.spec.teacher
    # The fingerprint is not computed again.
    teacher.model.encoder.transformer.layers[0].final_layer_norm.weight.mul_(1.1)
    checks = verify_deep(tmp_path / "cache", teacher)
    assert not any(check.good for check in checks if check.layer == 1)


def test_a_reader_is_a_dataset(tmp_path: Path, make_cache: Make, cache: Path) -> None:
    reader = CacheReader(cache, "train", layers=[2])
    assert len(reader) == len(reader.ids) == 9
    for index in (0, 8, -1, np.int64(3)):
        item, batch = reader[index], reader.read([int(index) % 9], 0)
        assert item.id == batch.ids[0]
        assert torch.equal(item.waveform, batch.waveforms[0]) and item.waveform.dtype == torch.float32
        assert torch.equal(item.targets, batch.targets[0]) and item.targets.shape == (1, len(item.frame_mask), 32)
        assert torch.equal(item.frame_mask, batch.frame_mask[0]) and item.frame_mask.dtype == torch.bool
    assert [item.id for item in reader] == reader.ids
    assert torch.equal(reader[-2].targets, reader[7].targets)
    for index in (9, -10):
        with pytest.raises(IndexError, match=f"index {index} is out of range for the 9 utterances of split 'train'"):
            reader[index]
    with pytest.raises(TypeError):
        reader[0:2]  # type: ignore[index]
    with pytest.raises(IndexError, match="a batch needs an index; the split 'train' has 9 utterances"):
        reader.read([], 0)
    validation = CacheReader(cache, "validation")
    assert validation.draws == 0 and validation[0].frame_mask is None
    with pytest.raises(CacheError, match="mask draw 0 is not in the cache at .*; it has no draws"):
        validation.read([0], 0)
    assert torch.equal(validation[0].targets, validation.read([0], None).targets[0])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.layers == (2,) and torch.equal(copy[5].targets, reader[5].targets)
    for kind in ("composite_only", "masked_everywhere", "clean_only"):
        make_cache(tmp_path / kind, targets=kind, codec="pca")
        other = CacheReader(tmp_path / kind, "train")
        assert torch.equal(other[1].targets, other.read([1], 0).targets[0])


def test_a_reader_works_in_the_workers_of_a_data_loader(cache: Path) -> None:
    reader = CacheReader(cache, "train")
    reader.read([0, 1, 2], 0)  # Starts threads, which a forked process does not have.
    loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=1, timeout=60)
    for item, expected in zip(loader, reader, strict=True):
        assert item.id == expected.id and torch.equal(item.targets, expected.targets)


def test_threads_count_every_byte_that_they_read(cache: Path) -> None:
    counts = set()
    for threads in (1, 8):
        reader = CacheReader(cache, "train", threads=threads)
        for _ in range(20):
            reader.read(range(len(reader)), 0)
        counts.add(reader.bytes_read)
    assert len(counts) == 1


def test_what_a_notebook_shows(cache: Path) -> None:
    reader = CacheReader(cache, "train")
    assert repr(reader) == (
        f"CacheReader({str(cache)!r}, split='train', utterances=9, hours=0.00, layers=(1, 2), dim=32, draws=2, "
        "targets='clean_and_masked')"
    )
    opened = reader.cache
    assert repr(opened) == (
        f"Cache({str(cache)!r}, teacher='random:2x32', layers=(1, 2), codec='fp32', targets='clean_and_masked', draws=2, "
        f"utterances=12, hours=0.00, fingerprint='{opened.fingerprint[:8]}...')"
    )
    batch, item = reader.read([0, 1], 0), reader[0]
    masked, frames = int(batch.frame_mask.sum()), batch.num_frames.tolist()
    shown = (
        f"Batch(2 utterances, waveforms={tuple(batch.waveforms.shape)}, targets=(2, 2, {max(frames)}, 32), "
        f"frame_mask={masked} of {sum(frames)} frames, device='cpu')"
    )
    assert repr(batch) == repr(batch.to("cpu")) == shown
    assert "frame_mask=None" in repr(reader.read([0, 1], None))
    assert repr(item) == (
        f"CachedUtterance({item.id!r}, waveform=({len(item.waveform)},), targets=(2, {frames[0]}, 32), "
        f"frame_mask={int(item.frame_mask.sum())} of {frames[0]} frames)"
    )


def test_online_targets_may_be_clean_only(tmp_path: Path, cache: Path, source_utterances: list[Utterance]) -> None:
    cached = CacheReader(cache, "train", targets="clean_only")
    by_id = {u.id: u for u in source_utterances}
    members, masks = [by_id[i] for i in cached.ids], cached.cache.spec.masks
    teacher = load_teacher(TEACHER)
    teacher._mask_embedding = None  # A masked pass would be an error.
    ours, theirs = cached.read([3, 0], 1), OnlineReader(members, teacher, masks, targets="clean_only").read([3, 0], 1)
    assert torch.equal(ours.frame_mask, theirs.frame_mask) and ours.frame_mask.any()
    frames = real(ours)
    torch.testing.assert_close(
        ours.targets.transpose(1, 2)[frames], theirs.targets.transpose(1, 2)[frames], rtol=1e-4, atol=1e-5
    )
    assert OnlineReader(members, teacher, masks).draws is None
    assert OnlineReader(members, teacher, MaskDraws(draws=0)).draws == 0


def test_targets_are_the_composite(cache: Path, cache_spec: Make) -> None:
    reader = CacheReader(cache, "train")
    clean, composite = reader.read([1], None), reader.read([1], 0)
    mask = composite.frame_mask[0]
    assert mask.any()
    assert not mask.all()
    assert torch.equal(composite.targets[0, :, mask], clean.targets[0, :, mask])
    assert not torch.allclose(composite.targets[0, :, ~mask], clean.targets[0, :, ~mask])
    masks = cache_spec().masks
    assert mask.tolist() == draw_mask(masks.policy, masks.seed, 0, composite.ids[0], len(mask)).tolist()


@pytest.mark.parametrize("codec", ["fp32", "int8", "layer-pca:0.1", "pca:0.1", "units:20"])
def test_layers_can_be_chosen(tmp_path: Path, make_cache: Make, codec: str) -> None:
    make_cache(tmp_path / "cache", codec=codec)
    both = CacheReader(tmp_path / "cache", "train").read([0], 1)
    second = CacheReader(tmp_path / "cache", "train", [2]).read([0], 1)
    backwards = CacheReader(tmp_path / "cache", "train", [2, 1]).read([0], 1)
    assert both.targets.shape[1] == 2
    assert torch.equal(second.targets[:, 0], both.targets[:, 1])
    assert torch.equal(backwards.targets, both.targets.flip(1))
    with pytest.raises(CacheError, match=r"no layer 5; it has layers \[1, 2\]"):
        CacheReader(tmp_path / "cache", "train", [5])
    with pytest.raises(CacheError, match=r"no layer is named; it has layers \[1, 2\]"):
        CacheReader(tmp_path / "cache", "train", [])


def test_the_joint_codec_has_one_column(tmp_path: Path, make_cache: Make) -> None:
    make_cache(tmp_path / "cache", codec="pca")
    schema = pq.read_schema(tmp_path / "cache" / "clean" / "part-00000.parquet")
    assert schema.names == ["id", "num_samples", "num_frames", "audio", "layers_01_02"]


def test_masked_shards_hold_unmasked_frames_only_and_one_row_a_group(cache: Path) -> None:
    train = next(shard.number for shard in Cache.open(cache).shards if shard.split == "train")
    path = cache / "masked" / "draw=0" / f"part-{train:05d}.parquet"
    row = pq.read_table(path).to_pylist()[0]
    assert len(row["layer_01"]) == 4 * 32 * (len(row["mask"]) - sum(row["mask"]))
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == file.metadata.num_rows
    validation = next(shard.number for shard in Cache.open(cache).shards if shard.split == "validation")
    assert not (cache / "masked" / "draw=0" / f"part-{validation:05d}.parquet").exists()


def test_fp16_is_close(tmp_path: Path, make_cache: Make, cache: Path) -> None:
    make_cache(tmp_path / "half", codec="fp16")
    half, full = CacheReader(tmp_path / "half", "train").read([2], 0), CacheReader(cache, "train").read([2], 0)
    torch.testing.assert_close(half.targets, full.targets, rtol=2**-11, atol=1e-6)


def test_the_masked_pass_everywhere_serves_the_other_targets_too(
    tmp_path: Path, make_cache: Make, cache: Path, source_utterances: list[Utterance]
) -> None:
    place = tmp_path / "everywhere"
    make_cache(place, targets="masked_everywhere")
    reader = CacheReader(place, "train")
    members = [{u.id: u for u in source_utterances}[reader.ids[index]] for index in (0, 4)]
    teacher = load_teacher(TEACHER)
    for draw in (0, 1):
        ours = reader.read([0, 4], draw)
        assert ours.frame_mask is not None
        masked = teacher(ours.waveforms, ours.lengths, ours.frame_mask)
        clean = teacher(ours.waveforms, ours.lengths)
        masks, kinds = reader.cache.spec.masks, ("masked_everywhere", "clean_and_masked", "clean_only")
        for kind, expected in zip(
            kinds, (masked, torch.where(ours.frame_mask[:, None, :, None], clean, masked), clean), strict=True
        ):
            read = CacheReader(place, "train", targets=kind).read([0, 4], draw)
            online = OnlineReader(members, teacher, masks, targets=kind).read([0, 1], draw)
            for row, frames in enumerate(ours.num_frames):
                torch.testing.assert_close(
                    read.targets[row, :, :frames], expected[row, :, :frames], rtol=1e-4, atol=1e-5
                )
                torch.testing.assert_close(online.targets[row, :, :frames], expected[row, :, :frames])
            assert torch.equal(read.frame_mask, ours.frame_mask) and torch.equal(read.waveforms, ours.waveforms)
        composite = CacheReader(cache, "train").read([0, 4], draw)
        assert torch.equal(
            CacheReader(place, "train", targets="clean_and_masked").read([0, 4], draw).targets, composite.targets
        )
        assert torch.equal(ours.frame_mask, composite.frame_mask) and not torch.equal(ours.targets, composite.targets)
    assert torch.equal(reader.read([0, 4], None).targets, CacheReader(cache, "train").read([0, 4], None).targets)
    only_masked = CacheReader(place, "train")
    only_masked.read([0, 4], 0)
    both = CacheReader(place, "train", targets="clean_and_masked")
    both.read([0, 4], 0)
    assert only_masked.bytes_read < both.bytes_read, "the features of the clean pass are not read"
    with pytest.raises(CacheError, match="has targets clean_and_masked, not masked_everywhere"):
        CacheReader(cache, "train", targets="masked_everywhere")


def test_composite_only_gives_the_same_targets(tmp_path: Path, make_cache: Make, cache: Path) -> None:
    make_cache(tmp_path / "composite", targets="composite_only")
    ours, theirs = CacheReader(tmp_path / "composite", "train"), CacheReader(cache, "train")
    for draw in (0, 1):
        a, b = ours.read([0, 4], draw), theirs.read([0, 4], draw)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.frame_mask, b.frame_mask)
        assert torch.equal(a.waveforms, b.waveforms)
    ours, theirs = CacheReader(tmp_path / "composite", "validation"), CacheReader(cache, "validation")
    assert torch.equal(ours.read([0], None).targets, theirs.read([0], None).targets)
    with pytest.raises(CacheError, match="has no clean targets for the training split"):
        CacheReader(tmp_path / "composite", "train").read([0], None)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).rglob("*.parquet")) for name in ("composite", "cache")
    ]
    assert sizes[0] < sizes[1]


def test_clean_only_masks_the_student_but_not_the_targets(tmp_path: Path, make_cache: Make, cache: Path) -> None:
    make_cache(tmp_path / "clean", targets="clean_only")
    assert not (tmp_path / "clean" / "masked").exists()
    ours, theirs = CacheReader(tmp_path / "clean", "train"), CacheReader(cache, "train")
    assert ours.draws == 2
    assert torch.equal(ours.read([3], 1).frame_mask, theirs.read([3], 1).frame_mask)
    assert torch.equal(ours.read([3], 1).targets, theirs.read([3], None).targets)
    served = CacheReader(cache, "train", targets="clean_only")
    assert torch.equal(served.read([3], 1).frame_mask, ours.read([3], 1).frame_mask)
    assert torch.equal(served.read([3], 1).targets, ours.read([3], 1).targets)
    assert Cache.open(cache).covers(Cache.open(tmp_path / "clean").spec)
    with pytest.raises(CacheError, match="has targets clean_only, not clean_and_masked"):
        CacheReader(tmp_path / "clean", "train", targets="clean_and_masked")


def test_draws_may_have_policies_of_their_own(tmp_path: Path, make_cache: Make) -> None:
    policies = [MaskPolicy(mask_prob=p, mask_length=2) for p in (0.2, 0.9)]
    make_cache(tmp_path / "cache", masks=MaskDraws(policies=policies, draws=3))
    reader = CacheReader(tmp_path / "cache", "train")
    indices = list(range(len(reader.ids)))
    shares = [
        float(reader.read(indices, d).frame_mask.sum() / reader.read(indices, d).num_frames.sum()) for d in (0, 1, 2)
    ]
    assert shares[0] < 0.35 < shares[1]
    with pytest.raises(ValueError, match="3 policies for 2 draws"):
        MaskDraws(policies=[*policies, MaskPolicy()], draws=2)


def test_errors_name_what_does_not_exist(cache: Path) -> None:
    with pytest.raises(CacheError, match="no split 'test'; it has"):
        CacheReader(cache, "test")
    with pytest.raises(CacheError, match="mask draw 2 is not in the cache at .*; it has draws 0 to 1"):
        CacheReader(cache, "train").read([0], 2)
    with pytest.raises(CacheError, match="mask draw 1 is not in the cache at .*; it has draws 0 to 0"):
        CacheReader(cache, "train", draws=1).read([0], 1)
    with pytest.raises(CacheError, match="has 2 mask draws, not 3"):
        CacheReader(cache, "train", draws=3)
    with pytest.raises(CacheError, match="no teacher cache"):
        CacheReader(cache / "elsewhere", "train")


def test_a_codec_state_that_does_not_fit_is_an_error(tmp_path: Path, make_cache: Make) -> None:
    from ray_distill.teacher_cache.codecs import open_codec

    make_cache(tmp_path / "cache", codec="pca")
    import safetensors.torch

    state = safetensors.torch.load_file(tmp_path / "cache" / "codec" / "set=0.safetensors")
    with pytest.raises(ValueError, match="made for 2 layers of width 32, not for 2 of width 48"):
        open_codec("pca", (1, 2), 48, state)
    with pytest.raises(ValueError, match="made for another codec"):
        open_codec("int8", (1,), 32, state)


def test_without_draws_composite_only_keeps_the_clean_targets(tmp_path: Path, make_cache: Make) -> None:
    root, none = tmp_path / "cache", MaskDraws(draws=0)
    make_cache(root, targets="composite_only", masks=none, layers=(2,))
    make_cache(root, targets="composite_only", masks=none)
    make_cache(tmp_path / "clean", targets="clean_only", masks=none)
    for split in ("train", "validation"):
        ours, theirs = (CacheReader(place, split).read([0, 1], None) for place in (root, tmp_path / "clean"))
        torch.testing.assert_close(ours.targets, theirs.targets)
    checks = verify_deep(root, load_teacher(TEACHER))
    assert [(check.draw, check.layer, check.good) for check in checks] == [(None, 1, True), (None, 2, True)]


def test_a_composite_cache_without_draws_that_lacks_its_features_is_repaired(tmp_path: Path, make_cache: Make) -> None:
    root = tmp_path / "cache"
    make_cache(root, targets="composite_only", masks=MaskDraws(draws=0))
    cache = Cache.open(root)
    sound = {file.name: (root / file.name).read_bytes() for shard in cache.shards for file in cache.files(shard)}
    for shard in cache.shards:
        if shard.split == "train":  # Versions before the key "features" wrote such files.
            (file,) = cache.files(shard)
            bare = replace(file.part, features=False)
            key = content_key(cache.spec, cache.layer_sets[0], bare, shard.number, shard.split)
            table = pq.read_table(root / file.name).drop_columns(["layer_01", "layer_02"])
            pq.write_table(table, root / file.name, row_group_size=1)
            write_commit(cache.store, file, file_record(root / file.name, table.num_rows, key))
    with pytest.raises(
        CacheError, match=f"belongs to another file or cache; `ray-distill cache repair {root}` restores it"
    ):
        CacheReader(root, "train")
    repair_cache(root)
    assert {name: (root / name).read_bytes() for name in sound} == sound


def test_files_of_composite_caches_with_draws_keep_their_key() -> None:
    """The expected keys were recorded with a version before the key "features"."""
    spec = CacheSpec(
        teacher="t",
        num_layers=2,
        dim=8,
        layers=(1, 2),
        masks=MaskDraws(),
        targets="composite_only",
        codec="fp16",
        corpus="c",
        shard_seconds=10,
        batch_seconds=5,
    )
    keys = {
        (part.folder, split): content_key(spec, LayerSet(layers=(1, 2)), part, 0, split)[:8]
        for split in ("train", "validation")
        for part in parts_of(spec, 1, split)
    }
    assert keys == {
        ("clean", "train"): "94ac9f42",
        ("composite/draw=0", "train"): "9efd8b28",
        ("clean", "validation"): "27bad5c4",
    }


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError(), r"can't be read \(TimeoutError\); run the same"),
        (
            OSError("AWS Error NETWORK_CONNECTION during HeadObject operation"),
            r"can't be read \(AWS Error NETWORK_CONN",
        ),
        (FileNotFoundError("no such key"), r"is damaged \(no such key\); `ray-distill cache repair memory://"),
        (OSError("Unexpected end of stream"), r"is damaged \(Unexpected end of stream\)"),
    ],
)
def test_a_store_that_fails_is_not_called_damage(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    local, remote = Store(cache), Store(f"memory://{cache.parent.name}")
    for name in local.names():
        remote.write(name, local.read(name))
    reader = CacheReader(remote.location, "train")
    reader.read([0], None)
    monkeypatch.setattr(ShardRows, "_values", Mock(side_effect=error))
    with pytest.raises(CacheError, match=rf"part-\d+\.parquet {message}") as raised:
        reader.read([0], None)
    assert raised.value.__cause__ is error, "training starts again after an error of the store"
