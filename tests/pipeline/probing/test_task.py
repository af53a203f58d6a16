"""Manifests of labelled utterances."""

from pathlib import Path

import pytest

from ray_distill.pipeline.probing.task import read_task


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


def test_labels_of_frames(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,frame_labels,split\n1.flac,SIL AH - AH,train\n2.flac,AH OH,test\n")
    task = read_task(tmp_path / "m.csv")
    assert (task.kind, task.metric, task.vocabulary) == ("frame", "frame error rate", ["AH", "SIL"])
    assert [example.target for example in task.examples] == [("SIL", "AH", "-", "AH"), ("AH", "OH")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n", "no rows"),
        ("path,speaker\n1.flac,x\n", "'label', 'transcript' or 'frame_labels'"),
        ("path,label\n1.flac,\n", "line 2"),
        ("path,label,split\n1.flac,x,dev\n", "train or test"),
        ("path,label,split\n1.flac,x,train\n", "in both splits, train and test"),
        ("path,label,split\n1.flac,x,train\n2.flac,y,test\n", "'y'"),
        ("path,label,split\n1.flac,x,train\n2.flac,x,test\n", "only the class 'x'"),
    ],
)
def test_manifests_that_cant_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / "m.csv")
