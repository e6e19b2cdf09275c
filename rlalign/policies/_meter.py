"""What a policy was asked: counted for costs, and measured for a run's metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Meter:
    """What a policy was asked so far."""

    calls: int = 0
    """Samples that the denoiser was asked about; a guided pass asks twice."""
    backward_calls: int = 0
    """Of these, the ones asked with a latent whose gradient is wanted."""
    learned: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Metric -> what the family measured of rows that were asked with gradients."""

    def take_means(self) -> dict[str, torch.Tensor]:
        """The mean of each metric since the last time."""
        found = {name: torch.cat(parts).mean() for name, parts in self.learned.items()}
        self.learned.clear()
        return found
