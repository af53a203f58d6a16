"""Weights of teachers that depend on the domain of the utterance, compared with the domains that the corpus names."""

from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.corpus.labels import LABELS
from ray_distill.pipeline.stages.run import Run
from ray_distill.teacher_cache.targets.domains import read_domains, without_weight


def check_domains(run: Run) -> None:
    """Check that each teacher has a weight for the domain of each utterance, before anything is computed for it.

    Raises:
        ConfigError: A teacher has weights by domain, and none for the domain of some utterance.
        ValueError: The labels of the corpus are damaged.
    """
    weights = {entry.name: entry.weight for entry in run.config.teachers if isinstance(entry.weight, dict)}
    if not weights:
        return
    ids = list(run.utterances.ids())
    if (problem := without_weight(weights, ids, read_domains(run.folder.corpus / LABELS, ids))) is not None:
        raise ConfigError(problem)
