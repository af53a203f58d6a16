"""The index stage: find and check the audio."""

from ray_distill.pipeline.corpus.index import index_corpus
from ray_distill.pipeline.ray_session import counted
from ray_distill.pipeline.stages.run import Run


def index_audio(run: Run) -> None:
    """Find, decode and list the audio of the corpus, or reuse the index if nothing changed.

    Raises:
        ValueError: The corpus can't be read, or has no usable audio for training or validation.
    """
    corpus = run.config.corpus
    with run.progress("index", "files") as update:
        index = index_corpus(
            corpus.path,
            train_splits=corpus.train_splits,
            validation_splits=corpus.validation_splits,
            validation_fraction=corpus.validation_fraction,
            min_seconds=corpus.min_seconds,
            max_seconds=corpus.max_seconds,
            output=run.folder.corpus,
            progress=update,
        )
    run.corpus = index
    skipped = (
        f", {counted(len(index.skipped), 'file')} skipped (see {run.folder.skipped_files})" if index.skipped else ""
    )
    again = " (unchanged since last time, reused)" if index.reused else ""
    run.say(f"index   {counted(len(index.utterances), 'utterance')}, {index.hours:.2f} h of audio{skipped}{again}")
