"""The actor that encodes prompts: once for all who ask, the same numbers after it died."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.config import RuntimeSettings
from rlalign.core.registry import UserError, build
from rlalign.networks.random_models import FAMILIES, write_pipeline

pytestmark = [pytest.mark.ray, pytest.mark.promise]
RUNTIME = RuntimeSettings()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    write_pipeline(folder, FAMILIES["flux"], seed=1)
    return folder


def recipe_of(model: Path, **more: Any) -> Any:
    settings = {"name": "flux", "path": str(model), "text_tokens": 16, "embeddings": "actor"}
    return build("policies", {**settings, **more})


def test_it_encodes_once_and_comes_back(ray_cluster: None, model: Path) -> None:
    """References to the same words for all who ask, of a policy's own numbers; an actor that was
    killed gives them again."""
    import ray

    from rlalign.runtime.words import create_encoder, reader_of

    own = recipe_of(model, embeddings="").load("cpu").family
    wanted = own.words(["a red circle"])
    encoder: Any = create_encoder("own", recipe_of(model), RUNTIME)
    reader = reader_of(encoder, RUNTIME)
    assert reader is not None
    try:
        for _ in range(2):
            found = reader("a red circle")
            assert found.keys() == wanted.tensors.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in found)
            first, second = (ray.get(encoder.words.remote("a red circle"))[0] for _ in range(2))
            assert first == second
            os.kill(ray.get(encoder.process_id.remote()), signal.SIGKILL)
    finally:
        ray.kill(encoder)


def test_a_mistake_of_the_users_is_told_to_who_asks(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    from rlalign.runtime.words import create_encoder, reader_of

    encoder: Any = create_encoder("own", recipe_of(tmp_path / "nothing"), RUNTIME)
    reader = reader_of(encoder, RUNTIME)
    assert reader is not None
    try:
        with pytest.raises(UserError, match="there is no folder"):
            reader("a red circle")
    finally:
        ray.kill(encoder)
