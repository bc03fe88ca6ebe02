"""Whether attentions of small models are read right: `python -m t5fx.bench.coverage`."""
