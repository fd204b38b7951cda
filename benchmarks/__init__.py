"""Measurements behind the tables of the README and docs/. Run one with `python3 run.py bench NAME`."""
