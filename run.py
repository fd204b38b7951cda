#!/usr/bin/env python3
"""The pack's commands, each complete in itself:

    python3 run.py demo [--comfyui PATH [--python PATH]] [--output DIR]
    python3 run.py test [--comfyui PATH [--python PATH]] [pytest arguments...]
    python3 run.py bench NAME
    python3 run.py sweep WORKFLOW.json --set NODE.INPUT=VALUES ... --out DIR

Needs only Python 3.11 to 3.13 and a network connection to the package index on the first run.
"""

import sys
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(f"run.py needs Python 3.11 to 3.13, and this is Python {sys.version.split()[0]}.")

# Some Pythons (python -P, the portable ComfyUI's) do not look beside the script for its modules.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
