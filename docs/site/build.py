"""What mkdocs makes at build time: references from the schema, the commands and the docstrings, and pages kept beside the code.

A module of mkdocs' ``hooks``; it is no part of the product.
"""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

import click
import pydantic
import typer
from link_package import link_package
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pictures import PICTURES

SECTIONS = ("corpus", "teacher", "masks", "cache", "train")
IN_DOCS = re.compile(r"\]\(\.\./docs/")
IN_BENCHMARKS = re.compile(r"\]\(\.\./benchmarks/README\.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    link_package(REPOSITORY / "build" / "linked")
    pages: dict[str, Callable[[], str]] = {
        "reference/configuration.md": configuration,
        "reference/commands.md": commands,
        "reference/cache.md": lambda: modules("The cache, from Python", CACHE),
        "reference/student.md": lambda: modules("The student, from Python", STUDENT),
        "reference/job.md": lambda: modules("The job and the service, from Python", JOB),
        "benchmarks.md": benchmarks,
        "changelog.md": lambda: (REPOSITORY / "CHANGELOG.md").read_text(),
    }
    for name, drawing in PICTURES.items():
        files.append(File.generated(config, f"concepts/{name}.svg", content=drawing))
    for name, make in pages.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pages of docs/ link to the benchmarks where the repository has them; the site has a page for them."""
    return IN_BENCHMARKS.sub("](benchmarks.md", markdown)


CACHE = (
    "ray_distill.teacher_cache.teachers",
    "ray_distill.teacher_cache.storage.cache_spec",
    "ray_distill.teacher_cache.masks",
    "ray_distill.teacher_cache.storage.shard_plan",
    "ray_distill.teacher_cache.build.build_cache",
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
    "ray_distill.pipeline.ablation.definition",
    "ray_distill.pipeline.reports.ablation_report",
    "ray_distill.pipeline.corpus",
    "ray_distill.pipeline.planning.cache_cost",
    "ray_distill.pipeline.planning.cluster_plan",
    "ray_distill.serve.app",
)


def modules(title: str, names: tuple[str, ...]) -> str:
    """A page of docstrings."""
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) + "\n"


def configuration() -> str:
    """Every key of a run's YAML with its type, default and meaning, from the schema."""
    from ray_distill.pipeline.config import Config
    from ray_distill.student.model.student_config import StudentConfig

    lines = [
        "# Configuration",
        "",
        "Made from the schema. A run is one YAML file; `section.key=value` on the command line changes a key. Unknown keys and",
        "impossible combinations are refused before any work. `configs/` has the published recipes.",
        "",
        *_keys("", Config, skip=(*SECTIONS, "student")),
    ]
    for section in SECTIONS:
        lines += [f"## {section}", "", *_keys(section, Config.model_fields[section].annotation)]
    lines += [
        "## student",
        "",
        "`encoder_layers` and `target_dim` left out, or `teacher`, take what the teacher has.",
        "",
        *_keys("student", StudentConfig),
    ]
    return "\n".join(lines) + "\n"


def _keys(section: str, model: Any, skip: tuple[str, ...] = ()) -> list[str]:
    meanings = _attributes(inspect.getdoc(model) or "")
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested = []
    for name, kind, default in _fields(model):
        if name in skip:
            continue
        key = f"{section}.{name}" if section else name
        if name not in meanings:
            raise ValueError(f"{model.__name__}.{name} has no line under 'Attributes' of its class")
        if isinstance(kind, type) and (issubclass(kind, pydantic.BaseModel) or dataclasses.is_dataclass(kind)):
            nested += ["", f"### {key}", "", *_keys(key, kind)]
        lines.append(f"| `{key}` | {_cell(_type(kind))} | {_cell(default)} | {_cell(meanings[name], code=False)} |")
    return [*lines, *nested, ""]


def _fields(model: Any) -> Iterator[tuple[str, Any, str]]:
    if issubclass(model, pydantic.BaseModel):
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
            yield name, field.annotation, default
    else:
        for field in dataclasses.fields(model):
            default = "required" if field.default is dataclasses.MISSING else _default(field.default)
            yield field.name, field.type, default


def _default(value: Any) -> str:
    if isinstance(value, pydantic.BaseModel) or dataclasses.is_dataclass(value):
        return "see below"
    return "none" if value is None else str(value)


def _type(kind: Any) -> str:
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    text = re.sub(r"\b(?:typing|pathlib|ray_distill(?:\.\w+)+)\.", "", text)
    return text.replace("Literal[", "one of [").replace("NoneType", "None")


def _cell(text: str, code: bool = True) -> str:
    text = text.replace("|", "\\|")
    return f"`{text}`" if code and text not in ("required", "none", "see below") else text


def _attributes(doc: str) -> dict[str, str]:
    """Names and meanings of a Google docstring's ``Attributes``; ``a, b: meaning`` gives it to both."""
    found: dict[str, str] = {}
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    names: list[str] = []
    for line in (section[1] if section else "").splitlines():
        entry = re.match(r"    ([a-z_]\w*(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2].strip())
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: re.sub(r"``(.+?)``", r"`\1`", text) for name, text in found.items()}


def commands() -> str:
    """Every command with its options, from the typer applications."""
    import ray_distill.pipeline.demo.demo
    import ray_distill.pipeline.run
    import ray_distill.serve.__main__
    import ray_distill.teacher_cache.__main__

    def one(function: Callable[..., Any]) -> typer.Typer:
        app = typer.Typer(add_completion=False)
        app.command()(function)
        return app

    def of(module: Any, function: str) -> typer.Typer:
        app = getattr(module, "app", None)
        return app if isinstance(app, typer.Typer) else one(getattr(module, function))

    applications = (
        ("ray-distill", "python pipeline/run.py", of(ray_distill.pipeline.run, "main")),
        *(
            (f"ray-distill {name}", f"python pipeline/run.py {name}", one(importlib.import_module(module).command))
            for name, module in ray_distill.pipeline.run.COMMANDS.items()
        ),
        ("ray-distill-cache", "python -m teacher_cache", ray_distill.teacher_cache.__main__.app),
        ("ray-distill-serve", "python -m serve", of(ray_distill.serve.__main__, "serve")),
        ("make demo", "python pipeline/demo/demo.py", of(ray_distill.pipeline.demo.demo, "main")),
    )
    lines = [
        "# Commands",
        "",
        "Made from the code. An installed package has the first name, the repository the second.",
    ]
    for installed, here, app in applications:
        command = typer.main.get_command(app)
        lines += ["", f"## {installed}", "", f"`{here}`", "", _paragraph(command.help)]
        subcommands = getattr(command, "commands", None)
        for name, inner in (subcommands or {"": command}).items():
            if subcommands:
                lines += ["", f"### {installed} {name}", "", _paragraph(inner.help)]
            lines += ["", *_parameters(inner)]
    return "\n".join(lines) + "\n"


def _parameters(command: click.Command) -> list[str]:
    lines = ["| option or argument | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        name = ", ".join(parameter.opts) if parameter.param_type_name == "option" else str(parameter.name)
        default = parameter.default() if callable(parameter.default) else parameter.default
        shown = "required" if parameter.required else "none" if default in (None, "", (), []) else str(default)
        shown = shown.replace(f"{REPOSITORY}/", "")
        lines.append(
            f"| `{_cell(name, code=False)}` | {_cell(shown)} | {_cell(getattr(parameter, 'help', None) or '', code=False)} |"
        )
    return lines


def _paragraph(text: str | None) -> str:
    return " ".join(re.sub(r"``(.+?)``", r"`\1`", text or "").split())


def benchmarks() -> str:
    """benchmarks/README.md, and every result file with what made it."""
    page = IN_DOCS.sub("](", (REPOSITORY / "benchmarks" / "README.md").read_text())
    lines = ["", "## Results", "", "| file | command | machine | commit |", "|---|---|---|---|"]
    for path in sorted((REPOSITORY / "benchmarks" / "results").glob("*.json")):
        record = json.loads(path.read_text())
        machine = record.get("machine", {})
        where = f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('gpu') or 'no GPU'}"
        command = re.sub(r"/(?:[\w.-]+/)+", "", record.get("command", "?").replace("benchmarks/", "benchmarks\\"))
        lines.append(f"| `{path.name}` | `{command.replace(chr(92), '/')}` | {where} | `{record.get('commit', '?')}` |")
    return page + "\n".join(lines) + "\n"
