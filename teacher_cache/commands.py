"""``ray-distill cache info|verify|repair``: show a cache, check it, rebuild what is damaged.

Only typer is imported at the top, so that ``--help`` is fast; each function imports what it needs.
"""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Location = Annotated[
    str, typer.Argument(metavar="CACHE", help="Folder of the cache, or a URI such as s3://bucket/prefix.")
]
TeacherSpec = Annotated[
    str | None,
    typer.Option(
        help="Teacher: a checkpoint, OWNER/NAME on the hub, torchaudio:NAME, ... Default: the one that the cache names, if that "
        "needs no file."
    ),
]
Device = Annotated[str, typer.Option(help="Device of the teacher: cpu, cuda.")]


def info(cache: Location) -> None:
    """Show teacher, layers, codec, masks and size of a cache."""
    from ray_distill.teacher_cache.maintenance.info import info_table

    _console().print(info_table(cache))


def verify(
    cache: Location,
    fast: Annotated[
        bool, typer.Option("--fast", help="Check only sizes and records, without reading every byte.")
    ] = False,
    deep: Annotated[int, typer.Option(min=0, help="Number of utterances to run the teacher on again.")] = 0,
    seed: Annotated[int, typer.Option(help="Random seed for choosing the utterances of --deep.")] = 0,
    teacher: TeacherSpec = None,
    device: Device = "cpu",
) -> None:
    """Check the files of a cache, and with --deep its features.

    Every file is compared with its commit record; --deep compares features with those of the teacher. The exit code is 1 if the
    cache is damaged.
    """
    from rich.table import Table

    from ray_distill.teacher_cache.device import check_device
    from ray_distill.teacher_cache.maintenance.cache_teacher import chosen_teacher
    from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
    from ray_distill.teacher_cache.storage.cache import Cache
    from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
    from ray_distill.teacher_cache.teachers import load_teacher

    console = _console()
    check_device(device)
    problems = verify_cache(cache, checksums=not fast)
    for problem in problems:
        console.print(problem.text, style="red", markup=False)
    good = not problems
    if good and deep:
        loaded = load_teacher(chosen_teacher(Cache.open(cache), teacher), device)
        table = Table(
            "pass", "layer", "relative error", "allowed", title=f"up to {deep} utterances compared with the teacher"
        )
        for check in verify_deep(cache, loaded, sample=deep, seed=seed):
            name = "clean" if check.draw is None else f"draw {check.draw}"
            style = None if check.good else "red"
            table.add_row(name, str(check.layer), f"{check.error:.4f}", f"{check.allowed:.4f}", style=style)
            good &= check.good
        console.print(table)
    if not good:
        console.print(f"{cache} is damaged; run `ray-distill cache repair {cache}` to rebuild the damaged parts")
        raise typer.Exit(1)
    sizes_only = fast and not deep
    failed = len(failed_utterances(Cache.open(cache)))
    without = (
        f", without {failed} {'utterance' if failed == 1 else 'utterances'} that failed when it was built"
        if failed
        else ""
    )
    console.print(
        f"{cache} {'has files of the right sizes (their bytes were not read)' if sizes_only else 'is sound'}{without}"
    )


def repair(
    cache: Location,
    teacher: TeacherSpec = None,
    device: Device = "cpu",
    corpus_moved: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="OLD NEW",
            help="Old and new path of the corpus folder, if it has moved since the cache was built.",
        ),
    ] = None,
) -> None:
    """Restore damaged records from their copies, rebuild damaged or missing shards, and move unknown files to set-aside/.

    Rebuilt shards have the same bytes as the originals on the same kind of machine with the same library versions.
    """
    from ray_distill.teacher_cache.device import check_device
    from ray_distill.teacher_cache.maintenance.repair import repair_cache

    console = _console()
    check_device(device)
    done = repair_cache(cache, teacher, device, corpus_moved)
    for sentence in done:
        console.print(sentence, markup=False)
    if not done:
        console.print(f"{cache} is sound; nothing to repair")
    else:
        console.print(f"{cache}: {len(done)} {'repair' if len(done) == 1 else 'repairs'} made")


def _console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)
