"""Top-1 and top-5 of a checkpoint: the same integer counts on any number of ranks."""

import argparse
import json

from resnet_dist import engine
from resnet_dist.config import Config
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.distributed import Runtime
from resnet_dist.models.zoo import check_image_size
from resnet_dist.precision import Precision
from resnet_dist.process import run_process
from resnet_dist.state import build_state


def run(saved: dict, config: Config, options: argparse.Namespace) -> int:
    """Evaluate the raw weights of `saved` and, where it has them, the averaged ones; prints on the
    main process.
    """

    def body(config: Config, runtime: Runtime) -> int:
        check_image_size(config.model.name, config.data)
        loader = build_val_loader(config, runtime)
        num_classes = check_num_classes(config.model.num_classes, len(loader.class_names))
        if tuple(saved["class_names"]) != tuple(loader.class_names):
            raise ValueError(
                f"data.data_dir is {config.data.data_dir!r}: its classes are not those of the checkpoint, "
                "in the same order; take the data set that it was trained on"
            )
        state = build_state(config, num_classes, runtime.device)
        precision = Precision(config.train.precision, runtime.device)
        results = {"step": saved["step"]}
        for name in ("model", "ema"):
            if saved[name]:
                state.model.load_state_dict(saved[name])
                counts = engine.evaluate(state.model, loader, runtime, precision)
                results[name] = counts.result(num_classes)
        loader.close()
        if runtime.is_main:
            print(json.dumps(results) if options.json else describe(results), flush=True)
        return 0

    return run_process(config, body)


def describe(results: dict) -> str:
    """The results as sentences."""
    lines = [f"step {results['step']}"]
    for name, title in (("model", "weights"), ("ema", "averaged weights")):
        if name in results:
            r = results[name]
            parts = [f"top-1 {r['top1']:.3f} % ({r['correct1']}/{r['num']})"]
            if "top5" in r:
                parts.append(f"top-5 {r['top5']:.3f} % ({r['correct5']}/{r['num']})")
            parts.append(f"loss {r['loss']:.4f}")
            lines.append(f"{title}: {', '.join(parts)}")
    return "\n".join(lines)
