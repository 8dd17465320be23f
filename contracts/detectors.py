"""What personal data and secrets look like in text: built-in detectors, and loading of others.

A detector is called with a text and yields (start, end, label). Every pattern here is linear in the text: a
repeat is bounded, or consumes its whole run so that no run is looked at twice. Classes in look-arounds are
ASCII, because in Chinese or Japanese text nothing stands between a word and a number. Knows nothing about
rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import AddressValueError, IPv6Address

from contracts.errors import ConfigError
from contracts.plugins import load_function

Span = tuple[int, int, str]
Detector = Callable[[str], Iterable[Span]]

# email: runs of local-part characters are consumed whole, then it is looked whether an '@' follows.
_LOCAL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]+[@＠]?")
_DOMAIN = re.compile(r"[\w-]{1,63}(?:\.[\w-]{1,63}){1,20}")

_SEP = r"[ \u00a0\u2009\u202f().\-\u2010-\u2013/]"
_INTERNATIONAL = re.compile(rf"(?<![0-9A-Za-z_+])(?:\+|00){_SEP}{{0,2}}\d(?:{_SEP}{{0,3}}\d){{6,14}}(?!\d)")
_TRUNK = re.compile(rf"(?<![0-9A-Za-z_.,+/-])0(?![.,])(?:{_SEP}{{0,3}}\d){{8,13}}(?!\d)")
_NANP = re.compile(
    r"(?<![0-9A-Za-z_.+-])(?:1[ .-])?(?:\([2-9]\d{2}\)[ .-]{0,2}|[2-9]\d{2}[ .-])"
    r"\d{3}[ .-]\d{4}(?![0-9A-Za-z_])"
)
_CHINESE_MOBILE = re.compile(r"(?<![0-9A-Za-z_.+-])1[3-9]\d(?:[ -]?\d{4}){2}(?![0-9A-Za-z_])")
_DATE = re.compile(r"\d{1,2}[./-]\d{1,2}[./-](?:\d{4}|\d{2})(?![./-]?\d)")

_DIGITS = re.compile(r"\d+(?:[ \u00a0\u2009\u202f-]\d+)*")
_CARD_DIGITS = range(13, 20)
_GROUP = re.compile(r"\d+")
_SHORTEST_GROUP = 2
_DOUBLED = {str(d): (2 * d if d < 5 else 2 * d - 9) for d in range(10)}

_IBAN_HEAD = re.compile(r"(?<![0-9A-Za-z])[A-Za-z]{2}[ \u00a0]?[0-9]{2}")
_IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d{2})",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 "
        "EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 "
        "IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 "
        "NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 "
        "SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30",
    )
}
_IBAN_SEPARATORS = " \u00a0-"

_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![0-9A-Za-z_.])(?:{_OCTET}\.){{3}}{_OCTET}(?![0-9A-Za-z_]|\.[0-9])")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z_:])[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]{1,39}(?:\.[0-9]{1,3}){0,3}(?![0-9A-Za-z_])"
)

_PREFIXED = re.compile(r"(?<![A-Za-z0-9_-])(?:sk|pk|rk|hf|gsk|xai|glpat|npm|pypi)[-_][A-Za-z0-9_-]{16,}")
_KNOWN_KEYS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    + r"|".join(
        (
            r"gh[pousr]_[A-Za-z0-9]{20,}",
            r"github_pat_[A-Za-z0-9_]{20,}",
            r"xox[abeoprs]-[A-Za-z0-9-]{10,}",
            r"(?:AKIA|ASIA)[A-Z0-9]{16}",
            r"AIza[A-Za-z0-9_-]{30,}",
            r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]{0,8192})?",
        )
    )
    + r")"
)
_BEARER = re.compile(r"(?i)(?<![A-Za-z0-9_])(?:bearer|basic)[ \t]{1,4}([A-Za-z0-9._~+/-]{16,}={0,2})")
_ASSIGNED = re.compile(
    r"(?i)(?<![A-Za-z0-9])(api[ _-]?key|access[_-]?key|secret[_-]?key|secret|token|password|passwd|passwort)"
    r"[\"']?[ \t]{0,3}[:=][ \t]{0,3}[\"']?([^\s\"',;]{8,})"
)
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----")
_KEY_BLOCK_END = "-----END"


def emails(text: str) -> Iterator[Span]:
    """Addresses with a dotted domain, in any script."""
    for local in _LOCAL.finditer(text):
        if local.group()[-1] not in "@＠" or len(local.group()) == 1:
            continue
        domain = _DOMAIN.match(text, local.end())
        labels = domain.group().split(".") if domain is not None else []
        while labels and len(labels[-1]) < 2:  # a full stop and the next sentence's first letter
            labels.pop()
        if len(labels) > 1:
            yield local.start(), local.end() + len(".".join(labels)), "EMAIL"


def phones(text: str) -> Iterator[Span]:
    """Numbers with + or 00, with a national 0 and at least nine digits, as in North America, Chinese mobiles.

    Any other bare run of digits is not taken for a phone number: most of them are order numbers.
    """
    for pattern in (_INTERNATIONAL, _TRUNK, _NANP, _CHINESE_MOBILE):
        for found in pattern.finditer(text):
            if pattern is not _TRUNK or not _DATE.match(text, found.start()):
                yield found.start(), found.end(), "PHONE"


def credit_cards(text: str) -> Iterator[Span]:
    """13 to 19 digits that pass Luhn's check, in one piece or in groups of two and more."""
    for run in _DIGITS.finditer(text):
        groups = [m.span() for m in _GROUP.finditer(text, *run.span())]
        at = 0
        while at < len(groups):
            upto = _card_from(text, groups, at)
            if upto is None:
                at += 1
                continue
            yield groups[at][0], groups[upto][1], "CREDIT_CARD"
            at = upto + 1


def _card_from(text: str, groups: list[tuple[int, int]], first: int) -> int | None:
    """The last group of the longest card that begins with group `first`."""
    digits, best = "", None
    for at in range(first, len(groups)):
        start, end = groups[at]
        if end - start < _SHORTEST_GROUP or len(digits) + end - start > _CARD_DIGITS[-1]:
            break
        digits += text[start:end]
        if len(digits) in _CARD_DIGITS and int(digits[0]) in (2, 3, 4, 5, 6) and _luhn(digits):
            best = at
    return best


def _luhn(digits: str) -> bool:
    plain = "".join(str(int(char)) for char in digits) if not digits.isascii() else digits
    return (sum(map(int, plain[-1::-2])) + sum(map(_DOUBLED.__getitem__, plain[-2::-2]))) % 10 == 0


def ibans(text: str) -> Iterator[Span]:
    """IBANs of every country that has them, with or without spaces; the checksum must be right."""
    for head in _IBAN_HEAD.finditer(text):
        length = _IBAN_LENGTHS.get(head.group()[:2].upper())
        if length is None:
            continue
        end, compact = head.start(), ""
        while len(compact) < length and end < len(text):
            char = text[end]
            if char.isascii() and char.isalnum():
                compact += char
            elif char not in _IBAN_SEPARATORS or text[end - 1] in _IBAN_SEPARATORS:
                break
            end += 1
        follows = text[end : end + 1]
        if len(compact) == length and not (follows.isascii() and follows.isalnum()) and _mod97(compact):
            yield head.start(), end, "IBAN"


def _mod97(iban: str) -> bool:
    turned = iban[4:] + iban[:4]
    return int("".join(str(int(char, 36)) for char in turned)) % 97 == 1


def ip_addresses(text: str) -> Iterator[Span]:
    """IPv4 and IPv6 addresses. A version number of four parts looks the same, and goes too."""
    for found in _IPV4.finditer(text):
        yield found.start(), found.end(), "IP"
    for found in _IPV6.finditer(text):
        address = found.group()
        if address.endswith(":") and not address.endswith("::"):
            address = address[:-1]
        if address == "::":
            continue
        try:
            IPv6Address(address)
        except AddressValueError:
            continue
        yield found.start(), found.start() + len(address), "IP"


def api_keys(text: str) -> Iterator[Span]:
    """Keys with well-known prefixes, JWTs, bearer tokens, `password=…` and private keys."""
    for found in _KNOWN_KEYS.finditer(text):
        yield found.start(), found.end(), "API_KEY"
    for found in _PREFIXED.finditer(text):
        if _has_digit(found.group()):
            yield found.start(), found.end(), "API_KEY"
    for found in _BEARER.finditer(text):
        if _has_digit(found[1]):
            yield found.start(1), found.end(1), "API_KEY"
    for found in _ASSIGNED.finditer(text):
        # "the secret: patience" is prose; a password may be any word.
        if _has_digit(found[2]) or found[1].lower().startswith("passw"):
            yield found.start(2), found.end(2), "API_KEY"
    yield from _key_blocks(text)


def _key_blocks(text: str) -> Iterator[Span]:
    at = 0
    while (block := _KEY_BLOCK.search(text, at)) is not None:
        end = text.find(_KEY_BLOCK_END, block.end())
        line_end = text.find("-----", end + len(_KEY_BLOCK_END)) if end >= 0 else -1
        at = line_end + 5 if line_end >= 0 else len(text)
        yield block.start(), at, "PRIVATE_KEY"


def _has_digit(text: str) -> bool:
    return any(char.isdigit() for char in text)


BUILT_IN: dict[str, Detector] = {
    "email": emails,
    "phone": phones,
    "credit_card": credit_cards,
    "iban": ibans,
    "ip": ip_addresses,
    "api_key": api_keys,
}


def load_detectors(names: Iterable[str], field: str = "log.detectors") -> tuple[Detector, ...]:
    """The detectors of these names: built-in ones, or 'module:function'. Raises: ConfigError."""
    return tuple(BUILT_IN[name] if name in BUILT_IN else _imported(name, field) for name in names)


def _imported(spec: str, field: str) -> Detector:
    if ":" not in spec:
        raise ConfigError(
            f"{field}: there is no detector {spec!r}. Built in are {', '.join(BUILT_IN)}; "
            "give your own as 'module:function'."
        )
    return load_function(spec, field)
