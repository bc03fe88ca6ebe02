"""What works in diffusers' pipelines: `python -m t5fx.bench.pipelines`."""
