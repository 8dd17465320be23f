"""What all dashboards have alike: variables, links, time range, refresh, and panels in rows of 24.

Knows nothing about what a panel shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models

from k8s.dashboards.panels import DATASOURCE, WIDTH, Panel

TAG: Final = "stillhouse"
TITLES: Final = {
    "stillhouse-fleet": "Fleet",
    "stillhouse-route": "Route",
    "stillhouse-rollout": "Rollout / A-B",
    "stillhouse-distillation": "Distillation",
    "stillhouse-engine": "Engine (vLLM)",
    "stillhouse-cost": "Cost",
}
"""uid → title, in the order in which a person would open them. Bookmarks and links hold on to the uids."""


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label of a metric."""

    name: str
    label: str
    query: str
    many: bool = True
    """Several values at once, all of them at first; False: exactly one."""


@dataclass(frozen=True)
class Section:
    """A titled row and the panels below it, left to right."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 8


def dashboard(
    uid: str, description: str, variables: tuple[Variable, ...], sections: tuple[Section, ...]
) -> models.Dashboard:
    """A whole dashboard. Raises: ValueError when a section's panels do not fill whole lines."""
    made = (
        builders.Dashboard(f"Stillhouse / {TITLES[uid]}")
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .link(_others())
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in variables:
        made = made.with_variable(_variable(variable))
    y = 0
    for section in sections:
        row = builders.Row(section.title).grid_pos(models.GridPos(h=1, w=WIDTH, x=0, y=y))
        made = made.with_row(row)
        y += 1
        for line in _in_lines(section):
            x = 0
            for panel in line:
                place = models.GridPos(h=section.height, w=panel.width, x=x, y=y)
                made = made.with_panel(panel.builder.grid_pos(place))
                x += panel.width
            y += section.height
    return _numbered(made.build())


def _in_lines(section: Section) -> list[list[Panel]]:
    lines: list[list[Panel]] = [[]]
    for panel in section.panels:
        used = sum(p.width for p in lines[-1])
        if used == WIDTH:
            lines.append([])
        elif used + panel.width > WIDTH:
            raise ValueError(f"{section.title}: a line of panels is {used + panel.width} wide, not {WIDTH}")
        lines[-1].append(panel)
    if (last := sum(p.width for p in lines[-1])) != WIDTH:
        raise ValueError(f"{section.title}: the last line of panels is {last} wide, not {WIDTH}")
    return lines


def _numbered(made: models.Dashboard) -> models.Dashboard:
    """Panels with ids of their own, so that links to a panel hold."""
    for number, panel in enumerate(made.panels or (), 1):
        panel.id_val = number
    return made


def _variable(variable: Variable) -> builders.QueryVariable:
    made = (
        builders.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATASOURCE)
        .query({"qryType": 1, "query": variable.query, "refId": variable.name})
        .definition(variable.query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(variable.many)
        .include_all(variable.many)
    )
    if not variable.many:
        return made
    return made.current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))


def _others() -> builders.DashboardLink:
    return (
        builders.DashboardLink("Stillhouse")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
        .tooltip("The other dashboards, with the same route and time range")
    )
