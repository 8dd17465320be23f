"""Stands in for vLLM inside an engine's process where a test is about nodes and not about models.

Everything around it is real: Ray's replica, its keeper, `serve.engine.launch`, registration, drain. Only the
import of `vllm` finds this, by the engine's PYTHONPATH; it starts in a second where vLLM takes fifteen.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from serve.engine.fake import FakeEngine, Receive, Send
from serve.engine.fake_apis import Behaviour

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.3
"""Per answer, so that some are always under way."""
_PLATFORMS = """
class current_platform:
    @staticmethod
    def is_cpu(): return False
"""


def stand_in(folder: Path) -> dict[str, str]:
    """Write the package `vllm`; returns the environment in which an engine finds it."""
    entry = folder / "vllm" / "entrypoints" / "launchers" / "api_server"
    entry.mkdir(parents=True)
    for package in (entry, *entry.parents[:3]):
        (package / "__init__.py").touch()
    (folder / "vllm" / "platforms.py").write_text(_PLATFORMS)
    (entry / "entry.py").write_text("from tests.integration.engine_stand_in import main\n")
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


class Engine(FakeEngine):
    """Says how many requests it has as vLLM does, by which a drain waits for them."""

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "http" and scope["path"] == "/metrics":
            text = f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n".encode()
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": text})
            return
        await super().__call__(scope, receive, send)


def main() -> None:
    """Serve like `vllm serve` with these arguments; those about the model's weights are not looked at."""
    import uvicorn

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--served-model-name", "--host"):
        parser.add_argument(name, required=True)
    parser.add_argument("--port", type=int, required=True)
    known, _ = parser.parse_known_args()
    if not Path(known.model).is_dir():
        raise SystemExit(f"OSError: there is no model at {known.model}")
    app = Engine(Behaviour(model=known.served_model_name, ttft_s=SECONDS))
    uvicorn.run(app, host=known.host, port=known.port, log_level="warning", ws="none")
