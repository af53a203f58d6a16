"""HTML pages of reports: one file that needs no network, from the Jinja templates beside this module."""

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ray_distill.pipeline.reports.charts import Chart

_TEMPLATES = Path(__file__).with_name("templates")


def render_page(template: str, **values: Any) -> str:
    """Return the page of a template; values are escaped, and a missing value is an error.

    Args:
        template: File name in ``templates/``.
        values: Variables of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["chart_data"] = _chart_data
    return environment.get_template(template).render(chart_library=_chart_library, **values) + "\n"


def _chart_data(chart: Chart) -> dict[str, Any]:
    """Return what ``charts.js`` needs to draw a chart."""
    return {"spec": chart.spec, "series": chart.series, "x_title": chart.x_title, "description": chart.description}


@cache
def _chart_library() -> Markup:
    """Return Vega-Lite and what it needs, about 0.9 MB of JavaScript. Bundling takes two seconds."""
    import altair
    import vl_convert

    version = ".".join(altair.VEGALITE_VERSION.split(".")[:2])
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    assert "</script" not in script and "<!--" not in script, "this would end the script element early"
    return Markup(script)  # It comes from the library, not from a run.
