"""Panel builders over grafana-foundation-sdk: every panel has a unit, a legend, thresholds and a description.

A panel knows its width; where it stands is the frame's business. Knows nothing about metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import common as shared
from grafana_foundation_sdk.models import dashboard as models

DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH: Final = 24

GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
Thresholds = tuple[tuple[float, str], ...]

NEUTRAL: Thresholds = ()
ERROR_RATIO: Thresholds = ((0.01, YELLOW), (0.05, RED))
TTFT_S: Thresholds = ((1.0, YELLOW), (3.0, RED))
TPOT_S: Thresholds = ((0.05, YELLOW), (0.2, RED))
E2E_S: Thresholds = ((5.0, YELLOW), (20.0, RED))
OVERHEAD_S: Thresholds = ((0.005, YELLOW), (0.02, RED))
FULL: Thresholds = ((0.8, YELLOW), (0.95, RED))
ANY_IS_BAD: Thresholds = ((0.000001, YELLOW), (1.0, RED))
NONE_IS_BAD: Thresholds = ((1.0, GREEN),)

TO_ROUTE: Final = "/d/stillhouse-route/?var-route=${__field.labels.route}&${__url_time_range}"
TO_ENGINE: Final = "/d/stillhouse-engine/?var-upstream=${__field.labels.upstream}&${__url_time_range}"


@dataclass(frozen=True)
class Query:
    """One expression and how its series are named."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A built panel and its width of 24."""

    builder: Any
    width: int


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    thresholds: Thresholds = NEUTRAL,
    stacked: bool = False,
    top: float | None = None,
    link: str | None = None,
) -> Panel:
    """Series over time, with last and highest value in the legend. Thresholds are drawn as lines."""
    panel = timeseries.Panel().legend(_legend()).tooltip(_tooltip())
    panel = (
        panel.min(0).fill_opacity(25 if stacked else 8).line_width(1).show_points(shared.VisibilityMode.AUTO)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(shared.StackingMode.NORMAL))
    if top is not None:
        panel = panel.max(top)
    if thresholds:
        style = shared.GraphThresholdsStyleConfig(mode=shared.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds_style(_built(style))
    return _finished(panel, title, description, unit, queries, width, thresholds, link=link)


def signed(title: str, description: str, unit: str, *queries: Query, width: int = 8) -> Panel:
    """Series over time that may be negative."""
    panel = timeseries.Panel().legend(_legend()).tooltip(_tooltip()).fill_opacity(0).line_width(1)
    panel = panel.show_points(shared.VisibilityMode.AUTO)
    return _finished(panel, title, description, unit, queries, width, NEUTRAL)


def number(
    title: str,
    description: str,
    unit: str,
    query: Query,
    width: int = 4,
    thresholds: Thresholds = NEUTRAL,
    base: str = GREEN,
) -> Panel:
    """One figure, coloured by thresholds, over a faint line."""
    panel = stat.Panel().graph_mode(shared.BigValueGraphMode.AREA).color_mode(shared.BigValueColorMode.VALUE)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return _finished(panel, title, description, unit, (query,), width, thresholds, base)


def bars(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    thresholds: Thresholds = NEUTRAL,
) -> Panel:
    """The current value of each series as a bar."""
    panel = bargauge.Panel().orientation(shared.VizOrientation.HORIZONTAL).min(0)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel = panel.display_mode(shared.BarGaugeDisplayMode.BASIC)
    return _finished(panel, title, description, unit, queries, width, thresholds, instant=True)


def states(title: str, description: str, *queries: Query, width: int = 24) -> Panel:
    """Which of several states is 1, over time."""
    shown = models.ValueMap(
        options={
            "0": models.ValueMappingResult(text=" ", color="transparent", index=0),
            "1": models.ValueMappingResult(text="now", color=BLUE, index=1),
        }
    )
    panel = statetimeline.Panel().legend(_legend(False)).mappings([shown]).merge_values(True).row_height(0.8)
    panel = panel.show_value(shared.VisibilityMode.NEVER)
    return _finished(panel, title, description, "short", queries, width, ((1.0, BLUE),), "transparent")


def listing(
    title: str,
    description: str,
    unit: str,
    query: Query,
    columns: dict[str, str],
    width: int = 12,
    link: str | None = None,
) -> Panel:
    """A table of the current series: `columns` names label → heading; the value comes last."""
    panel = table.Panel()
    hidden = {"Time": True, "__name__": True}
    options = {
        "excludeByName": hidden,
        "indexByName": {name: at for at, name in enumerate([*columns, "Value"])},
        "renameByName": {**columns, "Value": query.legend},
    }
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=options))
    return _finished(
        panel, title, description, unit, (query,), width, NEUTRAL, instant=True, rows=True, link=link
    )


def _finished(
    panel: Any,
    title: str,
    description: str,
    unit: str,
    queries: tuple[Query, ...],
    width: int,
    thresholds: Thresholds,
    base: str = GREEN,
    instant: bool = False,
    rows: bool = False,
    link: str | None = None,
) -> Panel:
    steps = [models.Threshold(value=None, color=base)]
    steps += [models.Threshold(value=value, color=color) for value, color in thresholds]
    limits = builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
    panel = panel.title(title).description(description).unit(unit).thresholds(limits).datasource(DATASOURCE)
    for ref, query in zip("ABCDEFGH", queries, strict=False):
        target = prometheus.Dataquery().ref_id(ref).expr(query.expr).legend_format(query.legend)
        target = target.datasource(DATASOURCE)
        target = target.instant() if instant else target.range()
        panel = panel.with_target(target.format("table") if rows else target)
    if link is not None:
        panel = panel.data_links([builders.DashboardLink("Open").url(link)])
    return Panel(panel, width)


def _legend(figures: bool = True) -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(True).placement(shared.LegendPlacement.BOTTOM)
    if not figures:
        return legend.display_mode(shared.LegendDisplayMode.LIST)
    return legend.display_mode(shared.LegendDisplayMode.TABLE).calcs(["lastNotNull", "max"])


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(shared.TooltipDisplayMode.MULTI).sort(shared.SortOrder.DESCENDING)


class _Built:
    """A model where the SDK wants a builder."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def build(self) -> Any:
        """The model."""
        return self._model


def _built(model: Any) -> Any:
    return _Built(model)
