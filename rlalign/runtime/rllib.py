"""RLlib's own PPO on a run file: the denoising environment, an RLModule around a Policy, and the
run.

A tested reference, not the production path: RLlib sees each denoising step as a transition of its
own. What it shares with rlalign's loop is the policy, the plan, the rewards and the evaluation's
prompts and noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchDiagGaussian
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule

from rlalign.alignment.collect import LocalCollect
from rlalign.alignment.environment import Chain, Denoising
from rlalign.config import Run, locate_run, resolved
from rlalign.core.media import as_uint8
from rlalign.core.records import Scored, Weights
from rlalign.core.registry import UserError
from rlalign.data.prompts.base import prompt_id
from rlalign.learning import evaluate
from rlalign.learning.log import Log
from rlalign.learning.metrics import Recorder
from rlalign.rewards.base import refuse_constraints, refuse_latents, score, total
from rlalign.sinks.base import Origin

ENVIRONMENT = "rlalign/denoising"
MOST_PROMPTS = 10_000
OnRecord = Callable[[dict[str, Any]], None]


def register() -> None:
    """Makes the environment known to RLlib as ``rlalign/denoising``; its config has the Run under
    ``run``."""
    from ray.tune.registry import register_env

    register_env(ENVIRONMENT, lambda config: environment(config["run"]))


def environment(run: Run) -> Denoising:
    """The environment of a run: its policy's last step, its prompts, its plan, the weighted sum of
    its rewards."""
    torch.set_num_threads(1)
    scorers = [(reward, reward.load_scorer("cpu")) for reward in run.rewards]

    def scored(media_BFCHW: torch.Tensor, prompts: Any) -> np.ndarray:
        media = as_uint8(media_BFCHW)  # as everywhere: rewards see uint8
        return total(
            run.rewards,
            {r.title: score(r, scorer, media, prompts) for r, scorer in scorers},
            run.combine,
        )

    return Denoising(run.policy.load("cpu"), scored, prompts_of(run), run.plan)


def prompts_of(run: Run) -> list[str]:
    """The run's prompts, each once: an observation says by number which one it is.

    Raises UserError for more than ``MOST_PROMPTS``.
    """
    pool = run.prompts.pool()
    if len(pool) > MOST_PROMPTS:
        raise UserError(
            f"prompts must be at most {MOST_PROMPTS:,} for rllib, whose observations have a number"
            f" for each, got {len(pool):,}; name a shorter list, or use rlalign train"
        )
    return list({prompt_id(prompt): prompt for prompt in pool}.values())


class DenoisingModule(TorchRLModule, ValueFunctionAPI):
    """A policy whose action distribution is the denoising step's own Gaussian, and a small value
    network beside it."""

    def setup(self) -> None:
        run: Run = self.model_config["run"]  # type: ignore[index]
        policy = run.policy.load("cpu")
        self.chain = Chain(policy, prompts_of(run), run.plan)
        self.denoiser = policy.network  # registered here, so its weights are the module's
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            size = int(self.observation_space.shape[0])  # type: ignore[index,union-attr]
            self.value = torch.nn.Sequential(
                torch.nn.Linear(size, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
            )

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        gaussian = self.chain.gaussian(batch[Columns.OBS])
        mean = gaussian.mean.flatten(1)
        std = gaussian.std.expand_as(gaussian.mean).flatten(1)
        return {Columns.ACTION_DIST_INPUTS: torch.cat([mean, std.log()], dim=1)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        """(B,) what is expected of the state."""
        return self.value(batch[Columns.OBS]).squeeze(-1)

    def get_train_action_dist_cls(self) -> Any:
        """The denoising step is a diagonal Gaussian."""
        return TorchDiagGaussian

    get_exploration_action_dist_cls = get_inference_action_dist_cls = get_train_action_dist_cls


def ppo_config(run: Run, runners: int) -> Any:
    """RLlib's PPO with a run's numbers: a round is an iteration, a sample an episode, the clip
    range that of joint log-probs."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    env = environment(run)
    decisions = env.chain.decisions
    clip_range = getattr(run.algorithm, "clip_range", None)
    if clip_range is None:
        raise UserError(
            "rllib trains by PPO and takes the clip range of algorithm ddpo or grpo, got"
            f" {run.algorithm.name}"
        )
    steps = run.samples_per_round * decisions
    lanes = max(1, run.samples_per_round // max(runners, 1) // 2)
    return (
        PPOConfig()
        .environment(
            ENVIRONMENT, env_config={"run": run}, normalize_actions=False, clip_actions=False
        )
        .env_runners(
            num_env_runners=runners,
            num_envs_per_env_runner=lanes,
            batch_mode="complete_episodes",
            rollout_fragment_length="auto",
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(module_class=DenoisingModule, model_config={"run": run})
        )
        .training(
            lr=run.learner.lr,
            gamma=1.0,
            lambda_=0.95,
            train_batch_size_per_learner=steps,
            minibatch_size=max(1, steps // run.learner.updates_per_round),
            num_epochs=run.learner.epochs,
            clip_param=float(clip_range) * env.chain.size,
            vf_clip_param=float("inf"),
            vf_loss_coeff=0.5,
            entropy_coeff=0.0,
            use_kl_loss=False,
            grad_clip=run.learner.max_grad_norm,
        )
        .learners(num_learners=0)
        .debugging(seed=run.seed, log_level="ERROR")
    )


def train(run: Run, folder: Path, on_record: OnRecord, *, runners: int = 0) -> dict[str, Any]:
    """Trains a run file by RLlib's PPO on a local Ray. Returns the comparison of base and trained,
    as evaluation.json has it."""
    from rlalign.runtime import cluster
    from rlalign.runtime.reservation import run_bundles

    _refuse_what_is_not_ppo(run)
    run = locate_run(run, begun=False)
    cluster.connect(run_bundles(run), run.runtime.device, None)
    import ray

    logging.getLogger("ray.rllib").setLevel(logging.ERROR)

    try:
        register()
        algorithm = ppo_config(run, runners).build_algo()
        policy = run.policy.load("cpu")
        collect = LocalCollect(run)
        held = run.prompts.held_out(run.evaluate.prompts)
        units = evaluate.evaluation_units(held, run.plan, run.evaluate.seed, run.samples_per_unit)

        def evaluated(kind: str) -> list[Scored]:
            return collect.gather(
                collect.order(units, Weights(version=0, kind=kind, tensors=policy.weights()))
            )

        base = evaluated("base")
        origin = Origin(folder=folder, name=run.name, settings=resolved(run), resume_at=-1)
        log = Log(run.log, origin)
        _train_rounds(algorithm, run.rounds, Recorder(folder, -1, log), on_record)
        log.close(ended=True)
        module = algorithm.get_module()
        policy.network.load_state_dict(module.denoiser.state_dict())
        trained = evaluated("current")
        algorithm.stop()
    finally:
        ray.shutdown()
    titles = [r.title for r in run.rewards]
    held_out = [r.title for r in run.evaluate.rewards]
    found = evaluate.compare(base, trained, titles, held_out, run.evaluate.by)
    found["round"] = run.rounds
    evaluate.write_json(folder / "evaluation.json", found)
    policy.save(folder / "policy")
    return found


def _refuse_what_is_not_ppo(run: Run) -> None:
    """Refuses settings that RLlib's PPO has no place for."""
    for_train = run.preferences is not None or run.refit is not None
    if run.policy.lora_rank or run.policy.adapter or for_train:
        raise UserError(
            "rllib trains all weights of a policy on samples of its own; lora_rank, adapter,"
            " preferences and refit are for train"
        )
    refuse_constraints(run.rewards, "rewards")
    refuse_latents(run.rewards, "rewards", "an episode of rllib has")
    if run.combine == "normalised":
        raise UserError(
            "combine must be sum or product for rllib, got 'normalised': its PPO has advantages of"
            " its own"
        )


def _train_rounds(algorithm: Any, rounds: int, recorder: Recorder, on_record: OnRecord) -> None:
    """Every round, with its line of metrics."""
    for number in range(1, rounds + 1):
        result = algorithm.train()
        reward = float(result["env_runners"]["episode_return_mean"])
        line = {"round": number, "reward/total/mean": reward}
        recorder.write(line)
        on_record(line)
