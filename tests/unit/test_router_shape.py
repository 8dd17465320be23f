"""What a route's settings make of a request."""

from __future__ import annotations

import pytest

from contracts.routes import Affinity
from serve.router.errors import RequestRefused
from serve.router.shape import affinity_key, completion_cap


@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        ("/v1/chat/completions", "max_completion_tokens"),
        ("/v1/completions", "max_tokens"),
        ("/v1/responses", "max_output_tokens"),
        ("/v1/messages", "max_tokens"),
    ],
)
def test_a_request_without_a_limit_gets_the_routes(endpoint: str, field: str) -> None:
    """The limit goes into the field that the endpoint knows."""
    assert completion_cap(endpoint, {}, 64) == (field, 64)
    assert completion_cap(endpoint, {field: 64}, 64) is None


def test_asking_for_more_is_refused_by_the_fields_name() -> None:
    """Both of chat's fields count; a wrong type is the upstream's to refuse."""
    for field in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(RequestRefused, match=f"'{field}' may be at most 64 here, not 65"):
            completion_cap("/v1/chat/completions", {field: 65}, 64)
    assert completion_cap("/v1/chat/completions", {"max_tokens": "many"}, 64) is None
    assert completion_cap("/v1/embeddings", {"max_tokens": 65}, 64) is None


def test_requests_with_the_same_head_share_a_replica_and_conversations_only_their_own() -> None:
    """Prefix affinity looks at the system prompt and first question, not at what follows."""
    system = {"role": "system", "content": "You are kind."}
    ask = {"role": "user", "content": "Hello?"}
    short, long = (
        {"messages": [system, ask]},
        {"messages": [system, ask, {"role": "assistant", "content": "Hi"}]},
    )
    other = {"messages": [system, {"role": "user", "content": "Bye?"}]}
    keys = [affinity_key(Affinity.PREFIX, "u", b) for b in (short, long, other)]
    assert keys[0] == keys[1] != keys[2]
    assert affinity_key(Affinity.PREFIX, "u", {}) == affinity_key(Affinity.PREFIX, "v", {})
    assert affinity_key(Affinity.CONVERSATION, "u", short) != affinity_key(Affinity.CONVERSATION, "v", short)
