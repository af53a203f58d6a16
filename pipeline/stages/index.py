"""The index stage: find and check the audio."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from rich.markup import escape

from ray_distill.pipeline.corpus.decoded_sources import DECODED
from ray_distill.pipeline.corpus.decoding import Limits
from ray_distill.pipeline.corpus.decoding_work import Source, decode_here, decode_on_ray
from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.corpus.splits import SplitSummary
from ray_distill.pipeline.ray_session import counted, init_ray, owns_ray, quiet_ray
from ray_distill.pipeline.run_plugins import format_found, note_format
from ray_distill.pipeline.stages.domains import check_domains
from ray_distill.pipeline.stages.run import Run
from ray_distill.teacher_cache.frames import shown_audio

CLUSTER_SOURCES = 1000
"""Number of sources to decode from which a cluster decodes them."""
_SHOWN_DOMAINS = 8
"""Maximum number of domains whose names are shown."""


def index_audio(run: Run) -> None:
    """Find, decode and list the audio of the corpus, or reuse the index if nothing changed.

    Raises:
        ValueError: The corpus can't be read, has no usable audio for training or validation, or lacks a domain that a weight needs.
    """
    corpus, path = run.config.corpus, run.corpus_path
    with run.progress("index", "files") as update:
        index = index_corpus(
            path,
            train_splits=corpus.train_splits,
            validation_splits=corpus.validation_splits,
            validation_fraction=corpus.validation_fraction,
            min_seconds=corpus.min_seconds,
            max_seconds=corpus.max_seconds,
            format=corpus.format,
            channel=corpus.channel,
            long_audio=corpus.long_audio,
            output=run.folder.corpus,
            others=_other_indexes(run),
            decode=partial(_decode, run),
            progress=update,
        )
    run.corpus = index
    if corpus.format is None and (plugin := format_found(index.format)) is not None:
        note_format(run.folder.plugins_file, plugin)
        run.say(f"plugin  {escape(str(plugin))}")
    for line in split_table(index.splits):
        run.say(f"        {line}")
    for note in index.notes:
        run.say(f"[yellow]index   {escape(note)}[/yellow]")
    others = len(index.skipped) - index.num_unused
    skipped = f", {counted(others, 'file')} skipped" if others else ""
    unused = f", {counted(index.num_unused, 'file')} of unused splits" if index.num_unused else ""
    where = f" (see {run.folder.skipped_files})" if index.skipped else ""
    again = " (unchanged since last time, reused)" if index.reused else ""
    labels = index.labels
    numbers = [f"{labels.transcripts:,} transcripts" if labels.transcripts else ""]
    numbers += [counted(labels.speakers, "speaker") if labels.speakers else ""]
    if len(labels.domains) <= _SHOWN_DOMAINS:
        numbers += [f"{counted(n, 'utterance')} of {escape(domain)}" for domain, n in labels.domains.items()]
    else:
        numbers += [counted(len(labels.domains), "domain")]
    known = ", ".join(filter(None, numbers))
    run.say(f"index   format {index.format}{f', with {known}' if known else ''}")
    run.say(
        f"index   {counted(len(index.utterances), 'utterance')}, {shown_audio(index.hours * 3600)} of audio{skipped}{unused}"
        f"{where}{again}"
    )
    check_domains(run)


def _decode(run: Run, sources: Sequence[Source], limits: Limits) -> Iterator[pa.Table]:
    """Decode sources on all nodes of a cluster, or with threads if there is none or the sources are few."""
    if owns_ray() or len(sources) < CLUSTER_SOURCES:
        yield from decode_here(sources, limits)
        return
    with quiet_ray(run.folder.ray_log):
        init_ray()
        yield from decode_on_ray(sources, limits)


def _other_indexes(run: Run) -> list[Path]:
    """Return the index folders of the runs beside this one, with the newest first."""
    decoded = list(run.folder.path.parent.glob(f"*/{run.folder.corpus.name}/{DECODED}"))
    return [file.parent for file in sorted(decoded, key=_modified, reverse=True) if file.parent != run.folder.corpus]


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # The run was removed just now.
        return 0.0


def split_table(splits: Sequence[SplitSummary]) -> list[str]:
    """Return the lines of a table of a corpus's splits."""
    rows = [("split", "files", "audio", "role", "from")]
    rows += [
        (
            escape(split.name),
            f"{split.files:,}",
            "-" if split.hours is None else shown_audio(split.hours * 3600),
            split.role,
            escape(split.origin),
        )
        for split in splits
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    return [
        f"{name:{widths[0]}}  {files:>{widths[1]}}  {audio:>{widths[2]}}  {role:{widths[3]}}  {origin}"
        for name, files, audio, role, origin in rows
    ]
