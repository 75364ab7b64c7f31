"""torch.compile for the network: part by part, in place, inside DDP.

A network of the ResNet family is compiled in parts (stem, each stage, head), any other network as a
whole. Each part has a backward graph of its own, so that DDP reduces its gradient while the part
before it computes. `torch.nn.Module.compile` works in place: state-dict keys stay.

A compiled part holds the collectives of SyncBatchNorm. If it failed to compile on one rank only,
the others would wait in them. Therefore nothing runs while the parts are compiled: every rank
compiles on its own, then all ranks agree over the CPU group whether all of them succeeded.
"""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from resnet_dist.config import TrainConfig
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.forward import train_mode
from resnet_dist.precision import Precision, build_precision
from resnet_dist.text import printable

BACKEND = "inductor"
"""Name of the backend of torch.compile. Tests take one that is done sooner."""

# Graphs that torch keeps for one function. All parts share one, and each image size of progressive
# resizing adds a graph for each part. Torch's own limit of 8 is an error beyond that.
_MOST_GRAPHS = 256

# What `train.deterministic` fixes in inductor. Its kernels are deterministic; the choice between
# them is not, where it depends on measured times.
_DETERMINISTIC_INDUCTOR = {
    # No choice by timing on the device: blocks of reductions, padding of matrix products,
    # templates. Torch 2.9 does not know it yet.
    "deterministic": True,
    # What else is switched on by mode or by environment variables of the user.
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "shape_padding": False,
}

T = TypeVar("T")
Shape = tuple[int, ...]
Graph = Callable[..., Any]


class _ReadyError(Exception):
    """Ends the call of a part that was only to be compiled."""


def compiled_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that can be compiled, by name, in the order in which `model` calls them."""
    parts = getattr(model, "parts", None)
    if parts is None:
        return {"network": model}
    named: dict[str, nn.Module] = parts()
    return named


def is_compiled(model: nn.Module) -> bool:
    """Whether the parts of `model` are compiled."""
    return any(part._compiled_call_impl is not None for part in compiled_parts(model).values())


def run_eagerly(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Run the compiled parts of `model` without their graphs, as if they were not compiled."""
    if not is_compiled(model):
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


class NetworkCompiler:
    """Compiles the parts of a network, and keeps count of what is compiled.

    Shapes are static: a graph that serves several image sizes would differ between a run that has
    seen one of them and a run that has seen two, and a resumed run would not be exact.

    Args:
        model: The network itself, not its DDP wrapper.
        train: The `train` section of the config.
        runtime: The ranks.
        teacher: A network in evaluation mode that looks at the same images and is not trained; its
            parts have no backward graph. None for none.

    Attributes:
        parts: The compiled modules of the network by name.
        teacher_parts: Those of the teacher.
        shapes: The shapes [B, 3, H, W] that are compiled.
        num_graphs: Number of graphs that were compiled (forward and backward count as one).
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        runtime: Runtime,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.precision = build_precision(train, runtime.device)
        self.runtime = runtime
        self.parts = compiled_parts(model)
        self.teacher_parts = {} if teacher is None else compiled_parts(teacher)
        self.shapes: set[Shape] = set()
        self.num_graphs = 0
        self._train = train
        self._only_compiles = False
        set_dynamo_options()
        for part in self._all_parts():
            part.compile(backend=self._backend, fullgraph=True, dynamic=False)

    def prepare(self, shape: Shape) -> str:
        """Compile for images [B, 3, H, W]. Every rank must call it; it may take minutes.

        The model is in training mode afterwards, and otherwise unchanged.

        Returns:
            Why it failed on the first rank where it failed; empty if all ranks succeeded.
        """
        self.shapes.add(shape)
        problem = run_together(lambda: self._compile_all(shape), self.runtime)
        return first_problem(problem, self.runtime)

    def discard(self) -> None:
        """Make the networks as they were before they were compiled."""
        for part in self._all_parts():
            part._compiled_call_impl = None

    def _all_parts(self) -> list[nn.Module]:
        """The modules of both networks that are compiled."""
        return [*self.parts.values(), *self.teacher_parts.values()]

    def _compile_all(self, shape: Shape) -> str:
        """Compile every part on this rank; returns the failure, or an empty string."""
        if torch._dynamo.config.disable:
            return "TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE switches it off"
        train_mode(self.model)
        problem = self._compile_parts(self.parts, shape)
        if problem:
            return problem
        with torch.no_grad():
            problem = self._compile_parts(self.teacher_parts, shape)
        return f"the teacher's {problem}" if problem else ""

    def _compile_parts(self, parts: dict[str, nn.Module], shape: Shape) -> str:
        """Compile the parts of a network; returns the failure, or an empty string."""
        x = example_images(shape, self.precision)
        for name, part in parts.items():
            try:
                self._compile(part, x)
            except Exception as problem:
                return describe_failure(name, problem)
            x = self._output(part, x)
        return ""

    def _compile(self, part: nn.Module, x: torch.Tensor) -> None:
        """Compile a part, forward and backward, without running it."""
        self._only_compiles = True
        try:
            with contextlib.suppress(_ReadyError), self.precision.autocast():
                part(x)
        finally:
            self._only_compiles = False

    def _output(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The input of the next part: what this one returns, eagerly and in evaluation mode.

        No collective runs in this mode, and the running statistics stay as they are.
        """
        self.model.eval()
        with torch.compiler.set_stance("force_eager"), self.precision.autocast():
            output = part(x)
        train_mode(self.model)
        if not isinstance(output, torch.Tensor):
            # Of a network with several heads, which is a single part.
            return x
        return output.detach().requires_grad_(output.requires_grad)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Graph:
        """Compile one graph; torch.compile calls this with the traced part."""
        with backward_compiled_too():
            run = lower(graph, inputs, self._train)
        self.num_graphs += 1

        def run_unless_preparing(*arguments: object) -> object:
            if self._only_compiles:
                raise _ReadyError
            return run(*arguments)

        return run_unless_preparing


def replays_cuda_graphs(train: TrainConfig) -> bool:
    """Whether the kernels of the network are recorded once and then replayed."""
    return train.compile is True and train.compile_mode == "reduce-overhead"


def begin_step(replays_graphs: bool) -> None:
    """Call it before the forward passes of a step, if CUDA graphs are replayed.

    What the graphs return is then valid until the next step begins. Without it, torch takes the
    next part that is called for the next step, unless a backward pass is due: the predictions of a
    teacher and the maps of a frozen part would be overwritten.
    """
    if replays_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def set_dynamo_options() -> None:
    """Set the process-wide options of torch.compile's tracer.

    DDP's optimizer would split each part once more, which `fullgraph` does not allow.
    """
    from torch._dynamo import config

    config.optimize_ddp = False
    config.recompile_limit = _MOST_GRAPHS
    config.accumulated_recompile_limit = _MOST_GRAPHS


def backward_compiled_too() -> contextlib.AbstractContextManager[object]:
    """Compile the backward graph together with the forward graph, and not when it first runs."""
    from torch._functorch import config

    if not hasattr(config, "force_non_lazy_backward_lowering"):
        return contextlib.nullcontext()
    changed: contextlib.AbstractContextManager[object] = config.patch(
        force_non_lazy_backward_lowering=True
    )
    return changed


def lower(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], train: TrainConfig) -> Graph:
    """Compile a graph with the backend."""
    if BACKEND == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(graph, inputs, config_patches=inductor_options(train))
        assert callable(compiled)
        return compiled
    backend: Callable[..., Graph] = torch._dynamo.lookup_backend(BACKEND)
    return backend(graph, inputs)


def inductor_options(train: TrainConfig) -> dict[str, Any]:
    """The options of inductor that `train.compile_mode` and `train.deterministic` stand for."""
    import torch._inductor as inductor

    options: dict[str, Any] = dict(inductor.list_mode_options(train.compile_mode))
    if not train.deterministic:
        return options
    known = inductor.list_options()
    for name, value in _DETERMINISTIC_INDUCTOR.items():
        if name in known:
            options[name] = value
    return options


def example_images(shape: Shape, precision: Precision) -> torch.Tensor:
    """Black images [B, 3, H, W], as the loader gives them: their type, device and layout."""
    images = torch.zeros(shape, dtype=precision.dtype, device=precision.device)
    return images.contiguous(memory_format=torch.channels_last)


def run_together(work: Callable[[], T], runtime: Runtime) -> T:
    """Call `work` on every rank. It may take longer than the time-out of a collective.

    A thread reduces every second whether all ranks are done, so that no rank waits long in one
    collective. `work` must not communicate.
    """
    if runtime.world_size == 1:
        return work()
    is_done = Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_wait_for_all, is_done, runtime)
        try:
            return work()
        finally:
            is_done.set()
            waiting.result()


def _wait_for_all(is_done: Event, runtime: Runtime) -> None:
    """Return when `is_done` is set on every rank."""
    while True:
        is_done.wait(1.0)
        busy = 0 if is_done.is_set() else 1
        num_busy = torch.tensor(busy)
        dist.all_reduce(num_busy, group=runtime.cpu_group)
        if not int(num_busy):
            return


def first_problem(problem: str, runtime: Runtime) -> str:
    """The first problem that is not empty, in the order of ranks, on every rank."""
    if runtime.world_size == 1:
        return problem
    problems = [""] * runtime.world_size
    dist.all_gather_object(problems, problem, group=runtime.cpu_group)
    for rank, text in enumerate(problems):
        if text:
            return f"rank {rank}: {text}"
    return ""


def describe_failure(name: str, problem: Exception) -> str:
    """One line that names the part, the error and, where torch says it, the operator.

    Args:
        name: The part that was compiled.
        problem: What torch.compile raised; its text has many lines.
    """
    while hasattr(problem, "inner_exception"):
        # Torch's compiler wraps what its parts raise.
        problem = problem.inner_exception
    lines = []
    for line in str(problem).splitlines():
        stripped = line.strip()
        if stripped:
            lines.append(stripped)
    message = lines[0] if lines else ""
    text = f"{name}: {type(problem).__name__}: {message}"
    for line in lines:
        if line.startswith("target:"):
            operator = line.removeprefix("target:").strip()
            text = f"{text} (operator {operator})"
            break
    return printable(text)


def start_compiler(
    model: nn.Module,
    train: TrainConfig,
    shape: Shape,
    runtime: Runtime,
    teacher: nn.Module | None = None,
) -> tuple[NetworkCompiler | None, str]:
    """Compile a network, and its teacher, for their first shape; every rank must call it.

    Returns:
        The compiler, and why it failed on some rank. If it failed, the networks are as they were,
        and there is no compiler.
    """
    compiler = NetworkCompiler(model, train, runtime, teacher)
    problem = compiler.prepare(shape)
    if problem:
        compiler.discard()
        return None, problem
    return compiler, ""


def compile_for(compiler: NetworkCompiler, shape: Shape) -> float:
    """Compile for one more shape in the middle of a run; every rank must call it.

    Returns:
        The seconds that it took.

    Raises:
        ValueError: It failed on a rank. To go on without it would change the arithmetic of the run.
    """
    start = time.monotonic()
    problem = compiler.prepare(shape)
    if problem:
        raise ValueError(refusal(problem))
    return time.monotonic() - start


def describe_compilation(num_graphs: int, shape: Shape, seconds: float) -> str:
    """What was compiled for images of `shape` [B, 3, H, W], and its time."""
    batch_size, _, height, width = shape
    return (
        f"compiled {num_graphs} parts for {batch_size} images of {height} x {width} pixels in "
        f"{seconds:.1f} s"
    )


def refusal(problem: str) -> str:
    """The error of a run that must compile and cannot."""
    return (
        f"train.compile is true, but torch.compile failed: {problem}; train.compile false trains "
        "without it"
    )
