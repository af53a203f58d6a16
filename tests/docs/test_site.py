"""The documentation builds in strict mode, its links have targets, and its quotations match the code."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from ray_distill.pipeline.composition.sections import CacheSection, CorpusSection
from ray_distill.pipeline.config import Config
from ray_distill.student.exporters.s3prl import usable_name
from ray_distill.student.model.student_config import StudentConfig
from ray_distill.student.training.train_settings import TrainSettings
from ray_distill.teacher_cache.masks import MaskPolicy

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PACKAGES = ("pipeline", "teacher_cache", "student", "serve")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """The anchors, links and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # Its links are relative to the root of the published site.
        for link in page.links:
            if urlsplit(link).scheme in ("http", "https", "mailto", "data", "javascript"):
                continue
            target, anchor = urldefrag(unquote(link))
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            checked += 1
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].names | {"__toc"}):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert checked > 500 and not broken, broken[:20]


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        html = path.read_text()
        fetched = re.findall(r'<(?:script|img)[^>]*src="(https?:[^"]*)"', html)
        fetched += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?:[^"]*)"', html)
        assert not fetched, f"{path}: {fetched}"
        assert page.text


def test_every_concept_has_a_diagram_drawn_from_its_source() -> None:
    spec = importlib.util.spec_from_file_location("draw_diagrams", DOCS / "site" / "draw_diagrams.py")
    assert spec is not None and spec.loader is not None
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    concepts = sorted((DOCS / "concepts").glob("*.md"))
    assert [path.stem for path in drawn.diagrams()] == [path.stem for path in concepts]
    for concept, source in zip(concepts, drawn.diagrams(), strict=True):
        assert re.findall(r"!\[[^]]+\]\(([\w./]+\.svg)\)", concept.read_text()) == [f"../pictures/{concept.stem}.svg"]
        drawing = (DOCS / "pictures" / f"{concept.stem}.svg").read_text()
        assert f"<!-- sources {drawn.source_digest(source)} -->" in drawing, "run docs/site/draw_diagrams.py"
        assert "prefers-color-scheme:dark" in drawing


@pytest.mark.slow
def test_configuration_reference_has_every_key(site: Path) -> None:
    html = (site / "reference" / "configuration" / "index.html").read_text()
    for prefix, model in (
        ("", Config),
        ("corpus.", CorpusSection),
        ("cache.", CacheSection),
        ("train.", TrainSettings),
        ("student.", StudentConfig),
        ("masks.policy.", MaskPolicy),
    ):
        fields = getattr(model, "model_fields", None) or model.__dataclass_fields__  # type: ignore[attr-defined]
        for name in fields:
            if prefix or name in ("name", "runs"):
                assert f"<code>{prefix}{name}</code>" in html, prefix + name


@pytest.mark.slow
def test_command_reference_has_commands_and_options(pages: dict[Path, Page], site: Path) -> None:
    text = pages[site / "reference" / "commands" / "index.html"].text
    for name in (
        "ray-distill",
        "ray-distill cache verify",
        "ray-distill cache repair",
        "ray-distill plan-cluster",
        "ray-distill export",
        "make demo",
    ):
        assert name in text
    for option in ("--config", "--stages", "--deep", "--cluster", "--max-bytes"):
        assert option in text
    assert str(REPOSITORY) not in text, "a path of this machine"


@pytest.mark.slow
def test_benchmarks_page_lists_every_result(pages: dict[Path, Page], site: Path) -> None:
    text = pages[site / "benchmarks" / "index.html"].text
    results = REPOSITORY / "benchmarks" / "results"
    for result in results.rglob("*.json"):
        assert str(result.relative_to(results)) in text


def sentences_of_the_code() -> str:
    """Return all string literals, one per line, with `...` in place of the values in f-strings."""
    found = []
    for package in ("ray_distill", *PACKAGES):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    headings = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    code = sentences_of_the_code()
    assert len(headings) > 20
    for heading in headings:
        for quoted in re.split(r"`(?:, | and | or )`", heading):
            assert quoted.removeprefix("... ") in code, f"no message contains {quoted!r}"


def test_keys_and_files_that_pages_name_exist() -> None:
    known = {f"cache.{n}" for n in CacheSection.model_fields} | {f"train.{n}" for n in TrainSettings.model_fields}
    known |= {f"student.{n}" for n in StudentConfig.model_fields} | {f"corpus.{n}" for n in CorpusSection.model_fields}
    own = [*(DOCS / "concepts").glob("*.md"), *(DOCS / "how-to").glob("*.md")]
    own += [*DOCS.glob("*.md"), DOCS / "in-depth" / "scaling.md"]
    for page in own:
        text = page.read_text()
        for key in re.findall(r"\b((?:cache|train|student|corpus)\.[a-z_]+)=", text):
            assert key in known, f"{page.name}: {key}"
        for file in re.findall(r"`((?:docker|configs|tests|benchmarks|pipeline)/[\w./-]+)`", text):
            assert (REPOSITORY / file).exists(), f"{page.name}: {file}"


def test_folders_of_documented_s3prl_exports_can_be_imported() -> None:
    pages = [REPOSITORY / "README.md", *DOCS.rglob("*.md")]
    exports = [o for page in pages for o in re.findall(r"--format s3prl --output ([\w/-]+)", page.read_text())]
    assert len(exports) >= 4
    for output in exports:
        assert usable_name(Path(output).name), output
