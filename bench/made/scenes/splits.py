"""Which scenes are in which split: no scene twice, and some pairs of shape and color in test scenes only."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from bench.made.scenes.scene import Pair, Scene, draw

SPLITS = ("train", "val", "test")


def draw_splits(seed: int, sizes: Mapping[str, int], held_out: Sequence[Pair], novel: float) -> dict[str, list[Scene]]:
    """The scenes of all splits.

    Test scenes are drawn first, then those of validation: they stay the same when there are more to train on.

    Args:
        seed: of all scenes.
        sizes: scenes of each of `SPLITS`.
        held_out: pairs of a shape and a color that are not in the scenes of train and val.
        novel: share of the test scenes in which a held-out pair occurs; the others have none.
    """
    taken: set[object] = set()
    drawn = {}
    for split in reversed(SPLITS):
        share = novel if split == "test" else 0.0
        drawn[split] = []
        for number in range(sizes[split]):
            # Evenly spread, so that the first so many have the same share.
            wanted = held_out if int((number + 1) * share) > int(number * share) else ()
            rng = random.Random(f"scenes {seed} {split} {number}")
            scene = draw(rng, () if wanted else held_out, wanted)
            while scene.key in taken:
                scene = draw(rng, () if wanted else held_out, wanted)
            taken.add(scene.key)
            drawn[split].append(scene)
    return drawn
