"""Which changes the regression benchmark reports, on figures made up here."""

from dataclasses import asdict

from benchmarks.regression import Figure, comparison, cpu_seconds, speeds, verdict


def test_verdict_needs_more_than_the_noise() -> None:
    assert verdict(Figure(1.0, 0.1), Figure(1.15, 0.1), 0.0) == ""
    assert verdict(Figure(1.0, 0.1), Figure(1.25, 0.1), 0.0) == "worse"
    assert verdict(Figure(1.0, 0.1), Figure(0.75, 0.1), 0.0) == "better"
    assert verdict(Figure(1.0, 0.0), Figure(1.04, 0.0), 0.05) == ""


def test_comparison_names_every_figure() -> None:
    new = {
        "speed": {"teacher": Figure(2.0, 0.1), "reader": Figure(1.0, 0.1)},
        "quality": {"phone error": Figure(0.6, 0.01)},
    }
    old = {"speed": {"teacher": asdict(Figure(1.0, 0.1))}, "quality": {"phone error": asdict(Figure(0.5, 0.01))}}
    verdicts = {row[0]: row[-1] for row in comparison(old, new, same_processor=True)}
    assert verdicts == {"teacher": "worse", "reader": "new", "phone error": "worse"}
    elsewhere = {row[0]: row[-1] for row in comparison(old, new, same_processor=False)}
    assert elsewhere == {"teacher": "other processor", "reader": "new", "phone error": "worse"}


def test_speeds_are_relative_to_the_calibration() -> None:
    def work(count: int) -> None:
        sum(n * n for n in range(count))

    found = speeds({"once": lambda: work(300_000), "four times": lambda: work(1_200_000)}, rounds=5)
    assert 2.5 < found["four times"].value / found["once"].value < 6
    assert cpu_seconds(lambda: work(300_000)) > 0
