"""Who owns which value: every identifier and every proper noun belongs to exactly one split, by its hash.

That is what keeps the splits apart by construction: two requests of different splits can share the words of a
phrasing, never an order id, an email, a name or a town. It does not know what the values are used for.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

#: split -> first and last bucket (of 100) that it owns.
SHARES: dict[str, tuple[int, int]] = {
    "teacher": (0, 49),
    "live": (50, 77),
    "evaluation": (78, 89),
    "calibration": (90, 99),
}
SPLITS = tuple(SHARES)

_SYLLABLES = (
    "bal",
    "bren",
    "cor",
    "dal",
    "den",
    "dor",
    "el",
    "fal",
    "fen",
    "gar",
    "hal",
    "hol",
    "ir",
    "jor",
    "kal",
    "kar",
    "len",
    "lor",
    "mar",
    "mel",
    "mor",
    "nal",
    "nor",
    "or",
    "pel",
    "ral",
    "ren",
    "sal",
    "sol",
    "tal",
    "ten",
    "tor",
    "ul",
    "val",
    "ver",
    "vin",
    "wal",
    "wen",
    "yor",
    "zel",
)
_SURNAME_ENDS = ("berg", "holt", "ski", "sen", "wick", "mann", "ova", "ides", "ton", "ley")
_TOWN_ENDS = ("ford", "ville", "stad", "bury", "mouth", "haven", "dorf", "field")
_ZH_SURNAMES = "王李张刘陈杨赵黄周吴"
_ZH_GIVEN = "伟芳娜敏静丽强磊军洋勇艳杰涛明超霞平刚桂"


def owner(value: str) -> str:
    """The split that owns a value."""
    bucket = zlib.crc32(value.encode()) % 100
    return next(split for split, (first, last) in SHARES.items() if first <= bucket <= last)


def owned(split: str, draw: Callable[[], str]) -> str:
    """Draw until the value belongs to the split (about 1 / share tries)."""
    first, last = SHARES[split]
    while True:
        value = draw()
        if first <= zlib.crc32(value.encode()) % 100 <= last:
            return value


def _pick(rng: random.Random, items: tuple[str, ...] | str) -> str:
    # rng.choice costs twice as much, and this is drawn tens of times a case.
    return items[int(rng.random() * len(items))]


def digits(rng: random.Random, count: int) -> str:
    """A string of `count` random digits."""
    return str(int(rng.random() * 10**count)).zfill(count)


def syllables(rng: random.Random, count: int) -> str:
    """A made-up word of `count` syllables."""
    return "".join(_pick(rng, _SYLLABLES) for _ in range(count))


def first_name(rng: random.Random, split: str) -> str:
    """A first name that the split owns."""
    return owned(split, lambda: syllables(rng, 2).capitalize())


def surname(rng: random.Random, split: str) -> str:
    """A surname that the split owns."""
    return owned(
        split, lambda: (syllables(rng, 1 + (rng.random() < 0.5)) + _pick(rng, _SURNAME_ENDS)).capitalize()
    )


def town(rng: random.Random, split: str) -> str:
    """A town that the split owns (not one of the shop's cities)."""
    return owned(
        split, lambda: (syllables(rng, 1 + (rng.random() < 0.5)) + _pick(rng, _TOWN_ENDS)).capitalize()
    )


def zh_name(rng: random.Random, split: str) -> str:
    """A Chinese full name that the split owns."""
    return owned(split, lambda: _pick(rng, _ZH_SURNAMES) + _pick(rng, _ZH_GIVEN) + _pick(rng, _ZH_GIVEN))


def order_id(rng: random.Random, split: str) -> str:
    """An order id that the split owns."""
    return owned(split, lambda: f"{_pick(rng, 'ABCDEFGH')}-{digits(rng, 5)}")


def email(rng: random.Random, split: str) -> str:
    """An email address that the split owns."""
    hosts = ("posta.net", "mailo.com", "inbox.org", "webly.com")
    return owned(split, lambda: f"{syllables(rng, 2)}{digits(rng, 2)}@{_pick(rng, hosts)}")


def zip_code(rng: random.Random, split: str) -> str:
    """A zip code that the split owns."""
    return owned(split, lambda: digits(rng, 5))


def card(rng: random.Random, split: str) -> str:
    """A gift card number that the split owns."""
    return owned(split, lambda: digits(rng, 6))


def serial(rng: random.Random, split: str) -> str:
    """A serial number that the split owns."""
    return owned(split, lambda: f"S{digits(rng, 6)}")


def coupon(rng: random.Random, split: str) -> str:
    """A coupon code that the split owns."""
    words = ("SAVE", "GIFT", "STAR", "MINT", "SUN", "WARM", "FROST", "LUCKY", "BONUS", "MAPLE")
    return owned(split, lambda: f"{_pick(rng, words)}{digits(rng, 2)}")


def amount(rng: random.Random, split: str) -> str:
    """An amount of money with cents that the split owns; never ends in 0, so that JSON spells it the same."""
    return owned(
        split, lambda: f"{5 + int(rng.random() * 295)}.{_pick(rng, '0123456789')}{_pick(rng, '123456789')}"
    )
