"""A run's progress on the terminal: one line that updates, or a few plain lines in a log."""

from __future__ import annotations

import sys
from typing import TextIO

from .client import Progress

PARTS = 4  # plain lines per node


class ProgressLine:
    """Call it with every `Progress`; `close` it to end the line."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._updates = self._stream.isatty()
        self._shown = ""
        self._told = (None, 0)  # node, quarter of its steps

    def __call__(self, progress: Progress) -> None:
        if self._updates:
            text = f"  {progress}"
            self._stream.write("\r" + text.ljust(len(self._shown)))
            self._shown = text
        else:
            told = (progress.node_id, progress.step * PARTS // progress.steps if progress.steps else 0)
            if told == self._told:
                return
            self._told = told
            self._stream.write(f"  {progress}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._shown:
            self._stream.write("\n")
            self._shown = ""
