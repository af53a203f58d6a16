"""The plan of a run, made without starting or writing anything."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ray_distill.pipeline.config import Config, ConfigError
from ray_distill.pipeline.corpus.hub_dataset import dataset_of_run, parse_hub_dataset
from ray_distill.pipeline.corpus.index import INDEX, CorpusIndex
from ray_distill.pipeline.corpus.search import count_files, find_audio
from ray_distill.pipeline.corpus.splits import SplitSummary
from ray_distill.pipeline.initialise import tensors_of_student
from ray_distill.pipeline.ray_session import counted, missing_gpus
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.pipeline.stages import Run
from ray_distill.pipeline.stages.audio import audio_places, refuse_other_place
from ray_distill.pipeline.stages.domains import check_found_domains
from ray_distill.pipeline.stages.export import require_training
from ray_distill.pipeline.stages.frame_rates import check_frame_rates, check_student_frames
from ray_distill.pipeline.stages.index import split_table
from ray_distill.pipeline.stages.run import TeacherRun
from ray_distill.pipeline.stages.run_audio import check_reference
from ray_distill.pipeline.stages.run_device import batch_seconds_of
from ray_distill.student import Student
from ray_distill.student.pruning.gates import Gates
from ray_distill.student.training.train_state import saved_batch_seconds
from ray_distill.teacher_cache.reading.audio_place import AUDIO_ONLY, open_holder, refuse_audio_store
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec
from ray_distill.teacher_cache.storage.create import check_location, refuse_derived
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.domains import shown
from ray_distill.teacher_cache.teachers import Teacher
from ray_distill.teacher_cache.teachers.header import hub_model_of, load_header
from ray_distill.teacher_cache.teachers.hub.hub_model import HubModel


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        name: Name of the run.
        facts: Main facts of the resolved configuration, by name.
        stages: What each selected stage would do, by name.
        splits: The splits of the corpus, without their hours.
    """

    name: str
    facts: dict[str, str]
    stages: dict[str, str]
    splits: tuple[SplitSummary, ...]


def plan_run(config: Config, stages: list[str]) -> RunPlan:
    """Check a run's configuration, corpus, teacher and cache, and say what its stages would do.

    Audio files are found but not decoded, and the teacher's weights are not read, so the run can still fail later: where files
    are damaged, or where the cache belongs to other teacher weights or another corpus.

    Args:
        config: Configuration of the run.
        stages: Names of the stages to plan.

    Raises:
        ValueError: The corpus, the teacher, the cache or the run's folder can't be used with this configuration.
    """
    RunFolder(config.folder.absolute()).refuse_other_config(config, may_extend=True)
    RunFolder(config.folder.absolute()).check_room()
    corpus = config.corpus
    splits: tuple[SplitSummary, ...] = ()
    if (dataset := parse_hub_dataset(corpus.path)) is not None:
        dataset = dataset_of_run(RunFolder(config.folder.absolute()).dataset_file, dataset)
        described = f"{dataset}, which the index stage downloads"
    else:
        found = find_audio(corpus.path.absolute(), corpus.train_splits, corpus.validation_splits, format=corpus.format)
        described, splits = f"{corpus.path.absolute()}: {_listed(count_files(found))}", tuple(found.splits)
        check_found_domains(config, found.entries)
    named = Run(config, Console(quiet=True))
    headers = [load_header(part.checkpoint) for part in named.parts]
    run = named.sibling(config, Console(quiet=True), headers)
    folder, train = run.folder, config.train
    cached = train.targets == "cached"
    caches = [Cache.open(part.cache) if cached and Cache.exists(part.cache) else None for part in run.parts]
    labels = [f" {part.name}" if isinstance(part, TeacherRun) else "" for part in run.parts]
    parts = list(zip(labels, run.parts, headers, caches, strict=True))
    if None not in headers:
        check_frame_rates(run)
    masks = (
        f"{counted(config.masks.draws, 'draw')}, mask_prob {config.masks.policy.mask_prob:g}"
        if config.masks.draws
        else "none"
    )
    length = counted(train.max_steps, "step") if train.max_steps else counted(train.epochs, "epoch")
    batch = train.describe_batch(seconds := saved_batch_seconds(folder.path))
    batch += ", found on the GPU at the start" if train.batch_seconds == "auto" and seconds is None else ""
    facts = {
        "run folder": str(folder.path),
        "corpus": described,
        **{f"teacher{label}": _facts_of(part, header) for label, part, header, _ in parts},
        "student": _student_facts(config, headers),
        "masks": masks,
        **{f"cache{label}": _cache_facts(part) for label, part, *_ in parts if cached},
        "training": f"{length}, {train.targets} targets, "
        f"batches of {batch}, {counted(train.workers, 'worker')}, peak learning rate {train.learning_rate:g}",
    }
    _refuse_missing_work(
        run, stages, [part for part, cache in zip(run.parts, caches, strict=True) if cached and cache is None]
    )
    checks = "cache" in stages
    actions = {
        "index": _index_action(folder),
        "plan": "estimate the size of the cache" if cached else "check the lengths of the utterances",
        "cache": "; ".join(
            [
                *(_audio_action(run) if cached else []),
                *(
                    f"{label.lstrip()}: {_cache_action(part, cache, header, checks)}".removeprefix(": ")
                    for label, part, header, cache in parts
                ),
            ]
        ),
        "train": _train_action(folder, config),
        "export": f"{'update' if folder.export.is_dir() else 'write'} {folder.export}",
        "report": f"write {folder.report}",
    }
    chosen = {stage: action for stage, action in actions.items() if stage in stages}
    return RunPlan(config.name, facts, chosen, splits)


def _refuse_missing_work(run: Run, stages: list[str], without_cache: Sequence[Run]) -> None:
    """Raise as the first of some stages will, if it needs the work of an earlier stage that is neither done nor chosen."""
    if "index" not in stages and {"plan", "cache", "train", "report"} & set(stages):
        CorpusIndex.load(run.folder.corpus)
    if without_cache and "train" in stages and "cache" not in stages:
        Cache.open(without_cache[0].cache)
    if "export" in stages and "train" not in stages:
        require_training(run)


def _listed(counts: dict[str, int]) -> str:
    """Return the numbers of files as a text, such as ``900 train files, 40 validation files``."""
    return ", ".join(f"{count:,} {split} files" for split, count in counts.items())


def _facts_of(run: Run, header: Teacher | None) -> str:
    """Describe a teacher, and what the run learns from it if it is one of several."""
    with run.named():
        facts = _teacher_facts(run, header)
    if not isinstance(run, TeacherRun):
        return facts
    chosen = run.whole.config.objectives[run.whole.config.teachers.index(run.entry)]
    until = "" if run.entry.stop_step is None else f" to step {run.entry.stop_step:,}"
    since = f", from step {run.entry.start_step:,}{until}" if run.entry.start_step or until else ""
    own = run.entry.objective
    options = {} if own is None else own.changed_options()
    chosen += "".join(f", {key} {value}" for key, value in options.items())
    return f"{facts}; objective {chosen}, weight {shown(run.entry.weight)}{since}"


def _cache_facts(run: Run) -> str:
    audio = run.config.cache.audio_location
    beside = "" if audio is None else f", audio at {audio}"
    if run.config.cache.audio == "source":
        beside = ", audio read from the corpus"
    batches = ", batches found on each GPU (auto)" if batch_seconds_of(run.config.cache) == "auto" else ""
    return f"{run.config.cache.location}: {run.config.cache.codec}, {run.config.cache.targets}{batches}{beside}"


def _audio_action(run: Run) -> list[str]:
    """Say where the audio of the caches is, or that it would be stored."""
    actions = []
    for place in audio_places(run):
        if not Cache.exists(store := Store(place)):
            for part in run.parts:
                refuse_other_place(part, place)
            actions.append(f"store the audio at {place}")
        else:
            actions.append(f"{'finish' if open_holder(store).missing(AUDIO_ONLY) else 'reuse'} the audio at {place}")
    return actions


def _teacher_facts(run: Run, header: Teacher | None) -> str:
    """Describe the teacher, after checking that it has the layers and the mask embedding that the run needs."""
    config = run.config
    model = hub_model_of(run.checkpoint)
    if header is None and model is not None:
        return _unread_facts(config, model)
    if header is None:
        if config.masks.draws and "mean-mask:" not in config.teacher.checkpoint:
            raise ConfigError(
                f"masks.draws: {config.teacher.checkpoint} has no mask embedding, so it has no masked targets; set masks.draws=0 "
                f"for clean targets, or teacher.checkpoint=mean-mask:{config.teacher.checkpoint} for a substitute embedding"
            )
        return f"{config.teacher.checkpoint} (not checked, since it would be downloaded)"
    teacher = run.teacher  # Checks the layers and the mask embedding.
    weights = ", RANDOM weights" if run.teacher_is_random else ""
    return (
        f"{teacher.name}: {teacher.num_parameters:,} parameters{weights}, {teacher.num_layers} layers of width {teacher.dim}, "
        f"{len(run.layers)} used{_to_download(model)}"
    )


def _unread_facts(config: Config, model: HubModel) -> str:
    """Describe a teacher on the hub whose weights can only be read as a whole, after checking that it has the layers."""
    count, width = model.description.size
    for layer in config.teacher.layers or []:
        if count is not None and not 1 <= layer <= count:
            raise ConfigError(
                f"teacher.layers: there is no layer {layer}; {model.label} has layers 1 to {count} by its config.json"
            )
    return f"{model.label}: {count} layers of width {width} by its config.json; its weights are not checked{_to_download(model)}"


def _to_download(model: HubModel | None) -> str:
    """Say what would be downloaded of a teacher on the hub."""
    if model is None or not model.missing:
        return ""
    return f", {sum(model.missing.values()) / 1e6:,.1f} MB to download ({', '.join(model.missing)})"


def _student_facts(config: Config, headers: Sequence[Teacher | None]) -> str:
    """Describe the size of the student, which may depend on the teachers."""
    known = [header for header in headers if header is not None]
    if len(known) < len(headers):
        return "not resolved, since it depends on the teacher"
    chosen = [entry.layers for entry in config.teachers] or [config.teacher.layers]
    counts = [len(layers or range(header.num_layers)) for layers, header in zip(chosen, known, strict=True)]
    teacher, layers = known[config.owner], counts[config.owner]
    sizes = [(count, header.dim) for count, header in zip(counts, known, strict=True)]
    config.check_aggregate(sizes)
    dim = config.target_dim([header.dim for header in known])
    settings = config.resolve_student(layers, dim, teacher.patches)
    config.training(sizes).chosen_objective.check_targets(settings, layers, dim)
    check_student_frames(settings, teacher)
    if config.train.init_from is not None:
        tensors_of_student(config.train.init_from, settings)
    with torch.device("meta"):
        student = Student(settings)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    size = f"{parameters:,} parameters, {settings.encoder_layers} layers of width {settings.encoder_embed_dim}"
    if config.train.prune is None:
        return size
    gates = Gates(settings, config.train.prune, config.train.seed)
    left = round((1 - config.train.prune.sparsity) * gates.total)
    return (
        f"{size}; {config.train.prune.steps:,} steps of pruning leave about {left:,} of {gates.total:,} without heads"
    )


def _index_action(folder: RunFolder) -> str:
    """Say what the index stage would do."""
    if (folder.corpus / INDEX).is_file():
        return f"reuse the index in {folder.corpus} unless files have changed"
    return f"decode all files, and write the index to {folder.corpus}"


def _cache_action(run: Run, cache: Cache | None, teacher: Teacher | None, checks_device: bool) -> str:
    """Say what the cache stage would do, after checking that an existing cache can serve the run.

    Args:
        run: The run as the teacher sees it.
        cache: The existing cache, or None.
        teacher: The teacher's header, or None if it would be downloaded.
        checks_device: Whether to check that the teacher can run on its device if it has something to do.
    """
    config = run.config
    if config.train.targets == "online":
        return "nothing, since targets are online"
    if cache is None:
        store = Store(config.cache.location)
        store.check_writable()
        check_location(store)
        if checks_device:
            _check_device(run)
        return f"build the cache at {config.cache.location}"
    refuse_audio_store(cache, "set cache.path to another folder")
    # The fingerprints of the teacher and the corpus are unknown without weights and samples; take the cache's for granted.
    values = cache.spec.model_dump() | {
        "masks": config.masks,
        "codec": config.cache.codec,
        "targets": config.cache.targets,
        "batch_seconds": batch_seconds_of(config.cache),
        "audio": config.cache.audio,
        "audio_store": None,
    }
    if config.cache.audio == "store":
        check_reference(cache, config.cache)
        values["audio_store"] = cache.spec.audio_fingerprint
    if teacher is not None:
        layers = config.teacher.layers or range(1, teacher.num_layers + 1)
        values |= {"num_layers": teacher.num_layers, "dim": teacher.dim, "layers": tuple(layers)}
    if config.cache.shard_minutes is not None:
        values["shard_seconds"] = config.cache.shard_minutes * 60
    if config.cache.precision is not None:
        values["precision"] = config.cache.precision
    needed = CacheSpec.model_validate(values)
    present = f"the cache at {config.cache.location} ({cache_bytes(cache) / 1e6:,.1f} MB)"
    if not cache.covers(needed):
        refuse_derived(cache, needed)
        if checks_device:
            _check_device(run)
        return f"add {cache.spec.lacking(needed)} to {present}"
    if missing := sum(map(len, cache.missing(needed).values())):
        refuse_derived(cache)
        if checks_device:
            _check_device(run)
        return f"write {counted(missing, 'missing file')} of {present}"
    return f"reuse {present} if it belongs to the same teacher weights and audio"


def _check_device(run: Run) -> None:
    with run.named():
        run.check_device()


def _train_action(folder: RunFolder, config: Config) -> str:
    """Say what the train stage would do, and whether this machine has its GPUs."""
    longer = folder.would_continue(config)
    if folder.is_trained and not longer:
        return "nothing, since the training is finished"
    gpus = missing_gpus(config)
    lacking = f"; {gpus}, so it needs another machine or a cluster" if gpus else ""
    if longer:
        return f"continue the finished training from its last checkpoint in {folder.checkpoints}{lacking}"
    if folder.checkpoints.is_dir():
        return f"resume from the last checkpoint in {folder.checkpoints}{lacking}"
    return f"train from the first step, with checkpoints in {folder.checkpoints}{lacking}"


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print a plan as three tables, and that nothing was started."""
    for title, rows in ((f"run {plan.name}", plan.facts), ("stages", plan.stages)):
        table = Table(show_header=False, title=title)
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
    for line in split_table(plan.splits):
        console.print(line, highlight=False, soft_wrap=True)
    console.print("Dry run: the configuration, corpus and teacher can be used; nothing was started or written.")
