"""The paper's tables at our scale, beside the paper: `python -m t5fx.bench.ablation`."""
