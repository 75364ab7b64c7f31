"""Batch normalisation over the batches of all ranks: one class for every device.

It gives what one process would compute on the whole batch: outputs, input gradients, running
statistics, and weight gradients once DDP has summed them over the ranks. Each layer costs one
all-reduce of 2 * C numbers forward and one backward. Nothing waits for the device, and
`torch.compile` traces all of it without a graph break (`torch.nn.SyncBatchNorm` waits three times
per layer, and breaks the graph).

All ranks must have batches of the same size, which is then known without asking.
"""

from typing import Any

import torch
import torch.distributed as dist

# Tells `torch.compile` the shapes of what the collectives return.
import torch.distributed._functional_collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

SYNC_IN_GROUP_OF_ONE = False
"""Whether a single rank runs the collectives too. For tests and benchmarks on one GPU."""


def _all_reduce_sum(numbers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks, as operations that `torch.compile` can trace.

    `functional_collectives.all_reduce` calls the same two, but wraps the result until it is used.
    In eager mode that took the CPU three times as long (one rank: 0.24 instead of 0.07 ms).
    """
    operations = torch.ops._c10d_functional
    total = operations.all_reduce(numbers, "sum", group.group_name)
    waited: Tensor = operations.wait_tensor(total)
    return waited


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """`x` without gaps, in channels_last if `like` is, else contiguous.

    The native kernels are fast for these layouts, if input and gradient have the same one.
    """
    layout = torch.contiguous_format
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return x.contiguous(memory_format=layout)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] as [C, 1, ...], to be combined with `like` [B, C, ...]."""
    num_spatial_dims = like.dim() - 2
    ones = [1] * num_spatial_dims
    return values.view(-1, *ones)


def _local_mean_and_m2(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and M2 (the sum of the squared deviations from the mean) of this rank's values.

    It reads `x` twice, so that a mean that is large beside the deviation does no harm. In eager
    mode PyTorch's own kernel does it (on one CPU core, for 32 images of 64 channels and 56 pixels:
    4.1 ms, and 50 ms as two reductions), which `torch.compile` cannot trace.

    Args:
        x: [B, C, ...].
        dtype: Type of the results.

    Returns:
        Mean [C] and M2 [C].
    """
    channels = x.shape[1]
    count = x.numel() // channels
    if torch.compiler.is_compiling():
        dims = [0, *range(2, x.dim())]
        values = x.to(dtype)
        mean = values.mean(dims)
        deviations = values - _per_channel(mean, x)
        m2 = deviations.square().sum(dims)
        return mean, m2
    # The kernel returns the type of the running statistics that it is given.
    unused = torch.zeros(2, channels, dtype=dtype, device=x.device)
    mean, biased_var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    return mean, biased_var * count


def _global_statistics(x: Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> Tensor:
    """Mean and biased variance over the batches of all ranks.

    Each rank contributes n * mean and M2 + n * mean^2, which are sums over its values and their
    squares, and so add up over the ranks. They are float64, where the final subtraction cancels
    nothing that float32 could show.

    Args:
        x: This rank's batch [B, C, ...].
        dtype: Type of the result.
        group: The ranks.

    Returns:
        [2, C]: mean, biased variance.
    """
    count = x.numel() // x.shape[1]
    total = count * group.size()
    local_mean, local_m2 = _local_mean_and_m2(x, dtype)
    mean = local_mean.double()
    m2 = local_m2.double()
    local_sum = count * mean
    local_square_sum = m2 + count * mean.square()
    local_sums = torch.stack((local_sum, local_square_sum))

    global_sums = _all_reduce_sum(local_sums, group)
    global_mean = global_sums[0] / total
    mean_square = global_sums[1] / total
    biased_var = mean_square - global_mean.square()
    biased_var = biased_var.clamp_min(0.0)
    statistics = torch.stack((global_mean, biased_var))
    return statistics.to(dtype)


class _Normalize(torch.autograd.Function):
    """Normalise with the given statistics; backward, let the gradient flow through them.

    x is [B, C, ...]; weight and bias [C] and statistics [2, C] (mean and biased variance) are of
    the dtype of the statistics. With s = weight / sqrt(var + eps), y = xhat * weight + bias and
    means over the batch of all ranks:

        dL/dx = s * (dy - mean(dy) - xhat * mean(dy * xhat))

    (Ioffe and Szegedy 2015, "Batch Normalization", section 3, collected by powers of xhat).
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: Tensor,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """The normalised x."""
        ctx.save_for_backward(x, weight, statistics)
        ctx.eps = eps
        ctx.group = group
        mean, var = statistics.unbind()
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """The gradients of x, weight and bias."""
        x, weight, statistics = ctx.saved_tensors
        mean, var = statistics.unbind()
        dy = _dense(dy, like=x)
        # In its eval form, and asked for no input gradient, the native backward gives the two sums
        # over this rank's batch in one pass: of dy * xhat, and of dy.
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            dy,
            x,
            weight,
            mean,
            var,
            None,
            None,
            False,
            ctx.eps,
            [False, True, True],
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            count = x.numel() // x.shape[1]
            total = count * ctx.group.size()
            local_sums = torch.stack((grad_weight, grad_bias))
            global_sums = _all_reduce_sum(local_sums, ctx.group)
            means = global_sums / total
            mean_dy_xhat, mean_dy = means.unbind()
            # The equation above as s * (dy - mean_dy) + slope * (x - mean): two passes over memory.
            # The batch norm kernel does the first, since it takes float32 numbers per channel
            # beside a bf16 tensor. `slope` must have the dtype of x; it is rounded before its
            # product with the mean, so that it still acts on x - mean.
            slope = -weight * mean_dy_xhat / (var + ctx.eps)
            slope = slope.to(x.dtype)
            offset = -slope * mean
            grad_x = F.batch_norm(dy, mean_dy, var, weight, offset, eps=ctx.eps)
            grad_x = grad_x.addcmul_(x, _per_channel(slope, x))
        # DDP sums the gradients of weight and bias over the ranks.
        return grad_x, grad_weight, grad_bias, None, None, None


class SyncBatchNorm(_BatchNorm):
    """Batch norm of [B, C, ...] with the statistics of the batches of all ranks of `process_group`.

    Options, state-dict keys and rules are those of `torch.nn.BatchNorm2d`: the biased variance
    normalises, the unbiased one goes into `running_var`, and `momentum=None` means a cumulative
    average. The statistics are float32 for inputs of half precision, else of the input's dtype. The
    output has the dtype and layout of the input. `process_group=None` means all ranks.

    In eval mode, with one rank or without a process group it is plain batch norm, and communicates
    nothing.
    """

    def __init__(
        self, num_features: int, process_group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"expected an input of at least 2 dimensions [B, C, ...], got {input.dim()}"
            )

    def _group_to_sync(self) -> dist.ProcessGroup | None:
        """The ranks that share their statistics; None if this rank uses its own batch alone."""
        if not self.training:
            return None
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        assert group is not None
        if group.size() == 1 and not SYNC_IN_GROUP_OF_ONE:
            return None
        return group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...].

        Raises:
            ValueError: If the input has fewer than two dimensions, or less than two values per
                channel on all ranks together.
        """
        group = self._group_to_sync()
        if group is None:
            return super().forward(x)
        self._check_input_dim(x)
        count = x.numel() // x.shape[1]
        total = count * group.size()
        if total < 2:
            raise ValueError(
                f"expected more than 1 value per channel when training, got {total} on all ranks"
            )
        x = _dense(x, like=x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            statistics = _global_statistics(x, dtype, group)
            if self.track_running_stats:
                self._update_running_statistics(statistics, total)
        if self.affine:
            weight = self.weight.to(dtype)
            bias = self.bias.to(dtype)
        else:
            weight = torch.ones_like(statistics[0])
            bias = torch.zeros_like(statistics[0])
        y: Tensor = _Normalize.apply(x, weight, bias, statistics, self.eps, group)
        return y

    def _update_running_statistics(self, statistics: Tensor, total: int) -> None:
        """Move the running statistics towards those of this batch; equal on every rank.

        Args:
            statistics: Mean and biased variance, [2, C].
            total: Values per channel on all ranks.
        """
        mean, biased_var = statistics.unbind()
        unbiased_var = biased_var * (total / (total - 1))
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self._move(self.running_mean, mean)
        self._move(self.running_var, unbiased_var)

    def _move(self, running: Tensor | None, new: Tensor) -> None:
        """Move one running statistic [C] towards its new value, in place."""
        assert running is not None
        assert self.num_batches_tracked is not None
        momentum: Tensor | float
        if self.momentum is None:
            momentum = 1 / self.num_batches_tracked.to(running.dtype)
        else:
            momentum = self.momentum
        running.lerp_(new.to(running.dtype), momentum)


def convert_sync_batch_norm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Make every batch norm in `module` a `SyncBatchNorm`, in place.

    Parameters and buffers stay the same tensors, so that an optimizer or average built earlier
    stays valid. The training flag is kept.

    Args:
        module: The network.
        process_group: The ranks that share their statistics; None means all ranks.

    Returns:
        `module`.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            # All other attributes are those of a batch norm.
            norm.__class__ = SyncBatchNorm
            assert isinstance(norm, SyncBatchNorm)
            norm.process_group = process_group
    return module
