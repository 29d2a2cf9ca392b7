"""Addresses under which exports are downloaded: single files, or all of them as one tar that is made while it is sent.

    /download/RUN/EXPORT/FILE       a file that the export's manifest lists
    /download/RUN/EXPORT.tar        everything

Nothing else of the machine has an address: run, export and file are looked up by name (`runs.exports`), and where the explorer asks for a
password these do as well.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from moesvd_core.checkpoint.archive import Archive
from moesvd_core.errors import MoesvdError
from moesvd_core.runs.exports import ExportFolder, open_export
from moesvd_core.runs.folder import RunFolder

_FROM = re.compile(r"bytes=(\d{1,18})-")
"""A request for the rest of an archive; others are answered with the whole of it, as the standard allows."""
_BYTES = "application/octet-stream"


def file_address(run: str, export: str, file: str) -> str:
    """Where a file is downloaded, relative to any page."""
    return f"./download/{quote(run, safe='')}/{quote(export, safe='')}/{quote(file, safe='')}"


def archive_address(run: str, export: str) -> str:
    """Where everything is downloaded."""
    return f"./download/{quote(run, safe='')}/{quote(export, safe='')}.tar"


def routes(runs: Path) -> Sequence[BaseRoute]:
    """The addresses above, over the runs in a folder."""

    def found(request: Request) -> ExportFolder | Response:
        """The export that is asked for, or the answer that there is none: the same for whatever is wrong with the names."""
        if not _logged_in(request):
            return JSONResponse({"detail": "log in first"}, status_code=401)
        try:
            return open_export(RunFolder.named(runs, request.path_params["run"]), request.path_params["export"])
        except MoesvdError:
            return _nothing()

    def file(request: Request) -> Response:
        export = found(request)
        if isinstance(export, Response):
            return export
        name = request.path_params["file"]
        listed = next((each for each in export.files if each.name == name), None)
        if listed is None:
            return _nothing()
        headers = {"etag": f'"{listed.sha256}"'} if listed.sha256 else {}
        return FileResponse(export.file(name), media_type=_BYTES, filename=name, headers=headers)

    def archive(request: Request) -> Response:
        export = found(request)
        return export if isinstance(export, Response) else _archive(request, export)

    return [Route("/download/{run}/{export}.tar", archive), Route("/download/{run}/{export}/{file}", file)]


def _archive(request: Request, export: ExportFolder) -> Response:
    try:
        made = Archive(export.path)
    except MoesvdError:
        return _nothing()
    start = _start(request, made.size)
    headers = {
        "content-length": str(made.size - start),
        "content-disposition": f"attachment; filename*=utf-8''{quote(made.name)}",
        "accept-ranges": "bytes",
        "content-range": f"bytes {start}-{made.size - 1}/{made.size}",
    }
    if not start:
        del headers["content-range"]
    closing = BackgroundTask(made.close)
    if request.method == "HEAD":
        return Response(None, headers=headers, media_type="application/x-tar", background=closing)
    status = 206 if start else 200
    return StreamingResponse(_sent(made, start), status_code=status, headers=headers, media_type="application/x-tar", background=closing)


def _sent(archive: Archive, start: int) -> Iterator[bytes]:
    """The archive's bytes; closes it also when the visitor breaks off."""
    with archive:
        yield from archive.chunks(start)


def _start(request: Request, size: int) -> int:
    """Where the visitor wants the archive to go on from."""
    match = _FROM.fullmatch(request.headers.get("range", ""))
    start = int(match[1]) if match and "if-range" not in request.headers else 0
    return start if start < size else 0


def _logged_in(request: Request) -> bool:
    """Whether Gradio would let this visitor in: it guards its own addresses, not those that an app adds."""
    app: Any = request.app
    if app.auth is None and app.auth_dependency is None:
        return True
    cookies = request.cookies
    token = cookies.get(f"access-token-{app.cookie_id}") or cookies.get(f"access-token-unsecure-{app.cookie_id}")
    return token is not None and token in app.tokens


def _nothing() -> Response:
    return JSONResponse({"detail": "not found"}, status_code=404)
