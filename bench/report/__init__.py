"""One page of a result folder, that needs nothing beside it: `python -m bench.report DIR`."""
