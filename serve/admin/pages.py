"""The console's files: a page that anybody may load, because everything it shows is asked for with a key.

Read once, at the start; a strict content policy lets the page talk to nobody but this server. Knows nothing
about what the page does.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

_FOLDER = Path(__file__).parent / "console"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
PAGE = "/console"
_WITHOUT_KEYS = (b'data-keys="required"', b'data-keys="off"')


def console_files() -> dict[str, bytes]:
    """Path → content of every file of the console; the page itself is at /console."""
    found = {f"{PAGE}/{f.name}": f.read_bytes() for f in _FOLDER.iterdir() if f.suffix in _TYPES}
    return {PAGE: found.pop(f"{PAGE}/index.html"), **found}


def open_paths() -> frozenset[str]:
    """What is behind no door: the console's files, and the ways to them."""
    return frozenset(("/", f"{PAGE}/", *console_files()))


def console_router(insecure: bool) -> APIRouter:
    """Serves the files. `insecure`: tell the page that no key is needed."""
    api = APIRouter(include_in_schema=False)
    files = console_files()
    if insecure:
        files[PAGE] = files[PAGE].replace(*_WITHOUT_KEYS)

    def show(request: Request) -> Response:
        path = request.url.path
        tag = f'"{sha256(files[path]).hexdigest()[:32]}"'
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        kind = _TYPES[Path(path).suffix or ".html"]
        return Response(files[path], headers={**headers, "content-type": kind})

    for path in files:
        api.add_api_route(path, show, methods=["GET", "HEAD"])
    for path, target in (("/", PAGE[1:]), (f"{PAGE}/", f"..{PAGE}")):
        # Relative, so that it also works behind a proxy that puts a prefix before it.
        api.add_api_route(path, lambda target=target: RedirectResponse(target), methods=["GET", "HEAD"])
    return api
