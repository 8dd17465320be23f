"""Runs the router on its own: python -m serve.router --config router.yaml --port 8000.

One process a core by default, all on one port. Sets PROMETHEUS_MULTIPROC_DIR before anything imports
prometheus_client. Knows nothing about Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from pathlib import Path

from contracts import logs
from contracts.config import load_config
from contracts.errors import StillhouseError
from contracts.logs import levelled
from serve.router.config import RouterConfig
from serve.router.workers import Workers, default_workers, listeners


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM, then drain."""
    args = _arguments(argv)
    try:
        config = load_config(args.config, RouterConfig)
        logs.start(levelled(config.logging, args.log_level), "router")
        if args.fd is not None:
            return _serve(config, args, socket.socket(fileno=args.fd))
        sockets = listeners(args.host, args.port, args.workers)
    except StillhouseError as err:
        return _refuse(str(err))
    except OSError as err:
        return _refuse(f"cannot listen on {args.host}:{args.port}: {err}")
    url = f"http://{args.host}:{sockets[0].getsockname()[1]}"
    if args.workers == 1:
        print(f"router listens on {url}", flush=True)
        return _serve(config, args, sockets[0])
    print(f"router of {args.workers} processes listens on {url}", flush=True)
    passed_on = ["--config", args.config, *(["--log-level", args.log_level] if args.log_level else [])]
    return Workers(passed_on, sockets, args.multiproc_dir).run()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serve.router", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML or JSON file of a RouterConfig")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; it is printed")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=default_workers(),
        help="processes; default: one a core, 4 at most",
    )
    parser.add_argument("--multiproc-dir", help="folder in which all router processes of this host count")
    parser.add_argument("--log-level", help="instead of the configuration's logging.level")
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _refuse(why: str) -> int:
    print(f"serve.router: {why}", file=sys.stderr)
    return 2


def _serve(config: RouterConfig, args: argparse.Namespace, listener: socket.socket) -> int:
    if args.multiproc_dir:
        Path(args.multiproc_dir).mkdir(parents=True, exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = args.multiproc_dir

    import uvloop

    from serve.router.app import create_app
    from serve.router.server import bounds_of, serve

    app = create_app(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, listener, app.startup, app.shutdown, bounds_of(config), config.drain_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
