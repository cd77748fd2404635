"""What a plan would cost on GPUs that are not here: a range, from a table of their peaks and prices."""

from importlib.resources import files
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ns.core.errors import ConfigError
from ns.planning.cost import WorkEstimate
from ns.storage import read_uri

LOW, HIGH = 0.02, 0.25
"""Of its peak that a GPU reaches: networks of depthwise convolutions (EfficientNet) wait for memory, those of dense ones (ResNet) less."""


class GpuPrice(BaseModel):
    """One kind of GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak: float = Field(gt=0)
    """10¹² multiply-adds a second."""
    price: tuple[float, float]
    """Of one for an hour: lowest, highest."""


class GpuCost(NamedTuple):
    """Of a plan's work on one kind of GPU."""

    gpu: str
    hours: tuple[float, float]
    """GPU-hours, from and to."""
    cost: tuple[float, float]
    """In the table's currency."""


def read_prices(uri: str | None = None) -> dict[str, GpuPrice]:
    """The table at a path or URI; the one that comes with this package if not given. Raises ConfigError naming what is wrong in it."""
    text = (files("ns.planning") / "prices.yaml").read_bytes() if uri is None else read_uri(uri)
    try:
        table: Any = yaml.safe_load(text)
        return {str(name): GpuPrice.model_validate(row) for name, row in table.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri}: not YAML: {error}") from error
    except (AttributeError, ValidationError) as error:
        raise ConfigError(f"{uri}: must be GPU: {{peak: TMACS, price: [LOW, HIGH]}}, a line each: {error}") from error


def estimate_gpu_costs(
    work: tuple[WorkEstimate, ...], prices: dict[str, GpuPrice], multiply_adds_per_second: float
) -> list[GpuCost]:
    """What `work` of a plan, which was made for devices of that speed, costs on each kind of GPU."""
    multiply_adds = sum(estimate.device_hours for estimate in work) * multiply_adds_per_second
    estimates = []
    for gpu, row in prices.items():
        hours = tuple(multiply_adds / (row.peak * 1e12 * share) for share in (HIGH, LOW))
        estimates.append(GpuCost(gpu, (hours[0], hours[1]), (hours[0] * row.price[0], hours[1] * row.price[1])))
    return estimates
