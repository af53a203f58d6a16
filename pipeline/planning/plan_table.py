"""The table of `cluster_plan.ClusterPlan` for corpora of several sizes."""

from collections.abc import Callable, Sequence

from rich.table import Table

from ray_distill.pipeline.planning.cache_cost import shown_bytes
from ray_distill.pipeline.planning.cluster import Cluster
from ray_distill.pipeline.planning.cluster_plan import ClusterPlan, bottleneck


def plan_table(cluster: Cluster, plans: Sequence[ClusterPlan]) -> Table:
    """Return a table with one column per plan."""
    money = cluster.currency

    def row(label: str, value: Callable[[ClusterPlan], str]) -> None:
        table.add_row(label, *map(value, plans))

    table = Table(title=f"{cluster.name}: estimated cost")
    table.add_column("")
    for plan in plans:
        table.add_column(f"{plan.hours:,.0f} h", justify="right")
    row("cache", lambda p: shown_bytes(p.cache_bytes))
    if any(plan.audio_store_bytes for plan in plans):
        row("audio store", lambda p: shown_bytes(p.audio_store_bytes))
    row("build: accelerator hours", lambda p: f"{p.build_accelerator_hours:,.1f}")
    row("build: wall time", lambda p: _time(p.build_wall))
    row("build: bottleneck", lambda p: bottleneck(p.build_hours))
    row("build: writes", lambda p: f"{p.build_puts:,.0f} ({p.build_puts / p.build_wall / 3600:,.1f}/s)")
    row("build: cost", lambda p: f"{p.build_money:,.0f} {money}")
    row("storage for a month", lambda p: f"{p.month_money:,.0f} {money}")
    row(f"training, {plans[0].epochs} epochs: accelerator hours", lambda p: f"{p.train_accelerator_hours:,.1f}")
    row("training: wall time", lambda p: _time(p.train_wall))
    row("training: with the teacher in the loop", lambda p: _time(p.online_hours))
    row("training: reads", _place_read)
    row("training: bottleneck", lambda p: bottleneck(p.epoch_hours))
    row("training: network per trainer", lambda p: f"{shown_bytes(p.trainer_bytes_per_second)}/s")
    row("training: read from the store per epoch", lambda p: shown_bytes(p.epoch_bytes))
    row("training: requests to the store", lambda p: f"{p.gets_per_second:,.0f}/s")
    row("training: cost", lambda p: f"{p.train_money:,.0f} {money}")
    return table


def _place_read(plan: ClusterPlan) -> str:
    place = "local copies" if plan.copied else "the store"
    return f"{place} and the corpus" if plan.audio == "source" else place


def _time(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours >= 48 else f"{hours:,.2f} h" if hours >= 1 else f"{hours * 60:,.1f} min"
