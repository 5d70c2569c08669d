"""Fine-tuning methods on real data and a real backbone, without a download: `python -m bench.offline`."""
