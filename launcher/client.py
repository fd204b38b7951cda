"""Queues workflows in a running ComfyUI and follows them, in plain calls that return when there is a result."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import aiohttp

RUN_S = 600.0
REQUEST_S = 60.0
POLL_S = 0.5  # the history is looked at this often even if no message comes


class WorkflowError(Exception):
    """ComfyUI refused a workflow or a node of it failed; the message names node, class and reason.

    Attributes:
        traceback: the node's own traceback, empty if ComfyUI refused the workflow.
    """

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


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


@dataclass(frozen=True)
class _Queued:
    """A workflow, and the client that ComfyUI sends its messages to: one of its own, so that no other's are heard."""

    workflow: dict
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)


OnProgress = Callable[[Progress], None]


class Client:
    """One ComfyUI at `url`, such as http://127.0.0.1:8188."""

    def __init__(self, url: str):
        self.url = url
        self._queued: dict[str, _Queued] = {}  # by prompt id
        # the address is this machine's own: proxy settings are not for it
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def run(self, workflow: dict, on_progress: OnProgress | None = None, timeout: float = RUN_S) -> dict:
        """Queue a workflow in API format, wait for it, and return its history entry.

        Raises: as `queue` and `wait`.
        """
        queued = _Queued(workflow)
        return _checked(self._follow(queued, lambda: self._queue(queued), on_progress, timeout))

    def queue_many(self, workflows: Iterable[dict], timeout: float = RUN_S) -> list[dict]:
        """Queue all of them before the first has to finish, wait for each, and return their history entries in order.

        Raises: as `queue` and `wait`, for the first that fails.
        """
        return [self.wait(prompt_id, timeout=timeout) for prompt_id in [self.queue(workflow) for workflow in workflows]]

    def queue(self, workflow: dict) -> str:
        """Queue a workflow in API format and return its prompt id.

        Raises:
            WorkflowError: ComfyUI refuses it, or would leave out a part of it.
            ValueError: it is in the web page's format.
        """
        return self._queue(_Queued(workflow))

    def wait(self, prompt_id: str, on_progress: OnProgress | None = None, timeout: float = RUN_S) -> dict:
        """Wait for a queued prompt and return its history entry; `on_progress` is called with every step.

        Raises:
            WorkflowError: a node failed.
            WorkflowInterrupted: it was interrupted.
            TimeoutError: it took longer than `timeout` seconds (it goes on).
            ConnectionError: ComfyUI is gone.
        """
        queued = self._queued.get(prompt_id, _Queued({}))
        return _checked(self.history(prompt_id) or self._follow(queued, lambda: prompt_id, on_progress, timeout))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop what runs now; with a prompt id, only if that is it."""
        self._request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def history(self, prompt_id: str) -> dict | None:
        """A finished prompt's entry (`prompt`, `outputs`, `status`); None while it has not finished."""
        return self._request(f"/history/{prompt_id}").get(prompt_id)

    def object_info(self) -> dict[str, dict]:
        """Every node class that ComfyUI knows, by its id."""
        return self._request("/object_info")

    def _queue(self, queued: _Queued) -> str:
        workflow = queued.workflow
        if "nodes" in workflow and "links" in workflow:
            raise ValueError(
                "This workflow is in the web page's format; what can be queued is its API format (Export (API))."
            )
        answer = self._request("/prompt", {"prompt": workflow, "client_id": queued.client_id})
        if "prompt_id" not in answer:
            raise WorkflowError(_refusal(answer))
        prompt_id = answer["prompt_id"]
        if answer.get("node_errors"):  # ComfyUI runs the rest of it; half a result is no result
            self._request("/queue", {"delete": [prompt_id]})
            self.interrupt(prompt_id)
            raise WorkflowError(_refusal(answer))
        self._queued[prompt_id] = queued
        return prompt_id

    def _follow(
        self, queued: _Queued, queue: Callable[[], str], on_progress: OnProgress | None, timeout: float
    ) -> dict:
        try:
            return asyncio.run(self._listen(queued, queue, on_progress or (lambda progress: None), timeout))
        except aiohttp.ClientError as error:
            raise ConnectionError(f"ComfyUI does not answer at {self.url}: {error}") from error

    async def _listen(self, queued: _Queued, queue: Callable[[], str], on_progress: OnProgress, timeout: float) -> dict:
        give_up = time.monotonic() + timeout
        last = "it has not started"
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={queued.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            await _receive(socket, REQUEST_S)  # ComfyUI's greeting: from now on the prompt's messages will be heard
            prompt_id = queue()
            while True:
                try:
                    message = await _receive(socket, POLL_S)
                    is_last = _is_last(message, prompt_id)
                except asyncio.TimeoutError:
                    message, is_last = {}, True  # perhaps: the last one may have come before this connection was made
                if progress := _progress(message, prompt_id, queued.workflow):
                    last = f"it is in {progress}"
                    on_progress(progress)
                if is_last and (entry := self.history(prompt_id)):
                    return entry
                if time.monotonic() > give_up:
                    raise TimeoutError(f"The workflow has not finished within {timeout:g} s: {last}.")

    def _request(self, path: str, body: dict | None = None) -> dict:
        """GET, or POST of a body; the answer's JSON, also that of a refusal."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=REQUEST_S) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            text = error.read()
            if error.code != 400:
                raise WorkflowError(
                    f"ComfyUI answered {error.code} to {path}: {text.decode(errors='replace')}"
                ) from error
        except urllib.error.URLError as error:
            raise ConnectionError(f"ComfyUI does not answer at {self.url}: {error.reason}") from error
        return json.loads(text) if text else {}


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
            raise WorkflowError(f"{node} failed: {reason}", "".join(data["traceback"]))
        if event == "execution_interrupted":
            raise WorkflowInterrupted(f"{node} was interrupted")
    return entry


async def _receive(socket: aiohttp.ClientWebSocketResponse, timeout: float) -> dict:
    """The next message; previews, which come as binary messages, as an empty one."""
    message = await socket.receive(timeout)
    if message.type in (
        aiohttp.WSMsgType.CLOSE,
        aiohttp.WSMsgType.CLOSING,
        aiohttp.WSMsgType.CLOSED,
        aiohttp.WSMsgType.ERROR,
    ):
        raise ConnectionError("ComfyUI closed the connection before the workflow had finished.")
    return message.json() if message.type == aiohttp.WSMsgType.TEXT else {}


def _is_last(message: dict, prompt_id: str) -> bool:
    """What ComfyUI sends when a run is over, its history entry written: that it executes no node any more."""
    data = message.get("data", {})
    return message.get("type") == "executing" and data.get("node") is None and data.get("prompt_id") == prompt_id


def _progress(message: dict, prompt_id: str, workflow: dict) -> Progress | None:
    data = message.get("data", {})
    node_id = data.get("node")  # None in the last message
    if message.get("type") not in ("executing", "progress") or data.get("prompt_id") != prompt_id or node_id is None:
        return None
    node = workflow.get(node_id, {})
    name = node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}"
    return Progress(node_id, name, data.get("value", 0), data.get("max", 0))


def _refusal(answer: dict) -> str:
    """ComfyUI's answer to a workflow that it does not take, in plain words."""
    error = answer.get("error") or {"message": "a part of it cannot run"}
    details = [] if answer.get("node_errors") or not error.get("details") else [error["details"]]
    for node_id, found in answer.get("node_errors", {}).items():
        reasons = "; ".join(f"{reason['message']}: {reason['details']}" for reason in found["errors"])
        details.append(f"node {node_id} ({found['class_type']}): {reasons}")
    return "\n  ".join([f"ComfyUI refused the workflow: {error['message']}", *details])
