"""Denoising as a Gymnasium environment: one episode is one trajectory, an action is the next
latent.

The state is (latent, how far the chain is, the prompt), the policy's action distribution is the
denoising step's own Gaussian, and the reward comes at the end (Black 2023, arXiv:2305.13301,
section 4.2). Steps without noise are no decisions: the environment takes the last one, which has
none in DDIM and DDPM, by its own copy of the policy. Log-probs: rlalign averages them over a
latent's elements, a library that sees actions as vectors sums them; with D elements its clip range
is D times ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box

from rlalign.core.clips import lay_out
from rlalign.core.finite import watching
from rlalign.core.media import as_uint8
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.rollout import denoised
from rlalign.diffusion.steps import Gaussian, is_stochastic, noise_of
from rlalign.policies.base import Policy

Score = Callable[[torch.Tensor, Sequence[str]], np.ndarray]
"""Media (B, F, 3, H, W) float32 in [0, 1] and B prompts -> (B,) rewards."""


class Chain:
    """A plan's denoising steps on a policy's path, and observations in and out: what environment
    and learner share."""

    def __init__(self, policy: Policy, prompts: Sequence[str], plan: Plan) -> None:
        """Raises UserError for a plan without noise, or with noise after steps that have none."""
        # what is denoised, and at which levels
        self.policy = policy
        self.prompts = tuple(prompts)
        self.plan = plan
        self.levels = policy.path.at(plan).levels(plan.steps)

        # each decision needs noise
        noisy = is_stochastic(policy.path, self.levels, **noise_of(plan)).tolist()
        self.decisions = sum(noisy)
        if plan.window or not self.decisions or not all(noisy[: self.decisions]):
            raise UserError(
                "plan: every step but the last ones must have noise to be a decision, got rule"
                f" {plan.rule}, eta {plan.eta:g}, window {plan.window}; set eta above 0 and window"
                " to 0"
            )

        # the prompts are encoded once
        self.shape = policy.latent_shape(plan)
        self.size = int(np.prod(self.shape))
        with torch.no_grad():
            self._condition = policy.encode(self.prompts, plan)

    def observation(self, latent: torch.Tensor, step: int, prompt: int) -> np.ndarray:
        """(latent, share of the chain that is done, one-hot prompt) as one float32 vector."""
        words = np.zeros(len(self.prompts), np.float32)
        words[prompt] = 1.0
        head = np.array([step / self.plan.steps], np.float32)
        return np.concatenate([latent.flatten().numpy().astype(np.float32), head, words])

    def gaussian(self, observation_BO: torch.Tensor) -> Gaussian:
        """The denoising step of each observation under the policy's weights: mean (B, *latent), std
        broadcastable to it."""
        latent = observation_BO[:, : self.size].reshape(-1, *self.shape)
        step_B = (
            (observation_BO[:, self.size] * self.plan.steps)
            .round()
            .long()
            .clamp(0, self.decisions - 1)
            .cpu()
        )
        return self.step(latent, step_B, observation_BO[:, self.size + 1 :].argmax(1))

    def step(self, latent: torch.Tensor, step_B: torch.Tensor, prompt_B: torch.Tensor) -> Gaussian:
        """Steps number ``step_B`` from latents, for prompts by their numbers."""
        rows = self._condition.take(prompt_B)
        levels = self.levels
        plan = self.plan
        return denoised(
            self.policy, latent, levels[step_B], levels[step_B + 1], rows, plan, plan.eta
        ).gaussian

    def finished(self, latent: torch.Tensor, prompt: int) -> torch.Tensor:
        """(1, *latent) after the steps that have no noise."""
        for k in range(self.decisions, self.plan.steps):
            latent = self.step(latent, torch.tensor([k]), torch.tensor([prompt])).mean
        return latent


SHEET_WIDTH = 1024
"""Pixels, at most, of a sheet with the frames of a clip."""


class Denoising(gymnasium.Env[np.ndarray, np.ndarray]):
    """One trajectory an episode, as many steps as the plan has noisy ones; float32 vectors in,
    float32 vectors out."""

    metadata: ClassVar[dict[str, Any]] = {
        "render_modes": ["rgb_array", "rgb_array_list"],
        "render_fps": 4,
    }

    def __init__(
        self,
        policy: Policy,
        score: Score,
        prompts: Sequence[str],
        plan: Plan,
        *,
        render_mode: str | None = None,
    ) -> None:
        self.chain = Chain(policy, prompts, plan)
        self._score = score
        self.render_mode = render_mode
        size = self.chain.size
        self.observation_space = Box(
            -np.inf, np.inf, (size + 1 + len(self.chain.prompts),), np.float32
        )
        self.action_space = Box(-np.inf, np.inf, (size,), np.float32)
        self._latent = torch.zeros(1, *self.chain.shape)
        self._step = 0
        self._prompt = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts from noise under a prompt, both drawn by the seed; ``options`` may name ``latent``
        and ``prompt`` (a number)."""
        # a caller may fix the prompt
        super().reset(seed=seed)
        given = options or {}
        prompts = len(self.chain.prompts)
        self._prompt = (
            int(given["prompt"]) if "prompt" in given else int(self.np_random.integers(prompts))
        )
        if not 0 <= self._prompt < prompts:
            raise UserError(
                f"options.prompt must be a prompt's number from 0 to {prompts - 1}, got"
                f" {self._prompt}"
            )

        # a caller may also fix the latent that the episode starts from
        drawn = self.np_random.standard_normal(self.chain.size, dtype=np.float32)
        latent = np.asarray(given.get("latent", drawn), np.float32).reshape(1, *self.chain.shape)
        self._latent = torch.from_numpy(latent.copy())
        self._step = 0
        return self._observation(), {"prompt": self.chain.prompts[self._prompt]}

    @torch.no_grad()
    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """The next latent; (observation, reward, terminated, False, info), with the clean
        ``latent`` in the last info."""
        self._latent = torch.from_numpy(np.array(action, np.float32)).reshape(1, *self.chain.shape)
        self._step += 1
        if self._step < self.chain.decisions:
            return self._observation(), 0.0, False, False, {}
        with watching("at the end of an episode"):
            self._latent = self.chain.finished(
                self._latent.to(self.chain.policy.device), self._prompt
            ).cpu()
        media = self.chain.policy.decode(self._latent.to(self.chain.policy.device)).cpu()
        value = float(self._score(media, [self.chain.prompts[self._prompt]])[0])
        return self._observation(), value, True, False, {"latent": self._latent[0].numpy().copy()}

    @torch.no_grad()
    def render(self) -> np.ndarray | list[np.ndarray] | None:  # type: ignore[override]
        """The picture of the latent as it is, (H, W, 3) uint8; of a clip all frames on one sheet,
        row by row. In the mode ``rgb_array_list`` the list of its frames."""
        if self.render_mode not in self.metadata["render_modes"]:
            return None
        media = self.chain.policy.decode(self._latent.to(self.chain.policy.device))
        media_FCHW = as_uint8(media)[0]
        if self.render_mode == "rgb_array_list":
            return list(media_FCHW.transpose(0, 2, 3, 1))
        return lay_out(media_FCHW, SHEET_WIDTH)[0].transpose(1, 2, 0)

    def _observation(self) -> np.ndarray:
        return self.chain.observation(
            self._latent[0], min(self._step, self.chain.plan.steps), self._prompt
        )
