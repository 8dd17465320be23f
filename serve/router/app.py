"""The router as one raw ASGI application: what is served where, and the life of its parts.

No web framework, because everything here is either five fixed paths or bytes passed through. Knows nothing
about how it is hosted.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from pathlib import Path
from typing import Any, cast

from contracts.detectors import BUILT_IN, load_detectors
from contracts.errors import ConfigError
from contracts.keys import ApiKey
from contracts.redaction import Redactor
from serve.grading.graders import single_graders
from serve.grading.judge import evidence_names
from serve.request_log import Keeper, RequestLog, SegmentWriter, recover
from serve.request_log.erase import settle
from serve.request_log.remote import Remote
from serve.router.accounts import Accounts
from serve.router.answers import AnswerJudging
from serve.router.client import HttpClient
from serve.router.config import RouterConfig
from serve.router.errors import RequestRefused, error_body, error_for
from serve.router.feedback import FeedbackDesk
from serve.router.guard import Receive
from serve.router.intake import Intake
from serve.router.judge_client import JudgeClient
from serve.router.judging import Judging
from serve.router.keys import KeyTable, in_scope
from serve.router.keysync import KeySync
from serve.router.ledger import Ledger
from serve.router.lines import RequestLines
from serve.router.metrics import CONTENT_TYPE, OTHER, Metrics
from serve.router.names import host_name, replica_name
from serve.router.openapi import FEEDBACK, ROUTED, document
from serve.router.pairs import PairGrading
from serve.router.pool import Pools
from serve.router.proxy import Proxy
from serve.router.readiness import Readiness
from serve.router.relay import Send
from serve.router.replies import send_bytes, send_json
from serve.router.scores import Scores
from serve.router.served import ServedIds
from serve.router.sync import StateSync
from serve.router.table import RouteTable
from serve.router.targets import targets
from serve.router.tracing import Tracer
from serve.router.verdicts import Verdicts

_log = logging.getLogger("stillhouse.router")

_LOCAL = ("/v1/models", "/health", "/ready", "/metrics", "/targets", "/openapi.json")
_STORED = "/v1/responses/"
_NO_STORE = (
    "Responses are not kept here: a replica that stored one is known to nobody but itself. "
    "Send the conversation in 'input' instead of 'previous_response_id'."
)
_SWITCH_INTERVAL_S = 0.0001
_LAST_UPLOAD_S = 20.0


class RouterApp:
    """One router process. Its parts live between the lifespan's startup and shutdown."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.replica = replica_name()
        self._graders = single_graders(config.graders)
        self._judge_names = evidence_names(config.judges(), config.upstreams)
        self._redactor = Redactor(load_detectors(config.log.detectors if config.log else BUILT_IN))
        self._keeper: Keeper | None = None
        self._desk: FeedbackDesk | None = None
        self._draining = False
        self._proxy: Proxy | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            raise ConfigError(f"the router speaks HTTP, not {scope['type']}")

    # HTTP ------------------------------------------------------------------------------------------

    async def _http(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        path = _path(scope)
        if self._proxy is None:
            await send_json(send, 503, error_body("The router is not started.", "server_error"))
        elif path in ROUTED and scope["method"] == "POST":
            await self._proxy.handle(scope, receive, send, path)
        elif path == FEEDBACK and scope["method"] == "POST" and self._desk is not None:
            await self._desk.handle(scope, receive, send)
        elif scope["method"] in ("GET", "HEAD") and (path in _LOCAL or path.startswith("/v1/models/")):
            await self._local(path, scope, send)
        elif path.startswith(_STORED):
            self._metrics.refused(404, OTHER)
            await send_json(send, 404, error_body(_NO_STORE, "invalid_request_error", "response_not_found"))
        else:
            known = (
                path in ROUTED
                or path in _LOCAL
                or path.startswith("/v1/models/")
                or (path == FEEDBACK and self._desk is not None)
            )
            status = 405 if known else 404
            what = f"{scope['method']} is not allowed here." if known else "There is nothing at this path."
            self._metrics.refused(status, path if path in ROUTED or path in _LOCAL else OTHER)
            body = error_for(path, status, error_body(what, "invalid_request_error", "not_found"))
            allow = (
                [(b"allow", b"POST" if path in ROUTED or path == FEEDBACK else b"GET, HEAD")] if known else []
            )
            await send_json(send, status, body, headers=allow)

    async def _local(self, path: str, scope: dict[str, Any], send: Send) -> None:
        if path == "/metrics":
            if self._request_log is not None:
                self._metrics.log_queue.set(len(self._request_log))
            await send_bytes(send, 200, CONTENT_TYPE, await self._metrics.scrape())
        elif path == "/health":
            await send_json(send, 200, {"status": "ok", "replica": self.replica})
        elif path == "/ready":
            missing = ["the router is draining"] if self._draining else await self._readiness.missing()
            missing = [*missing, *self._keys.missing()]
            status = "ready" if not missing else "not ready"
            await send_json(send, 503 if missing else 200, {"status": status, "missing": missing})
        elif path == "/openapi.json":
            await send_bytes(send, 200, b"application/json", document())
        else:
            try:
                key = self._keys.identify(scope["headers"])
                if path == "/targets":
                    await send_json(send, 200, targets(self._table, self._pools))
                else:
                    await self._models(path, key, send)
            except RequestRefused as refused:
                self._metrics.refused(refused.status, "/targets" if path == "/targets" else "/v1/models")
                await send_json(send, refused.status, refused.body, headers=refused.headers)

    async def _models(self, path: str, key: ApiKey | None, send: Send) -> None:
        """The names that the key may ask for; the others do not exist for it."""
        if path == "/v1/models":
            models = [_model(name) for name in self._table.public_names(key)]
            await send_json(send, 200, {"object": "list", "data": models})
        else:
            name = path.removeprefix("/v1/models/")
            route = self._table.get(name)
            if route is None or not in_scope(key, route.split.route):
                why = f"The model {name[:128]!r} does not exist."
                await send_json(
                    send, 404, error_body(why, "invalid_request_error", "model_not_found", "model")
                )
            else:
                await send_json(send, 200, _model(name))

    # life ------------------------------------------------------------------------------------------

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.startup()
        except Exception as err:  # reason: the server must hear of it in its own protocol, then it is raised
            await send({"type": "lifespan.startup.failed", "message": str(err)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.shutdown()
        await send({"type": "lifespan.shutdown.complete"})

    async def startup(self) -> None:
        """Make the parts, look at the state store once, and take requests."""
        # The log's threads share the interpreter with the event loop; let it have it back quickly.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        config = self.config
        self._metrics = Metrics(
            [self._judge_names.get(name, name) for name in config.graders],
            config.prices,
            config.student_price,
        )
        self._table = RouteTable(self._metrics)
        self._pools = Pools(config)
        self._client = HttpClient(config.timeouts.connect_s)
        self._ledger = Ledger(self.replica)
        judging = Judging(
            config.judges(),
            self._judge_names,
            JudgeClient(self._client, self._pools, config.upstreams),
            self._metrics,
        )
        self._scores = self._open_scores()
        self._answers = AnswerJudging(judging, self._scores)
        self._request_log = await self._open_log()
        self._tracer = self._start_tracer()
        self._keys = KeyTable(config.keys, self._metrics)
        self._sync = StateSync(
            config,
            self.replica,
            self._table,
            self._pools,
            self._ledger,
            self._metrics,
            KeySync(self.replica, self._keys) if config.keys else None,
        )
        self._readiness = Readiness(config.routes, self._table, self._pools, self._client)
        await self._sync.start()
        served = await self._open_desk()
        gc.collect()
        gc.freeze()  # what is here stays; not walking it again keeps collections off the slowest percent
        accounts = Accounts(
            self._table,
            self._metrics,
            self._ledger,
            self._keys,
            served,
            self._request_log,
            self._tracer,
            RequestLines(config.logging),
        )
        intake = Intake(config, self._table, self._keys, self._tracer)
        pairs = PairGrading(config, judging, self._scores, self._metrics) if config.graders else None
        self._proxy = Proxy(
            config,
            intake,
            self._table,
            self._pools,
            self._client,
            self._metrics,
            accounts,
            pairs,
            {grader.name: grader for grader in self._graders},
            judging,
        )
        _log.info("router %s started with routes %s", self.replica, self._table.names())

    def listens(self, address: str) -> None:
        """To be called after `startup` by whoever made a server for this application, with its host:port."""
        self._sync.listens(address)

    async def shutdown(self) -> None:
        """Finish what is running, then store all evidence and rows."""
        self._draining = True
        assert self._proxy is not None
        deadline = time.monotonic() + self.config.drain_s
        while self._proxy.active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._proxy.active:
            _log.error("router %s leaves with %d requests running", self.replica, self._proxy.active)
        await self._proxy.shadows.close()
        if self._request_log is not None and not await asyncio.to_thread(self._request_log.close):
            _log.error("router %s leaves with %d log rows unwritten", self.replica, len(self._request_log))
        await self._answers.close()
        await self._scores.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.stop)
        await self._sync.stop()  # after the log: the last grades are evidence too
        if self._desk is not None:
            await self._desk.stop()
        if self._keeper is not None and not await asyncio.to_thread(self._keeper.close, _LAST_UPLOAD_S):
            _log.error("router %s leaves with segments to upload; the next one does it", self.replica)
        self._client.close()
        self._metrics.batch.flush()
        _log.info("router %s stopped", self.replica)

    def _start_tracer(self) -> Tracer | None:
        if self.config.tracing is None:
            return None
        tracer = Tracer(self.config.tracing, self.replica)
        tracer.start()
        return tracer

    async def _open_log(self) -> RequestLog | None:
        log = self.config.log
        if log is None:
            return None
        folder = Path(log.dir)
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(recover, folder, host_name())
        writer = SegmentWriter(folder, self.replica, log.rotate_bytes, log.rotate_s, settle=settle)
        hooks = Verdicts(self._metrics, self._ledger, self._answers.answered)
        request_log = RequestLog(
            writer, hooks, log.queue_rows, self._graders, self._redactor, self._answers.wants_answers
        )
        request_log.start(asyncio.get_running_loop())
        remote = Remote(log.upload) if log.upload is not None else None
        self._keeper = Keeper(folder, remote, log.keep_local, log.retention_days, hooks.uploaded)
        self._keeper.start()
        return request_log

    def _open_scores(self) -> Scores:
        log, lines = self.config.log, None
        if log is not None and self.config.graders:
            lines = SegmentWriter(
                Path(log.dir), self.replica, log.rotate_bytes, log.rotate_s, "scores", settle
            )
        scores = Scores(self._metrics, self._ledger, lines)
        scores.start()
        return scores

    async def _open_desk(self) -> ServedIds | None:
        if not self.config.feedback:
            return None
        log, lines = self.config.log, None
        if log is not None:
            lines = SegmentWriter(
                Path(log.dir), self.replica, log.rotate_bytes, log.rotate_s, "feedback", settle
            )
        served = ServedIds(self.config.served_queue, self._metrics)
        self._desk = FeedbackDesk(
            self.config, self._table, self._keys, self._metrics, served, self._ledger, self._redactor, lines
        )
        await self._desk.start()
        return served


def create_app(config: RouterConfig) -> RouterApp:
    """The ASGI application of one router process."""
    return RouterApp(config)


def _path(scope: dict[str, Any]) -> str:
    """The path below where the application is mounted."""
    path, root = cast(str, scope["path"]), cast(str, scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "stillhouse"}
