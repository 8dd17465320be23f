"""Runs one router process on its own: python -m serve.router --config router.yaml --port 8000.

Sets PROMETHEUS_MULTIPROC_DIR before anything imports prometheus_client. Knows nothing about Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM, then drain."""
    parser = argparse.ArgumentParser(prog="python -m serve.router", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML or JSON file of a RouterConfig")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; it is printed")
    parser.add_argument("--multiproc-dir", help="folder in which all router processes of this host count")
    parser.add_argument("--log-level", default="warning")
    args = parser.parse_args(argv)
    if args.multiproc_dir:
        Path(args.multiproc_dir).mkdir(parents=True, exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = args.multiproc_dir

    import uvloop

    from contracts.config import load_config
    from serve.router.app import create_app
    from serve.router.config import RouterConfig
    from serve.router.server import bounds_of, serve

    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = load_config(args.config, RouterConfig)
    app = create_app(settings)
    listener = socket.create_server((args.host, args.port), backlog=2048, reuse_port=False)
    print(f"router {app.replica} listens on http://{args.host}:{listener.getsockname()[1]}", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, listener, app.startup, app.shutdown, bounds_of(settings), settings.drain_s))


if __name__ == "__main__":
    main()
