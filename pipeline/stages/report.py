"""The report stage: a summary and a page of the run's results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from ray_distill.pipeline.composition.suggestions import enumerated
from ray_distill.pipeline.config import ConfigError
from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.probing.task import PHONES_FILE, read_task
from ray_distill.pipeline.ray_session import counted
from ray_distill.pipeline.reports.explained_variance import explained_variance, shown_share
from ray_distill.pipeline.reports.feature_maps import FeatureMaps, feature_maps
from ray_distill.pipeline.reports.run_report import write_run_report
from ray_distill.pipeline.reports.training_charts import rows_of_kind
from ray_distill.pipeline.run_starts import read_starts
from ray_distill.pipeline.stages.run import Run, TeacherRun
from ray_distill.pipeline.stages.train import pruning_record, teacher_caches
from ray_distill.student import Student, load_student
from ray_distill.student.objectives.several_teachers import SeveralTeachers
from ray_distill.student.training.target_source import several_readers
from ray_distill.student.training.train_state import saved_batch_seconds
from ray_distill.teacher_cache.frames import shown_audio
from ray_distill.teacher_cache.storage.cache import Cache, cache_bytes
from ray_distill.teacher_cache.storage.failed_utterances import failed_utterances
from ray_distill.teacher_cache.targets.domains import counted_domains, shown
from ray_distill.teacher_cache.targets.online_targets import OnlineReader
from ray_distill.teacher_cache.targets.student_frames import open_reader
from ray_distill.teacher_cache.targets.target_batch import TargetReader


def report_run(run: Run) -> dict[str, Any]:
    """Write the run's summary and HTML report, and return the summary.

    If there is no export, write a page of the metrics so far, then raise ConfigError.

    Raises:
        ConfigError: The run has no export. Nothing is written if it has no metrics either.
    """
    folder = run.folder
    exported, metrics = folder.export.is_dir(), folder.metrics()
    no_export = f"the run {run.config.name} has no export to report on; run the export stage first"
    if not exported and not metrics:
        raise ConfigError(no_export)
    if exported:
        student = load_student(folder.export)
    else:
        student = Student(run.config.resolve_student(len(run.layers), run.target_dim, run.teacher.patches))
    summary = _summarise(run, student)
    if exported:
        write_text(folder.summary_file, json.dumps(summary, indent=2) + "\n")
    maps = _feature_maps(run, student if exported else None)
    write_run_report(folder, summary=summary, facts=_facts(run, summary), maps=maps)
    if not exported:
        raise ConfigError(f"{no_export} ({folder.report} shows the metrics so far)")
    run.say(f"report  {folder.report}")
    return summary


def _summarise(run: Run, student: Student) -> dict[str, Any]:
    """Return the summary of the run."""
    online = run.config.train.targets == "online"
    metrics = run.folder.metrics()
    explained = explained_variance(metrics)
    sizes = [
        cache_bytes(Cache.open(part.cache)) if not online and Cache.exists(part.cache) else None for part in run.parts
    ]
    size = None if None in sizes else sum(filter(None, sizes))
    failed = [failed_utterances(Cache.open(part.cache), part.spec) for part in run.parts] if size is not None else []
    return {
        "name": run.config.name,
        "hours": run.corpus.hours,
        "utterances": len(run.utterances),
        "skipped_files": len(run.corpus.skipped) - run.corpus.num_unused,
        "failed_utterances": None if size is None else sum(map(len, failed)),
        "teacher": enumerated(part.teacher.name for part in run.parts),
        "teacher_source": run.checkpoint,
        "teacher_is_random": run.teacher_is_random,
        "random_teachers": [part.teacher.name for part in run.parts if part.teacher_is_random],
        "teacher_parameters": sum(part.teacher.num_parameters for part in run.parts),
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "targets": run.config.train.targets,
        "cache_bytes": size,
        "cache_bytes_per_second": None if size is None else size / run.seconds,
        "training": run.folder.result(),
        "batch_seconds": saved_batch_seconds(run.folder.path),
        "constant_loss": None if explained is None else explained.constant_loss,
        "explained_variance": None if explained is None else explained.share,
        "starts": read_starts(run.folder.starts_file),
        "resumed": [{key: row[key] for key in ("step", "time")} for row in rows_of_kind(metrics, "resumed")],
        "cache": None if online else run.cache.location,
        "audio": None if online else _place_of_audio(run),
        "export": str(run.folder.export),
        "run": str(run.folder.path),
        "report": str(run.folder.report),
        "pruning": pruning_record(run.folder),
    } | _teachers(run, sizes, failed, metrics)


def _teachers(
    run: Run, sizes: Sequence[int | None], failed: Sequence[Mapping[str, str]], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the facts of each of several teachers as ``teachers``; nothing if there is one.

    Args:
        run: The run.
        sizes: Bytes of each teacher's cache; None where it does not exist.
        failed: Utterances that each cache lacks, with reasons; empty if a cache does not exist.
        metrics: Rows of the metrics.
    """
    objective = run.settings().chosen_objective
    if not run.config.teachers:
        return {}
    validation = rows_of_kind(metrics, "validation")
    last = validation[-1] if validation else {}
    found = []
    for k, part in enumerate(run.parts):
        assert isinstance(part, TeacherRun)
        settings, owns = objective, True  # With one target for all teachers.
        if isinstance(objective, SeveralTeachers):
            terms = {term.name: term.settings for term in objective.terms}
            settings = terms.get(part.name, part.entry.objective or run.config.train.chosen_objective)
            owns = k == run.config.owner
        found.append(
            {
                "name": part.name,
                "teacher": part.teacher.name,
                "teacher_source": part.checkpoint,
                "teacher_parameters": part.teacher.num_parameters,
                "layers": list(part.layers),
                "dim": part.teacher.dim,
                "objective": settings.objective,
                "objective_options": settings.changed_options(),
                "weight": part.entry.weight,
                "heads_in_the_student": owns and settings.uses_heads,
                "cache": part.cache.location,
                "cache_bytes": sizes[k],
                "audio": _place_of_audio(part),
                "utterances": len(part.utterances),
                "failed_utterances": len(failed[k]) if failed else None,
                "last_validation_loss": last.get(f"teacher_loss_{part.name}"),
                "last_validation_loss_by_domain": {
                    domain: last.get(f"teacher_loss_{part.name}.{domain}")
                    for domain in counted_domains(part.entry.weight)
                },
            }
        )
    return {"teachers": found}


def _feature_maps(run: Run, student: Student | None) -> FeatureMaps | str:
    """Return features of the exported student and of the teacher, or a sentence on why the report has none."""
    if student is None:
        return "No student is exported yet."
    if run.config.train.targets == "cached" and not Cache.exists(run.main.cache):
        return f"The cache at {run.main.cache.location} no longer exists, so the teacher's features can't be shown."
    if student.config.heads == "none":
        return "A student without heads predicts no features that could be shown beside the teacher's."
    maps = feature_maps(student, _validation_reader(run))
    return replace(maps, phones=_phones(run, maps.utterance))


def _phones(run: Run, utterance: str) -> Sequence[str]:
    """Return the phone of each frame of an utterance if the corpus contains ``phones.csv``, else nothing."""
    manifest = run.config.corpus.path / PHONES_FILE
    if not manifest.is_file():
        return ()
    try:
        task = read_task(manifest)
    except ValueError as error:
        run.say(f"report  no phones are shown, since {error}")
        return ()
    audio = next(found.address for found in run.utterances if found.id == utterance)
    labels = (
        example.target for example in task.examples if example.address.with_file(example.path.absolute()) == audio
    )
    return next(labels, ()) if task.kind == "frame" else ()


def _validation_reader(run: Run) -> TargetReader:
    if run.config.train.aggregate != "heads":
        return several_readers(
            teacher_caches(run), run.config.masks, fresh=False, aggregate=run.config.train.aggregate
        )[1]
    if run.config.train.targets == "cached":
        main = run.main
        return open_reader(
            main.cache.location, "validation", run.layers, audio=main.audio, frames=main.config.teacher.frames
        )
    members = run.utterances.of_split("validation")
    rule = run.config.teacher.frames
    return OnlineReader(
        members, run.teacher, run.config.masks, run.layers, run.config.cache.targets, run.precision, rule
    )


def _facts(run: Run, summary: dict[str, Any]) -> dict[str, str]:
    """Return what the report's header states, by name."""
    train, masks = run.config.train, run.config.masks
    batch = train.describe_batch(summary["batch_seconds"])
    policy = "one policy per draw" if masks.policies else f"mask_prob {masks.policy.mask_prob:g}"
    layers = f"layers {', '.join(map(str, run.layers))} of width {run.teacher.dim}"
    loss = "" if run.config.teachers else f"{train.loss}, "  # Several teachers have one each.
    facts = {
        "corpus": f"{shown_audio(summary['hours'] * 3600)}, {summary['utterances']:,} utterances, {_left_out(summary)}",
        "teacher": f"{summary['teacher']}, {summary['teacher_parameters']:,} parameters, {layers}",
        "student": f"{summary['student_parameters']:,} parameters, heads included",
        "masks": f"{counted(masks.draws, 'draw')}, {policy}, seed {masks.seed}" if masks.draws else "none",
        "training": f"{train.targets} targets, batches of {batch}, {train.accumulate} per step and worker, "
        f"{counted(train.workers, 'worker')}, {train.precision}, {loss}peak learning rate {train.learning_rate:g}",
    }
    if (pruned := summary["pruning"]) is not None:
        facts["pruning"] = (
            f"{pruned['step']:,} steps, after which {pruned['parameters']:,} of {pruned['parameters_before']:,} parameters without "
            f"heads were left (sparsity {pruned['sparsity']:.3f})"
        )
    if summary["constant_loss"] is not None:
        shares = list(summary["explained_variance"].items())
        facts["loss"] = (
            f"{summary['constant_loss']:.4g} is the validation loss of the best constant prediction, the mean of each layer's "
            "validation targets"
        ) + (
            f"; variance explained at the last validation: {shown_share(shares[-1][1], shares[-1][0])}"
            if shares
            else ""
        )
    if summary["starts"]:
        last = summary["starts"][-1]
        facts["made by"] = f"{last['command']}, {last['code']}, started {summary['starts'][0]['time']}"
        if len({start["code"] for start in summary["starts"]}) > 1:
            facts["made by"] += f" with {summary['starts'][0]['code']}"
    if summary["resumed"]:
        facts["interrupted"] = "resumed " + ", ".join(
            f"at step {row['step']:,} ({row['time']})" for row in summary["resumed"]
        )
    for one in summary.get("teachers", ()):
        heads = ", which the exported heads predict" if one["heads_in_the_student"] else ""
        facts[f"teacher {one['name']}"] = (
            f"{one['teacher']}, {one['teacher_parameters']:,} parameters, layers {', '.join(map(str, one['layers']))} of width "
            f"{one['dim']}, objective {one['objective']}{_listed(one['objective_options'])}, weight {shown(one['weight'])}{heads}"
            + (
                f"; cache of {one['cache_bytes'] / 1e6:,.1f} MB at {one['cache']}{_beside(one['audio'])}"
                if one["cache_bytes"] is not None
                else ""
            )
        )
    if train.aggregate != "heads":
        what = "average" if train.aggregate == "average" else "channels side by side"
        facts["targets"] = f"the {what} of the teachers' layers, of width {run.target_dim}"
    if summary.get("teachers"):
        del facts["teacher"]
    elif summary["cache_bytes"] is not None:
        facts["cache"] = (
            f"{run.spec.codec}, {run.spec.targets}, {summary['cache_bytes'] / 1e6:,.1f} MB at {summary['cache']}"
            f"{_beside(summary['audio'])}"
        )
    return facts | ({"model": summary["export"]} if run.folder.export.is_dir() else {})


def _place_of_audio(run: Run) -> str | None:
    """Return where the audio is that the cache of a run does not hold; None if it does."""
    cache = run.config.cache
    return str(run.config.corpus.model_dump(mode="json")["path"]) if cache.audio == "source" else cache.audio_location


def _beside(audio: str | None) -> str:
    return "" if audio is None else f", beside the audio at {audio}"


def _listed(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else ""


def _left_out(summary: Mapping[str, Any]) -> str:
    """Return the numbers of skipped files and failed utterances as a text."""
    skipped = f"{counted(summary['skipped_files'], 'file')} skipped"
    failed = summary.get("failed_utterances")  # None without a cache, and missing in summaries of earlier versions.
    return f"{skipped}, {counted(failed, 'utterance')} failed" if failed else skipped


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the short table that a run ends with."""
    trained = summary["training"]
    table = Table(show_header=False, title=f"run {summary['name']}")
    some = summary.get("random_teachers")  # Missing in summaries of earlier versions.
    random = f" (RANDOM weights: {enumerated(some)})" if some else ""
    if summary["teacher_is_random"]:
        random = " (RANDOM weights: features are meaningless)"
    table.add_row(
        "audio",
        f"{shown_audio(summary['hours'] * 3600)}, {summary['utterances']} utterances, {_left_out(summary)}",
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
    if summary.get("explained_variance"):
        layer, share = list(summary["explained_variance"].items())[-1]
        table.add_row(
            "explained variance",
            f"{shown_share(share, layer)}; a constant has loss {summary['constant_loss']:.4f}",
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
            places = {one["name"]: one["cache"] for one in summary.get("teachers", ())} if key == "cache" else {}
            table.add_row(name, "\n".join(f"{one}: {place}" for one, place in places.items()) or str(summary[key]))
    return table
