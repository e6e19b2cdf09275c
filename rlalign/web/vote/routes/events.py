"""How far a person is and what goes on behind the page, as server-sent events: GET /progress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from rlalign.core.files import dump_json
from rlalign.web.vote import messages
from rlalign.web.vote.desk import Declined, Desk
from rlalign.web.vote.routes.visitors import Visitors

HEARTBEAT_SECONDS = 15.0
"""An event stream says something at least this often, so that nobody takes it for dead."""
STREAMS_OF_A_PERSON = 4


@dataclass(kw_only=True)
class EventRoutes:
    """Streams that stay open until the page ends."""

    desk: Desk
    visitors: Visitors
    _streams: dict[str, int] = field(default_factory=dict, init=False)
    _ends: set[asyncio.Event] = field(default_factory=set, init=False)
    _ending: bool = field(default=False, init=False)

    def routes(self) -> list[BaseRoute]:
        return [Route("/progress", self._progress)]

    @property
    def count(self) -> int:
        """Streams that are open."""
        return len(self._ends)

    def end(self) -> None:
        """Ends the event streams, which would not end by themselves."""
        self._ending = True
        for event in self._ends:
            event.set()

    async def _progress(self, request: Request) -> Response:
        annotator = self.visitors.person(request)
        if self._streams.get(annotator, 0) >= STREAMS_OF_A_PERSON:
            raise Declined(429, "streams", "this page is open in too many tabs")
        return StreamingResponse(
            self._events(annotator),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def _events(self, annotator: str) -> AsyncIterator[str]:
        """The person's progress whenever it has changed."""
        # a ring comes from any thread
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()

        def ring(whom: str) -> None:
            if whom in ("", annotator):
                loop.call_soon_threadsafe(rung.set)

        leave = self.desk.notice.listen(ring)
        self._ends.add(rung)
        self._streams[annotator] = self._streams.get(annotator, 0) + 1
        try:
            yield "retry: 2000\n\n"
            said = ""
            while not self._ending:
                rung.clear()
                progress = await run_in_threadpool(self.desk.progress, annotator)
                now = dump_json(messages.progress_json(progress))
                if now != said:
                    yield f"data: {now}\n\n"
                    said = now
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await rung.wait()
                except TimeoutError:
                    yield ": still here\n\n"
        finally:
            leave()
            self._ends.discard(rung)
            self._streams[annotator] -= 1
            if not self._streams[annotator]:
                del self._streams[annotator]
