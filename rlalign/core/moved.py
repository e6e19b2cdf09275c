"""The modules' names before they were in rooms: ``import rlalign.registry`` still finds
``rlalign.core.registry``.

For plug-ins and scripts that were written against the earlier layout. Each use warns
(DeprecationWarning) with the name that holds now; the old names go with the release after this one.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NEW_NAMES = {
    "advantages": "algorithms._advantages",
    "arrow": "data.pairs.columns",
    "arrow_types": "data.pairs.types",
    "assemble": "alignment.assemble",
    "batches": "core.batches",
    "checkpoint": "learning.checkpoint",
    "cli.page": "report.evaluation",
    "collect": "alignment.collect",
    "control": "alignment.control",
    "costs": "alignment.costs",
    "critic": "networks.critic",
    "data.pair_rows": "data.pairs.rows",
    "data.preferences": "data.pairs.reader",
    "data.rankings": "data.pairs.ranking",
    "devices": "networks.devices",
    "environment": "alignment.environment",
    "evaluate": "learning.evaluate",
    "finite": "core.finite",
    "fit_reward": "fitting.reward",
    "fit_reward.fitting": "fitting.reward.fitting",
    "fit_reward.losses": "fitting.reward.losses",
    "fit_reward.report": "fitting.reward.report",
    "fit_reward.settings": "fitting.reward.settings",
    "fit_reward.simulate": "fitting.reward.simulate",
    "fit_reward.stage": "fitting.reward.stage",
    "folders": "learning.folders",
    "guard": "learning.guard",
    "http_client": "web.client",
    "http_protocol": "web.protocol",
    "http_token": "web.token",
    "learner": "learning.learner",
    "locations": "core.locations",
    "loop": "alignment.loop",
    "lora": "networks.lora",
    "memory": "algorithms._memory",
    "metrics": "learning.metrics",
    "models": "alignment.models",
    "noisy_classifier": "networks.noisy_classifier",
    "objectives": "algorithms._objectives",
    "particles": "engine.particles",
    "picture_files": "core.media",
    "pictures": "core.pictures",
    "pipelines": "networks.pipelines",
    "pipelines.fitting": "networks.pipelines.fitting",
    "pipelines.loading": "networks.pipelines.loading",
    "pipelines.schedulers": "networks.pipelines.schedulers",
    "precision": "networks.precision",
    "pretrain": "fitting.denoiser",
    "pretrain.classifier": "fitting.denoiser.classifier",
    "pretrain.flow": "fitting.denoiser.flow",
    "pretrain.pipeline": "fitting.denoiser.pipeline",
    "pretrain.run": "fitting.denoiser.run",
    "pretrain.settings": "fitting.denoiser.settings",
    "pretrain.stages": "fitting.denoiser.stages",
    "pretrain.zero_rows": "fitting.denoiser.zero_rows",
    "progress": "core.progress",
    "records": "core.records",
    "registry": "core.registry",
    "runtime.collect": "runtime.training.collect",
    "runtime.coordinator": "runtime.training.coordinator",
    "runtime.dashboard": "runtime.jobs.dashboard",
    "runtime.fleet": "runtime.training.fleet",
    "runtime.http_server": "web.front",
    "runtime.pack": "runtime.jobs.pack",
    "runtime.preferences": "runtime.pairs",
    "runtime.production": "runtime.training.production",
    "runtime.sample": "runtime.sampling",
    "runtime.scaling": "runtime.training.scaling",
    "runtime.serve": "runtime.serving",
    "runtime.supervisor": "runtime.training.supervisor",
    "runtime.train": "runtime.training.train",
    "sample": "sampling",
    "sample.engine": "engine.local",
    "sample.outcome": "sampling.outcome",
    "sample.output": "sampling.output",
    "sample.settings": "sampling.settings",
    "sample.stage": "sampling.compare",
    "stage_checkpoints": "fitting.checkpoints",
    "text_files": "core.files",
    "towers": "networks.towers",
    "work": "engine",
    "work.base": "engine.base",
    "work.chains": "engine.chains",
    "work.pieces": "engine.pieces",
    "work.swarm": "engine.swarm",
}
"""Old name -> new name, both without ``rlalign.``."""


class _Moved(MetaPathFinder, Loader):
    """Gives the module of the new name where one of the old names is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.removeprefix("rlalign.") not in NEW_NAMES:
            return None
        # A package still has to find the modules that it held.
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"rlalign.{NEW_NAMES[spec.name.removeprefix('rlalign.')]}"
        warnings.warn(f"{spec.name} is {new} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        # The import system is about to write the old name's spec into the module that both names
        # share.
        spec.loader_state = module.__spec__, getattr(module, "__path__", None)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__, path = module.__spec__.loader_state
        if path is None:
            del module.__path__


def install() -> None:
    """Lets the old names be imported. Done once, where ``rlalign`` is imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        # before the finder of files, which would find a moved package's modules under both names
        sys.meta_path.insert(0, _Moved())
