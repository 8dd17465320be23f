"""Which arm a request belongs to: a pure function of the split and the request.

The unit is the conversation, hashed with the split's salt to a fraction in [0, 1); canary iff the fraction
is below the weight, so raising the weight only ever adds units; further students have intervals of their own
(`Split.others`). Knows nothing about HTTP, metrics or state.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from contracts.traffic import Arm, Assignment, Reason, Split, UnitKind, bounded_unit, hash_unit
from serve.router.bodies import dump

_TWO_64 = float(2**64)
_BELOW_ONE = 1.0 - 2.0**-53


def fraction_of(salt: str, unit: str) -> float:
    """The unit's place in [0, 1): the first 64 bits of sha256(salt 0x1f unit)."""
    digest = sha256(f"{salt}\x1f{unit}".encode("utf-8", "surrogatepass")).digest()
    # 2**64 - 1 rounds up to 2**64 as a double; the fraction must stay below one.
    return min(int.from_bytes(digest[:8], "big") / _TWO_64, _BELOW_ONE)


def unit_of(conversation: str | None, body: Mapping[str, Any], request_id: str) -> tuple[UnitKind, str]:
    """The assignment unit of a request and where it came from, best source first.

    Args:
        conversation: value of the conversation header, if the client sent one.
        body: the parsed request; wrong types in it are skipped, the upstream will complain about them.
        request_id: the unit of last resort; such requests are not sticky.
    """
    if conversation:
        return UnitKind.HEADER, bounded_unit(conversation)
    user = body.get("user")
    if isinstance(user, str) and user:
        return UnitKind.USER, bounded_unit(user)
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        named = metadata.get("conversation_id")
        if isinstance(named, str) and named:
            return UnitKind.METADATA, bounded_unit(named)
    head = _first_messages(body.get("messages"))
    if head is not None:
        return UnitKind.MESSAGES, head
    return UnitKind.REQUEST, request_id


def assign(split: Split, unit_kind: UnitKind, unit: str, override: Arm | None = None) -> Assignment:
    """Decide the arm of a unit under a split.

    `override` is a client's explicit wish and wins; it is recorded as such and never counts as evidence.
    While there is nobody else to send a request to (no student with a weight) the reason is ONLY_ARM.
    """
    fraction = fraction_of(split.salt, unit)
    arm, slot, reason = Arm.STABLE, 0, Reason.RANDOM
    if override is not None:
        arm, reason = override, Reason.OVERRIDE
    elif fraction < split.weight:
        arm = Arm.CANARY
    elif split.others:
        slot = _slot_of(split, fraction)
        arm = Arm.CANARY if slot else Arm.STABLE
    elif split.weight <= 0.0:
        reason = Reason.ONLY_ARM
    return Assignment(
        arm=arm,
        reason=reason,
        unit_kind=unit_kind,
        unit_hash=hash_unit(unit),
        fraction=fraction,
        split_version=split.version,
        slot=slot,
    )


def _slot_of(split: Split, fraction: float) -> int:
    """Which of the others a fraction belongs to, counted from 1; 0: none."""
    for n, slot in enumerate(split.others, 1):
        if slot.start <= fraction < slot.start + slot.weight:
            return n
    return 0


def _first_messages(messages: object) -> str | None:
    """Digest of everything up to the first user message: a chat that grows keeps its head, so its arm."""
    if not isinstance(messages, list):
        return None
    for at, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            head = [
                (m.get("role"), m.get("content")) if isinstance(m, dict) else m for m in messages[: at + 1]
            ]
            return sha256(dump(head, sort_keys=True)).hexdigest()
    return None
