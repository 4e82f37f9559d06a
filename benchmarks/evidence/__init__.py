"""What the maps are worth, measured on models whose true answer is known. ``python -m benchmarks.evidence``."""
