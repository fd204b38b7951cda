"""What the registry would publish of the pack: its tracked files, without those that .comfyignore names."""

import io
import subprocess
import zipfile

import pathspec

from ..launcher.environment import PACK


def tracked():
    """Paths of the files that git tracks, with slashes; none where the pack is no repository."""
    found = subprocess.run(["git", "-C", str(PACK), "ls-files"], capture_output=True, text=True)
    return found.stdout.splitlines()


def published():
    """Those of them that go into the archive."""
    lines = [line for line in (PACK / ".comfyignore").read_text().splitlines() if line and not line.startswith("#")]
    ignored = pathspec.PathSpec.from_lines("gitignore", lines)
    return [path for path in tracked() if not ignored.match_file(path)]


def archive_size(paths):
    """Bytes of an archive of the paths."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(PACK / path, path)
    return len(target.getvalue())
