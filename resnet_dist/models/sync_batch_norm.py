"""Batch normalisation over the batches of all ranks, on any device that has PyTorch's native batch
norm.

`torch.nn.SyncBatchNorm` refuses the CPU. The one here gives what one process would compute on the
whole batch: outputs, input gradients, running statistics, and weight gradients once summed over the
ranks. The ranks may hold batches of different sizes, also empty ones. Each layer costs one
collective forward and one backward.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """`x` without gaps, in channels_last if `like` is, else contiguous.

    The native kernels are fast for these layouts, and only where input and gradient have the same
    one.
    """
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`local` of all ranks, stacked along a new first dimension in order of rank.

    Also used where a sum is wanted: over gloo it takes half the time of an all-reduce of so little
    data, and every rank adds in the same order.
    """
    gathered = local.new_empty(dist.get_world_size(group), *local.shape)
    dist.all_gather(list(gathered), local, group=group)
    return gathered


def _local_stats(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What this rank adds to the statistics: (mean, M2, n), packed as [2 * C + 1] of `dtype`.

    M2 is the sum of squared deviations from this rank's mean, n the number of values per channel.
    In fp32 n is exact up to 2**24, and off by less than one part in ten million beyond.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    packed = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)
    if count:
        # The running buffers are only there to make the kernel return `dtype` for a bf16 input.
        scratch = torch.zeros(2, channels, dtype=dtype, device=x.device)
        mean, var = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
        packed[:channels] = mean
        torch.mul(var, count, out=packed[channels:-1])
        packed[-1] = count
    return packed


def _merge(stats: Tensor) -> tuple[Tensor, Tensor, float]:
    """Merge rows of (mean, M2, n), [ranks, 2 * C + 1], to the mean [C], M2 [C] and count of the
    union.

    Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", for any number of parts: M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2. Unlike sums
    of squares it does not cancel.
    """
    channels = stats.shape[1] // 2
    means, m2s, counts = stats[:, :channels], stats[:, channels:-1], stats[:, -1:]
    total = counts.sum().item()
    share = counts / total
    mean = (share * means).sum(0)
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    return mean, m2, total


class _SyncBatchNormFunction(torch.autograd.Function):
    """Normalise with given statistics forward; backward, let the gradient flow through them on all
    ranks.

    x is [B, C, ...], weight, bias, mean and var are [C] in the dtype of the statistics, `total` is
    the number of values per channel over all ranks. With s = weight / sqrt(var + eps) and y = xhat
    * weight + bias: dL/dx = s * (dy - mean(dy) - xhat * mean(dy * xhat)), the means over the batch
    of all ranks (Ioffe and Szegedy 2015, "Batch Normalization", section 3, collected by powers of
    xhat).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, total, eps, group):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.total, ctx.eps, ctx.group = total, eps, group
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, var = ctx.saved_tensors
        dy = _dense(dy, like=x)
        dw, db = torch.zeros_like(weight), torch.zeros_like(weight)
        if x.numel():  # the kernel dies of an empty batch
            # The native backward in its eval form, asked for no input gradient, gives both sums in
            # one pass.
            _, dw, db = torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        dx = None
        if ctx.needs_input_grad[0]:
            # dw and db stay those of this rank: DDP sums the gradients of parameters.
            mean_dw, mean_db = _gather(torch.stack((dw, db)), ctx.group).sum(0) / ctx.total
            # Two passes over memory and one allocation, in the layout of x. The first borrows the
            # batch norm kernel to compute s * (dy - mean_db) + offset, as it takes float32 numbers
            # per channel beside a bf16 tensor. The second adds slope * x, where the slope must have
            # the dtype of x: the offset takes up its rounding, so that the slope acts on x - mean.
            slope = (-weight * mean_dw / (var + ctx.eps)).to(x.dtype)
            dx = F.batch_norm(dy, mean_db, var, weight, -slope * mean, eps=ctx.eps)
            dx.addcmul_(x, slope.view(-1, *[1] * (x.dim() - 2)))
        return dx, dw, db, None, None, None, None, None


class SyncBatchNorm(_BatchNorm):
    """Batch norm of [B, C, ...] with the statistics of the batches of all ranks of `process_group`.

    Options and state-dict keys are those of `torch.nn.BatchNorm2d`, and so are the rules: a biased
    variance to normalise, an unbiased one in `running_var`, and `momentum=None` for a cumulative
    average. The statistics are kept in float32 for inputs of half precision and in the input's
    dtype else; the output has dtype and layout of the input. `process_group=None` means all ranks.
    In eval mode, with one rank or without a process group it is plain batch norm and communicates
    nothing.

    Raises ValueError when training with fewer than two values per channel over all ranks.
    """

    def __init__(self, *args, process_group: dist.ProcessGroup | None = None, **options) -> None:
        super().__init__(*args, **options)
        self.process_group = process_group

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(
                f"expected an input of at least 2 dimensions [B, C, ...], got {x.dim()}"
            )

    def forward(self, x: Tensor) -> Tensor:
        if (
            not self.training
            or not dist.is_initialized()
            or dist.get_world_size(self.process_group) == 1
        ):
            return super().forward(x)
        self._check_input_dim(x)
        x = _dense(x, like=x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            mean, m2, total = _merge(_gather(_local_stats(x, dtype), self.process_group))
            if total < 2:
                raise ValueError(
                    f"expected more than 1 value per channel when training, got {total:.0f} on all ranks"
                )
            if self.track_running_stats:
                self._update_running_stats(mean, m2 / (total - 1))
        if self.affine:
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        else:
            weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
        return _SyncBatchNormFunction.apply(
            x, weight, bias, mean, m2 / total, total, self.eps, self.process_group
        )

    def _update_running_stats(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Move the running statistics towards those of this batch, [C] each; the same on every
        rank.
        """
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)


def convert_sync_batch_norm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, device_type: str = "cpu"
) -> nn.Module:
    """Make every batch norm in `module` a synchronised one. Returns the module (on "cuda" a new one
    for a norm).

    On "cuda" that is `torch.nn.SyncBatchNorm`, on any other device type the one of this file.
    Parameters and buffers are the same tensors as before, so an optimizer or EMA built earlier
    stays valid; the training flag is kept.
    """
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.__class__, norm.process_group = (
                SyncBatchNorm,
                process_group,
            )  # all else is that of a batch norm
    return module
