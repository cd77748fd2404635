"""Dropout and stochastic depth for the first images of a batch only: those of the labeled ones.

Both kinds of images go through the network together, and share its batch-norm statistics (arXiv:1911.04252, Table 6 removes the noise
of the unlabeled images alone), so the noise is masked per image.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ns.config.schema import NoiseConfig
from ns.core.errors import ConfigError

DRAWS: tuple[Callable[..., Any], ...] = (
    Tensor.bernoulli_, Tensor.bernoulli, Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.exponential_, Tensor.geometric_,
    torch.bernoulli, torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.randperm, torch.multinomial,
    torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu,
)  # fmt: skip
"""Functions whose result is random; which images it belongs to is not known."""


class FirstImagesNoise(TorchFunctionMode):
    """While it is entered, dropout acts on the first `noised` of the `total` images of a batch; the others pass unchanged.

    The network must have gone through `confine_drop_paths`. Raises ConfigError if the network draws at random in another way.
    """

    def __init__(self, noised: int, total: int) -> None:
        super().__init__()
        self._noised = noised
        self._total = total

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:
            return self._drop_values(*args, **kwargs)
        if function in DRAWS or (function is F.scaled_dot_product_attention and _get_attention_dropout(*args, **kwargs) > 0):
            raise ConfigError(
                f"noise.pool: invalid value 'none' for this network: its noise ({function.__name__}) cannot be kept to the labeled "
                "images; take it out of model.args, or set noise.pool: same"
            )
        return function(*args, **kwargs)

    def _drop_values(self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return values
        if len(values) != self._total:
            raise ConfigError(
                f"noise.pool: invalid value 'none' for this network: it drops from {len(values)} rows for {self._total} images; "
                "set noise.dropout: 0 or noise.pool: same"
            )
        return torch.cat([F.dropout(values[: self._noised], p, training, inplace), values[self._noised :]])


def confine_drop_paths(network: nn.Module) -> None:
    """Replaces the network's stochastic depth by one that `FirstImagesNoise` confines. Elsewhere, it works as before."""
    for name, module in list(network.named_modules()):
        if isinstance(module, DropPath) and module.scale_by_keep:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _DropoutPath(module.drop_prob))


def check_confined_noise(network: nn.Module, resolution: int) -> None:
    """Raises ConfigError if the noise of a network on the meta device cannot be kept to some images of a batch.

    A network that cannot run there passes; training finds out.
    """
    confine_drop_paths(network)
    try:
        images = torch.zeros(2, 3, resolution, resolution, device="meta")
        with torch.no_grad(), FirstImagesNoise(1, 2):
            network.train()(images)
    except (AssertionError, RuntimeError, ValueError):
        return  # count_multiply_adds says what else is wrong


def find_missing_noise(network: nn.Module, noise: NoiseConfig) -> list[str]:
    """A line for each kind of noise that the experiment asks for and the network took no notice of: families of timm accept arguments
    that they do not use."""
    modules = list(network.modules())
    has_depth = any(isinstance(module, DropPath) and module.drop_prob for module in modules)
    has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in modules) or bool(
        getattr(network, "drop_rate", 0.0)
    )
    return [
        f"noise.{field}: {getattr(noise, field):g}: {type(network).__name__} has none, so it has no effect"
        for field, is_there in (("dropout", has_dropout), ("stochastic_depth", has_depth))
        if getattr(noise, field) and not is_there
    ]


class _DropoutPath(nn.Module):
    """Stochastic depth per image, as dropout of a column of ones: 0, or 1 / (1 - p)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return branch
        ones = branch.new_ones((len(branch),) + (1,) * (branch.ndim - 1))
        return branch * F.dropout(ones, self.drop_prob, True)


def _get_attention_dropout(*args: Any, **kwargs: Any) -> float:
    """The dropout of F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, …)."""
    return float(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
