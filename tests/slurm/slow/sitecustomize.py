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
    def find_spec(self, name, path, target=None):
        if name != "resnet_dist.engine":
            return None
        self.real = importlib.machinery.PathFinder.find_spec(name, path)
        return importlib.machinery.ModuleSpec(name, self, origin=self.real.origin)

    def exec_module(self, module):
        module.__file__ = self.real.origin
        self.real.loader.exec_module(module)
        train_step, seconds = module.train_step, float(os.environ.get("SLOW_SECONDS", 0))

        def slow(model, state, *rest):
            time.sleep(seconds)
            if os.environ.get("FAIL_AT") == f"{os.environ['RANK']}:{state.step}":
                raise RuntimeError("this rank broke, as the test asked")
            return train_step(model, state, *rest)

        module.train_step = slow


sys.meta_path.insert(0, Slow())
