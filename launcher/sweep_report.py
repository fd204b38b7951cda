"""What a sweep has made so far: a summary, a table and a contact sheet."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

from .sweep import duration, read_head, read_rows

LARGEST = (30, 12)  # rows and columns of the sheet
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def report(out: Path) -> None:
    """Print how far the sweep is, and write DIR/report.csv and, of its first images, DIR/report.png."""
    head = read_head(out)
    labels = [axis["label"] for axis in head["axes"]]
    places = {axis["label"]: {json.dumps(value): i for i, value in enumerate(axis["values"])} for axis in head["axes"]}
    rows = sorted(read_rows(out), key=lambda row: [places[label].get(json.dumps(row["settings"][label])) for label in labels])
    by, seconds = Counter(row["status"] for row in rows), [row["seconds"] for row in rows if row["status"] == "done"]
    found = ", ".join(f"{count} {status}" for status, count in by.items()) or "none"
    print(f"{len(rows)} of {head['prompts']} prompts have run: {found}.")
    if seconds:
        print(f"{duration(sum(seconds) / len(seconds))} each, on {len({row['worker'] for row in rows})} workers.")
    for error, count in Counter(row["error"].splitlines()[-1] for row in rows if row["error"]).most_common(5):
        print(f"  {count} x {error}")
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*labels, "bits_per_dim", "status", "error", "seconds", "worker", "id", "files"])
        for row in rows:
            bits, files = (" ".join(map(str, row[name])) for name in ("bits_per_dim", "files"))
            settings = [row["settings"][label] for label in labels]
            writer.writerow([*settings, bits, *(row[name] for name in ("status", "error", "seconds", "worker", "id")), files])
    print(f"Table: {out / 'report.csv'}")
    if any(_image(row) for row in rows):
        _draw(out, rows)
        print(f"Contact sheet: {out / 'report.png'}")


def _image(row: dict) -> str | None:
    return next((name for name in row["files"] if name.endswith(IMAGES)), None)


def _draw(out: Path, rows: list[dict]) -> None:
    """A column for each value of the last setting, a row for each of the others; the bits under each image."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells, lines, columns = {}, {}, {}  # the latter two: text -> place
    for row in rows:
        *others, last = row["settings"].items()
        line = lines.setdefault("\n".join(f"{label} {value}" for label, value in others), len(lines))
        cells[line, columns.setdefault(f"{last[0]}\n{last[1]}", len(columns))] = row
    height, width = (min(len(found), most) for found, most in zip((lines, columns), LARGEST))
    figure, grid = pyplot.subplots(
        height, width, figsize=(2 * width + 1, 2.2 * height + 0.5), squeeze=False, layout="constrained"
    )
    for place, text in zip(grid[0], columns):
        place.set_title(text, fontsize=8)
    for place, text in zip(grid[:, 0], lines):
        place.set_ylabel(text, fontsize=8)
    for place in grid.flat:
        place.set(xticks=[], yticks=[])
    for index, row in ((index, row) for index, row in cells.items() if index[0] < height and index[1] < width):
        if name := _image(row):
            grid[index].imshow(pyplot.imread(out / row["id"] / name))
        bits = ", ".join(f"{number:.3f}" for number in row["bits_per_dim"][:4])
        grid[index].set_xlabel(bits if row["status"] == "done" else row["status"], fontsize=8)
    figure.savefig(out / "report.png", dpi=100)
    pyplot.close(figure)
