"""``python -m teacher_cache info|verify|repair CACHE``: look at a cache, check it, bring it back."""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ray_distill.teacher_cache.maintenance.info import info_table
from ray_distill.teacher_cache.maintenance.repair import repair_cache
from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
from ray_distill.teacher_cache.storage.cache import Cache
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.teachers import load_teacher

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)
console = Console(soft_wrap=True, highlight=False)


def _usable(device: str) -> str:
    """The device, if PyTorch can use it; ValueError otherwise."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # The latter where PyTorch was built without CUDA.
        raise ValueError(f"can't use device {device!r}: PyTorch finds no such device on this machine") from error
    return device


Location = Annotated[str, typer.Argument(metavar="CACHE", help="Its folder, or a URI such as s3://bucket/prefix.")]
TeacherSpec = Annotated[str | None, typer.Option(help="Checkpoint; default the one the cache was made with.")]
CorpusMoved = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="OLD NEW", help="The folder the corpus lay in when the cache was begun, and where that is now."
    ),
]
Device = Annotated[str, typer.Option(callback=_usable, help="cpu or cuda, for the teacher.")]


@app.command()
def info(cache: Location) -> None:
    """Show what a cache is: teacher, layers, codec, masks, sizes, completeness."""
    console.print(info_table(cache))


@app.command()
def verify(
    cache: Location,
    fast: Annotated[bool, typer.Option("--fast", help="Sizes and records only, without reading every byte.")] = False,
    deep: Annotated[int, typer.Option(min=0, help="Also run the teacher again on this many utterances.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of utterances for --deep.")] = 0,
    teacher: TeacherSpec = None,
    device: Device = "cpu",
) -> None:
    """Check every file against its commit record; with --deep the content against the teacher. Exit code 1: not sound."""
    problems = verify_cache(cache, checksums=not fast)
    for problem in problems:
        console.print(problem.text, style="red", markup=False)
    good = not problems
    if good and deep:
        loaded = load_teacher(teacher or Cache.open(Store(cache)).record["teacher_spec"], device)
        table = Table(
            "pass", "layer", "relative error", "allowed", title=f"up to {deep} utterances against the teacher"
        )
        for check in verify_deep(cache, loaded, sample=deep, seed=seed):
            name = "clean" if check.draw is None else f"draw {check.draw}"
            style = None if check.good else "red"
            table.add_row(name, str(check.layer), f"{check.error:.4f}", f"{check.allowed:.4f}", style=style)
            good &= check.good
        console.print(table)
    sound = "has files of the right sizes; their bytes were not read" if fast and not deep else "is sound"
    wrong = f"is not sound; `python -m teacher_cache repair {cache}` rebuilds what is damaged"
    console.print(f"{cache} {sound if good else wrong}", soft_wrap=True)
    raise typer.Exit(0 if good else 1)


@app.command()
def repair(
    cache: Location, teacher: TeacherSpec = None, device: Device = "cpu", corpus_moved: CorpusMoved = None
) -> None:
    """Restore damaged records and make damaged or missing shards again, to the same bytes."""
    done = repair_cache(cache, teacher, device, corpus_moved)
    for sentence in done:
        console.print(sentence, markup=False)
    console.print(f"{cache}: {len(done)} things repaired" if done else f"{cache} was sound: nothing to do")


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(2) from None
