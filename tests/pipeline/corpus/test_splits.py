"""Splits: which folders are recognised, what is refused, and what the user is told."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ray_distill.pipeline.corpus.index import CorpusIndex, index_corpus
from ray_distill.pipeline.corpus.search import FoundCorpus, find_audio
from ray_distill.pipeline.corpus.splits import kinds
from ray_distill.pipeline.stages.index import split_table


def make(root: Path, *names: str) -> Path:
    """Create empty files; the search doesn't open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def roles(found: FoundCorpus) -> dict[str, str | None]:
    """Return the roles of the used files by id, and ``unused`` for those that are not used."""
    unused = {skip.path.stem: "unused" for skip in found.skipped if skip.reason == "unused_split"}
    return {entry.id: entry.role for entry in found.entries} | unused


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, {"train"}) for name in ("train", "TRAIN", "train-clean-100", "training", "trainset", "my_Train2", "trn")],
        *[(name, {"validation"}) for name in ("dev", "Dev-Clean", "devel", "val", "VALID", "validation", "heldout", "held_out-2")],
        *[(name, {"test"}) for name in ("test", "TEST", "tests", "test-other", "speechTest", "eval", "evaluation", "eval2000")],
        *[(name, set()) for name in ("devices", "validated", "value", "contest", "New Testament", "latest", "strain", "medieval")],
        ("train_dev", {"train", "validation"}),
    ],
)  # fmt: skip
def test_names_of_splits(name: str, kind: set[str]) -> None:
    assert kinds(name) == kind


LAYOUTS = {
    "parent of LibriSpeech": ("LibriSpeech/{}-clean/1/2/1-2-{}.flac", ("train", "dev", "test"), "1-2-{}"),
    "LibriSpeech as wav": ("{}-clean/1/2/1-2-{}.wav", ("train", "dev", "test"), "1-2-{}"),
    "LibriSpeech in capitals": ("{}-clean/1/2/1-2-{}.FLAC", ("train", "dev", "test"), "1-2-{}"),
    "MLS": ("mls_german/{}/audio/1/2/1_2_{}.flac", ("train", "dev", "test"), None),
    "TIMIT": ("timit/{}/DR1/FCJF0/SA{}.WAV", ("TRAIN", "DEV", "TEST"), None),
    "plain": ("{}/{}.wav", ("train", "valid", "test"), None),
    "deep": ("a/b/{}set/c/{}.ogg", ("train", "dev", "test"), None),
    "links of the user": ("speech-{}/{}.mp3", ("train", "validation", "eval"), None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [False, True])
def test_layouts(tmp_path: Path, layout: str, named: bool) -> None:
    pattern, names, id = LAYOUTS[layout]
    files = [pattern.format(name, n) for n, name in enumerate(names)]
    ids = [id.format(n) if id else Path(file).with_suffix("").as_posix() for n, file in enumerate(files)]
    train = None
    if named and layout in ("MLS", "TIMIT", "plain"):
        train = ["train"]
    found = find_audio(make(tmp_path, *files), train, None)
    assert roles(found) == {ids[0]: "train", ids[1]: "validation", Path(files[2]).stem: "unused"}
    assert sorted(split.role for split in found.splits) == ["not used", "train", "validation"]
    assert all(split.origin.startswith("folder ") and split.files == 1 for split in found.splits)


def test_other_folders_can_be_named(tmp_path: Path) -> None:
    root = make(tmp_path, "alice/a.wav", "bob/b.wav", "c.wav")
    assert roles(find_audio(root, None, None)) == {"alice/a": None, "bob/b": None, "c": None}
    assert roles(find_audio(root, ["alice"], ["bob"])) == {"alice/a": "train", "bob/b": "validation", "c": "unused"}
    assert roles(find_audio(root, [".", "alice"], ["bob"])) == {"alice/a": "train", "bob/b": "validation", "c": "train"}


@pytest.mark.parametrize(
    ("files", "message", "keys"),
    [
        (("test/a.wav", "b.wav"), r"1 files of .* are in no split's folder .*b\.wav.*set corpus\.train_splits", [["."]]),
        (("train/a.wav", "train/dev/b.wav"), "'train/dev' in corpus.train_splits or", [None, ["train/dev"]]),
        (("TEST/train/a.wav", "dev/b.wav"), "names several splits", [["train"]]),
        (("train_dev/1/2/1-2-3.flac", "train/1/2/1-2-4.flac"), "names several splits", [None, ["train_dev"]]),
        (("audio/a.mp3", "train.tsv", "dev.tsv", "test.tsv"), r"lists of splits, such as .*dev\.tsv", [["."]]),
        (("yes/a.wav", "testing_list.txt"), "lists of splits", [["."]]),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_refused_until_it_is_named(
    tmp_path: Path, files: Sequence[str], message: str, keys: list[list[str] | None]
) -> None:
    with pytest.raises(ValueError, match=message):
        find_audio(make(tmp_path, *files), None, None)
    assert find_audio(tmp_path, *keys, *[None] * (2 - len(keys))).entries


def test_a_named_folder_does_not_hide_a_test_folder_inside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the folder 'alice/test'"):
        find_audio(make(tmp_path, "alice/test/a.wav", "alice/b.wav"), ["alice"], None)


def test_file_names_like_test_data_are_said(tmp_path: Path) -> None:
    found = find_audio(make(tmp_path, "a.wav", "dev_001.wav", "dev_001.txt"), None, None)
    assert len(found.entries) == 2
    assert len(found.notes) == 1 and "dev_001.wav" in found.notes[0]
    (tmp_path / "m.csv").write_text("path\ntest/a.wav\nb.wav\n")
    assert "test/a.wav" in find_audio(tmp_path / "m.csv", None, None).notes[0]


def write(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (np.arange(800) * (number + 1) % 200).astype(np.int16), 16_000)


def splits(index: CorpusIndex) -> dict[str, str]:
    return {utterance.id: utterance.split for utterance in index.utterances}


def test_the_ids_and_splits_of_version_1_are_kept(tmp_path: Path) -> None:
    """The values are those of version 1, so caches of these layouts remain valid."""
    for n in range(12):
        write(tmp_path / "plain" / f"speaker-{n % 3}" / f"clip {n}.{('wav', 'flac')[n % 2]}", n)
    write(tmp_path / "plain" / "speaker-0" / "clip 0.flac", 50)
    plain = index_corpus(tmp_path / "plain", validation_fraction=0.2, output=tmp_path / "i")
    assert plain.fingerprint == "9064667f4bab2ef32bc6acfa2da7d87da4817da2f7841a08a02ae6c327b38055"
    held_out = {"speaker-0/clip 9", "speaker-1/clip 4", "speaker-2/clip 5"}
    assert {id for id, split in splits(plain).items() if split == "validation"} == held_out
    assert {"speaker-0/clip 0.flac", "speaker-0/clip 0.wav", "speaker-0/clip 3"} < set(splits(plain))
    # A file that version 1 ignored doesn't change the id of another.
    write(tmp_path / "plain" / "speaker-0" / "clip 3.aiff", 3)
    assert splits(index_corpus(tmp_path / "plain", output=tmp_path / "i")).keys() == {
        *splits(plain),
        "speaker-0/clip 3.aiff",
    }

    for n, split in enumerate(("train-clean-5", "dev-clean", "test-clean", "train-other", "extra")):
        for k in range(2):
            write(tmp_path / "libri" / split / str(n) / "7" / f"{n}-7-000{k}.flac", 10 * n + k)
    write(tmp_path / "libri" / "train-clean-5" / "notes.wav", 90)
    write(tmp_path / "libri" / "stray.wav", 91)
    libri = index_corpus(tmp_path / "libri", output=tmp_path / "j")
    assert libri.fingerprint == "a109754938722722689f07fd6915213712afcd2c9a050f5a41bd88e08dccac52"
    assert libri.num_unused == 4
    # Nor does the place of the folder change an id.
    (tmp_path / "parent").mkdir()
    (tmp_path / "libri").rename(tmp_path / "parent" / "LibriSpeech")
    for stray in (
        "stray.wav",
        "train-clean-5/notes.wav",
        "extra/4/7/4-7-0000.flac",
        "extra/4/7/4-7-0001.flac",
    ):
        (tmp_path / "parent" / "LibriSpeech" / stray).unlink()
    del (expected := splits(libri))["notes"]
    assert splits(index_corpus(tmp_path / "parent", output=tmp_path / "k")) == expected


def test_the_table_of_splits(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / "c" / "train" / f"{n}.wav", n)
    write(tmp_path / "c" / "TEST" / "t.wav", 4)
    for _ in range(2):  # Decoded, and reused.
        index = index_corpus(tmp_path / "c", output=tmp_path / "i")
        assert [line.split() for line in split_table(index.splits)] == [
            ["split", "files", "audio", "role", "from"],
            ["TEST", "1", "-", "not", "used", "folder", "TEST"],
            ["train", "3", "0.15", "s", "train", "and", "validation", "folder", "train"],
        ]
    assert index.reused
