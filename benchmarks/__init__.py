"""Measurements: ``python dev.py bench NAME`` runs ``benchmarks/NAME.py``."""
