"""The stages of a run, each skipping what is done: index, plan, cache, train, export, report."""

import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ray_distill.pipeline.config import Config, ConfigError, dump_config
from ray_distill.pipeline.corpus import CorpusIndex, index_corpus
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.initialise import initial_tensors, write_initial
from ray_distill.pipeline.planning.cache_cost import cost_lines, cost_table, plan_cost
from ray_distill.pipeline.reports.feature_maps import FeatureMaps, feature_maps
from ray_distill.pipeline.reports.run_report import write_run_report
from ray_distill.pipeline.run_folder import RunFolder
from ray_distill.student import Student, StudentConfig, load_student
from ray_distill.student.training.ray_training import train_on_ray
from ray_distill.teacher_cache.build.build_cache import Progress as BuildProgress
from ray_distill.teacher_cache.build.build_cache import Workers, build_cache
from ray_distill.teacher_cache.frames import SAMPLE_RATE
from ray_distill.teacher_cache.maintenance.verify import verify_cache
from ray_distill.teacher_cache.reader import CacheReader
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.cache_spec import CacheError, CacheSpec
from ray_distill.teacher_cache.storage.shard_plan import Utterance, plan_shards
from ray_distill.teacher_cache.storage.store import Store
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.target_batch import TargetReader
from ray_distill.teacher_cache.teachers import Teacher, load_teacher, split_options

STAGES = ("index", "plan", "cache", "train", "export", "report")


class Run:
    """One run: its configuration, its folder, and its stages as methods.

    Args:
        config: checked configuration.
        console: where progress goes.
        teacher: its teacher, where the caller has loaded it already.
        claim: refuse a folder with results of another configuration; False only for work that other runs share.

    Raises:
        ConfigError: the run's folder holds a run of another configuration, or paths are relative inside a Ray job.
    """

    def __init__(self, config: Config, console: Console, teacher: Teacher | None = None, *, claim: bool = True) -> None:
        # A job's working directory is a copy that is thrown away.
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            for key, path, absolute in (
                ("runs", config.runs, config.runs.is_absolute()),
                ("cache.path", config.cache.path, config.cache.is_absolute),
                ("corpus.path", config.corpus.path, config.corpus.path.is_absolute()),
            ):
                if not absolute:
                    raise ConfigError(
                        f"{key}: {path} is relative, but a Ray job runs in a copy of its folder; give an absolute path"
                    )
        self.config = config
        self.console = console
        self._given_teacher = teacher
        self.folder = config.folder.absolute()
        self.cache = Store(config.cache.location)
        if claim:
            self._refuse_others()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", dump_config(config))

    def _refuse_others(self) -> None:
        path = self.folder / "config.yaml"
        # A run that failed before its first result has nothing to lose: a corrected configuration may replace its own. The
        # corpus index is made again where that changes it.
        results = self.folder.is_dir() and any(
            entry.name not in ("config.yaml", "ray.log", "corpus", "initial.safetensors")
            for entry in self.folder.iterdir()
        )
        if results:
            if not path.is_file():
                raise ConfigError(f"{self.folder} holds files but no run (no config.yaml); choose another name=...")
            mine, theirs = _identity(self.config.model_dump(mode="json")), _identity(_recorded(path))
            changed = [section for section in mine if mine[section] != theirs.get(section)]
            if changed:
                raise ConfigError(
                    f"{self.folder} holds a run with another configuration (sections that differ: {', '.join(changed)}); "
                    "choose another name=..., or remove that folder"
                )

    def say(self, text: str) -> None:
        """One line for people."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, on the CPU."""
        teacher = self._given_teacher or load_teacher(self.config.teacher.checkpoint, "cpu")
        if self._given_teacher is None and split_options(self.config.teacher.checkpoint)[1].startswith("random:"):
            self.say(
                "[yellow]The teacher has seeded RANDOM weights: this run shows the machinery, its features mean nothing. "
                "Give a real teacher for real features.[/yellow]"
            )
        for layer in self.layers_of(teacher):
            if not 1 <= layer <= teacher.num_layers:
                raise ConfigError(
                    f"teacher.layers: there is no layer {layer}; {teacher.name} has layers 1 to {teacher.num_layers}"
                )
        if self.config.masks.draws and not teacher.has_mask_embedding:
            raise ConfigError(
                f"masks.draws: {teacher.name} has no mask embedding, so it has no masked targets; set masks.draws=0 for clean "
                f"targets, teacher.checkpoint=mean-mask:{self.config.teacher.checkpoint} for a stand-in, or use a checkpoint "
                "that kept its mask embedding"
            )
        return teacher

    def layers_of(self, teacher: Teacher) -> tuple[int, ...]:
        """1-based layers learnt from."""
        return tuple(self.config.teacher.layers or range(1, teacher.num_layers + 1))

    @cached_property
    def corpus(self) -> CorpusIndex:
        """The corpus index, made by the index stage."""
        return CorpusIndex.load(self.folder / "corpus")

    @property
    def utterances(self) -> list[Utterance]:
        """All indexed utterances."""
        return self.corpus.utterances

    @cached_property
    def spec(self) -> CacheSpec:
        """The cache this run needs."""
        cache = self.config.cache
        return CacheSpec(
            teacher=self.teacher.fingerprint,
            num_layers=self.teacher.num_layers,
            dim=self.teacher.dim,
            layers=self.layers_of(self.teacher),
            masks=self.config.masks,
            codec=cache.codec,
            targets=cache.targets,
            corpus=self.corpus.fingerprint,
            shard_seconds=cache.shard_minutes * 60,
            batch_seconds=cache.batch_seconds,
            precision=self.precision,
            audio=cache.audio,
        )

    @cached_property
    def precision(self) -> Literal["fp32", "fp16", "bf16"]:
        """Of the teacher, in the cache this run needs."""
        settings = self.config.cache
        if settings.precision is not None:
            return settings.precision
        if Cache.exists(self.cache):  # Made on another kind of machine perhaps.
            return Cache.open(self.cache).spec.precision
        return "fp16" if settings.gpus_per_actor else "fp32"

    @contextmanager
    def progress(self, name: str, unit: str) -> Iterator[Any]:
        """A progress bar; yields update(done, total, note="")."""
        columns = (
            TextColumn(f"{name:7s}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(name, total=None, note="")
            yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Ray's notices on standard error, from C++ too, go to the run's ray.log: they would drown the run's own."""
        sys.stderr.flush()
        kept = os.dup(2)
        with (self.folder / "ray.log").open("a") as log:
            os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)

    def index(self) -> None:
        """Finds and checks the audio."""
        corpus = self.config.corpus
        with self.progress("index", "files") as update:
            index = index_corpus(
                corpus.path,
                train_splits=corpus.train_splits,
                validation_splits=corpus.validation_splits,
                validation_fraction=corpus.validation_fraction,
                min_seconds=corpus.min_seconds,
                max_seconds=corpus.max_seconds,
                output=self.folder / "corpus",
                progress=update,
            )
        self.corpus = index
        skipped = (
            f", {len(index.skipped)} files skipped (see {self.folder / 'corpus' / 'skipped.csv'})"
            if index.skipped
            else ""
        )
        again = " (unchanged since last time, reused)" if index.reused else ""
        self.say(f"index   {len(index.utterances)} utterances, {index.hours:.2f} h of audio{skipped}{again}")

    def plan(self) -> None:
        """Says what the cache will cost; refuses where the disk is too small, or audio too long for the teacher."""
        self._check_lengths()
        if self.config.train.targets == "online":
            self.say("plan    targets are online: no cache is needed")
            return
        if Cache.exists(self.cache) and Cache.open(self.cache).covers(self.spec):
            self.say(f"plan    the cache at {self.cache.location} has all layers and draws that are needed")
            return
        self._check_precision()
        utterances, teacher = self.utterances, self.teacher
        if self.config.cache.gpus_per_actor and torch.cuda.is_available():
            teacher = load_teacher(self.config.teacher.checkpoint, "cuda")
        cost = plan_cost(utterances, self.spec, teacher, self.cache.location)
        self.console.print(cost_table(cost))
        for line in cost_lines(cost):
            self.say(f"plan    {line}")
        needed = cost.total_bytes(self.spec.codec, self.spec.targets) - cost.there_bytes
        if cost.free_bytes is not None and needed > cost.free_bytes:
            raise ConfigError(
                f"cache.path: {self.cache.location} has {cost.free_bytes / 1e9:.1f} GB free, the cache needs about "
                f"{needed / 1e9:.1f} GB more; choose another disk, a smaller codec, fewer layers or draws"
            )

    def _check_precision(self) -> None:
        """ConfigError where the teacher can't compute what is missing."""
        if self.precision == "fp16" and not self.config.cache.gpus_per_actor:
            there = f"; the cache at {self.cache.location} is of that precision" if Cache.exists(self.cache) else ""
            raise ConfigError(f"cache.precision fp16 needs cache.gpus_per_actor; on CPUs use fp32 or bf16{there}")

    def _check_lengths(self) -> None:
        """ConfigError where the teacher can't take an utterance of the corpus."""
        teacher, samples = self.teacher, [utterance.num_samples for utterance in self.utterances]
        least, most = teacher.min_samples, teacher.max_samples or max(samples)
        for key, limit, what, wrong in (
            ("min_seconds", math.ceil(least / SAMPLE_RATE * 1000) / 1000, "shorter", sum(n < least for n in samples)),
            ("max_seconds", math.floor(most / SAMPLE_RATE * 100) / 100, "longer", sum(n > most for n in samples)),
        ):
            if wrong:
                raise ConfigError(
                    f"corpus.{key}: {teacher.name} takes audio of {least / SAMPLE_RATE:g} to {most / SAMPLE_RATE:g} s, and {wrong} "
                    f"utterances are {what}; set corpus.{key}={limit:g} to skip them"
                )

    def cache_targets(self) -> None:
        """Runs the teacher over the corpus, once; adds layers and draws that an earlier run did not need."""
        if self.config.train.targets == "online":
            self.say("cache   targets are online: skipped")
            return
        settings = self.config.cache
        complete = Cache.exists(self.cache) and Cache.open(self.cache).covers(self.spec)
        if complete and not Cache.open(self.cache).missing(self.spec):
            detail = "all shards are there, reused"
        else:
            self._check_precision()
            with self.quiet(), self.progress("cache", "utterances") as update:
                init_ray()
                keys = "cache.cpus_per_actor, cache.gpus_per_actor"
                self._check_room(keys, 1, settings.cpus_per_actor, settings.gpus_per_actor)

                def show(progress: BuildProgress) -> None:
                    note = (
                        f"{progress.seconds_done / 3600:.2f} of {progress.seconds / 3600:.2f} h, "
                        f"{progress.audio_per_second / 60:.2f} h of audio/min, teachers busy {progress.busy:.0%}"
                    )
                    update(progress.utterances_done, progress.utterances, note)

                report = build_cache(
                    self.cache.location,
                    self.spec,
                    plan_shards(self.utterances, self.spec.shard_seconds, self.teacher.num_frames),
                    _absolute_spec(self.config.teacher.checkpoint),
                    teacher_name=self.teacher.name,
                    workers=Workers(settings.actors, settings.gpus_per_actor, settings.cpus_per_actor),
                    on_progress=show,
                )
            detail = (
                f"{report.written} shards written in {report.elapsed:.0f} s "
                f"({report.seconds / max(report.elapsed, 1e-9) / 60:.2f} h of audio per minute)"
            ) + (f", {report.reused} were there" if report.reused else "")
        size = cache_bytes(Cache.open(self.cache))
        self.say(
            f"cache   {detail}: {size / 1e6:.1f} MB, {size / self._seconds / 1e3:.1f} kB per second of audio, "
            f"at {self.cache.location}"
        )

    def check_cache(self) -> None:
        """Refuses a cache that is not this run's, or whose layers and draws that this run reads are not sound."""
        cache = Cache.open(self.cache)
        if not cache.covers(self.spec):
            raise CacheError(
                f"the cache at {self.cache.location} lacks layers or draws that this run needs; run the cache stage"
            )
        problems = verify_cache(self.cache, checksums=self.config.cache.verify, needed=self.spec)
        if problems:
            more = f" and {len(problems) - 3} more problems" if len(problems) > 3 else ""
            raise CacheError(
                f"the cache is not sound: {'; '.join(problem.text for problem in problems[:3])}{more}; "
                f"`python -m teacher_cache repair {self.cache.location}` rebuilds what is damaged"
            )

    def _check_room(self, keys: str, workers: int, cpus: int, gpus: float) -> None:
        """Where so many workers don't fit into Ray: ConfigError, or of a cluster, which may grow, says what is waited for."""
        nodes = node_resources()
        if fitting(nodes, cpus, gpus) >= workers:
            return
        each = f"{cpus} cores{f' and {gpus:g} GPUs' if gpus else ''}"
        needed = f"{workers} workers of {each} each are needed" if workers > 1 else f"a worker of {each} is needed"
        if ray_is_own():
            raise ConfigError(f"{keys}: {needed}; {described(nodes)}, and gets no more")
        self.say(f"wait    for room: {needed}; {described(nodes)}")

    @property
    def _seconds(self) -> float:
        return sum(u.num_samples for u in self.utterances) / SAMPLE_RATE

    def first_student(self) -> tuple[StudentConfig, dict[str, Tensor]]:
        """The student, and those of its first weights that are the teacher's; ConfigError where there is no such student."""
        config = self.config.resolve_student(len(self.layers_of(self.teacher)), self.teacher.dim, self.teacher.patches)
        settings = self.config.train
        return config, initial_tensors(self.teacher, config, settings) if settings.starts_from_teacher else {}

    def training(self, cpu_threads: int, reserved_cpus: int = 1, *, in_process: bool = False) -> Callable[[], None]:
        """The training itself, to be called where Ray is initialised; see `train_on_ray`. It may travel to another node."""
        layers = self.layers_of(self.teacher)
        settings = self.config.train
        cached = settings.targets == "cached"
        config, tensors = self.first_student()
        initial = None
        if tensors:
            initial = self.folder / "initial.safetensors"
            write_initial(initial, tensors)
        return partial(
            train_on_ray,
            config,
            settings,
            self.folder,
            layers=layers,
            cache=self.cache.location if cached else None,
            teacher=_absolute_spec(self.config.teacher.checkpoint),
            masks=self.config.masks,
            utterances=[] if cached else self.utterances,
            cache_targets=self.config.cache.targets,
            initial=initial,
            cpu_threads=cpu_threads,
            reserved_cpus=reserved_cpus,
            in_process=in_process,
        )

    def train(self) -> None:
        """Trains the student from the cache (or with the teacher in the loop)."""
        result = self.folder / "train.json"
        if result.is_file():
            self.say(f"train   finished before ({json.loads(result.read_text())['steps']} steps), reused")
            return
        settings = self.config.train
        if settings.targets == "cached":
            self.check_cache()
        training = self.training(max(1, (os.cpu_count() or 1) // settings.workers))
        with self.quiet(), self.progress("train", "steps") as update:
            init_ray()
            self._check_room("train.workers, train.use_gpu", settings.workers, 1, float(settings.use_gpu))
            done = threading.Event()
            watcher = threading.Thread(target=_follow, args=(self.folder / "metrics.jsonl", update, done), daemon=True)
            watcher.start()
            try:
                training()
            finally:
                done.set()
                watcher.join()
        trained = json.loads(result.read_text())
        self.say(
            f"train   {trained['steps']} steps in {trained['seconds']:.0f} s: training loss {trained['first_loss']:.4f} -> "
            f"{trained['last_loss']:.4f}, validation {trained['first_validation_loss']:.4f} -> {trained['last_validation_loss']:.4f}"
        )

    def export(self) -> None:
        """Puts the best student where the service finds it."""
        best = self.folder / "checkpoints" / "best"
        if not (self.folder / "train.json").is_file():
            raise ConfigError(
                f"the run {self.config.name} has no finished training to export; run the train stage first"
            )
        export = self.folder / "export"
        names = [path.name for path in sorted(best.iterdir())]
        if export.is_dir() and all(
            (export / n).is_file() and (export / n).read_bytes() == (best / n).read_bytes() for n in names
        ):
            self.say(f"export  {export} is up to date")
            return
        temporary = self.folder / ".export.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(best, temporary)
        load_student(temporary)
        shutil.rmtree(export, ignore_errors=True)
        temporary.rename(export)
        self.say(f"export  {export}")

    def report(self) -> dict[str, Any]:
        """Writes summary.json and report.html; of a run that has no export yet, a page of what is recorded, and says so."""
        export, page = self.folder / "export", self.folder / "report.html"
        exported, metrics = export.is_dir(), RunFolder(self.folder).metrics()
        nothing = f"the run {self.config.name} has no export to report on; run the export stage first"
        if not exported and not metrics:
            raise ConfigError(nothing)
        if exported:
            student = load_student(export)
        else:
            student = Student(
                self.config.resolve_student(len(self.layers_of(self.teacher)), self.teacher.dim, self.teacher.patches)
            )
        result = self.folder / "train.json"
        trained = json.loads(result.read_text()) if exported or result.is_file() else None
        online = self.config.train.targets == "online"
        cached = not online and Cache.exists(self.cache)
        size = cache_bytes(Cache.open(self.cache)) if cached else None
        summary: dict[str, Any] = {
            "name": self.config.name,
            "hours": self.corpus.hours,
            "utterances": len(self.utterances),
            "skipped_files": len(self.corpus.skipped),
            "teacher": self.teacher.name,
            "teacher_is_random": split_options(self.config.teacher.checkpoint)[1].startswith("random:"),
            "teacher_parameters": self.teacher.num_parameters,
            "student_parameters": sum(p.numel() for p in student.parameters()),
            "targets": self.config.train.targets,
            "cache_bytes": size,
            "cache_bytes_per_second": None if size is None else size / self._seconds,
            "training": trained,
            "cache": None if online else self.cache.location,
            "export": str(export),
            "run": str(self.folder),
            "report": str(page),
        }
        if exported:
            write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        if not exported:
            maps: FeatureMaps | str = "No student is exported yet."
        elif not online and not cached:
            maps = f"The cache at {self.cache.location} is gone, and the teacher's features with it."
        elif student.config.heads == "none":
            maps = "A student without heads predicts no features that could be shown beside the teacher's."
        else:
            maps = feature_maps(student, self._validation_reader())
        write_run_report(RunFolder(self.folder), summary=summary, facts=self._facts(summary), maps=maps)
        if not exported:
            raise ConfigError(f"{nothing} ({page} shows what is recorded so far)")
        self.say(f"report  {page}")
        return summary

    def _validation_reader(self) -> TargetReader:
        layers = self.layers_of(self.teacher)
        if self.config.train.targets == "cached":
            return CacheReader(self.cache.location, "validation", layers)
        members = [utterance for utterance in self.utterances if utterance.split == "validation"]
        return OnlineReader(members, self.teacher, self.config.masks, layers)

    def _facts(self, summary: dict[str, Any]) -> dict[str, str]:
        """What the report says of the run, by name."""
        train, masks = self.config.train, self.config.masks
        batch = f"{train.batch_size} utterances" if train.batch_size else f"{train.batch_seconds:g} s of audio"
        policy = "a policy for each draw" if masks.policies else f"mask_prob {masks.policy.mask_prob:g}"
        layers = f"layers {', '.join(map(str, self.layers_of(self.teacher)))} of width {self.teacher.dim}"
        facts = {
            "corpus": f"{summary['hours']:.2f} h, {summary['utterances']:,} utterances, {summary['skipped_files']} files skipped",
            "teacher": f"{summary['teacher']}, {summary['teacher_parameters']:,} parameters, {layers}",
            "student": f"{summary['student_parameters']:,} parameters, heads included",
            "masks": f"{masks.draws} draws, {policy}, seed {masks.seed}" if masks.draws else "none",
            "training": f"{train.targets} targets, batches of {batch}, {train.accumulate} a step and worker, "
            f"{train.workers} workers, {train.precision}, {train.loss}, peak learning rate {train.learning_rate:g}",
        }
        if summary["cache_bytes"] is not None:
            facts["cache"] = (
                f"{self.spec.codec}, {self.spec.targets}, {summary['cache_bytes'] / 1e6:,.1f} MB at {summary['cache']}"
            )
        return facts | ({"model": summary["export"]} if Path(summary["export"]).is_dir() else {})


def summary_table(summary: dict[str, Any]) -> Table:
    """The short table a run ends with."""
    trained = summary["training"]
    table = Table(show_header=False, title=f"run {summary['name']}")
    random = " (RANDOM weights: shows the machinery only)" if summary["teacher_is_random"] else ""
    table.add_row(
        "audio",
        f"{summary['hours']:.2f} h, {summary['utterances']} utterances, {summary['skipped_files']} files skipped",
    )
    if summary["cache_bytes"] is not None:
        table.add_row(
            "cache",
            f"{summary['cache_bytes_per_second'] / 1e3:.1f} kB per second of audio, {summary['cache_bytes'] / 1e6:.1f} MB",
        )
    table.add_row(
        "training loss",
        f"{trained['first_loss']:.4f} first, {trained['last_loss']:.4f} last ({trained['steps']} steps)",
    )
    table.add_row(
        "validation loss", f"{trained['first_validation_loss']:.4f} first, {trained['last_validation_loss']:.4f} last"
    )
    table.add_row("teacher", f"{summary['teacher']}: {summary['teacher_parameters']:,} parameters{random}")
    table.add_row("student", f"{summary['student_parameters']:,} parameters")
    for key, name in (
        ("features", "features over HTTP"),
        ("cache", "cache at"),
        ("export", "model at"),
        ("run", "run at"),
        ("report", "report at"),
    ):
        if summary.get(key):
            table.add_row(name, str(summary[key]))
    return table


def run_stages(run: Run, stages: list[str]) -> dict[str, Any] | None:
    """Runs the named stages in their order; returns the summary where report is among them."""
    for stage, work in (
        ("index", run.index),
        ("plan", run.plan),
        ("cache", run.cache_targets),
        ("train", run.train),
        ("export", run.export),
    ):
        if stage in stages:
            work()
    return run.report() if "report" in stages else None


_CARRIED_OUT = {
    "cache": ("actors", "gpus_per_actor", "cpus_per_actor", "verify"),
    "train": (
        "trackers",
        "max_failures",
        "checkpoint_every",
        "keep_best",
        "max_skipped_steps",
        "checkpoint_activations",
    ),
}


def _recorded(path: Path) -> dict[str, Any]:
    """The configuration in a run's folder, with the defaults of keys that are new since it was written. ConfigError if damaged."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict) or not all(isinstance(tree.get(section), dict) for section in _CARRIED_OUT):
        raise ConfigError(
            f"{path} is damaged, so nobody knows whose results lie beside it; choose another name=..., or remove that folder"
        )
    try:
        return Config.model_validate(tree).model_dump(mode="json")
    except pydantic.ValidationError:
        return tree  # Of a key that is gone; comparing shows it.


def _identity(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes how a run is carried out but not what comes out."""
    tree.pop("runs", None)
    for section, keys in _CARRIED_OUT.items():
        for key in keys:
            tree[section].pop(key, None)
    return tree


def _absolute_spec(checkpoint: str) -> str:
    # Workers have other working directories.
    options, spec = split_options(checkpoint)
    return options + str(Path(spec).absolute()) if Path(spec).exists() else checkpoint


def init_ray() -> None:
    """Joins the cluster of a submitted job, or starts a Ray of this process's own; nothing where that is done."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # This process's packages must be importable in the workers of an embedded Ray; a submitted job has them shipped.
    repository = str(Path(__file__).resolve().parents[1])
    paths = os.environ.get("PYTHONPATH", "")
    if repository not in paths.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, paths]))
    for last in (False, False, True):
        try:
            ray.init(
                # A submitted job is told its cluster; anything else gets a Ray of its own, whatever else runs on this machine.
                address="local" if ray_is_own() else os.environ["RAY_ADDRESS"],
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}},
            )
        except Exception as error:  # Ray raises no kind of its own where its fixed 30 s for starting ran out.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if last:
                raise OSError(
                    "Ray did not start within its 30 s, three times; this machine is too busy: try again when less runs on it"
                ) from error
        else:
            return


def ray_is_own() -> bool:
    """Whether Ray is, or will be, of this process alone, so that no machine can join it."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def node_resources() -> list[dict[str, float]]:
    """What each of Ray's machines has in all: ``CPU``, ``GPU``, ..."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def described(nodes: Sequence[Mapping[str, float]]) -> str:
    """What Ray has, for people."""
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"Ray has {cores:g} cores and {gpus:g} GPUs on {len(nodes)} machines"


def fitting(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> int:
    """How many workers fit that take so many cores and GPUs of one machine each."""
    fits = 0
    for node in nodes:
        by_cores = int(node.get("CPU", 0)) // cpus
        fits += min(by_cores, int(node.get("GPU", 0) / gpus)) if gpus else by_cores
    return fits


def _follow(path: Path, update: Any, done: threading.Event) -> None:
    """Shows training progress from the metrics the loop writes."""
    while not done.wait(1.0):
        rows = path.read_text().splitlines() if path.is_file() else []
        for row in reversed(rows):
            record = json.loads(row) if row.endswith("}") else {}
            if record.get("kind") == "train":
                update(record["step"], record["steps"], f"loss {record['loss']:.4f}")
                break
