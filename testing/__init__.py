"""Oracles, small models, recorded runs and measures, for tests and benchmarks alike."""
