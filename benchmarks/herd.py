"""Fifty processes that want an access token at the same moment, and a cache that has none."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator

from measure import Row, in_turn, process, ratio
from office import HSM_TOKEN, Office

HERD, ROUNDS = 50, 7


def rows(office: Office) -> Iterator[Row]:
    posts: list[int] = []

    def herd() -> float:
        shutil.rmtree(office.cache, ignore_errors=True)
        before, began = office.posts(), time.perf_counter()
        command, environment = [HSM_TOKEN, "fetch"], office.environment
        running = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(HERD)]
        assert not any(each.wait() for each in running), "a fetch failed"
        took = time.perf_counter() - began
        posts.append(office.posts() - before)
        return took

    def cold() -> float:
        return process([HSM_TOKEN, "fetch", "--no-cache"], office.environment).seconds

    def hit() -> float:
        return process([HSM_TOKEN, "fetch"], office.environment).cpu

    found = in_turn(ROUNDS, herd=herd, hit=hit, cold=cold)
    yield Row("50 processes at once, empty cache", "POSTs", max(posts), 1, 1)
    cores = len(os.sched_getaffinity(0))
    least = HERD * statistics.median(found["hit"]) / cores + statistics.median(found["cold"])
    against = "50 times the CPU time of one cached fetch, shared over the cores, plus one cold fetch"
    yield ratio("the last of those 50", found["herd"], against, [least] * ROUNDS, 1.3, 1.1)
