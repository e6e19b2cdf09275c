"""The Run: one YAML file becomes frozen models; every error carries its path, the rule, the value and a "did you mean"."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from rlalign import checkpoint
from rlalign.algorithms.base import Algorithm
from rlalign.checkpoint import CheckpointSettings
from rlalign.data.prompts.base import Prompts
from rlalign.evaluate import EvaluateSettings
from rlalign.learner import LearnerSettings
from rlalign.policies.base import PolicyRecipe
from rlalign.records import Plan
from rlalign.registry import SHELVES, UserError, build, explain, load_class, names
from rlalign.rewards.base import Reward


class RuntimeSettings(BaseModel):
    """Who does the work and where. None of it changes the numbers, except ``max_staleness``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rollout_workers: int = Field(
        default=2, ge=1, description="actors that denoise (threads of the process with --local)"
    )
    reward_workers: int = Field(default=1, ge=1, description="actors per reward")
    learner_workers: int = Field(default=1, ge=1, description="Ray Train workers; must divide learner.shards")
    max_staleness: int = Field(
        default=0, ge=0, description="rounds that the samples' policy may lag behind; 0 is synchronous"
    )
    rollout_threads: int = Field(default=1, ge=1, description="torch threads in a rollout or reward worker")
    learner_threads: int = Field(default=1, ge=1, description="torch threads for each shard of the learner")
    rollout_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for a rollout worker")
    rollout_gpus: float = Field(default=0.0, ge=0, description="GPUs, or a share of one, for a rollout worker")
    reward_cpus: float = Field(default=0.25, ge=0, description="CPUs that Ray reserves for a reward worker")
    reward_gpus: float = Field(default=0.0, ge=0, description="GPUs, or a share of one, for a reward worker")
    learner_cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for a learner worker")
    learner_gpus: float = Field(default=0.0, ge=0, description="GPUs for a learner worker")
    max_attempts: int = Field(
        default=3, ge=1, description="tries of one unit, and restarts of the learner, before the run ends"
    )
    unit_timeout_seconds: float = Field(default=600.0, gt=0, description="a worker that takes longer is replaced")
    recovery_seconds: float = Field(default=120.0, gt=0, description="how long a dead worker may take to come back")
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="torch device of policies and rewards"
    )


def _recipe(shelf: str) -> BeforeValidator:
    """A plug-in field: built by name; its own errors already carry a path and pass through."""

    def build_one(value: Any) -> Any:
        return build(shelf, value, shelf)

    return BeforeValidator(build_one)


class Run(BaseModel):
    """Everything that defines a run. Same Run, same numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the run folder's name")
    seed: int = Field(default=0, ge=0, description="decides prompts and noise")
    rounds: int = Field(default=30, ge=1, description="produce, score, learn: this many times")
    policy: SerializeAsAny[Annotated[PolicyRecipe, _recipe("policies")]]
    plan: Plan = Plan()
    prompts: SerializeAsAny[Annotated[Prompts, _recipe("prompts")]]
    rewards: tuple[SerializeAsAny[Annotated[Reward, _recipe("rewards")]], ...] = Field(min_length=1)
    algorithm: SerializeAsAny[Annotated[Algorithm, _recipe("algorithms")]]
    learner: LearnerSettings = LearnerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        prompts, learner, runtime = self.prompts, self.learner, self.runtime
        if self.units_per_round % learner.updates_per_round:
            raise UserError(
                f"learner.updates_per_round must divide the units of a round ({self.units_per_round} = prompts.per_round "
                f"{prompts.per_round} / prompts.per_unit {prompts.per_unit}), got {learner.updates_per_round}"
            )
        if learner.shards % runtime.learner_workers:
            raise UserError(
                f"learner.shards must be a multiple of runtime.learner_workers ({runtime.learner_workers}), got {learner.shards}"
            )
        titles = [r.title for r in (*self.rewards, *self.evaluate.rewards)]
        twice = sorted({t for t in titles if titles.count(t) > 1})
        if twice:
            raise UserError(f"rewards: {twice[0]!r} appears twice; give one of them a label")
        form = getattr(self.algorithm, "form", "")
        if form == "score_function" and learner.updates_per_round * learner.epochs != 1:
            raise UserError(
                "algorithm.form score_function is strictly on-policy: learner.updates_per_round and learner.epochs must be 1, "
                f"got {learner.updates_per_round} and {learner.epochs}; or use importance_sampling"
            )
        return self

    @property
    def units_per_round(self) -> int:
        """Units of work that one round is made of."""
        return self.prompts.per_round // self.prompts.per_unit

    @property
    def samples_per_unit(self) -> int:
        """Samples in one unit of work: the batch of a rollout's forward pass."""
        return self.prompts.per_unit * self.prompts.samples_per_prompt

    @property
    def samples_per_round(self) -> int:
        """Samples in one round."""
        return self.prompts.per_round * self.prompts.samples_per_prompt

    def rewards_for(self, stream: str) -> tuple[Reward, ...]:
        """The rewards that score a stream: the trained ones, and in evaluations the held-out ones too."""
        return self.rewards + (self.evaluate.rewards if stream == "evaluate" else ())


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that appears twice is an error, not the last one's victory."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


# YAML 1.1 reads 1e-4 as a word; people mean a number
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_UniqueKeys.add_constructor("tag:yaml.org,2002:map", _mapping)
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for a missing, unreadable, empty or malformed one."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file{_near_file(path)}") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be UTF-8 text; byte {error.start} is not") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold a mapping of settings, got {type(data).__name__}")
    return data


def parse_yaml(text: str, place: str) -> Any:
    """Parsed YAML; a syntax error is a UserError with its line."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # noqa: TID251 - a SafeLoader
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}:{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not YAML: {error}") from error


def _near_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    found = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, found, n=1, cutoff=0.4)
    return f"; did you mean {str(folder / close[0])!r}?" if close else ""


def override(data: dict[str, Any], assignment: str) -> None:
    """Sets ``a.b=value`` in place; the value is YAML, a number in the path is a list's index."""
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise UserError(f"an override must read key=value, got {assignment!r}")
    *parents, last = path.strip().split(".")
    place: Any = data
    for part in parents:
        if isinstance(place, dict):
            place = place.setdefault(part, {})
        elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise UserError(f"override {assignment!r}: there is no {part!r} to go into")
    value = parse_yaml(text, f"override {assignment!r}")
    if isinstance(place, dict):
        place[last] = value
    elif isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    else:
        raise UserError(f"override {assignment!r}: there is no {last!r} to set")


def load_run(path: Path | str, overrides: Sequence[str] = ()) -> Run:
    """The Run of a YAML file with overrides applied. Every mistake is a UserError."""
    data = read_yaml(Path(path))
    for assignment in overrides:
        override(data, assignment)
    return parse_run(data)


def parse_run(data: Mapping[str, Any]) -> Run:
    """The Run of a mapping. Every mistake is a UserError."""
    if not all(isinstance(k, str) for k in data):
        raise UserError(f"settings must have names, got {next(k for k in data if not isinstance(k, str))!r}")
    try:
        return Run.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(explain(error, Run, "")) from error


def resolved(run: Run) -> dict[str, Any]:
    """The run as plain data, every default written out."""
    return json.loads(run.model_dump_json())


def dump(run: Run) -> str:
    """The run as YAML, every default written out; ``load_run`` of it gives the same run."""
    return yaml.safe_dump(resolved(run), sort_keys=False, allow_unicode=True)


def identity_of(run: Run) -> str:
    """The digest that ties a checkpoint to its run."""
    return checkpoint.identity(resolved(run))


def schema() -> dict[str, Any]:
    """The JSON Schema of a run file, with every plug-in's settings, for completion in an editor."""
    defs: dict[str, Any] = {}
    whole = Run.model_json_schema(ref_template="#/$defs/{model}")
    defs.update(whole.pop("$defs", {}))

    def choice(shelf: str) -> dict[str, Any]:
        options = []
        for name in names(shelf):
            one = load_class(shelf, name).model_json_schema(ref_template="#/$defs/{model}")
            defs.update(one.pop("$defs", {}))
            one["properties"]["name"] = {"const": name}
            one["required"] = sorted({*one.get("required", []), "name"})
            options.append(one)
        elsewhere = {"type": "object", "properties": {"name": {"type": "string", "pattern": ":"}}, "required": ["name"]}
        return {"oneOf": [*options, elsewhere]}

    for field, shelf in (("policy", "policies"), ("prompts", "prompts"), ("algorithm", "algorithms")):
        whole["properties"][field] = choice(shelf)
    rewards = choice("rewards")
    whole["properties"]["rewards"] = {"type": "array", "minItems": 1, "items": rewards}
    if "EvaluateSettings" in defs:
        defs["EvaluateSettings"]["properties"]["rewards"] = {"type": "array", "items": rewards}
    assert set(SHELVES) >= {"policies", "prompts", "algorithms", "rewards"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": defs}


def derived(run: Run) -> dict[str, Any]:
    """What follows from the settings: the numbers that ``rlalign check`` prints."""
    steps = run.samples_per_round * run.plan.steps
    updates = run.learner.updates_per_round * run.learner.epochs
    return {
        "samples per round": run.samples_per_round,
        "units per round": f"{run.units_per_round} of {run.samples_per_unit} samples",
        "denoiser calls per round": steps * (2 if run.plan.guidance != 1.0 else 1),
        "updates per round": updates,
        "samples per update": run.samples_per_round // run.learner.updates_per_round,
        "samples in all": run.samples_per_round * run.rounds,
        "reward queries in all": run.samples_per_round * run.rounds * len(run.rewards),
        "updates in all": updates * run.rounds,
    }
