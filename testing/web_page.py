"""ComfyUI's own web page in a headless Chromium, driven over the DevTools protocol with aiohttp.

Needs the program chromium (or google-chrome) on PATH, and no Python package that ComfyUI does not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp

from ..launcher.guardian import started

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# A fresh profile asks its maker's servers for this and that: nothing of it is wanted here.
QUIET = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
START_S = 60.0
ANSWER_S = 60.0

# The page is usable once it knows the nodes and has loaded its first graph.
READY = "Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.DensityGuidanceSampler)"
LOAD = """(async graph => {
    await app.loadGraphData(graph)
    await new Promise(requestAnimationFrame)
    return app.graph.nodes.filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])
        .map(node => node.type)
})"""


def find_chromium() -> str | None:
    """Path of a Chromium, None if there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """The open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket = socket
        self._numbers = itertools.count(1)

    async def command(self, method: str, **parameters) -> dict:
        """One command of the DevTools protocol and its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=ANSWER_S)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    async def evaluate(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited.

        Raises: RuntimeError with the script's own error.
        """
        answer = await self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    async def wait_for(self, expression: str):
        """Wait until a JavaScript expression is true, and return its value."""
        give_up = time.monotonic() + ANSWER_S
        while not (value := await self.evaluate(expression)):
            if time.monotonic() > give_up:
                raise TimeoutError(f"The page did not get there within {ANSWER_S:g} s: {expression}")
            await asyncio.sleep(0.1)
        return value

    async def load(self, graph: dict) -> list[str]:
        """Open a workflow in the web page's format; returns the classes of the nodes that are missing or red."""
        return await self.evaluate(f"{LOAD}({json.dumps(graph)})")

    async def to_api(self) -> dict:
        """The open workflow in API format, as the page itself would queue it."""
        return await self.evaluate("(async () => (await app.graphToPrompt()).output)()")


@contextlib.asynccontextmanager
async def _chromium() -> AsyncIterator[str]:
    """A Chromium with an empty profile; yields the DevTools address of its one tab."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError(f"There is no Chromium on PATH (looked for {', '.join(PROGRAMS)}).")
    with tempfile.TemporaryDirectory(prefix="density-guidance-page-", ignore_cleanup_errors=True) as profile:
        command = [program, *QUIET, f"--user-data-dir={profile}", "--window-size=1600,1000"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # it does not start for root with one
        with started([*command, "about:blank"], Path(profile)) as process:
            port_file = Path(profile, "DevToolsActivePort")  # written when it listens
            give_up = time.monotonic() + START_S
            while not (port_file.is_file() and port_file.read_text().count("\n")):
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{program} did not start (exit code {process.poll()}).")
                await asyncio.sleep(0.1)
            address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}/json"
            async with aiohttp.ClientSession() as session, session.get(address) as answer:
                tabs = await answer.json()
            yield next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")


@contextlib.asynccontextmanager
async def open_page(url: str) -> AsyncIterator[Page]:
    """ComfyUI's web page at `url`, open and ready, in a Chromium that ends with the `with` block."""
    async with (
        _chromium() as address,
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):
        page = Page(socket)
        await page.command("Page.enable")
        await page.command("Page.navigate", url=url)
        await page.wait_for(READY)
        yield page


def with_page(url: str, use: Callable[[Page], Awaitable]):
    """Run the coroutine function `use` with ComfyUI's page, and return its result."""

    async def run():
        async with open_page(url) as page:
            return await use(page)

    return asyncio.run(run())
