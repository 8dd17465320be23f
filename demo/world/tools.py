"""The support desk's tools: names, typed arguments, their JSON schemas, and what a valid answer looks like.

It knows nothing of how customers phrase things (`phrases_en`, `phrases_zh`) or of which split a request is
in (`splits`).
"""

from __future__ import annotations

import json
import re
from typing import Any

PRODUCTS = (
    "headphones",
    "laptop",
    "backpack",
    "kettle",
    "lamp",
    "keyboard",
    "jacket",
    "camera",
    "router",
    "tent",
)
CITIES = ("Oslo", "Lyon", "Porto", "Gdansk", "Leeds", "Turin", "Malmo", "Ghent")

ORDER = {"type": "string", "pattern": "^[A-H]-[0-9]{5}$"}
DATE = {"type": "string", "pattern": "^(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$"}
EMAIL = {"type": "string", "pattern": "^[a-z]+[0-9]{2}@[a-z]+\\.(com|net|org)$"}
ZIP = {"type": "string", "pattern": "^[0-9]{5}$"}
CARD = {"type": "string", "pattern": "^[0-9]{6}$"}
CODE = {"type": "string", "pattern": "^[A-Z]+[0-9]{2}$"}
SERIAL = {"type": "string", "pattern": "^S[0-9]{6}$"}
AMOUNT = {"type": "number", "exclusiveMinimum": 0}
HOUR = {"type": "integer", "minimum": 9, "maximum": 18}
QUANTITY = {"type": "integer", "minimum": 2, "maximum": 9}
BOOLEAN = {"type": "boolean"}


def _enum(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


PRODUCT = _enum(*PRODUCTS)
CITY = _enum(*CITIES)
REASON = _enum("damaged", "late", "wrong_item", "unwanted")
SPEED = _enum("standard", "express", "overnight")
FREQUENCY = _enum("daily", "weekly", "monthly")
CHANNEL = _enum("sms", "email", "push")
PRIORITY = _enum("low", "normal", "high")
TOPIC = _enum("billing", "delivery", "website", "quality")

#: tool -> argument -> JSON schema of the argument, in the order in which the arguments are written.
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "cancel_order": {"order_id": ORDER},
    "track_order": {"order_id": ORDER},
    "refund_order": {"order_id": ORDER, "amount": AMOUNT, "reason": REASON},
    "change_address": {"order_id": ORDER, "zip": ZIP},
    "reschedule_delivery": {"order_id": ORDER, "date": DATE},
    "upgrade_shipping": {"order_id": ORDER, "speed": SPEED},
    "change_quantity": {"order_id": ORDER, "quantity": QUANTITY},
    "apply_coupon": {"order_id": ORDER, "code": CODE},
    "return_item": {"order_id": ORDER, "product": PRODUCT},
    "send_invoice": {"order_id": ORDER, "email": EMAIL},
    "check_stock": {"product": PRODUCT, "city": CITY},
    "get_price": {"product": PRODUCT},
    "store_hours": {"city": CITY},
    "update_email": {"email": EMAIL},
    "reset_password": {"email": EMAIL},
    "subscribe_newsletter": {"email": EMAIL, "frequency": FREQUENCY},
    "close_account": {"email": EMAIL, "delete_data": BOOLEAN},
    "set_notifications": {"channel": CHANNEL, "enabled": BOOLEAN},
    "create_ticket": {"topic": TOPIC, "priority": PRIORITY},
    "book_callback": {"date": DATE, "hour": HOUR},
    "gift_card_balance": {"card": CARD},
    "warranty_claim": {"serial": SERIAL, "product": PRODUCT},
    "escalate_to_human": {},
}


def _schema(name: str, arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"tool": {"const": name}, **arguments},
        "required": ["tool", *arguments],
        "additionalProperties": False,
    }


#: tool -> JSON schema of one call.
TOOLS: dict[str, dict[str, Any]] = {name: _schema(name, arguments) for name, arguments in ARGUMENTS.items()}

_PATTERNS = {
    schema["pattern"]: re.compile(schema["pattern"])
    for arguments in ARGUMENTS.values()
    for schema in arguments.values()
    if "pattern" in schema
}


def canonical(answer: list[dict[str, Any]]) -> str:
    """The one spelling of an answer: compact JSON, keys in the order of the schema."""
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value_ok(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that the tools use, by hand: a validator library costs milliseconds a call."""
    kind = schema["type"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        if not isinstance(value, str):
            return False
        return (
            value in schema["enum"] if "enum" in schema else bool(_PATTERNS[schema["pattern"]].match(value))
        )
    if not _is_number(value) or (kind == "integer" and not isinstance(value, int)):
        return False
    return bool(
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
    )


def _call_ok(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("tool"), str):
        return False
    arguments = ARGUMENTS.get(call["tool"])
    if arguments is None or set(call) != {"tool", *arguments}:
        return False
    return all(_value_ok(call[name], schema) for name, schema in arguments.items())


def parse(text: str) -> Any:
    """The JSON value of an answer, or None when it is no JSON (`null` is no answer either)."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def schema_ok(text: str) -> bool:
    """Whether the text is a JSON list of calls that the tools would accept."""
    calls = parse(text)
    return isinstance(calls, list) and all(_call_ok(call) for call in calls)


def exact_match(text: str, answer: list[dict[str, Any]]) -> bool:
    """Whether the text, as JSON, equals the answer: the same calls in the same order; spelling is free."""
    calls = parse(text)
    if not isinstance(calls, list) or len(calls) != len(answer):
        return False
    return bool(calls == answer) and all(map(_same_types, calls, answer))


def _same_types(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Python says True == 1; JSON does not."""
    return all(isinstance(left[key], bool) == isinstance(right[key], bool) for key in right)
