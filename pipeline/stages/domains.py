"""Weights of teachers that depend on the domain of the utterance, compared with the domains that the corpus names."""

from ray_distill.pipeline.config import Config, ConfigError
from ray_distill.pipeline.corpus.found import FoundFiles
from ray_distill.pipeline.corpus.labels import LABELS
from ray_distill.pipeline.stages.run import Run
from ray_distill.teacher_cache.targets.domains import read_domains, without_weight


def check_domains(run: Run) -> None:
    """Check that each teacher has a weight for the domain of each utterance, before anything is computed for it.

    Raises:
        ConfigError: A teacher has weights by domain, and none for the domain of some utterance.
        ValueError: The labels of the corpus are damaged.
    """
    if not weights_by_domain(run.config):
        return
    ids = list(run.utterances.ids())
    _check(run.config, ids, read_domains(run.folder.corpus / LABELS, ids))


def check_found_domains(config: Config, found: FoundFiles) -> None:
    """Do the same for what the search of the corpus found, before it is decoded. Files that would be skipped count too.

    Raises:
        ConfigError: As `check_domains`.
    """
    if weights_by_domain(config):
        rows = [(id, domain or "") for id, domain in found.rows("id", "domain")]
        _check(config, [id for id, _ in rows], [domain for _, domain in rows])


def weights_by_domain(config: Config) -> dict[str, dict[str, float]]:
    """Return the weights of the teachers that have one for each domain, by the teacher's name."""
    return {entry.name: entry.weight for entry in config.teachers if isinstance(entry.weight, dict)}


def _check(config: Config, ids: list[str], domains: list[str]) -> None:
    if (problem := without_weight(weights_by_domain(config), ids, domains)) is not None:
        raise ConfigError(problem)
