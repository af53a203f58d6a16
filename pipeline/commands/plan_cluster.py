"""``ray-distill plan-cluster``: the cost of a corpus on a cluster, calculated without one."""

from pathlib import Path
from typing import Annotated

import typer

from ray_distill.pipeline.recipes import complete_recipe, find_recipe


def plan_cluster(
    cluster: Annotated[
        Path,
        typer.Option(
            parser=find_recipe,
            metavar="CLUSTER",
            autocompletion=complete_recipe("clusters"),
            help="YAML file of a cluster, or the name of one in configs/, such as clusters/this-machine.",
        ),
    ],
    hours: Annotated[
        list[float] | None,
        typer.Option(help="Hours of audio; may be repeated. Default: 960, 60000 and 1000000."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of benchmark results. Default: benchmarks/results of the repository.")
    ] = None,
) -> None:
    """Estimate the cost of a corpus on a cluster.

    The estimate covers time, storage, requests, network and money, and names the bottleneck. It needs no cluster.
    """
    from rich.console import Console

    from ray_distill.pipeline.planning.cluster import RESULTS, load_cluster, origins
    from ray_distill.pipeline.planning.cluster_plan import HOURS
    from ray_distill.pipeline.planning.cluster_plan import plan_cluster as plan_corpus
    from ray_distill.pipeline.planning.plan_table import plan_table

    console = Console(soft_wrap=True, highlight=False)
    described = load_cluster(cluster)
    folder = results or RESULTS
    plans = [plan_corpus(described, h, folder) for h in hours or HOURS]
    console.print(plan_table(described, plans))
    measured, assumed = origins(described)
    console.print(f"Measured: {', '.join(measured) or 'nothing'}.")
    console.print(f"Assumed: {', '.join(assumed) or 'nothing'}.")
    console.print("Lower bounds: the figures assume that all parts overlap and that nothing fails.")
