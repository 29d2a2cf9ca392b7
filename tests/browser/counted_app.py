"""The app, and at `/counts` what it holds: `python counted_app.py FLAGS…`, for the benchmark of load."""

import asyncio
import gc
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import app
from pages.components import assets


async def counts(request: Request) -> JSONResponse:
    """Resident bytes, and the sizes of what grows with visitors if it is not let go."""
    explorer: Any = request.app
    queue = explorer.get_blocks()._queue
    gc.collect()
    held = {
        "sessions": explorer.state_holder.session_data, "session times": explorer.state_holder.time_last_used,
        "message queues": queue.pending_messages_per_session, "event ids by session": queue.pending_event_ids_session,
        "events": queue.event_ids_to_events, "event analytics": queue.event_analytics, "iterators": explorer.iterators,
        "iterators to reset": explorer.iterators_to_reset, "tasks": asyncio.all_tasks(), "threads": threading.enumerate(),
        "open files": os.listdir("/proc/self/fd"),
    }
    sizes = {name: len(container) for name, container in held.items()}
    return JSONResponse({"memory": psutil.Process().memory_info().rss, **sizes})


def counted(*decided: Any) -> dict[str, Any]:
    """What Gradio passes on to FastAPI, with the counts."""
    kwargs = original(*decided)
    return {**kwargs, "routes": [*kwargs["routes"], Route("/counts", counts)]}


original, assets.app_kwargs = assets.app_kwargs, counted

if __name__ == "__main__":
    sys.exit(app.main())
