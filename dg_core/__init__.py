"""Density guidance in pure torch: formulas, solver and the exact-density model.

Nothing in this package imports ComfyUI. Notation and units are those of `schedule`.
"""
