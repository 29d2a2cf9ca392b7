"""A browser's session without a browser: the same requests over plain HTTP, for many visitors at once and for forged ones."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx

_CONFIG = re.compile(r"window\.gradio_config = (\{.*?\});</script>", re.DOTALL)


class Visitor:
    """One person's tab. Events are sent one after the other, as Gradio's client sends them; their values may be anything.

    Attributes:
        http: the connection, with the visitor's cookies.
        config: of the page that is open: its components and events.
        seconds: from asking for each event to its last answer.
        said: sentences that were shown over the page.
        session: the tab's name, by which the server keeps its state.
    """

    def __init__(self, address: str) -> None:
        self.http = httpx.AsyncClient(base_url=address, timeout=120, follow_redirects=True)
        self.config: Mapping[str, Any] = {}
        self.seconds: list[float] = []
        self.said: list[str] = []
        self._query, self.session = "", ""
        self._heart: asyncio.Task[None] | None = None

    async def log_in(self, name: str, password: str) -> None:
        answer = await self.http.post("/login", data={"username": name, "password": password})
        answer.raise_for_status()

    async def open(self, path: str = "/", query: str = "") -> list[Any]:
        """Open a page, and give what its first event returns; a tab is a session of its own."""
        await self.leave()
        self._query, self.session = query, secrets.token_hex(6)
        answer = await self.http.get(f"{path}?{query}")
        answer.raise_for_status()
        found = _CONFIG.search(answer.text)
        assert found is not None, f"{path} is no page of the app"
        self.config = json.loads(found[1])
        self._heart = asyncio.create_task(self._beat(self.session))
        outputs: list[Any] = []
        for event in self.events("load"):
            outputs = await self.fire(event)
        return outputs

    def events(self, kind: str = "") -> list[Mapping[str, Any]]:
        """The page's events, or those of a kind ("load", "change", "tick", "click" ...)."""
        found = self.config["dependencies"]
        return [event for event in found if not kind or any(target[1] == kind for target in event["targets"])]

    def usual(self, event: Mapping[str, Any]) -> list[Any]:
        """The values that the components hold which an event takes; of state the server has its own."""
        parts = {part["id"]: part for part in self.config["components"]}
        return [parts[name]["props"].get("value") for name in event["inputs"]]

    async def fire(self, event: Mapping[str, Any], data: Sequence[Any] | None = None, told: Any = None) -> list[Any]:
        """Send an event and wait for its last answer.

        Args:
            data: values of its inputs; None: those of the components.
            told: what the browser says happened, as a click does.

        Raises:
            RuntimeError: the server did not do it.
        """
        start = time.perf_counter()
        body = {
            "data": list(self.usual(event) if data is None else data), "event_data": told, "fn_index": event["id"],
            "session_hash": self.session, "trigger_id": event["targets"][0][0] if event["targets"] else None,
        }
        asked = await self.http.post(f"/gradio_api/queue/join?{self._query}", json=body)
        if asked.status_code != 200:
            raise RuntimeError(f"event {event['id']} was refused: {asked.status_code} {asked.text[:200]}")
        outputs = await self._followed(asked.json()["event_id"])
        self.seconds.append(time.perf_counter() - start)
        return outputs

    async def _followed(self, event: str) -> list[Any]:
        """Read the session's messages up to the end of an event; the server closes the stream when nothing is left to say."""
        outputs: list[Any] | None = None
        async with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            stream.raise_for_status()
            async for line in stream.aiter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "log":
                    self.said.append(message["log"])
                if message.get("msg") == "process_completed" and message.get("event_id") == event:
                    if not message["success"]:
                        raise RuntimeError(f"event {event} failed: {message['output']}")
                    outputs = message["output"].get("data", [])
        if outputs is None:
            raise RuntimeError(f"event {event} was never completed")
        return outputs

    async def _beat(self, session: str) -> None:
        """The stream by whose end the server knows that a tab was closed."""
        async with self.http.stream("GET", f"/gradio_api/heartbeat/{session}", timeout=None) as stream:
            async for _ in stream.aiter_bytes():
                pass

    async def leave(self) -> None:
        """Close the tab."""
        if self._heart is not None:
            self._heart.cancel()
            with suppress(asyncio.CancelledError):
                await self._heart
            self._heart = None

    async def close(self) -> None:
        await self.leave()
        await self.http.aclose()
