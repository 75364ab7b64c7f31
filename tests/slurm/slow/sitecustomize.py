"""Put on PYTHONPATH by a test's job: training steps that take SLOW_SECONDS longer, and one that
fails on one rank.

FAIL_AT "1:5" fails on rank 1 in the step after 5 updates. The engine is changed when it is
imported.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time


class Slow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Changes the module of the engine when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "resnet_dist.engine":
            return None
        self.real = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.machinery.ModuleSpec(name, self, origin=self.real.origin)

    def exec_module(self, module):
        module.__file__ = self.real.origin
        self.real.loader.exec_module(module)
        real_step = module.train_step
        seconds = float(os.environ.get("SLOW_SECONDS", 0))
        failing_place = os.environ.get("FAIL_AT")

        def slow_step(model, state, *rest):
            time.sleep(seconds)
            rank = os.environ["RANK"]
            if failing_place == f"{rank}:{state.step}":
                raise RuntimeError("this rank broke, as the test asked")
            return real_step(model, state, *rest)

        module.train_step = slow_step


sys.meta_path.insert(0, Slow())
