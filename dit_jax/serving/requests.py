"""The requests that the app takes: those of its page and of Gradio's client, of the sizes that they have.

Gradio serves much more than a page needs: it fetches addresses, converts recordings, and reads bodies of any size.
"""

import re
from typing import Any

_READ = re.compile(
    r"/|/(?:config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(?:static|assets|svelte)/.+"
    r"|/gradio_api/(?:info|openapi\.json|app_id|user|login_check|token|startup-events|theme\.css|upload_progress)/?"
    r"|/gradio_api/(?:heartbeat/.+|queue/(?:data|status)|call/[^/]+/[^/]+|file=(?!.*:/).+)"
)
_SENT = re.compile(r"/gradio_api/(?:queue/join|cancel|reset|call/[^/]+)/?")
_UPLOADED = re.compile(r"/gradio_api/upload/?")
_MOST_SENT = 2**20  # bytes of a call
_AROUND_UPLOAD = 2**16  # bytes of an upload's request that are not its file
_TOO_LARGE = "the request is too large"


class PageRequests:
    """An ASGI middleware that refuses every request which the page never makes, and bodies that are too large.

    Args:
        upload: bytes that an upload may have.
    """

    def __init__(self, app: Any, upload: int):
        self._app, self._upload = app, upload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        elif (most := self._most_bytes(scope["method"], scope["path"])) is None:
            await _refuse(404, "this app has no such page", scope, receive, send)
        elif _said_bytes(scope) > most:
            await _refuse(413, _TOO_LARGE, scope, receive, send)
        else:
            await self._app(scope, _counted(receive, most), send)

    def _most_bytes(self, method: str, path: str) -> int | None:
        """How large the body of a request may be; None: the page makes no such request."""
        if method in ("GET", "HEAD"):
            return 0 if _READ.fullmatch(path) else None
        if method != "POST":
            return None
        if is_upload(path):
            return self._upload + _AROUND_UPLOAD
        return _MOST_SENT if _SENT.fullmatch(path) else None


def is_upload(path: str) -> bool:
    """Whether files come with requests of this path."""
    return _UPLOADED.fullmatch(path) is not None


def _said_bytes(scope: Any) -> int:
    said = dict(scope["headers"]).get(b"content-length", b"")
    return int(said) if said.isdigit() and len(said) < 20 else 0


def _counted(receive: Any, most: int) -> Any:
    """`receive`, until more has come than is allowed."""
    taken = 0

    async def counted() -> Any:
        nonlocal taken
        from starlette.exceptions import HTTPException

        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted


async def _refuse(status: int, text: str, scope: Any, receive: Any, send: Any) -> None:
    from starlette.responses import PlainTextResponse

    await PlainTextResponse(text, status)(scope, receive, send)
