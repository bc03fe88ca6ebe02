"""Demo and benchmarks."""
