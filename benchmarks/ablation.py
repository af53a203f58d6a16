"""An ablation as a researcher runs it, at a size for two cores: which layers can reuse the attention map of the layer below?

Writes a configuration, runs ``pipeline/run.py ablate`` on it, and keeps what its report says: the table and the runs. The same command
goes on where it was.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import typer
import yaml
from probe import phones
from result_file import REPOSITORY, RESULTS, write_result
from small_speech import HELD_OUT, TRAIN, shared_data, small_student, utterances


def main(
    folder: Annotated[Path, typer.Argument(help="For corpus, cache and runs.")],
    seconds: Annotated[float, typer.Option(help="Training audio.")] = 900,
    steps: Annotated[int, typer.Option(help="Of each run.")] = 240,
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    quick: Annotated[bool, typer.Option("--quick", help="A moment: only tries the script.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file; the tables lie beside it.")] = RESULTS / "ablation.json",
) -> None:
    """Runs the ablation and keeps its tables."""
    if quick:
        seconds, steps, seeds = 60, 4, "0,1"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reuse-pattern-small.yaml"
    path.write_text(yaml.safe_dump(configuration(folder.absolute(), seconds, steps, seeds), sort_keys=False))
    run = REPOSITORY / "pipeline" / "run.py"
    subprocess.run([sys.executable, str(run), "ablate", "--config", str(path)], check=True)
    runs = folder / "runs" / "reuse-pattern-small"
    tables: dict[str, list[dict[str, str]]] = {}
    for name in ("table", "runs"):
        kept = output.with_name(f"{output.stem}_{name}.csv")
        shutil.copy(runs / f"{name}.csv", kept)
        with kept.open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    baselines = [json.loads(path.read_text())["outcomes"] for path in sorted(runs.glob("probes/*/probe.json"))]
    write_result(
        output,
        train_seconds=seconds,
        steps=steps,
        table=[{key: number(value) for key, value in row.items()} for row in tables["table"]],
        baselines=[{k: o[k] for k in ("source", "metric", "value", "low", "high")} for b in baselines for o in b],
        **{
            key: value
            for key, value in json.loads((runs / "summary.json").read_text()).items()
            if key in ("said", "saved")
        },
    )


def number(text: str) -> Any:
    """A cell as a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def configuration(folder: Path, seconds: float, steps: int, seeds: str) -> dict[str, Any]:
    """The ablation, and beside it the manifests of corpus and probe."""
    members = utterances(TRAIN, seconds), utterances(HELD_OUT, seconds)
    texts = phones()
    with (
        (folder / "corpus.csv").open("w", newline="") as corpus,
        (folder / "phones.csv").open("w", newline="") as probe,
    ):
        audio, labels = csv.writer(corpus), csv.writer(probe)
        audio.writerow(["id", "path", "split"])
        labels.writerow(["path", "transcript", "split"])
        for group, split, part in zip(members, ("train", "validation"), ("train", "test"), strict=True):
            for utterance in group:
                audio.writerow([utterance.id, utterance.path, split])
                if texts.get(utterance.id):
                    labels.writerow([utterance.path, texts[utterance.id], part])
    student = small_student(6, 192, width=64).model_dump(mode="json")
    kept = (
        *("conv_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"),
        *("conv_pos", "conv_pos_groups"),
    )
    return {
        "name": "reuse-pattern-small",
        "question": "Which layers can reuse the attention map of the layer below?",
        "base": {
            "name": "base",
            "runs": str(folder / "runs"),
            "corpus": {"path": str(folder / "corpus.csv")},
            "teacher": {"checkpoint": str(shared_data() / "teacher" / "hubert_small.pt")},
            "masks": {"policy": {"mask_prob": 0.5, "mask_length": 10}, "draws": 2},
            "cache": {"path": str(folder / "cache"), "shard_minutes": 2, "batch_seconds": 60},
            "student": {key: student[key] for key in kept},
            "train": {
                "epochs": 1000,
                "max_steps": steps,
                "batch_seconds": 15,
                "learning_rate": 5e-3,
                "validate_every": max(1, steps // 6),
            },
        },
        "variants": {
            "alternate": {"student.attention_reuse": "alternate"},
            "none": {"student.attention_reuse": "none"},
            "upper-half": {"student.attention_reuse": [False, False, False, True, True, True]},
        },
        "seeds": [int(seed) for seed in seeds.split(",")],
        "cpus_per_worker": 1,
        "concurrent": 1,
        "probe": {"manifest": "phones.csv", "units": "words", "epochs": 10},
    }


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
