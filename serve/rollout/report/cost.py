"""What 1000 requests of an arm cost: tokens of the request log times prices, or hours spread over requests.

An unknown price is said, never taken as zero. Pure. Knows nothing about where prices and tokens come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from contracts.price import Price
from serve.rollout.report.model import Cost
from serve.rollout.report.requests import Usage


@dataclass(frozen=True)
class Served:
    """How much of the route's traffic an arm got, for prices by the hour."""

    requests: int
    """Counted requests of the arm."""
    all_requests: int
    """Of both arms."""
    seconds: float
    """Time in which they came."""


def cost(
    arm: str,
    upstream: str,
    usage: Mapping[tuple[str, str], Usage],
    prices: Mapping[str, Price | None],
    served: Served,
    cascade: bool = False,
) -> Cost:
    """One arm's cost: a mean over its answered requests, whoever served them (a fallback costs, too).

    Args:
        upstream: the arm's own.
        usage: by assigned arm and by the upstream that made the tokens.
        cascade: the arm's upstream is one, and has no price but those of its two.
    """
    own = prices.get(upstream)
    if own is None and not cascade:
        return Cost(said=f"no price: set upstreams.{upstream}.cost, or students.cost for a student")
    if own is not None and own.per_hour is not None:
        return by_hour(own, served)
    mine = {served_by: used for (of, served_by), used in usage.items() if of == arm}
    if not any(used.rows for used in mine.values()):
        return Cost(said="no tokens of this arm in the request log")
    for name in sorted(mine):
        price = prices.get(name)
        if price is None:
            return Cost(said=f"no price for {name}, which served some of it: set upstreams.{name}.cost")
        if price.per_hour is not None:
            return Cost(said=f"some of it was served by {name}, which costs by the hour, not by tokens")
    return _by_token(mine, {name: price for name, price in prices.items() if name in mine and price})


def by_hour(price: Price, served: Served) -> Cost:
    """Money per hour spread over the requests of that hour: the arm's own, and all of the route's."""
    assert price.per_hour is not None
    if served.requests == 0 or served.seconds <= 0:
        return Cost(said=f"{price.per_hour:g} {price.currency} an hour, and no requests yet")
    spent = price.per_hour * served.seconds / 3600.0
    return Cost(
        per_1000=1000.0 * spent / served.requests,
        at_full_traffic=1000.0 * spent / served.all_requests,
        currency=price.currency,
        said=f"{price.per_hour:g} {price.currency} an hour over {served.requests:,} requests in "
        f"{served.seconds / 60.0:.1f} min; the same machines for all of the route's {served.all_requests:,} "
        "requests in the second figure",
    )


def _by_token(mine: Mapping[str, Usage], prices: Mapping[str, Price]) -> Cost:
    currencies = {p.currency for p in prices.values()}
    if len(currencies) > 1:
        return Cost(said=f"prices in different currencies: {', '.join(sorted(currencies))}")
    rows = sum(u.rows for u in mine.values())
    unknown = sum(u.unknown for u in mine.values())
    money = sum(prices[name].of_tokens(u.prompt, u.completion) for name, u in mine.items())
    prompt, completion = sum(u.prompt for u in mine.values()), sum(u.completion for u in mine.values())
    tokens = f"{prompt / rows:.0f} prompt + {completion / rows:.0f} answer tokens"
    said = f"{tokens} a request, mean of {rows:,} logged requests"
    if unknown:
        said += f"; {unknown:,} more say nothing about tokens"
    each = 1000.0 * money / rows
    return Cost(per_1000=each, at_full_traffic=each, currency=currencies.pop(), said=said)
