"""Random numbers of a step: a pure function of (seed, step, worker), as the order of samples is one of (plan, step).

So no checkpoint holds the state of a generator: step 700 draws the same numbers on whichever day it is done, and after
whatever else has drawn some in between.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the generators of Python, NumPy and torch (all devices) for one step on one worker."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint64).tolist()
    random.seed(words[0])
    np.random.seed(words[0] & 0xFFFFFFFF)
    torch.manual_seed(words[1] >> 1)
