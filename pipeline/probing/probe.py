"""``run.py probe MANIFEST --teacher T --student S``: how much frozen features tell a linear layer, side by side.

As in SUPERB, a probe sees a learnt weighted sum of all layers (softmax of one weight a layer) and is linear: of the mean over time for
a class of the utterance, of every frame for characters or phones by CTC, decoded greedily. Two things differ, so figures compare among
probes but not with SUPERB's: each layer is brought to zero mean and unit variance in each dimension (statistics of the training
utterances), so that layers of different scale meet on equal terms; and the encoder's input is not among the layers.

All sources get the same utterances, the same optimiser and the same number of steps. Intervals are 95 % bootstrap intervals over test
utterances; they tell nothing of the variation between trainings, or between speakers where few were tested.
"""

import csv
import hashlib
import html
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ray_distill.pipeline.files import write_text
from ray_distill.pipeline.reports.charts import COLORS, Line, line_chart
from ray_distill.student.model.student import Student
from ray_distill.teacher_cache.audio import load_audio
from ray_distill.teacher_cache.frames import FRAME_SAMPLES, RECEPTIVE_FIELD, SAMPLE_RATE
from ray_distill.teacher_cache.teachers import Teacher

Kind = Literal["class", "ctc"]
Units = Literal["characters", "words"]

_BOOTSTRAPS = 1000
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Example:
    """One labelled utterance.

    Attributes:
        path: its audio.
        target: its class as the only item, or its characters or phones.
        test: whether it is tested on, not trained on.
    """

    path: Path
    target: tuple[str, ...]
    test: bool


@dataclass(frozen=True)
class Task:
    """Labelled utterances, some for training and some for testing.

    Attributes:
        kind: ``class`` of an utterance, or ``ctc``: a sequence.
        examples: in the manifest's order.
        vocabulary: of the training targets, sorted.
    """

    kind: Kind
    examples: list[Example]
    vocabulary: list[str]

    @property
    def metric(self) -> str:
        """What is reported, in words."""
        return "accuracy" if self.kind == "class" else "error rate"


def read_task(manifest: Path, units: Units = "characters") -> Task:
    """Reads a CSV manifest with a column ``path`` and a column ``label`` (a class) or ``transcript`` (a sequence).

    Relative paths start at the manifest. A column ``split`` says ``train`` or ``test``; without it the fifth of the utterances whose
    hashed paths are smallest is tested on.

    Args:
        manifest: UTF-8, with a header.
        units: of transcripts: ``characters``, or ``words``: what blanks separate, such as phones.

    Raises:
        ValueError: what is missing or wrong, and where.
    """
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the manifest {manifest} can't be read ({error})") from error
    columns = list(rows[0]) if rows else []
    kinds: dict[str, Kind] = {"label": "class", "transcript": "ctc"}
    column = next((name for name in kinds if name in columns), None)
    if "path" not in columns or column is None:
        raise ValueError(
            f"the manifest {manifest} needs a column 'path' and one of 'label' or 'transcript'; "
            f"it has {', '.join(columns) or 'no rows'}"
        )
    examples = []
    for number, row in enumerate(rows, 2):
        text = (row[column] or "").strip()
        split = row.get("split") or None
        if not row["path"] or not text or split not in (None, "train", "test"):
            raise ValueError(
                f"line {number} of {manifest} needs a path, a {column}, and as split, if any, train or test"
            )
        sequence = tuple(text) if units == "characters" else tuple(text.split())
        digest = hashlib.sha256(row["path"].encode()).digest()
        test = split == "test" if split else int.from_bytes(digest[:4]) < _TEST_SHARE * 2**32
        examples.append(Example(manifest.parent / row["path"], (text,) if column == "label" else sequence, test))
    task = Task(kinds[column], examples, sorted({item for e in examples if not e.test for item in e.target}))
    if not task.vocabulary or not any(example.test for example in examples):
        raise ValueError(f"the manifest {manifest} needs utterances both to train and to test on")
    if task.kind == "class":
        unknown = sorted({e.target[0] for e in examples if e.test} - set(task.vocabulary))
        if unknown:
            raise ValueError(f"the class {unknown[0]!r} of {manifest} is tested but never trained; it needs both")
        if len(task.vocabulary) < 2:
            raise ValueError(f"the manifest {manifest} has only the class {task.vocabulary[0]!r}; a probe needs two")
    return task


@dataclass(frozen=True)
class Source:
    """Something that gives features.

    Attributes:
        name: for people.
        layers: L.
        dim: D.
        features: (S,) float32 waveform → (L, T, D) float32 on the CPU.
    """

    name: str
    layers: int
    dim: int
    features: Callable[[np.ndarray], Tensor]

    @classmethod
    def of_teacher(cls, teacher: Teacher, name: str | None = None) -> Self:
        """A teacher's Transformer layers."""
        return cls(
            name or f"teacher {teacher.name}",
            teacher.num_layers,
            teacher.dim,
            lambda wave: teacher.hidden_states(torch.from_numpy(wave)[None])[0].cpu(),
        )

    @classmethod
    def of_student(cls, student: Student, name: str) -> Self:
        """A student's Transformer layers, before its heads: what an export gives."""
        device = student.mask_embedding.device

        @torch.no_grad()
        def features(wave: np.ndarray) -> Tensor:
            waveform = torch.from_numpy(wave)[None].to(device)
            states, _ = student.encode(waveform, torch.tensor([len(wave)], device=device))
            return states[0].cpu()

        return cls(name, student.config.encoder_layers, student.config.encoder_embed_dim, features)

    @classmethod
    def log_mel(cls, bands: int = 80) -> Self:
        """Logarithms of mel bands, in frames like the teacher's: what a probe does without a model."""
        from torchaudio.transforms import MelSpectrogram  # Takes seconds to import; reports need none.

        window = {"n_fft": RECEPTIVE_FIELD, "hop_length": FRAME_SAMPLES, "center": False}
        transform = MelSpectrogram(SAMPLE_RATE, n_mels=bands, **window)
        return cls(f"log-mel, {bands} bands", 1, bands, lambda w: (transform(torch.from_numpy(w)) + 1e-6).log().T[None])


class Features:
    """Features of all utterances: means over time in memory, or frames in a file of half precision.

    Args:
        source: gives them.
        task: the utterances.
        folder: for the file.
    """

    def __init__(self, source: Source, task: Task, folder: Path) -> None:
        self._pooled = task.kind == "class"
        shape = source.layers, source.dim
        sums, squares, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0
        self._means: list[Tensor] = []
        self.frames: list[int] = []
        file = folder / "frames.f16"
        with file.open("wb") as out:
            for example in task.examples:
                x_LTD = source.features(load_audio(example.path))
                if self._pooled:
                    x_LTD = x_LTD.mean(1, keepdim=True)
                    self._means.append(x_LTD[:, 0])
                else:
                    out.write(x_LTD.transpose(0, 1).half().contiguous().numpy().tobytes())
                self.frames.append(x_LTD.shape[1])
                if not example.test:
                    sums += x_LTD.double().sum(1)
                    squares += x_LTD.double().square().sum(1)
                    count += x_LTD.shape[1]
        mean = sums / count
        self._mean = mean.float()
        self._scale = (squares / count - mean.square()).clamp(min=1e-12).rsqrt().float()
        self._starts = np.concatenate([[0], np.cumsum(self.frames)])
        if not self._pooled:
            self._file = np.memmap(file, np.float16, "r", shape=(int(self._starts[-1]), *shape))

    def __getitem__(self, number: int) -> Tensor:
        """Of an utterance: (T, L, D) float32, normalised; T is 1 for means."""
        if self._pooled:
            return ((self._means[number] - self._mean) * self._scale)[None]
        rows = self._file[self._starts[number] : self._starts[number + 1]]
        return (torch.from_numpy(np.array(rows)).float() - self._mean) * self._scale


class Probe(nn.Module):
    """A linear layer on a weighted sum of layers."""

    def __init__(self, layers: int, dim: int, outputs: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(layers))
        self.linear = nn.Linear(dim, outputs)

    def forward(self, x_BTLD: Tensor) -> Tensor:
        """(B, T, L, D) → (B, T, outputs)."""
        mixed = torch.einsum("btld,l->btd", x_BTLD, self.layer_weights.softmax(0))
        logits: Tensor = self.linear(mixed)
        return logits


@dataclass(frozen=True)
class Outcome:
    """What a probe found.

    Attributes:
        source: its features' name.
        metric: ``accuracy`` or ``error rate``.
        value: of all test utterances together.
        low, high: 95 % bootstrap interval.
        difference: value minus the first source's, with its interval from the same resamplings; None for the first.
        layer_weights: of each layer, summing to 1.
        training_loss: of the last epoch.
    """

    source: str
    metric: str
    value: float
    low: float
    high: float
    difference: tuple[float, float, float] | None
    layer_weights: list[float]
    training_loss: float


def _fit(features: Features, source: Source, task: Task, epochs: int, seed: int) -> tuple[Probe, float]:
    """Trains a probe with AdamW under a cosine schedule; and the last epoch's loss."""
    torch.manual_seed(seed)
    ids = {
        item: number for number, item in enumerate(task.vocabulary, start=task.kind == "ctc")
    }  # CTC's 0 is the blank.
    probe = Probe(source.layers, source.dim, len(ids) + (task.kind == "ctc"))
    # Weights of layers move in steps of the learning rate, and have further to go than a linear layer's.
    groups = [
        {"params": [probe.layer_weights], "lr": 5e-2, "weight_decay": 0.0},
        {"params": probe.linear.parameters(), "lr": 1e-2, "weight_decay": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups)
    train = [number for number, example in enumerate(task.examples) if not example.test]
    size = 8
    steps = epochs * -(-len(train) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng, loss_sum = np.random.default_rng(seed), 0.0
    for _ in range(epochs):
        order = rng.permutation(train)
        loss_sum = 0.0
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            x = nn.utils.rnn.pad_sequence([features[n] for n in batch], batch_first=True)
            logits = probe(x)
            targets = [torch.tensor([ids[item] for item in task.examples[n].target]) for n in batch]
            if task.kind == "class":
                loss = F.cross_entropy(logits[:, 0], torch.cat(targets))
            else:
                lengths = torch.tensor([features.frames[n] for n in batch])
                loss = F.ctc_loss(
                    logits.log_softmax(-1).transpose(0, 1),
                    torch.cat(targets),
                    lengths,
                    torch.tensor([len(target) for target in targets]),
                    zero_infinity=True,
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(batch)
    return probe, loss_sum / len(train)


@torch.no_grad()
def _mistakes(probe: Probe, features: Features, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Of each test utterance: mistakes, and of how many items."""
    mistakes, items = [], []
    for number, example in enumerate(task.examples):
        if not example.test:
            continue
        best = probe(features[number][None])[0].argmax(-1)
        if task.kind == "class":
            mistakes.append(int(task.vocabulary[int(best[0])] != example.target[0]))
        else:
            found = [task.vocabulary[n - 1] for n in best.unique_consecutive().tolist() if n]
            mistakes.append(edit_distance(found, example.target))
        items.append(len(example.target))
    return np.array(mistakes), np.array(items)


def edit_distance(found: Sequence[str], wanted: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(wanted) + 1))
    for n, item in enumerate(found, 1):
        diagonal, row[0] = row[0], n
        for m, other in enumerate(wanted, 1):
            diagonal, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, diagonal + (item != other))
    return row[-1]


def run_probes(
    task: Task, sources: Sequence[Source], *, epochs: int = 20, seed: int = 0, say: Callable[[str], object] = print
) -> list[Outcome]:
    """Fits and tests a probe on each source.

    Args:
        task: labelled utterances.
        sources: the first is what the others are compared with.
        epochs: passes over the training utterances.
        seed: of initialisation and order.
        say: is told of progress.
    """
    outcomes: list[Outcome] = []
    rng = np.random.default_rng(seed)
    count = sum(example.test for example in task.examples)
    draws = rng.integers(count, size=(_BOOTSTRAPS, count))
    first: tuple[float, np.ndarray] | None = None
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            features = Features(source, task, Path(folder))
            probe, loss = _fit(features, source, task, epochs, seed)
            mistakes, items = _mistakes(probe, features, task)
        rate = float(mistakes.sum() / items.sum())
        rates = mistakes[draws].sum(1) / items[draws].sum(1)
        if task.kind == "class":
            rate, rates = 1 - rate, 1 - rates
        difference = None
        if first is not None:
            low, high = np.quantile(rates - first[1], [0.025, 0.975])
            difference = rate - first[0], float(low), float(high)
        first = first or (rate, rates)
        low, high = np.quantile(rates, [0.025, 0.975])
        weights = probe.layer_weights.detach().softmax(0).tolist()
        outcome = Outcome(source.name, task.metric, rate, float(low), float(high), difference, weights, loss)
        outcomes.append(outcome)
        say(f"probe   {source.name}: {task.metric} {rate:.1%} ({low:.1%} to {high:.1%})")
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Side by side, for the terminal."""
    table = Table(title=f"{outcomes[0].metric} of linear probes, with 95 % bootstrap intervals")
    for column in ("features", outcomes[0].metric, f"minus {outcomes[0].source}", "heaviest layer"):
        table.add_column(column)
    for outcome in outcomes:
        heaviest = int(np.argmax(outcome.layer_weights))
        table.add_row(
            outcome.source,
            f"{outcome.value:.1%} ({outcome.low:.1%} to {outcome.high:.1%})",
            _signed(outcome.difference),
            f"{heaviest + 1} ({outcome.layer_weights[heaviest]:.0%})" if len(outcome.layer_weights) > 1 else "",
        )
    return table


def _signed(difference: tuple[float, float, float] | None) -> str:
    if difference is None:
        return ""
    value, low, high = (100 * x for x in difference)
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def probe_section(outcomes: Sequence[Outcome], title: str, level: int = 2) -> str:
    """A table and a plot of the layers' weights, as a piece of HTML for a report, under a heading of this level."""
    rows = "".join(
        f"<tr><td>{html.escape(o.source)}</td><td>{o.value:.1%} ({o.low:.1%} to {o.high:.1%})</td>"
        f"<td>{_signed(o.difference)}</td></tr>"
        for o in outcomes
    )
    head = f"<tr><th>features</th><th>{html.escape(outcomes[0].metric)}</th><th>minus {html.escape(outcomes[0].source)}</th></tr>"
    # Layers as shares of the depth, so that models of different depth can be compared.
    lines = [
        Line(
            o.source,
            np.linspace(0, 1, len(o.layer_weights)).tolist(),
            [w * len(o.layer_weights) for w in o.layer_weights],
            color,
        )
        for o, color in zip((o for o in outcomes if len(o.layer_weights) > 1), COLORS * 9, strict=False)
    ]
    chart = line_chart(
        "Learnt weights of the layers", lines, "weight x layers", x_label="layer: 0 is the first, 1 the last"
    )
    return f"<h{level}>{html.escape(title)}</h{level}><table>{head}{rows}</table>{chart}"


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid #ccc; }}
svg {{ width: 100%; max-width: 40rem; }} polyline {{ fill: none; stroke-width: 2; }} .grid {{ stroke: #ddd; }}
text {{ font-size: 11px; }} .legend span {{ margin-right: 1rem; }}
.legend i {{ display: inline-block; width: 1em; height: .6em; margin-right: .3em; }}
</style>{body}<p>{note}</p></html>
"""


def write_outcomes(
    folder: Path,
    outcomes: Sequence[Outcome],
    task: Task,
    title: str,
    origin: dict[str, Any],
    settings: dict[str, Any],
    own: int | None = None,
) -> None:
    """Writes ``probe.json`` and ``probe.html`` into a folder.

    Args:
        folder: see `probe_folder`.
        outcomes, task, title: what was found.
        origin: of the students.
        settings: of `probe_settings`.
        own: number of the outcome that is of the run's own student, if any is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = sum(not example.test for example in task.examples)
    tested = len(task.examples) - trained
    record = {
        "title": title,
        "kind": task.kind,
        "metric": task.metric,
        "train_utterances": trained,
        "test_utterances": tested,
        "vocabulary": len(task.vocabulary),
        "origin": origin,
        "settings": settings,
        "own": own,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    write_text(folder / "probe.json", json.dumps(record, indent=2) + "\n")
    sizes = f"{trained} utterances to train on, {tested} to test on, {len(task.vocabulary)} classes or symbols"
    page = _PAGE.format(
        title=html.escape(title), body=probe_section(outcomes, title), note=f"{sizes}; 95 % bootstrap intervals."
    )
    write_text(folder / "probe.html", page)


@dataclass(frozen=True)
class Probed:
    """A probe's record.

    Attributes:
        title: of the task.
        outcomes: one for each source.
        settings: manifest's SHA-256, units, epochs, seed.
        own: number of the outcome that is of the run's own student, if any is.
    """

    title: str
    outcomes: list[Outcome]
    settings: dict[str, Any]
    own: int | None

    @property
    def student(self) -> Outcome | None:
        """Of the run's own student."""
        return None if self.own is None else self.outcomes[self.own]

    @property
    def key(self) -> str:
        """Equal for figures that can be compared."""
        return json.dumps(self.settings, sort_keys=True)


def probe_settings(manifest: Path, units: Units, epochs: int, seed: int) -> dict[str, Any]:
    """What decides a probe's figures, but for its sources."""
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return {"manifest": digest, "units": units, "epochs": epochs, "seed": seed}


def probe_folder(run: Path, title: str, settings: dict[str, Any]) -> Path:
    """Where a run's folder keeps a probe; other settings have another folder."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return run / "probes" / f"{title}-{digest[:8]}"


def _read_probe(path: Path) -> Probed:
    try:
        record = json.loads(path.read_text())
        outcomes = []
        for item in record["outcomes"]:
            difference = item.pop("difference")
            outcomes.append(Outcome(**item, difference=None if difference is None else tuple(difference)))
        probed = Probed(record["title"], outcomes, record.get("settings", {}), record.get("own"))
        _ = probed.student
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no probe's record ({error}); remove it, or run the probe again") from error
    return probed


def read_probes(run: Path, settings: dict[str, Any] | None = None) -> list[Probed]:
    """What `write_outcomes` wrote into a run's folder, by title; only what was made with these settings, if any are given.

    Raises:
        ValueError: a file is damaged.
    """
    found = [_read_probe(path) for path in sorted(run.glob("probes/*/probe.json"))]
    return [probed for probed in found if settings is None or probed.settings == settings]


def refuse_other_results(folder: Path, settings: dict[str, Any], sources: Sequence[Source]) -> None:
    """ValueError where a folder holds a probe that one with these settings and sources should not replace."""
    path = folder / "probe.json"
    if not path.exists():
        return
    there = _read_probe(path)
    if there.settings != settings or [o.source for o in there.outcomes] != [source.name for source in sources]:
        raise ValueError(f"{folder} holds a probe with other settings or sources; choose another --output")


def titles_of(probes: Sequence[Probed]) -> list[str]:
    """A title for each that tells it from the others: with its settings where several have one title."""
    titles = []
    for probed in probes:
        settings = ", ".join(f"{k} {v[:8] if k == 'manifest' else v}" for k, v in probed.settings.items())
        alone = sum(other.title == probed.title for other in probes) == 1
        titles.append(probed.title if alone else f"{probed.title} ({settings})")
    return titles
