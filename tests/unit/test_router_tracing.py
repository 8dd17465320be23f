"""Traces: what is decided when a request arrives, and what is said when they cannot be made."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.errors import ConfigError
from serve.router.config import TracingConfig
from serve.router.tracing import SpanStart, Tracer, _traces_url


def test_the_header_for_the_upstream_has_the_w3c_form() -> None:
    """Leading zeros included."""
    assert (
        SpanStart(1, 2, None, True).header()
        == b"traceparent: 00-" + b"0" * 31 + b"1-" + b"0" * 15 + b"2-01\r\n"
    )


@given(st.binary(max_size=80))
def test_any_header_gets_a_span(tracer: Tracer, header: bytes) -> None:
    """Whatever a client sends as traceparent, ids are valid and nothing is raised."""
    start = tracer.begin(header)
    assert 0 < start.trace_id < 2**128
    assert 0 < start.span_id < 2**64


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer(TracingConfig(endpoint="http://127.0.0.1:9"), "test")


def test_a_missing_exporter_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing that cannot work stops the router at its start, naming the packages."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry.exporter.otlp"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="opentelemetry-exporter-otlp-proto-http"):
        Tracer(TracingConfig(endpoint="http://127.0.0.1:9"), "test")


def test_the_endpoint_is_a_url() -> None:
    """A base URL gets the standard path, a whole one stays, anything else is refused."""
    assert _traces_url("http://c:4318") == _traces_url("http://c:4318/") == "http://c:4318/v1/traces"
    assert _traces_url("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
    for wrong in ("c:4318", "grpc://c:4317", "http://"):
        with pytest.raises(ValidationError):
            TracingConfig(endpoint=wrong)
