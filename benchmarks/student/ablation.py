"""Run an ablation as a researcher would, at a size for two cores: which layers can reuse the attention map of the layer below?

The script writes a configuration, runs ``ablate`` on it, and stores the report's table and runs. The same command resumes an
interrupted ablation.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.result_file import REPOSITORY, RESULTS, write_result
from benchmarks.small_speech import HELD_OUT, TRAIN, shared_data, utterances
from benchmarks.student.probe_tasks import write_manifest


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for corpus, cache and runs.")],
    seconds: Annotated[float, typer.Option(help="Seconds of training audio.")] = 900,
    steps: Annotated[int, typer.Option(help="Training steps of each run.")] = 120,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    quick: Annotated[bool, typer.Option("--quick", help="Run for a moment, only to try the script.")] = False,
    output: Annotated[Path, typer.Option(help="Result file (JSON); the tables are stored beside it.")] = RESULTS
    / "student/ablation.json",
) -> None:
    """Run the ablation and store its tables."""
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
    """Return a cell as a number if it is one, else as text."""
    try:
        return float(text)
    except ValueError:
        return text


def configuration(folder: Path, seconds: float, steps: int, seeds: str) -> dict[str, Any]:
    """Return the ablation's configuration, and write the manifests of its corpus and probe."""
    members = utterances(TRAIN, seconds), utterances(HELD_OUT, seconds)
    with (folder / "corpus.csv").open("w", newline="") as corpus:
        audio = csv.writer(corpus)
        audio.writerow(["id", "path", "split"])
        audio.writerows([u.id, u.path, u.split] for group in members for u in group)
    write_manifest(folder / "speakers.csv", "speakers", min(seconds, 400.0))
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
            "student": {
                "conv_layers": [[16, 10, 5], *[[24, 3, 2]] * 4, *[[32, 2, 2]] * 2],
                "encoder_embed_dim": 32,
                "encoder_ffn_embed_dim": 64,
                "encoder_attention_heads": 4,
                "conv_pos": 32,
                "conv_pos_groups": 4,
            },
            "train": {
                "epochs": 1000,
                "max_steps": steps,
                "batch_seconds": 12,
                "learning_rate": 5e-3,
                "validate_every": max(1, steps // 2),
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
        "probe": {"manifest": "speakers.csv", "epochs": 20},
    }


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
