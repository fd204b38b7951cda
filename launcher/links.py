"""A link to a folder, on every system."""

from __future__ import annotations

import os
from pathlib import Path


def link_folder(target: Path, link: Path) -> None:
    """Make `link` point to the folder `target`."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        import _winapi  # a symlink takes extra rights on Windows, a junction none

        _winapi.CreateJunction(str(target), str(link))
