"""Queues workflows in a running ComfyUI and follows them, in plain calls that return when there is a result."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass

import aiohttp

from .environment import LauncherError

RUN_S = 600.0
REQUEST_S = 60.0


class WorkflowError(LauncherError):
    """ComfyUI refused a workflow, or a node of it failed: the message names node, class and reason, after a traceback."""


class WorkflowInterrupted(WorkflowError):
    """The run was interrupted."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: in which node, and in which of how many steps of it (0 of 0: it has not said)."""

    node_id: str
    name: str
    step: int = 0
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.name}, step {self.step}/{self.steps}" if self.steps else self.name


class Client:
    """One ComfyUI at `url`, such as http://127.0.0.1:8188. Every call raises ConnectionError if that does not answer."""

    def __init__(self, url: str):
        self.url = url

    def run(self, workflow: dict, on_progress: Callable[[Progress], object] = lambda _: None, timeout: float = RUN_S) -> dict:
        """Queue a workflow in API format, wait for it, and return its history entry.

        on_progress: called with every step, in another thread; it may use this client. Raises ValueError for a workflow in the
        web page's format, WorkflowError where ComfyUI would leave out a part of it or a node fails, WorkflowInterrupted, and
        TimeoutError after `timeout` seconds.
        """
        return self._do(self._run(workflow, on_progress, timeout))

    def queue_many(self, workflows: Iterable[dict]) -> list[dict]:
        """Queue all of them before the first has to finish; their history entries, in order. Raises as `run`."""

        async def together() -> list[dict]:
            return await asyncio.gather(*(self._run(workflow, lambda _: None, RUN_S) for workflow in workflows))

        return self._do(together())

    def interrupt(self) -> None:
        """Stop what runs now."""
        self._do(self._request("/interrupt", {}))

    def object_info(self) -> dict[str, dict]:
        """Every node class that ComfyUI knows, by its id."""
        return self.get("/object_info")

    def get(self, path: str) -> dict:
        """The JSON that ComfyUI has at a path; raises WorkflowError where it has nothing."""
        return self._do(self._request(path))

    def _do(self, work: Coroutine):
        try:
            return asyncio.run(work)
        except aiohttp.ClientError as error:
            raise ConnectionError(f"ComfyUI does not answer at {self.url}: {error}") from error

    async def _request(self, path: str, body: dict | None = None) -> dict:
        """GET, or POST of a body; the answer's JSON, also that of a refusal."""
        limit = aiohttp.ClientTimeout(sock_connect=REQUEST_S, sock_read=REQUEST_S)
        method = "GET" if body is None else "POST"
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.request(method, self.url + path, json=body) as response,
        ):
            text = await response.text()
        if not response.ok and response.status != 400:  # which is the answer to a workflow that it does not take
            raise WorkflowError(f"ComfyUI answered {response.status} to {path}: {text}")
        return json.loads(text) if text else {}

    async def _queue(self, workflow: dict, client_id: str) -> str:
        if "nodes" in workflow and "links" in workflow:
            raise ValueError("This workflow is in the web page's format; what can be queued is its API format (Export (API)).")
        answer = await self._request("/prompt", {"prompt": workflow, "client_id": client_id})
        prompt_id = answer.get("prompt_id")
        if prompt_id and answer.get("node_errors"):  # ComfyUI runs the rest of it; half a result is no result
            await self._request("/queue", {"delete": [prompt_id]})
            await self._request("/interrupt", {"prompt_id": prompt_id})
        if not prompt_id or answer.get("node_errors"):
            raise WorkflowError(_refusal(answer))
        return prompt_id

    async def _run(self, workflow: dict, on_progress: Callable[[Progress], object], timeout: float) -> dict:
        """Listen first, then queue: so no message is missed."""
        client_id = uuid.uuid4().hex  # ComfyUI sends the messages of a prompt to the client that queued it
        place = "it has not started"
        try:
            async with (
                asyncio.timeout(timeout),
                aiohttp.ClientSession() as session,
                session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=0) as socket,
            ):
                await socket.receive()  # ComfyUI's greeting: from now on the messages of prompts are heard
                prompt_id = await self._queue(workflow, client_id)
                async for message in socket:
                    progress = _progress(message, prompt_id, workflow)
                    if progress and progress.node_id is None:  # it executes no node any more, and its entry is written
                        return _checked((await self._request(f"/history/{prompt_id}"))[prompt_id])
                    if progress:
                        place = f"it is in {progress}"
                        await asyncio.to_thread(on_progress, progress)
        except TimeoutError as error:
            raise TimeoutError(f"The workflow has not finished within {timeout:g} s: {place}.") from error
        raise ConnectionError("ComfyUI closed the connection before the workflow had finished.")


def node_outputs(entry: dict, class_type: str) -> list[dict]:
    """What the nodes of a class showed (their `ui`), from a history entry."""
    workflow = entry["prompt"][2]
    return [output for node_id, output in entry["outputs"].items() if workflow[node_id]["class_type"] == class_type]


def _checked(entry: dict) -> dict:
    """The history entry of a run that went well; raises what it says went wrong."""
    for event, data in entry["status"]["messages"]:
        node = f"node {data.get('node_id')} ({data.get('node_type')})"
        if event == "execution_error":
            reason = f"{data['exception_type']}: {data['exception_message'].strip()}"
            raise WorkflowError(f"{''.join(data['traceback'])}{node} failed: {reason}")
        if event == "execution_interrupted":
            raise WorkflowInterrupted(f"{node} was interrupted")
    return entry


def _progress(message: aiohttp.WSMessage, prompt_id: str, workflow: dict) -> Progress | None:
    """What a message says of that prompt; None if nothing."""
    if message.type != aiohttp.WSMsgType.TEXT:  # a preview
        return None
    kind, data = (message.json().get(key) for key in ("type", "data"))
    if kind not in ("executing", "progress") or data.get("prompt_id") != prompt_id:
        return None
    node = workflow.get(data["node"], {})
    name = node.get("_meta", {}).get("title") or node.get("class_type") or f"node {data['node']}"
    return Progress(data["node"], name, data.get("value", 0), data.get("max", 0))


def _refusal(answer: dict) -> str:
    """ComfyUI's answer to a workflow that it does not take, in plain words."""
    error = answer.get("error") or {"message": "a part of it cannot run"}
    details = [] if answer.get("node_errors") or not error.get("details") else [error["details"]]
    for node_id, found in answer.get("node_errors", {}).items():
        reasons = "; ".join(f"{reason['message']}: {reason['details']}" for reason in found["errors"])
        details.append(f"node {node_id} ({found['class_type']}): {reasons}")
    return "\n  ".join([f"ComfyUI refused the workflow: {error['message']}", *details])
