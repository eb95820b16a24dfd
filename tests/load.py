"""Other work on this machine, which comes and goes."""

import subprocess
import sys
from contextlib import contextmanager

BURNER = """
import os, random, sys, time
rng, parent = random.Random(int(sys.argv[1])), os.getppid()
while os.getppid() == parent:
    until = time.monotonic() + rng.uniform(0.05, 0.6)
    while time.monotonic() < until:
        pass
    time.sleep(rng.uniform(0.0, 0.6))
"""


@contextmanager
def changing_load(n_processes):
    """Within the block, so many processes compute and sleep in turn, each by its own random clock."""
    burners = [subprocess.Popen([sys.executable, "-c", BURNER, str(seed)]) for seed in range(n_processes)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
        for burner in burners:
            burner.wait()
