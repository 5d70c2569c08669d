"""Benchmarks: latency, memory and accuracy of the library against literal implementations and against its peers."""
