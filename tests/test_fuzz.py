"""The fuzz targets hold for their own seeds, whole, cut and damaged; ``fuzz/run`` goes on from there."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fuzz"))
from targets import TARGETS

SOME = 100  # of the seeds of a target


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_holds_for_its_seeds_and_for_what_is_cut_or_damaged(name: str) -> None:
    target, chance = TARGETS[name], random.Random(name)  # noqa: S311  # the same damage each time
    seeds = list(target.seeds())
    for seed in seeds:
        target.check(seed)
    for seed in chance.sample(seeds, min(SOME, len(seeds))):
        damaged = bytearray(seed or b"\0")
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        target.check(bytes(damaged))
        target.check(seed[: chance.randrange(len(seed) + 1)])
