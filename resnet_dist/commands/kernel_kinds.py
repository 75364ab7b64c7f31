"""The kind of a GPU kernel or of a CPU operator, by its name."""

CONVOLUTION = "convolution"
MATRIX_PRODUCT = "matrix product"
NORM = "norm"
POOL = "pool"
POINTWISE = "pointwise"
REDUCTION = "reduction"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
COPY = "copy"
OTHER = "other"

KINDS = (
    CONVOLUTION,
    NORM,
    POINTWISE,
    POOL,
    MATRIX_PRODUCT,
    REDUCTION,
    OPTIMIZER,
    COMMUNICATION,
    COPY,
    OTHER,
)
"""All kinds, in the order of the table."""

# The first row that has a word of the name decides. Names are compared in lower case. A row comes
# before those whose words appear in its names too: a multi-tensor kernel has an "add" inside, and
# a Triton kernel of a batch norm followed by a ReLU is mostly norm.
_KERNELS = (
    (COMMUNICATION, ("nccl", "allreduce", "all_reduce", "allgather", "broadcast_kernel")),
    (OPTIMIZER, ("multi_tensor", "multitensor", "foreach", "fused_sgd", "fusedsgd", "triton_for")),
    # cuBLAS and CUTLASS have kernels with "bn" in their tile names, so norms are spelled out.
    (
        NORM,
        (
            "batch_norm",
            "batchnorm",
            "bn_fw_",
            "bn_bw_",
            "bnfw",
            "bnbw",
            "bn_fwd",
            "bn_bwd",
            "welford",
            "cudnn::norm",
            "layer_norm",
        ),
    ),
    (POOL, ("pool",)),
    # Changes of the memory format around cuDNN's convolutions.
    (COPY, ("nchwtonhwc", "nhwctonchw", "nchw_to_nhwc", "nhwc_to_nchw", "tensortransform")),
    (
        CONVOLUTION,
        (
            "fprop",
            "dgrad",
            "wgrad",
            "implicit_gemm",
            "implicit_convolve",
            "conv2d",
            "convolve",
            "winograd",
            "triton_tem_fused_convolution",
        ),
    ),
    (MATRIX_PRODUCT, ("gemm", "nvjet", "cublas", "cutlass", "splitk", "triton_tem")),
    (
        COPY,
        ("memcpy", "memset", "copy_kernel", "catarray", "copy_device_to_device", "fillfunctor"),
    ),
    (REDUCTION, ("reduce_kernel", "triton_red", "triton_per", "softmax", "nll_loss", "norm")),
    (
        POINTWISE,
        ("elementwise", "triton_poi", "pointwise", "threshold", "relu", "index_", "distribution"),
    ),
)

_OPERATORS = (
    (COMMUNICATION, ("c10d", "gloo", "nccl", "all_reduce", "allreduce", "wait_tensor")),
    (OPTIMIZER, ("_foreach", "_fused_", "optimizer")),
    (NORM, ("batch_norm", "layer_norm", "_normalize", "syncbatchnorm")),
    (POOL, ("pool",)),
    (CONVOLUTION, ("conv",)),
    (MATRIX_PRODUCT, ("addmm", "::mm", "linear", "matmul", "bmm")),
    (COPY, ("copy_", "aten::to", "_to_copy", "clone", "contiguous", "zero_", "fill_", "empty")),
    (REDUCTION, ("sum", "mean", "norm", "softmax", "nll_loss", "cross_entropy", "argmax", "topk")),
    (
        POINTWISE,
        (
            "add",
            "mul",
            "div",
            "sub",
            "relu",
            "clamp",
            "threshold",
            "where",
            "lerp",
            "sqrt",
            "square",
            "eq",
            "bitwise",
            "isfinite",
        ),
    ),
)


def kind_of_kernel(name: str) -> str:
    """The kind of a GPU kernel, or of a copy by the GPU.

    Args:
        name: As in a trace of `torch.profiler`, with or without its template arguments.

    Returns:
        One of `KINDS`; "other" for an unknown kernel.
    """
    return _first_match(name, _KERNELS)


def kind_of_operator(name: str) -> str:
    """The kind of a CPU operator, such as aten::add_; one of `KINDS`."""
    return _first_match(name, _OPERATORS)


def _first_match(name: str, rows: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    """The kind of the first row that has a word of the name."""
    lower = name.lower()
    for kind, words in rows:
        if any(word in lower for word in words):
            return kind
    return OTHER
