"""``ray-distill cache info|verify|repair|derive``: show a cache, check it, rebuild what is damaged, make another from it.

Only typer is imported at the top, so that ``--help`` is fast; each function imports what it needs.
"""

import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0
"""Time between two lines about the progress of a derivation."""
Location = Annotated[
    str, typer.Argument(metavar="CACHE", help="Folder of the cache, or a URI such as s3://bucket/prefix.")
]
TeacherSpec = Annotated[
    str | None,
    typer.Option(
        help="Teacher: a checkpoint, OWNER/NAME on the hub, torchaudio:NAME, ... Default: the one that the cache names, if it "
        "needs no file."
    ),
]
AudioPlace = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="Present place of the audio to which the cache refers. Default: the place that the cache has recorded. For a cache with "
        "cache.audio=source, give the index of the corpus as it is now, which is corpus/index.parquet in the folder of a run.",
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
        bool, typer.Option("--fast", help="Check only sizes and new records, without reading every byte.")
    ] = False,
    deep: Annotated[int, typer.Option(min=0, help="Number of utterances to run the teacher on again.")] = 0,
    seed: Annotated[int, typer.Option(help="Random seed for choosing the utterances of --deep.")] = 0,
    teacher: TeacherSpec = None,
    device: Device = "cpu",
    audio: AudioPlace = None,
) -> None:
    """Check the files of a cache or an audio store, and with --deep the features of a cache.

    Every file is compared with its commit record; --deep compares features with those of the teacher.
    The exit code is 1 if the cache is damaged.
    The manifest of an intact cache is written again if it is missing, old or damaged.
    If the cache refers to stored audio, only the sizes of its files are checked; verify the audio store to read them.
    If the cache reads its audio from the corpus, its files only have to exist; their content is checked when it is read.
    Training does not verify a cache again that was intact here and has not changed since.
    """
    from rich.table import Table

    from ray_distill.teacher_cache.device import check_device
    from ray_distill.teacher_cache.maintenance.cache_teacher import chosen_teacher
    from ray_distill.teacher_cache.maintenance.verify import verify_cache, verify_deep
    from ray_distill.teacher_cache.reading.audio_place import holder_of
    from ray_distill.teacher_cache.reading.commit_manifest import MANIFEST, rewrite_manifest
    from ray_distill.teacher_cache.storage.cache import Cache
    from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
    from ray_distill.teacher_cache.teachers import load_teacher

    console = _console()
    check_device(device)
    problems = verify_cache(cache, checksums=not fast, audio=audio, memory="write")
    for problem in problems:
        console.print(problem.text, style="red", markup=False)
    good = not problems
    if good and deep:
        if Cache.open(cache).spec.is_audio_store:
            raise ValueError(f"{cache} is an audio store, which no teacher made; leave --deep out")
        loaded = load_teacher(chosen_teacher(Cache.open(cache), teacher), device)
        table = Table(
            "pass", "layer", "relative error", "allowed", title=f"up to {deep} utterances compared with the teacher"
        )
        for check in verify_deep(cache, loaded, sample=deep, seed=seed, audio=audio):
            name = "clean" if check.draw is None else f"draw {check.draw}"
            style = None if check.good else "red"
            table.add_row(name, str(check.layer), f"{check.error:.4f}", f"{check.allowed:.4f}", style=style)
            good &= check.good
        console.print(table)
    if problems and all(problem.unfinished for problem in problems):
        console.print(
            f"{cache} is not finished: {len(problems)} shard files were not committed; the command that builds it goes on from here, "
            f"and `ray-distill cache repair {cache}` builds them too"
        )
        raise typer.Exit(1)
    if problems and all(problem.kind == "audio" for problem in problems):
        console.print(f"the files of {cache} itself are sound, but not the audio to which it refers")
        raise typer.Exit(1)
    if not good:
        console.print(f"{cache} is damaged; run `ray-distill cache repair {cache}` to rebuild the damaged parts")
        raise typer.Exit(1)
    if rewrite_manifest(cache, thorough=not fast):
        console.print(f"{cache}/{MANIFEST} written again from the commit records", markup=False)
    sizes_only = fast and not deep
    failed = len(failed_utterances(Cache.open(cache)))
    without = (
        f", without {failed} {'utterance' if failed == 1 else 'utterances'} that failed when it was built"
        if failed
        else ""
    )
    beside, spec = "", (opened := Cache.open(cache)).spec
    if spec.refers_to_store:
        place = holder_of(opened, audio).store.location
        beside = f"; of its audio only the sizes were checked, `ray-distill cache verify {place}` reads it"
    elif spec.audio == "source" and not deep:
        beside = "; its audio, in the corpus, was not compared"
    console.print(
        f"{cache} {'has files of the right sizes (their bytes were not read)' if sizes_only else 'is sound'}{without}{beside}",
        markup=False,
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
    audio: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="New place of the audio to which the cache refers, which is then recorded. For a cache with cache.audio=source, give "
            "the index of the corpus as it is now.",
        ),
    ] = None,
) -> None:
    """Restore damaged records from their copies, rebuild damaged or missing shards, and move unknown files to set-aside/.

    Rebuilt shards have the same bytes as the originals on the same kind of machine with the same library versions.
    An audio store is repaired in the same way, without a teacher.
    """
    from ray_distill.teacher_cache.device import check_device
    from ray_distill.teacher_cache.maintenance.repair import repair_cache

    console = _console()
    check_device(device)
    done = repair_cache(cache, teacher, device, corpus_moved, audio)
    for sentence in done:
        console.print(sentence, markup=False)
    if not done:
        console.print(f"{cache} is sound; nothing to repair")
    else:
        console.print(f"{cache}: {len(done)} {'repair' if len(done) == 1 else 'repairs'} made")


def derive(
    cache: Location,
    layer: Annotated[
        list[int], typer.Option(help="Layer of the new cache, counted from 1; may be given several times.")
    ],
    units: Annotated[
        int | None, typer.Option(help="Number of clusters, for the objective units. Give this or --mvq.")
    ] = None,
    mvq: Annotated[
        int | None, typer.Option(help="Number of codebooks, for the objective mvq. Give this or --units.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder or URI of the new cache. Default: that of CACHE, with codec and layers added."),
    ] = None,
    audio: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Audio store, or cache with audio such as CACHE, to which the new cache refers. Default: the new cache does as "
            "CACHE does: it holds a copy of the audio, refers to the same store, or reads it from the corpus.",
        ),
    ] = None,
) -> None:
    """Make a cache of discrete targets from the clean pass of another cache, without the teacher.

    Its fingerprint names the cache that it was derived from.
    Running the same command again finishes an interrupted derivation.
    """
    from ray_distill.teacher_cache.maintenance.derive import derive_cache
    from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes

    if (units is None) == (mvq is None):
        raise ValueError("give exactly one of --units and --mvq, such as --units 500")
    codec = f"units:{units}" if units is not None else f"mvq:{mvq}"
    name = f"{codec.replace(':', '-')}-layer-{'-'.join(map(str, sorted(set(layer))))}"
    place = output or f"{cache.rstrip('/')}-{name}"
    console = _console()
    said = time.monotonic()

    def show(done: int, shards: int) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            console.print(f"{place}: {done} of {shards} shards written", markup=False)

    written = derive_cache(cache, place, codec, layer, on_progress=show, audio=audio)
    made = Cache.open(place)
    what = "with the audio" if made.spec.embeds_audio else "beside the audio"
    console.print(
        f"{place}: {written} of {len(made.shards)} shards written, {cache_bytes(made) / 1e6:.1f} MB {what}",
        markup=False,
    )


def _console() -> "Console":
    from rich.console import Console

    return Console(soft_wrap=True, highlight=False)
