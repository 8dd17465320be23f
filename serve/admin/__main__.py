"""Runs the admin API on its own listener: python -m serve.admin --config router.yaml --port 8001.

Reads the routers' configuration, of which it needs the state store's address. Knows nothing about Ray.
"""

from __future__ import annotations

import argparse
import socket
import sys

from contracts.errors import StillhouseError


def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m serve.admin", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML or JSON file of a RouterConfig")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one; it is printed")
    parser.add_argument(
        "--insecure", action="store_true", help="no admin key needed; on a loopback address only"
    )
    parser.add_argument("--log-level", help="instead of the configuration's logging.level")
    args = parser.parse_args(argv)
    try:
        serve(args.config, args.host, args.port, args.insecure, args.log_level)
    except StillhouseError as err:
        sys.exit(f"{type(err).__name__}: {err}")


def serve(config_path: str, host: str, port: int, insecure: bool, log_level: str | None) -> None:
    """Listen and serve. Raises: ConfigError, StateError."""
    import uvicorn

    from contracts import logs
    from contracts.config import load_config
    from serve.admin.app import create_app
    from serve.admin.auth import check_insecure
    from serve.router.config import RouterConfig
    from serve.state.tables import open_state

    if insecure:
        check_insecure(host)
    settings = load_config(config_path, RouterConfig)
    logs.start(logs.levelled(settings.logging, log_level), "admin")
    app = create_app(open_state(settings.state_url), insecure)
    listener = socket.create_server((host, port), backlog=128)
    url = f"http://{host}:{listener.getsockname()[1]}"
    print(f"admin API listens on {url}\nconsole: {url}/console", flush=True)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        server_header=False,
        log_level="warning",
        log_config=None,  # uvicorn's lines are ours
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
