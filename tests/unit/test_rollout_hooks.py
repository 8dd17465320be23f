"""Webhooks: what is told, signed and in which order; what a dead receiver costs; what is never stored."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from contracts.config import parse_config
from contracts.errors import ConfigError
from contracts.hooks import EVENTS, HookPoint, HookSpec
from contracts.rollout import Phase, Step
from serve.rollout.courier import Courier, retry_s
from serve.rollout.messages import became, messages_table
from serve.rollout.policy import RolloutPolicy
from serve.rollout.webhook import Reply, post
from serve.state.outbox import OutboxState
from tests.unit.rollout_world import BROKEN, World, demo_policy

QUICK = (Step(weight=0.5, min_samples=20),)


class Receiver:
    """A webhook's other end: answers with `script` (the last entry for ever) and keeps what it got."""

    def __init__(self) -> None:
        self.script: list[tuple[int, bytes]] = [(204, b"")]
        self.got: list[tuple[dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((dict(self.headers), body))
                status, words = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{outer.url}/elsewhere")
                self.send_header("Content-Length", str(len(words)))
                self.end_headers()
                self.wfile.write(words)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self) -> list[str]:
        """The events as they came."""
        return [json.loads(body)["event"] for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver on a port of its own."""
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def told(folder: Path, url: str, **hook: object) -> tuple[World, Courier]:
    """A world whose policy tells `url`, and the courier over its outbox, at the world's clock."""
    spec = HookSpec(**{"on": ("*",), "url": url, **hook})  # type: ignore[arg-type]
    world = World(folder, demo_policy(steps=QUICK, hooks=(spec,)), per_s=60.0)
    return world, Courier(world.engine, clock=lambda: world.now)


def drain(courier: Courier) -> None:
    """Deliver until nothing is due."""
    while courier.deliver():
        pass


def test_every_transition_is_told_in_order_and_once(tmp_path: Path, receiver: Receiver) -> None:
    """The events of a whole rollout with their sentences; the event id of each is in header and body."""
    world, courier = told(tmp_path, receiver.url)
    world.until(Phase.PROMOTED)
    drain(courier)
    events = [e for e in receiver.events() if e not in ("held", "ramping")]
    assert events == ["warming", "step", "promoting", "promoted"]
    assert set(events) <= set(EVENTS)
    headers, body = receiver.got[-1]
    message = json.loads(body)
    assert headers["X-Stillhouse-Event-Id"] == message["id"]
    assert (message["route"], message["model"], message["decision"]) == ("support", "student:1", "promoted")
    assert message["reason"] == world.status.reason
    ids = [h["X-Stillhouse-Event-Id"] for h, _ in receiver.got]
    assert len(set(ids)) == len(ids)


def test_a_message_is_signed_over_timestamp_and_body(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HMAC-SHA256 as documented; the secret is in no table and no header."""
    monkeypatch.setenv("HOOK_SECRET", "s3cret")
    world, courier = told(tmp_path, receiver.url, secret_env="HOOK_SECRET")
    world.until(Phase.RAMPING)
    drain(courier)
    headers, body = receiver.got[0]
    signed = headers["X-Stillhouse-Timestamp"].encode() + b"." + body
    expected = hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert headers["X-Stillhouse-Signature"] == f"sha256={expected}"
    with world.engine.connect() as db:
        for table in ("outbox", "rollouts", "audit"):
            assert "s3cret" not in str(db.execute(text(f"SELECT * FROM {table}")).all())
    assert "s3cret" not in str(headers)


def test_only_the_events_asked_for_are_told(tmp_path: Path, receiver: Receiver) -> None:
    """on: [rolled_back] hears of nothing else."""
    world, courier = told(tmp_path, receiver.url, on=("rolled_back",))
    world.routers.canary = BROKEN
    world.until(Phase.ROLLED_BACK)
    drain(courier)
    assert receiver.events() == ["rolled_back"]


def test_a_failed_delivery_is_retried_later_and_holds_back_what_follows(
    tmp_path: Path, receiver: Receiver
) -> None:
    """Order within a rollout's stream: the second message waits for the first one's retry."""
    receiver.script = [(503, b"later"), (204, b"")]
    world, courier = told(tmp_path, receiver.url)
    world.until(Phase.RAMPING)
    drain(courier)
    assert receiver.events() == ["warming"]
    (first, *_) = OutboxState(world.engine).of(world.spec.id)
    assert (first.tries, first.error, first.done_at) == (1, "HTTP 503 later", None)
    assert 0.5 <= first.next_at - world.now <= 1.0
    world.now += 1.0
    drain(courier)
    assert receiver.events() == ["warming", "warming", "step"]
    ids = [h["X-Stillhouse-Event-Id"] for h, _ in receiver.got]
    assert ids[0] == ids[1] != ids[2]


def test_after_its_tries_a_message_is_a_dead_letter_and_the_next_is_sent(
    tmp_path: Path, receiver: Receiver
) -> None:
    """retries: 2 is three tries; the words are kept for 'rollout history', and the stream goes on."""
    receiver.script = [(500, b"no")] * 3 + [(204, b"")]
    world, courier = told(tmp_path, receiver.url, retries=2)
    world.until(Phase.RAMPING)
    for _ in range(4):
        drain(courier)
        world.now += 10.0
    assert receiver.events() == ["warming", "warming", "warming", "step"]
    dead, sent = OutboxState(world.engine).of(world.spec.id)
    assert (dead.dead, dead.tries, dead.error) == (True, 3, "HTTP 500 no")
    assert became(dead) == "dead letter: HTTP 500 no"
    assert became(sent).startswith("delivered ")
    assert messages_table([dead, sent]).row_count == 2


def test_one_dead_receiver_does_not_hold_back_another(tmp_path: Path, receiver: Receiver) -> None:
    """Each hook is a stream of its own."""
    hooks = (
        HookSpec(name="gone", on=("*",), url="http://127.0.0.1:1/"),
        HookSpec(on=("*",), url=receiver.url),
    )
    world = World(tmp_path, demo_policy(steps=QUICK, hooks=hooks))
    world.until(Phase.RAMPING)
    drain(Courier(world.engine, clock=lambda: world.now))
    assert receiver.events() == ["warming", "step"]


def test_a_message_and_its_tick_are_stored_together_or_not_at_all(tmp_path: Path) -> None:
    """No transition without its message, no message of a transition that was lost to another controller."""
    world, _ = told(tmp_path, "http://127.0.0.1:1/")
    world.step()
    moved = [e for e in world.rollouts.audit(world.spec.id) if e.body.get("to") != e.body.get("from")]
    assert len(OutboxState(world.engine).of(world.spec.id)) == len(moved) == 1


def test_who_does_not_lead_does_not_send(tmp_path: Path, receiver: Receiver) -> None:
    """The courier of a controller that lost its lease keeps still."""
    world, _ = told(tmp_path, receiver.url)
    world.until(Phase.RAMPING)
    Courier(world.engine, leading=lambda: False, clock=lambda: world.now).deliver()
    assert receiver.got == []


def test_a_redirect_is_a_failure(receiver: Receiver) -> None:
    """A signed message goes where the operator said and nowhere else."""
    receiver.script = [(302, b"")]
    reply = post(HookSpec(on=("*",), url=receiver.url), "{}", "held", "id", 1.0)
    assert (reply.status, reply.accepted, reply.refused) == (302, False, False)
    assert len(receiver.got) == 1


def test_what_a_receiver_says_is_cut_and_cleaned(receiver: Receiver) -> None:
    """Its words end up in a terminal: no control characters, not a megabyte of them."""
    receiver.script = [(400, b"\x1b[31mred\r\n" + b"x" * 100_000)]
    reply = post(HookSpec(on=("*",), url=receiver.url), "{}", "held", "id", 1.0)
    assert reply.refused
    assert reply.words.startswith("HTTP 400 [31mred x")
    assert len(reply.words) <= 210


@pytest.mark.parametrize(
    ("status", "refused"), [(400, True), (403, True), (408, False), (429, False), (500, False)]
)
def test_only_a_clear_no_is_a_refusal(status: int, refused: bool) -> None:
    """Overload and timeouts ask for patience: they are errors, retried within the budget."""
    assert Reply(status, "").refused is refused


def test_a_secret_that_is_not_set_is_an_error_and_nothing_is_sent_unsigned(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variable; a URL from the environment is checked like one from the file."""
    monkeypatch.delenv("NO_SUCH", raising=False)
    reply = post(HookSpec(on=("*",), url=receiver.url, secret_env="NO_SUCH"), "{}", "held", "id", 1.0)
    assert (reply.status, reply.words) == (None, "NO_SUCH is not set in the controller's environment")
    monkeypatch.setenv("URL", "file:///etc/passwd")
    reply = post(HookSpec(on=("*",), url_env="URL"), "{}", "held", "id", 1.0)
    assert reply.status is None
    assert "http" in reply.words
    assert receiver.got == []


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ({"url": "http://h/"}, "exactly one of 'on'"),
        ({"on": ["held"], "confirm": "before_step", "url": "http://h/"}, "exactly one of 'on'"),
        ({"on": ["helt"], "url": "http://h/"}, "no event helt; there are started"),
        ({"on": ["held"]}, "exactly one of 'url' and 'url_env'"),
        ({"on": ["held"], "url": "ftp://h/"}, "must start with http"),
        ({"on": ["held"], "url": "http://me:pw@h/"}, "no user or password in the url"),
        ({"confirm": "before_lunch", "url": "http://h/"}, "before_start"),
        ({"on": ["held"], "url": "http://h/", "timeout_s": 0}, "greater than 0"),
        ({"on": ["held"], "url": "http://h/", "secret": "x"}, "unknown key"),
    ],
)
def test_a_wrong_hook_is_refused_when_the_policy_is_read(hook: dict[str, object], says: str) -> None:
    """Not at the moment it is needed."""
    with pytest.raises(ConfigError) as err:
        parse_config({"hooks": [hook]}, RolloutPolicy)
    assert says in str(err.value)


def test_the_name_of_a_hook_never_shows_its_path() -> None:
    """Incoming-webhook URLs are secrets: sentences and logs name the host, or the variable."""
    assert HookSpec(on=("*",), url="https://hooks.example.com/T0/s3cret").label == "hooks.example.com"
    assert HookSpec(on=("*",), url_env="SLACK_URL").label == "SLACK_URL"
    assert HookSpec(name="desk", confirm=HookPoint.BEFORE_STEP, url="http://h/x").label == "desk"


def test_retries_back_off_with_jitter_up_to_a_bound() -> None:
    """1, 2, 4, … seconds, each between half and whole, five minutes at most."""
    for tries, longest in ((0, 1.0), (3, 8.0), (8, 256.0), (20, 300.0), (10_000, 300.0)):
        found = [retry_s(tries) for _ in range(50)]
        assert longest / 2 <= min(found)
        assert max(found) <= longest
        assert len(set(found)) > 1
