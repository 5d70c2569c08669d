"""Data sets made on the spot or converted: in the folder layout of VTAB-1k, or with captions and questions in COCO's.

A maker is a module here with a function `make(out, *, ...)`: `out` is the folder that gets the task folders, or the
data set itself, and the keywords are what `python -m bench.made NAME` takes as options. `bench.made.__main__` finds
the modules by itself.
"""
