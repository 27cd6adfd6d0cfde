"""Benchmarks for asv (asv.conf.json at the root); `python -m bench.smoke` runs each once to see that it works."""
