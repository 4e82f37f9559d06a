"""Does a loss on attention make a model better, on tasks whose answer is known? ``python -m benchmarks.refinement``."""
