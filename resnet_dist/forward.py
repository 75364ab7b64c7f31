"""What training and evaluation share about running a network."""

import torch
from torch import nn


def train_mode(model: nn.Module) -> None:
    """Put a model in training mode, but keep the norms of its frozen part in evaluation mode.

    Their running statistics then stay as they are. A norm without weights is frozen if the layer
    defined before it is.
    """
    model.train()
    is_frozen = False
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            is_frozen = not any(parameter.requires_grad for parameter in own)
        if is_frozen and isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in the precision of the loss: single, or double if the model computes in double."""
    if logits.dtype == torch.float64:
        return logits
    return logits.float()


def all_logits(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The logits of a network's output, first, then those of its auxiliary heads.

    Networks with auxiliary heads return a tuple in training mode.
    """
    if isinstance(outputs, tuple):
        return outputs
    return (outputs,)
