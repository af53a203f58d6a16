"""MkDocs hooks that generate pages: references from the schema, the commands and the docstrings, and pages stored beside the code.

The site describes the repository that contains it, whether or not `ray_distill` is installed. This is not part of the product.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from configuration import configuration, schema
from link_package import link_package
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
IN_DOCS = re.compile(r"\]\(\.\./docs/")
IN_BENCHMARKS = re.compile(r"\]\((?:\.\./)+benchmarks/README\.md")


@event_priority(100)  # mkdocstrings looks for the folder in its own `on_config`.
def on_config(config: MkDocsConfig) -> None:
    """Make `ray_distill` importable here, and readable for mkdocstrings."""
    if str(REPOSITORY) not in sys.path:  # MkDocs restores sys.path after it has loaded this module.
        sys.path.insert(0, str(REPOSITORY))
    link_package(REPOSITORY / "build" / "linked")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages: dict[str, Callable[[], str]] = {
        "reference/configuration.md": configuration,
        "reference/schema.json": schema,
        "reference/commands.md": commands,
        "reference/cache.md": lambda: modules("The cache, from Python", CACHE),
        "reference/student.md": lambda: modules("The student, from Python", STUDENT),
        "reference/job.md": lambda: modules("The job and the service, from Python", JOB),
        "benchmarks.md": benchmarks,
        "changelog.md": lambda: (REPOSITORY / "CHANGELOG.md").read_text(),
    }
    for name, make in pages.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to `benchmarks/README.md`, which work in the repository, to the site's page of benchmarks."""
    up = "../" * page.file.src_uri.count("/")
    return IN_BENCHMARKS.sub(f"]({up}benchmarks.md", markdown)


CACHE = (
    "ray_distill.teacher_cache.teachers",
    "ray_distill.teacher_cache.storage.cache_spec",
    "ray_distill.teacher_cache.masks",
    "ray_distill.teacher_cache.storage.shard_plan",
    "ray_distill.teacher_cache.build.build_cache",
    "ray_distill.teacher_cache.build.shard_workers",
    "ray_distill.teacher_cache.storage.failed_utterances",
    "ray_distill.teacher_cache.storage.cache",
    "ray_distill.teacher_cache.maintenance.verify",
    "ray_distill.teacher_cache.maintenance.repair",
    "ray_distill.teacher_cache.reader",
    "ray_distill.teacher_cache.targets.target_batch",
    "ray_distill.teacher_cache.codecs",
)
STUDENT = (
    "ray_distill.student.model.student_config",
    "ray_distill.student.model.student",
    "ray_distill.student.objectives.objective",
    "ray_distill.student.objectives.layer_prediction",
    "ray_distill.student.objectives.layer_loss",
    "ray_distill.student.objectives.temporal_relation",
    "ray_distill.student.training.spec_augment",
    "ray_distill.student.model.time_reduction",
    "ray_distill.student.training.train_settings",
    "ray_distill.student.checkpoints",
    "ray_distill.student.training.training_loop",
)
JOB = (
    "ray_distill.pipeline.config",
    "ray_distill.pipeline.composition.sections",
    "ray_distill.pipeline.ablation.definition",
    "ray_distill.pipeline.reports.ablation_report",
    "ray_distill.pipeline.corpus.index",
    "ray_distill.pipeline.planning.cache_cost",
    "ray_distill.pipeline.planning.cluster",
    "ray_distill.pipeline.planning.cluster_plan",
    "ray_distill.serve.app",
    "ray_distill.serve.settings",
)


def modules(title: str, names: tuple[str, ...]) -> str:
    """Return a page with the docstrings of some modules."""
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


def _cell(text: str, code: bool = True) -> str:
    text = text.replace("|", "\\|")
    return f"`{text}`" if code and text not in ("required", "none", "see below") else text


def commands() -> str:
    """Every command with its arguments and options, from the application."""
    from ray_distill.command_line import application

    root = typer.main.get_group(application)
    lines = [
        "# Commands",
        "",
        "Generated from the code. `ray-distill COMMAND --help` shows the same in a terminal. In the repository without installation,",
        "`python pipeline/run.py` is the same as `ray-distill`; everywhere, `python -m ray_distill` is too. `ray-distill-cache` and",
        "`python -m teacher_cache` are the same as `ray-distill cache`, and `ray-distill-serve` and `python -m serve` as",
        "`ray-distill serve`. `make demo` runs `ray-distill demo`.",
        "",
        _paragraph(root.epilog),
        "",
        "`ray-distill --install-completion` installs the completion of commands, options and recipe names for the shell.",
    ]
    for name, command in root.commands.items():
        lines += ["", f"## ray-distill {name}", "", _paragraph(command.help)]
        inner = getattr(command, "commands", None)
        for subcommand, function in (inner or {}).items():
            lines += [
                "",
                f"### ray-distill {name} {subcommand}",
                "",
                _paragraph(function.help),
                "",
                *_parameters(function),
            ]
        if inner is None:
            lines += ["", *_parameters(command)]
    return "\n".join(lines) + "\n"


def _parameters(command: Any) -> list[str]:
    """Return a table of the arguments and options of a command."""
    lines = ["| argument or option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        name = (
            ", ".join(parameter.opts) if parameter.param_type_name == "option" else parameter.metavar or parameter.name
        )
        default = parameter.default() if callable(parameter.default) else parameter.default
        shown = "required" if parameter.required else "none" if default in (None, "", (), []) else str(default)
        meaning = _cell(_paragraph(getattr(parameter, "help", None)), code=False)
        lines.append(f"| `{_cell(name, code=False)}` | {_cell(shown)} | {meaning} |")
    return lines


def _paragraph(text: str | None) -> str:
    return " ".join(re.sub(r"``(.+?)``", r"`\1`", text or "").split())


def benchmarks() -> str:
    """benchmarks/README.md, and every result file with what made it."""
    page = IN_DOCS.sub("](", (REPOSITORY / "benchmarks" / "README.md").read_text())
    lines = ["", "## Results", "", "| file | command | machine | commit |", "|---|---|---|---|"]
    results = REPOSITORY / "benchmarks" / "results"
    for path in sorted(results.rglob("*.json")):
        record = json.loads(path.read_text())
        machine = record.get("machine", {})
        where = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('gpu') or 'no GPU'}"
        command = re.sub(r"/(?:[\w.-]+/)+", "", record.get("command", "?").replace("benchmarks/", "benchmarks\\"))
        lines.append(
            f"| `{path.relative_to(results)}` | `{command.replace(chr(92), '/')}` | {where} | `{record.get('commit', '?')}` |"
        )
    return page + "\n".join(lines) + "\n"
