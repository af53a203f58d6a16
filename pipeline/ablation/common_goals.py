"""What the runs of an ablation have in common, so that their similarities to a teacher mean the same."""

from collections.abc import Collection

from ray_distill.pipeline.config import Config


def share_targets(configs: Collection[Config]) -> bool:
    """Return whether all runs compare their students with the same targets, where they learn from the same teacher."""
    targets = set()
    for config in configs:
        weights = [entry.weight for entry in config.teachers] if config.train.aggregate == "average" else []
        frames = [part.teacher.frames for part in config.parts]
        targets.add(str((config.objectives, config.train.aggregate, weights, frames)))
    return len(targets) == 1


def absent_teachers(configs: Collection[Config]) -> set[str]:
    """Return the names of those of several teachers that some run leaves out, because their weight is 0."""
    return {entry.name for config in configs for entry in config.teachers if not entry.weight}


def have_nothing_in_common(configs: Collection[Config]) -> bool:
    """Return whether neither losses nor similarities to a teacher can be compared, so that only probes can."""
    names = {entry.name for config in configs for entry in config.teachers}
    return not share_targets(configs) or (bool(names) and names == absent_teachers(configs))
