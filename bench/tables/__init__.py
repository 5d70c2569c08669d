"""The papers' tables from a user's own backbones and data: `python -m bench.tables`."""
