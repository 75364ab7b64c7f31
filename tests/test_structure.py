"""The structure of the package: import layers, fences around heavy libraries, and sizes."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "resnet_dist"

# A module imports from its own layer and from those above it in this list. `name.*` stands for a
# sub-package.
LAYERS = [
    {
        # These packages have modules in several layers. Their own files hold no code.
        "settings",
        "distributed",
        "checkpoints",
        "evaluation",
        "logs",
        "resources",
        "addresses",
        "config",
        "settings.rules",
        "settings.sections",
        "settings.cluster",
        "settings.options",
        "settings.recipes",
        "settings.remarks",
        "schedule",
        "settings.reading",
        "files",
        "text",
        "layout",
        "plan",
    },
    {
        "precision",
        "rng",
        "resources.host_memory",
        "distributed.watchdog",
        "distributed.error_file",
        "distributed.stacks",
        "distributed.interfaces",
        "distributed.runtime",
        "distributed.process",
        "logs.decoder_warnings",
        "distributed.rendezvous",
        "logs.console",
        "logs.metrics_file",
        "evaluation.intervals",
        "logs.history",
        "studies.*",
        "evaluation.calibration",
        "evaluation.comparison",
        "evaluation.confusion",
        "evaluation.per_image",
        "evaluation.pictures",
        "logs.log",
        "logs.sinks.*",
        "metrics",
        "timing",
        "checkpoints.torchvision_weights",
        "resources.compute_probe",
        "resources.gpu_usage",
        "data.arrays",
        "data.types",
        "data.sampling.order",
        "data.sampling.crops",
        "data.sources.index",
    },
    {"optim", "ema", "mix", "losses", "models.*", "data.*"},
    {
        "resources.memory",
        "checkpoints.checkpoint",
        "checkpoints.checkpoint_file",
        "checkpoints.run_folder",
        "checkpoints.resume_rules",
        "checkpoints.saved_network",
    },
    {"checkpoints.state", "nonfinite", "checkpoints.restore"},
    {
        "forward",
        "teacher",
        "compilation",
        "compile_cache",
        "evaluation.loop",
        "resources.step_cost",
        "resources.step_memory",
        "resources.operations",
        "resources.out_of_memory",
        "evaluation.image_collector",
        "evaluation.evaluation_file",
        "evaluation.exhibits",
        "evaluation.predictions_file",
    },
    {"evaluation.sets.*"},
    {"engine"},
    {"logs.summary"},
    {"run"},
    {"launch.*", "api", "commands.*"},
    {"", "cli", "weights_options"},
]

# The modules that may import a heavy library, each inside the function that needs it.
FENCES = {
    "nvidia": {
        "data.pixels.dali",
        "data.dali_operations",
        "data.pixels.probe",
        "commands.plain_loaders",
    },
    "torchvision": {
        "models.zoo",
        "checkpoints.torchvision_weights",
        "commands.download",
        "commands.import_cifar10",
        "commands.import_imagenet",
        "commands.plain_loaders",
        "commands.export",
        "commands.bare_loop",
    },
    "timm": {"models.zoo"},
    "pyarrow": {"evaluation.predictions_file", "data.sources.parquet"},
    "huggingface_hub": {"commands.import_hf"},
    "wandb": {"logs.sinks.wandb", "logs.sinks.wandb_attachments", "logs.sinks.wandb_mode"},
    "tensorboard": {"logs.sinks.tensorboard"},
    "pynvml": {"commands.energy"},
    "obstore": {"data.stores.client"},
    "boto3": {"data.stores.client"},
    "submitit": {"launch.submission", "launch.script", "launch.rank"},
}

MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 7

# torch defines what these methods do and what they take.
METHODS_OF_TORCH = {"forward", "backward", "extra_repr"}


def module_name(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def layer_of(name):
    for number, layer in enumerate(LAYERS):
        if name in layer:
            return number
    package = name
    while package:
        for number, layer in enumerate(LAYERS):
            if f"{package}.*" in layer:
                return number
        package = package.rpartition(".")[0]
    raise AssertionError(f"resnet_dist.{name} has no place in the layers")


def is_function(node):
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def find_imports(node, inside_function=False):
    """(imported module, line, whether inside a function), without TYPE_CHECKING blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, inside_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            names = [child.module, *(f"{child.module}.{alias.name}" for alias in child.names)]
            yield from ((name, child.lineno, inside_function) for name in names)
        else:
            yield from find_imports(child, inside_function or is_function(child))


IMPORTS = {name: list(find_imports(tree)) for name, tree in TREES.items()}


def own_imports(name):
    """(module of this package, line) that a module imports, at the top or inside functions."""
    for imported, line, _ in IMPORTS[name]:
        target = imported.removeprefix("resnet_dist").removeprefix(".")
        if imported.startswith("resnet_dist") and target in MODULES and target not in ("", name):
            yield target, line


def public_functions(tree):
    """All functions that are neither private nor inside of something private or of a function."""
    for child in ast.iter_child_nodes(tree):
        if is_function(child) and not child.name.startswith("_"):
            yield child
        elif not is_function(child) and not getattr(child, "name", "").startswith("_"):
            yield from public_functions(child)


def parameters(function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


def test_imports_run_downward():
    upward = [
        f"{MODULES[name]}:{line} imports {target}"
        for name in MODULES
        for target, line in own_imports(name)
        if layer_of(target) > layer_of(name)
    ]
    assert upward == []


def test_there_are_no_cycles():
    edges = {name: {target for target, _ in own_imports(name)} for name in MODULES}
    done = set()
    trail = []

    def visit(name):
        assert name not in trail, f"a cycle of imports: {' -> '.join([*trail, name])}"
        if name not in done:
            trail.append(name)
            for target in edges[name]:
                visit(target)
            done.add(trail.pop())

    for name in MODULES:
        visit(name)


def test_heavy_libraries_are_imported_by_few_modules_inside_functions():
    strays = []
    for name, found in IMPORTS.items():
        for imported, line, inside_function in found:
            # torch.utils.tensorboard imports tensorboard.
            library = imported.removeprefix("torch.utils.").split(".")[0]
            if library in FENCES and not (inside_function and name in FENCES[library]):
                strays.append(f"{MODULES[name]}:{line} imports {library}")
    assert strays == []


def test_what_the_command_line_needs_is_light():
    """config and cli import nothing heavy at the top (a test of the real thing: test_config)."""
    for name in ("", "config", "schedule", "cli"):
        at_the_top = [
            imported for imported, _, inside_function in IMPORTS[name] if not inside_function
        ]
        libraries = {imported.split(".")[0] for imported in at_the_top}
        assert not libraries & {"torch", "numpy", *FENCES}


def test_files_and_functions_are_short_and_documented():
    found = []
    for name, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            found.append(f"{path} has {lines} lines")
        if lines and not ast.get_docstring(TREES[name]):
            found.append(f"{path} has no docstring")
        for function in filter(is_function, ast.walk(TREES[name])):
            place = f"{path}:{function.lineno} {function.name}"
            length = function.end_lineno - function.lineno + 1
            if length > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{place} has {length} lines")
            if len(parameters(function)) > MOST_PARAMETERS:
                found.append(f"{place} has {len(parameters(function))} parameters")
        for function in public_functions(TREES[name]):
            if not ast.get_docstring(function) and function.name not in METHODS_OF_TORCH:
                found.append(f"{path}:{function.lineno} {function.name} has no docstring")
    assert found == []


def test_no_public_name_is_defined_in_two_modules():
    """Commands share a verb, `run`, since the command line calls each of them by it. The Python
    interface has the verbs of the parts that it calls.
    """
    places = defaultdict(list)
    for name, tree in TREES.items():
        if name == "api":
            continue
        for node in tree.body:
            named = getattr(node, "name", "_")
            if not named.startswith("_") and not (name.startswith("commands.") and named == "run"):
                places[named].append(name)
    assert {named: where for named, where in places.items() if len(where) > 1} == {}
