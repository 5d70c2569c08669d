"""The transformer that runs: what is computed, skipped, kept and recomputed. Knows no library's classes."""
