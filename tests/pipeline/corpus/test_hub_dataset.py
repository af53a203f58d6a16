"""Corpora on the Hugging Face Hub: their names, their download at one commit, and what can go wrong."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from rich.console import Console

from ray_distill.pipeline.composition.config_tree import compose
from ray_distill.pipeline.config import check_config, dump_config
from ray_distill.pipeline.corpus.hub_dataset import HubDataset, download_dataset, parse_hub_dataset, resolve_dataset
from ray_distill.pipeline.corpus.labels import read_labels
from ray_distill.pipeline.planning.dry_run import plan_run
from ray_distill.pipeline.stages import Run, run_stages
from tests.hub_server import HubServer, running_hub, use_hub
from tests.tiny import tiny_tree


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with running_hub() as running:
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    server.repositories.clear()
    server.requests.clear()
    server.status = None
    use_hub(server, tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return server


def dataset(folder: Path, shift: int = 0) -> Path:
    """Write a dataset of the hub: Parquet files with embedded audio in the folder of a configuration."""
    (folder / "clean").mkdir(parents=True)
    (folder / "README.md").write_text("a card")
    (folder / "load.py").write_text("raise SystemExit('code of a dataset was run')")
    for split, count in (("train", 3), ("dev", 1)):
        rows = []
        for n in range(count):
            file = folder / f"{split}{n}.wav"
            samples = np.random.default_rng([n, count, shift]).normal(size=8000 + 800 * n)
            soundfile.write(file, 0.1 * samples, 16_000)
            rows.append({"audio": {"bytes": file.read_bytes(), "path": file.name}, "text": f"{split} {n}"})
            file.unlink()
        pq.write_table(pa.Table.from_pylist(rows), folder / "clean" / f"{split}-00000-of-00001.parquet")
    return folder


def test_names(hub: HubServer, tmp_path: Path) -> None:
    expected = HubDataset("owner/name", None)
    for text in ("owner/name", "hf://datasets/owner/name", str(Path("hf://datasets/owner/name"))):
        assert parse_hub_dataset(text) == parse_hub_dataset(Path(text)) == expected
    assert str(expected) == "hf://datasets/owner/name"
    full = "hf://datasets/owner/name@refs/convert/parquet/clean/train.100"
    assert parse_hub_dataset(full) == HubDataset("owner/name", "refs/convert/parquet", "clean/train.100")
    assert str(parse_hub_dataset(full)) == full
    assert parse_hub_dataset("owner/name@v1") == HubDataset("owner/name", "v1")
    for path in (
        "/data/owner/name",
        "speech",
        "owner/name/clean",
        "owner/list.csv",
        "../name",
        "~/speech",
        "./owner/name",
    ):
        assert parse_hub_dataset(path) is None, path
    for wrong in ("hf://owner/name", "hf://datasets/name", "hf://datasets/owner/../x", "hf://datasets/"):
        with pytest.raises(
            ValueError, match=r"is not the name of a dataset on the hub; write hf://datasets/OWNER/NAME"
        ):
            parse_hub_dataset(wrong)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_hub_dataset("owner/name") is None, "an existing folder wins"
    assert hub.requests == []


def test_a_run_downloads_it_once_and_keeps_its_commit(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add("owner/speech", dataset(tmp_path / "one"))
    config = check_config(tiny_tree(corpus={"path": "hf://datasets/owner/speech"}, runs=str(tmp_path / "runs")))
    assert "path: hf://datasets/owner/speech\n" in dump_config(config)
    planned = plan_run(config, ["index"])
    assert planned.facts["corpus"] == f"hf://datasets/owner/speech@{first}, which the index stage downloads"
    assert not any(name.endswith(".parquet") for name in hub.downloaded())

    said = Console(record=True, width=300)
    run = Run(config, said)
    run_stages(run, ["index"])
    assert {u.id: u.split for u in run.corpus.utterances} == {
        **{f"train{n}": "train" for n in range(3)},
        "dev0": "validation",
    }
    assert read_labels(run.folder.corpus)["train1"].text == "train 1"
    assert f"hf://datasets/owner/speech@{first}: files that are missing" in said.export_text()

    hub.add("owner/speech", dataset(tmp_path / "two", shift=1))
    hub.requests.clear()
    again = Run(config, Console(quiet=True))
    run_stages(again, ["index"])
    assert again.corpus.reused and not any("/main" in line for line in hub.requests), "the branch moved, the run didn't"
    other = Run(config.model_copy(update={"name": "other"}), Console(quiet=True))
    run_stages(other, ["index"])
    assert other.corpus.fingerprint != run.corpus.fingerprint


def test_a_folder_of_it(hub: HubServer, tmp_path: Path) -> None:
    hub.add("owner/speech", dataset(tmp_path / "one"))
    resolved = resolve_dataset(HubDataset("owner/speech", None, "clean"))
    hub.requests.clear()
    assert [file.name for file in sorted(download_dataset(resolved).iterdir())] == [
        "dev-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    assert "load.py" not in hub.downloaded()
    with pytest.raises(ValueError, match="the dataset owner/speech has no folder 'other' in this revision"):
        download_dataset(HubDataset("owner/speech", resolved.revision, "other"))


def test_recipes_give_up_their_splits(hub: HubServer) -> None:
    recipe = Path(__file__).resolve().parents[3] / "configs" / "armhubert-s-100.yaml"
    composed = compose(recipe, ["corpus=owner/speech", "teacher=random:2x32"])
    assert "train_splits" not in composed.tree["corpus"]
    assert any("the cache is caches/random-2x32-speech" in note for note in composed.notes)
    assert any(
        note.startswith("owner/speech is on the hub, and takes none of the recipe's splits") for note in composed.notes
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "access", "status", "message"),
    [
        (
            "owner/absent",
            "public",
            None,
            "there is neither a file or folder owner/absent here nor a dataset of that name at http",
        ),
        ("owner/private", "private", None, "nor a dataset of that name"),
        ("owner/speech@no", "public", None, "owner/speech has no revision 'no'; give a branch"),
        ("owner/speech", "public", 500, "owner/speech can't be read from http.* which answers 500"),
    ],
)
def test_what_can_go_wrong_is_one_sentence(
    hub: HubServer, tmp_path: Path, name: str, access: str, status: int | None, message: str
) -> None:
    for repository in ("owner/speech", "owner/private"):
        hub.add(repository, dataset(tmp_path / repository.replace("/", "-")), access)
    hub.status = status
    run = Run(check_config(tiny_tree(corpus={"path": name}, runs=str(tmp_path / "runs"))), Console(quiet=True))
    with pytest.raises(ValueError, match=message) as caught:
        run_stages(run, ["index"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
