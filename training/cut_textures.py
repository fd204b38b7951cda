"""Cut the photographs of the exact textures: `python training/cut_textures.py public.zip`, into `models/textures`.

Data: terrain textures of the game 0 A.D., as in `demo_images.py`. Needs Pillow.
"""

import argparse
import io
import zipfile
from pathlib import Path

from PIL import Image

FOLDER = "art/textures/terrain/types/"
SIZE = 256
TEXTURES = {
    "dunes": "savanna_sand_dunes_100.png",
    "canyon": "cliff_canyon.dds",
    "ice": "polar_ice_c.dds",
    "granite": "cliff_granite.dds",
    "reef": "medit_sea_coral_plants.dds",
    "grass": "temp_grass_1.png",
}
OUT = Path(__file__).resolve().parent.parent / "models" / "textures"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help="mods/public/public.zip of the game")
    with zipfile.ZipFile(parser.parse_args().archive) as archive:
        for name, file in TEXTURES.items():
            photograph = Image.open(io.BytesIO(archive.read(f"{FOLDER}{file}.cached.dds"))).convert("RGB")
            side = min(photograph.size)
            photograph = photograph.crop((0, 0, side, side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            photograph.save(OUT / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
