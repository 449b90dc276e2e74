"""A mean of the weights before and after training (WiSE-FT, arXiv 2109.01903, equation 1).

Training for narrow widths on some texts moves whole vectors of other texts too. On the straight line between both
sets of weights more is kept of what was gained than of what was lost.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from matryo.core.errors import DamagedError

START = "start.safetensors"


def save_start(model: nn.Module, folder: Path) -> None:
    """Keep the weights that training starts from."""
    # Dense copies: the format takes neither weights that share their memory, nor learned axes as they come.
    weights = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / START)


def blend_with_start(model: nn.Module, folder: Path, share: float) -> None:
    """`share` of a model's weights and `1 - share` of those that `save_start` kept; in place, in float32.

    Raises:
        DamagedError: the weights kept cannot be read, or are another model's.
    """
    try:
        start = load_file(folder / START)
    except (SafetensorError, OSError) as error:
        raise DamagedError(
            f"{folder / START} cannot be read ({error}); start the run anew in another folder"
        ) from error
    now = model.state_dict()
    if {name: value.shape for name, value in start.items()} != {name: value.shape for name, value in now.items()}:
        raise DamagedError(f"{folder / START} holds another model's weights; start the run anew in another folder")
    with torch.no_grad():
        for name, value in now.items():
            if value.is_floating_point():
                # state_dict shares memory with the model.
                value.copy_(torch.lerp(start[name].to(value.device).float(), value.float(), share))
