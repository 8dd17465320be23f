"""Cost: what tokens and machines cost by route and arm, and what the students save.

Prices are the configuration's (`upstreams.<name>.cost`, `students.cost`), exported by the routers as
`stillhouse_price`; an upstream without a price has no cost, never a cost of 0.
"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from k8s.dashboards import promql as q
from k8s.dashboards.frame import Section, Variable, dashboard
from k8s.dashboards.panels import GREEN, RED, Query, lines, listing, number, signed

ROUTES = 'route=~"$route"'
CURRENCY = 'currency="$currency"'
BASELINE = 'upstream="$baseline"'
KINDS = ("prompt", "completion")
ARM = "route, arm, upstream"


def build() -> Dashboard:
    """The dashboard."""
    return dashboard(
        "stillhouse-cost",
        "Tokens and money by route and arm; what students save against the baseline (usually the teacher).",
        (
            Variable("route", "Route", "label_values(stillhouse_split_weight, route)"),
            Variable("currency", "Currency", "label_values(stillhouse_price, currency)", many=False),
            Variable(
                "baseline",
                "Baseline (priced by token)",
                'label_values(stillhouse_price{per="completion_token", currency="$currency"}, upstream)',
                many=False,
            ),
        ),
        (_now(), _money(), _saved(), _tokens()),
    )


def by_token(by: str) -> str:
    """Money an hour for tokens, of upstreams that are priced so, by labels."""
    parts = (
        f"sum by ({by}) (3600 * rate({q.select(f'stillhouse_{kind}_tokens_total', ROUTES)}[$__rate_interval])"
        f" * on (upstream) group_left () {_price(f'{kind}_token')})"
        for kind in KINDS
    )
    return " + ".join(parts)


def by_hour(by: str) -> str:
    """Money an hour for machines, divided over routes and arms like the upstream's answers."""
    answers = "stillhouse_e2e_seconds_count"
    mine = f"sum by ({ARM}) (rate({q.select(answers, ROUTES)}[$__rate_interval]))"
    whole = f"(sum by (upstream) (rate({answers}[$__rate_interval])) > 0)"
    return (
        f"sum by ({by}) ({mine} / on (upstream) group_left () {whole}"
        f" * on (upstream) group_left () {_price('hour')})"
    )


def cost(by: str) -> str:
    """Money an hour by labels; an upstream is priced by token or by hour, so nothing is counted twice."""
    return (
        f"sum by ({by}) ({by_token(ARM)} or {by_hour(ARM)})"
        if by
        else f"sum ({by_token(ARM)} or {by_hour(ARM)})"
    )


def _price(per: str) -> str:
    which = f'per="{per}"'
    return f"max by (upstream) ({q.select('stillhouse_price', which, CURRENCY)})"


def _at_baseline() -> str:
    """Money an hour that all chosen tokens would cost at the baseline's prices."""
    parts = []
    for kind in KINDS:
        price = q.largest("stillhouse_price", "", f'per="{kind}_token"', BASELINE, CURRENCY)
        parts.append(f"3600 * {q.rate(f'stillhouse_{kind}_tokens_total', '', ROUTES)} * {price}")
    return " + ".join(parts)


def _share_off_baseline(by: str) -> str:
    rest = q.rate("stillhouse_completion_tokens_total", by, ROUTES, 'upstream!="$baseline"')
    return q.ratio(rest, q.rate("stillhouse_completion_tokens_total", by, ROUTES))


def _per_thousand(by: str) -> str:
    """Money per 1000 answered requests, by labels."""
    answers = f"3600 * {q.rate('stillhouse_e2e_seconds_count', by, ROUTES)}"
    return f"1000 * {q.ratio(cost(by), answers)}"


def _now() -> Section:
    return Section(
        "Now (in the chosen currency)",
        (
            number(
                "Cost", "Money an hour for tokens and used machines.", "short", Query(cost(""), "an hour")
            ),
            number(
                "Per 1000 requests",
                "Money per 1000 answered requests, whatever arm answered.",
                "short",
                Query(_per_thousand(""), "per 1000"),
            ),
            number(
                "Tokens the baseline did not make",
                "Share of completion tokens that came from other upstreams than the baseline.",
                "percentunit",
                Query(_share_off_baseline(""), "share"),
            ),
            number(
                "At the baseline's prices",
                "Money an hour that the same tokens would cost if the baseline made all of them.",
                "short",
                Query(_at_baseline(), "an hour"),
            ),
            number(
                "Saved",
                "That, less what it costs now. Below 0 while machines cost more than the tokens they save.",
                "short",
                Query(f"{_at_baseline()} - {cost('')}", "an hour"),
                base=RED,
                thresholds=((0.0, GREEN),),
            ),
            number(
                "Machines",
                "Money an hour of all upstreams that are priced by the hour, busy or idle.",
                "short",
                Query(f"sum ({_price('hour')})", "an hour"),
            ),
        ),
        height=4,
    )


def _money() -> Section:
    return Section(
        "Money",
        (
            lines(
                "Cost by route and arm",
                "Money an hour. Machines are divided over arms like the upstream's answers.",
                "short",
                Query(cost(ARM), "{{route}} {{arm}} {{upstream}}"),
                stacked=True,
            ),
            lines(
                "Per 1000 requests by arm",
                "Money per 1000 answered requests: the arms' unit costs side by side.",
                "short",
                Query(_per_thousand(ARM), "{{route}} {{arm}} {{upstream}}"),
            ),
            listing(
                "Prices",
                "What the configuration says: money a token, or an hour of all replicas.",
                "short",
                Query(q.largest("stillhouse_price", "upstream, per", CURRENCY), "Price"),
                {"upstream": "Upstream", "per": "Per"},
                width=8,
            ),
        ),
    )


def _saved() -> Section:
    return Section(
        "Saved",
        (
            signed(
                "Baseline's price and today's cost",
                "Money an hour: all tokens at the baseline's prices, what they cost now, the difference.",
                "short",
                Query(_at_baseline(), "at the baseline's prices"),
                Query(cost(""), "now"),
                Query(f"{_at_baseline()} - {cost('')}", "saved"),
                width=12,
            ),
            lines(
                "Tokens the baseline did not make",
                "Share of each route's completion tokens that came from other upstreams than the baseline.",
                "percentunit",
                Query(_share_off_baseline("route"), "{{route}}"),
                width=12,
                top=1,
            ),
        ),
    )


def _tokens() -> Section:
    return Section(
        "Tokens",
        (
            *(
                lines(
                    f"{kind.capitalize()} tokens",
                    "Tokens a second by route, arm and upstream.",
                    "short",
                    Query(
                        q.rate(f"stillhouse_{kind}_tokens_total", ARM, ROUTES),
                        "{{route}} {{arm}} {{upstream}}",
                    ),
                    stacked=True,
                )
                for kind in KINDS
            ),
            lines(
                "Tokens in the time range",
                "All tokens of the chosen routes, by upstream.",
                "short",
                Query(
                    q.increase("stillhouse_prompt_tokens_total", "upstream", ROUTES), "{{upstream}} prompt"
                ),
                Query(
                    q.increase("stillhouse_completion_tokens_total", "upstream", ROUTES),
                    "{{upstream}} completion",
                ),
            ),
        ),
    )
