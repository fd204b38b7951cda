"""What the registry would publish: its list of files, its size, the project's fields, and what the registry's own tools say."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import tomllib
from density_guidance.benchmarks import make_templates
from density_guidance.launcher.environment import PACK
from density_guidance.testing import archive
from PIL import Image

LARGEST = 25_000_000  # bytes
SINGLE = {"CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "docs/licences.md", "pyproject.toml", "requirements.txt"}
FOLDERS = {  # endings of what lies in them
    "dg_core": {".py"},
    "locales": {".json"},
    "models": {".safetensors", ".png"},
    "nodes": {".py"},
    "web": {".md", ".jpg"},
    "workflows": {".json", ".jpg"},
}
PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
RAW = "https://raw.githubusercontent.com/REPOSITORY_OWNER/density-guidance/main/"

needs_git = pytest.mark.skipif(not archive.tracked(), reason="the pack is no git repository, or git is missing")


@needs_git
def test_the_archive_holds_what_a_user_runs():
    published = archive.published()
    folders = {path.split("/")[0] for path in published if "/" in path} - {"docs"}
    assert {path for path in published if path.split("/")[0] not in FOLDERS} == SINGLE
    assert folders == set(FOLDERS)
    endings = {folder: {"." + p.rsplit(".")[-1] for p in published if p.startswith(f"{folder}/")} for folder in FOLDERS}
    assert endings == FOLDERS
    code = {path for path in archive.tracked() if path.startswith(("nodes/", "dg_core/", "models/", "web/", "locales/"))}
    assert code <= set(published) and not any("/api/" in path for path in published)


@needs_git
def test_the_archive_is_small():
    size = archive.archive_size(archive.published())
    print(f"{size / 1e6:.1f} MB")
    assert size < LARGEST


def test_placeholders_are_named_in_the_release_checklist():
    """One for the registry, one for the repository; each stands in the checklist, and nowhere else is a field empty."""
    fields = [*PROJECT["project"]["urls"].values(), *(v for v in PROJECT["tool"]["comfy"].values())]
    checklist = (PACK / "docs" / "release.md").read_text(encoding="utf-8")
    assert all(fields) and all(f"`{name}`" in checklist for name in ("REPOSITORY_OWNER", "PUBLISHER_ID"))
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(PROJECT["project"]["urls"])
    assert set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", " ".join(fields))) == {"REPOSITORY_OWNER", "PUBLISHER_ID"}


@pytest.mark.parametrize("field, check", [("Icon", lambda w, h: w == h <= 400), ("Banner", lambda w, h: w * 9 == h * 21)])
def test_images_for_the_registry(field, check):
    address = PROJECT["tool"]["comfy"][field]
    assert address.startswith(RAW)
    with Image.open(PACK / address.removeprefix(RAW)) as image:
        assert check(*image.size)


def test_images_of_the_readme_show_on_the_registrys_page():
    images = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (PACK / "README.md").read_text(encoding="utf-8"))
    assert images and all(a.startswith(RAW) and (PACK / a.removeprefix(RAW)).is_file() for a in images)


def test_the_version_is_in_the_changelog():
    assert f"\n## {PROJECT['project']['version']}" in (PACK / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(make_templates.WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_templates_name_the_pack(path):
    """So that a page without it can say which one is missing."""
    assert make_templates.named(path.read_text(encoding="utf-8")) == path.read_text(encoding="utf-8")
    ours = [n for n in json.loads(path.read_text(encoding="utf-8"))["nodes"] if "cnr_id" in n["properties"]]
    assert ours and {(n["properties"]["cnr_id"], n["properties"]["ver"]) for n in ours} == {
        (PROJECT["project"]["name"], PROJECT["project"]["version"])
    }


# --- the registry's own tools -----------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A git repository with the tracked files as they are now."""
    for path in archive.tracked():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACK / path, tmp_path / path)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def comfy(folder, *arguments):
    """What comfy-cli prints."""
    pytest.importorskip("comfy_cli", reason="comfy-cli is not installed")
    command = [sys.executable, "-P", "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_git
def test_comfy_node_validate_finds_nothing(repository):
    printed = comfy(repository, "node", "validate")
    assert "All validation checks passed" in printed and "warning" not in printed.lower(), printed


@needs_git
def test_comfy_node_pack_packs_the_list(repository):
    comfy(repository, "node", "pack")
    packed = next(repository.glob("*.zip"))
    assert packed.stat().st_size < LARGEST
    with zipfile.ZipFile(packed) as found:
        assert sorted(found.namelist()) == sorted(archive.published())


def test_comfy_lint_finds_nothing(server):
    """In the copies of the templates for programs, against what a real server offers."""
    pytest.importorskip("comfy_lint", reason="comfy-lint is not installed")
    copies = sorted(map(str, (make_templates.WORKFLOWS / "api").glob("*.json")))
    lint = "import sys; from comfy_lint.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", lint, "--server", server.client.url, "--color", "never", "--strict", *copies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
