"""The commands and the Python code in the documentation are those of the product."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import typer

from ray_distill.command_line import application
from ray_distill.pipeline.composition.config_tree import SHORT_KEYS
from ray_distill.pipeline.composition.sections import TeacherEntry
from ray_distill.pipeline.config import Config
from ray_distill.pipeline.recipes import find_recipe
from ray_distill.student import Student, StudentConfig, save_student
from ray_distill.student.exporters.huggingface import export_huggingface
from ray_distill.teacher_cache.storage.cache_spec import CacheSpec

from ..tiny import TEACHER, tiny_student

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *(REPOSITORY / "docs").rglob("*.md"),
]
RECIPES = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SECTIONS: dict[str, Any] = {
    name: Config.model_fields[name].annotation for name in ("corpus", "teacher", "masks", "cache", "train")
} | {"student": StudentConfig, "teachers": TeacherEntry}


def code(page: Path) -> str:
    """Return the fenced and inline code of a page with continued lines joined, or the comments of a YAML file."""
    text = page.read_text()
    if page.suffix == ".yaml":
        return "\n".join(re.findall(r"#\s*(.*)", text))
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.*)", text, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*fenced, *indented, *inline]).replace("\\\n", " ")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in [*PAGES, *RECIPES]:
        for line in code(page).splitlines():
            command = re.search(r"(?:^|[\s`])(?:ray-distill|python pipeline/run\.py) [-a-z].*", line)
            if command:
                found.append((str(page.relative_to(REPOSITORY)), command[0].strip(" `")))
    return found


def test_every_documented_command_exists_with_its_options() -> None:
    group: Any = typer.main.get_command(application)
    checked = set()
    for page, line in commands():
        words = shlex.split(line, comments=True)
        words = words[2:] if words[0] == "python" else words[1:]
        if words[0] in ("--help", "--version"):
            continue
        if words[0].startswith("-"):
            words = ["run", *words]
        command = group
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            name = words.pop(0)
            assert all(part in command.commands for part in name.split("|")), (
                f"{page}: {line!r} has no command {name!r}"
            )
            command = command.commands[name.split("|")[0]]
            checked.add(name)
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for word, value in zip(words, [*words[1:], ""], strict=False):
            option, _, given = word.partition("=")
            if option.startswith("--"):
                assert option in known, f"{page}: {line!r} has no option {option}"
            recipe_first = command.name == "run" and word == words[0] and not word.startswith("-") and "=" not in word
            if recipe_first and not word.isupper():
                assert find_recipe(word).is_file(), f"{page}: {line!r} names no recipe"
            if option in ("--config", "--cluster"):
                assert find_recipe(given or value).is_file(), f"{page}: {line!r} names no recipe"
            section, _, key = re.sub(r"^teachers\.\w+", "teachers", option).partition(".")
            if given and option in SHORT_KEYS:
                continue
            if given and section in SECTIONS:
                assert key.split(".")[0] in SECTIONS[section].model_fields, f"{page}: {line!r} has no key {option}"
            elif given and not option.startswith("-"):
                assert option in Config.model_fields, f"{page}: {line!r} has no key {option}"
    assert {"run", "ablate", "export", "profile", "probe", "convert", "cache", "serve", "plan-cluster"} <= checked


@pytest.mark.slow
def test_the_tutorial_runs(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Python with two recordings of each voice, a random student and two steps; its commands are run by other tests."""
    pytest.importorskip("espeakng_loader", reason="needs espeak-ng (the dev extra has it)")
    page = (REPOSITORY / "docs" / "tutorial.md").read_text()
    speech, train, hear, store = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "UTTERANCES = 40" in speech and "STEPS = 400" in train
    monkeypatch.chdir(tmp_path)
    exec(speech.replace("UTTERANCES = 40", "UTTERANCES = 2"), {})
    assert len(list(Path("digits").rglob("*.flac"))) == len(list(Path("digits").rglob("*.txt"))) == 24
    export_huggingface(Student(tiny_student()), Path("digits-hf"), {}, "heads")
    names: dict[str, object] = {}
    exec(train.replace("STEPS = 400", "STEPS = 2"), names)
    exec(hear, names)
    assert re.search(r"\d+ of 32 words in their place", capsys.readouterr().out)
    exec(store, names)


def test_the_python_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_cache: Callable[..., CacheSpec]
) -> None:
    make_cache(tmp_path / "caches" / "demo")
    save_student(Student(tiny_student()), tmp_path / "runs" / "demo" / "export")
    (tmp_path / "runs" / "demo" / "config.yaml").write_text("")
    soundfile.write(tmp_path / "speech.flac", torch.randn(16_000).mul(0.1).numpy(), 16_000)
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "how-to" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("/models/hubert_base_ls960.pt", TEACHER), names)
        for expression, shape, kind in re.findall(
            r"^([\w.]+) +# \(([\w, ]+)\)(?: (float32|int64|bool))?", block, re.MULTILINE
        ):
            value = eval(expression, names)
            if value is not None:
                assert value.ndim == len([part for part in shape.split(",") if part.strip()]), expression
                assert not kind or str(value.dtype) == f"torch.{kind}", expression
    assert names["similarity"].shape == (1, 2, 49)  # type: ignore[attr-defined]
