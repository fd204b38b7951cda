"""300 prompts of mixed nodes through the HTTP API: no failure, and no growth of the server's memory.

    python3 run.py bench long_queue

Writes docs/long_queue.json. About two minutes.
"""

import tempfile
from pathlib import Path

import psutil

from ..launcher.environment import environment
from ..launcher.host import running_host
from ..testing.mixed_prompts import mixed_run
from .pages import publish

PROMPTS, SETTLED = 300, 30


def memory_after_each(host, count):
    """Resident bytes of the server after each of `count` prompts; raises WorkflowError where one fails."""
    process = psutil.Process(host.pid)
    used = []
    for i in range(count):
        host.client.run(mixed_run(i))
        used.append(process.memory_info().rss)
    return used


def main():
    with tempfile.TemporaryDirectory() as output, running_host(environment(), Path(output)) as host:
        used = memory_after_each(host, PROMPTS)
    publish(
        "long_queue",
        {
            "prompts": PROMPTS,
            "mib_when_settled": used[SETTLED - 1] >> 20,
            "mib_after_last": used[-1] >> 20,
            "growth": used[-1] / used[SETTLED - 1] - 1,
        },
    )
