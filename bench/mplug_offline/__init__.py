"""The mPLUG study in small, on a computer without a network: `python -m bench.mplug_offline --out DIR`."""
