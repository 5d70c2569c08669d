"""Parts of `bench.scale`."""
