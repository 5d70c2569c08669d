"""The study of five tuning methods on mPLUG: captions and questions, by share of the data and by size of the module."""

# Of the study's figures, in the order of the paper.
NAMES = tuple(f"mplug-fig{number}" for number in range(3, 11))
