"""The commands: what they print, what they write, and how they end."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import rlalign
from rlalign.cli import main
from rlalign.config import load_run
from rlalign.core.registry import SHELVES, names
from rlalign.data.pairs.ranking import encode
from rlalign.report.numbers import number
from tests.runs import CONFIGS, SMALL, final_tensors

QUICKSTART = str(CONFIGS / "quickstart.yaml")
TINY = Path(rlalign.__file__).parent / "assets" / "tiny"
# three steps draw no shapes: that reward would be 0 for every sample, and a run that learns nothing
# tests nothing
ONE_REWARD = ["rewards=[{name: jpeg}]", "evaluate.rewards=[]"]
TWO_ROUNDS = [*SMALL, *ONE_REWARD, "rounds=2", "evaluate.every=0", "checkpoint.every=1"]


@pytest.fixture
def call(capsys):
    """(exit code, stdout, stderr) of a command in this process."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures printed
        code = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def refused(call):
    """The one message of a command that ends with code 2."""

    def run(*arguments: str | Path) -> str:
        code, out, err = call(*arguments)
        assert code == 2, out + err
        assert out == ""
        assert "Traceback" not in err
        last = err.splitlines()[-1]  # diffusers may have shown a bar before it
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of two rounds, and what the command printed."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("cli") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["train", QUICKSTART, *TWO_ROUNDS, "--local", "--out", str(folder)]) == 0
    return folder, printed.getvalue()


# looking


def test_importing_and_listing_need_nothing_heavy():
    code = (
        "import sys, rlalign\n"
        "dir(rlalign)\n"
        "from rlalign.cli import main\n"
        "assert main(['list']) == 0\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'numpy', 'matplotlib', 'scipy'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_list_has_a_line_for_every_plugin(call):
    code, out, _ = call("list")
    assert code == 0
    lines = out.splitlines()
    for shelf in SHELVES:
        assert shelf in lines
        for name in names(shelf):
            assert any(line.startswith(f"{name} ") for line in lines)
    jpeg = next(line for line in lines if line.startswith("jpeg "))
    assert "quality=95" in jpeg
    assert "2305.13301" in jpeg
    shared = "weight=1.0, label='', on_error='raise', at_least=None, units_per_call=1, frames=None"
    assert f"each also takes {shared}" in lines


def test_list_of_one_shelf(call, refused):
    assert call("list", "rewards")[1].splitlines()[0] == "rewards"
    assert refused("list", "reward") == "there is no shelf 'reward'; did you mean 'rewards'?"


def test_schema_prints_a_schema(call):
    code, out, _ = call("schema")
    assert code == 0
    jsonschema.Draft202012Validator(json.loads(out)).validate(
        yaml.safe_load(Path(QUICKSTART).read_text())
    )


def test_check_prints_what_follows(call):
    code, out, _ = call(
        "check",
        QUICKSTART,
        "prompts.per_round=8",
        "prompts.samples_per_prompt=2",
        "learner.shards=2",
    )
    assert code == 0
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert rows["samples per round"].strip() == "16 = 8 prompts x 2"
    policy = load_run(QUICKSTART).policy.load("cpu")
    count = sum(p.numel() for p in policy.network.parameters())
    assert rows["parameters"].strip() == f"{count:,} trained of {count:,} in the denoiser"
    assert rows["Ray reserves"].strip().endswith("; in all 3.25 CPU")
    assert out.splitlines()[-1] == "ok"


def test_check_finds_what_a_run_would_meet(refused, tmp_path):
    assert (
        refused("check", QUICKSTART, "plan.rule=flow_sde")
        == "plan.rule 'flow_sde' needs a flow model, and 'tiny' is not one; use ddim or ddpm"
    )
    assert "cannot import 'no_such_lab'" in refused(
        "check", QUICKSTART, "rewards.0={name: function, call: 'no_such_lab:f'}"
    )
    assert "model_index.json" in refused("check", QUICKSTART, f"policy.path={tmp_path}")
    assert "prompts.path" in refused(
        "check", QUICKSTART, f"prompts={{name: file, path: {tmp_path}/none.txt}}"
    )


def test_pairs_that_cannot_be_learned_from_are_refused_before_anything_starts(refused, tmp_path):
    """By ``check``, by ``train`` with and without Ray, and by ``fit-reward``, in the same words and
    without a folder."""
    file, out = tmp_path / "pairs.parquet", tmp_path / "out"
    blob, count = encode(np.full((3, 32, 32), 9, dtype=np.uint8)), 6
    plain = {"caption": ["a cat"] * count, "jpg_0": [blob] * count, "jpg_1": [blob] * count}
    plain |= {"label_0": [1.0] * count, "label_1": [0.0] * count}
    offline = [str(CONFIGS / "tiny_dpo_offline.yaml"), f"preferences={{path: {file}}}"]
    fit = str(CONFIGS / "fit_tiny_reward.yaml")
    for changes, expected in (
        (
            {"jpg_0": [base64.b64encode(blob).decode()] * count},
            f"{file}: column 'jpg_0' must hold the bytes of picture",
        ),
        ({"label_1": ["0"] * count}, f"{file}: column 'label_1' must hold numbers"),
        (
            {"jpg_1": [blob[:50], *[blob] * (count - 1)]},
            "preferences.bad_share must be >= the share of bad rows, got 0.01",
        ),
    ):
        pq.write_table(pa.table({**plain, **changes}), file)
        messages = {
            refused("check", *offline),
            refused("train", *offline, "--local", "--out", out),
            refused("train", *offline, "--out", out),
            refused("fit-reward", fit, "simulate=null", f"preferences.path={file}", "--out", out),
        }
        assert len(messages) == 1 and messages.pop().startswith(expected)
        assert not out.exists()
    assert not ray_is_started()


def ray_is_started() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def test_pictures_to_edit_are_looked_at_before_anything_starts(refused, call, tmp_path):
    config = str(CONFIGS / "sample_best_of_n.yaml")
    source = tmp_path / "picture.png"
    source.write_bytes(encode(np.full((3, 32, 32), 9, dtype=np.uint8)))
    edit = ["sampler={name: edict, source: [%s], source_prompt: [a red circle]}", "compare=false"]
    assert call("check", config, edit[0] % source, edit[1])[0] == 0
    source.write_bytes(source.read_bytes()[:40])
    for path in (source, tmp_path / "none.png"):
        expected = (
            f"sampler.source: cannot read {str(path)!r} as a picture (",
            f"sampler.source.0 must name a file or folder that is there, got {str(path)!r}",
        )
        for command in ("check", "sample"):
            where = ["--local", "--out", tmp_path / "out"] if command == "sample" else []
            assert refused(command, config, edit[0] % path, edit[1], *where).startswith(expected)
        assert not (tmp_path / "out").exists()


# mistakes on the command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--lokal"], "No such option: --lokal"),
        (["train"], "train needs a run file"),
        (["train", "rounds=3"], "train needs a run file"),
        (["train", "no_such.yaml"], "no_such.yaml: no such file"),
        (["train", QUICKSTART, "rounds"], "an override must read key=value, got 'rounds'"),
        (
            ["train", QUICKSTART, "plan.stepz=3"],
            "plan.stepz: unknown setting; did you mean 'steps'?",
        ),
        (
            ["train", QUICKSTART, "--local", "--address", "auto"],
            "--local and --address exclude each other",
        ),
        (["train", "--resume", "a", "--out", "b"], "--out is for a new run"),
        (
            ["train", "--resume", "no_such_run"],
            "--resume must name a run folder, and 'no_such_run' has no config.yaml",
        ),
        (["check"], "Missing argument 'CONFIG'"),
        (
            ["evaluate", "no_such_model"],
            "a model must be a run folder with a checkpoint, a pipeline folder",
        ),
        (["export", "tiny", QUICKSTART], "is a file and must be a folder; name another folder"),
        (["pretrain", QUICKSTART], "unknown setting"),
    ],
)
def test_a_mistake_is_one_message(refused, arguments, expected):
    assert expected in refused(*arguments)


def test_a_process_ends_with_code_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "rlalign", "list", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: there is no shelf 'nothing'; known: algorithms, limits, optimizers, policies,"
        " prompts, rewards, samplers, sinks\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_no_fault_of_ours(capfd, monkeypatch):
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails again
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["schema"]) == 2
    assert "No space left on device" in capfd.readouterr().err


def test_without_arguments_it_explains_itself(call):
    code, out, _ = call()
    assert code == 0
    for command in (
        "train",
        "pretrain",
        "fit-reward",
        "evaluate",
        "export",
        "random-model",
        "list",
        "check",
        "schema",
    ):
        assert f"\n  {command} " in out
    assert call("--version")[1] == f"rlalign {rlalign.__version__}\n"


# training


def test_train_says_before_after_and_where(run_folder):
    folder, printed = run_folder
    lines = printed.splitlines()
    final = json.loads((folder / "evaluation.json").read_text())
    before, after = (final[side]["reward/jpeg/mean"] for side in ("base", "aligned"))
    assert f"reward jpeg: {number(before)} before, {number(after)} after" in printed
    assert "reward total" not in printed, "of one reward the total says nothing new"
    assert lines[-3] == f"policy: {folder}/policy"
    assert lines[-2].startswith("reward ")
    assert lines[-1] == f"report: {folder}/report.html"
    assert (folder / "report.html").is_file()
    assert len([line for line in lines if line.startswith("round ")]) == 2


def test_a_finished_run_folder_is_not_overwritten(run_folder, refused):
    folder, _ = run_folder
    message = refused("train", QUICKSTART, "--local", "--out", folder)
    assert message.startswith(
        f"{folder} is not empty; go on with: rlalign train --resume {folder}, or "
    )
    assert "--out" in message


@pytest.mark.slow
def test_resume_extends_and_changes_nothing_else(run_folder, call, refused):
    folder, _ = run_folder
    assert "seed must stay 0, got 1: " in refused("train", "--resume", folder, "--local", "seed=1")
    assert refused("train", "--resume", folder, "rounds=1", "--local").startswith(
        "rounds must be >= 2"
    )
    code, out, _ = call("train", "--resume", folder, "rounds=3", "--local")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("round ")] == ["3/3"]
    assert load_run(folder / "config.yaml").rounds == 3


def test_a_fault_in_a_rewards_code_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "cli_faulty.py").write_text(
        "def score(media, prompts):\n    raise KeyError('lexicon')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = "rewards.0={name: function, call: 'cli_faulty:score'}"
    with pytest.raises(KeyError, match="lexicon"):
        main(["train", QUICKSTART, *TWO_ROUNDS, reward, "--local", "--out", str(tmp_path / "run")])


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_gives_up_on_ray_says_why_without_a_traceback(tmp_path):
    (tmp_path / "cli_deadly.py").write_text(
        "import os\n\ndef score(media, prompts):\n    os._exit(7)\n"
    )
    reward = "rewards=[{name: function, call: 'cli_deadly:score'}]"
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "train",
        QUICKSTART,
        *TWO_ROUNDS,
        reward,
        "runtime.max_attempts=2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    # whichever unit meets its second death first
    assert re.search(
        r"^error: reward function of unit evaluate/0/\d+ failed on 2 attempts",
        done.stderr,
        re.MULTILINE,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [["--local"], pytest.param([], marks=[pytest.mark.ray, pytest.mark.slow], id="ray")]
)
def test_ctrl_c_says_how_to_go_on(tmp_path, where):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "train",
        QUICKSTART,
        *SMALL,
        "rounds=500",
        "--out",
        str(folder),
        *where,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines = folder / "metrics.jsonl"
    while not (lines.exists() and lines.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert f"stopped; go on with: rlalign train --resume {folder}" in err
    assert "Traceback" not in err


# models


def test_evaluate_compares_a_run_with_its_base(run_folder, call, tmp_path):
    folder, _ = run_folder
    out = tmp_path / "evaluation"
    code, printed, _ = call("evaluate", folder, "evaluate.rewards=[{name: shapes}]", "--out", out)
    assert code == 0
    assert printed.splitlines()[-1] == f"report: {out}/evaluation.html"
    found, final = (json.loads((f / "evaluation.json").read_text()) for f in (out, folder))
    for key in ("base", "aligned"):  # the run's own prompts and noise, so its own numbers
        assert found[key]["reward/jpeg/mean"] == final[key]["reward/jpeg/mean"]
        assert "held_out/shapes/mean" in found[key]
    assert found["kl/per_step_gaussian"] == pytest.approx(final["kl/per_step_gaussian"], rel=1e-6)
    page = (out / "evaluation.html").read_text()
    assert page.count("<img ") == 2 * 4
    assert "held_out/shapes/mean" in page


@pytest.mark.promise
def test_evaluate_takes_any_two_models(run_folder, call, tmp_path):
    folder, _ = run_folder
    arguments = ["evaluate.prompts=4", "plan.steps=2"]
    code, _, _ = call(
        "evaluate", folder / "policy", *arguments, "--against", "tiny", "--out", tmp_path / "two"
    )
    assert code == 0
    found = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert found["model"] == str(folder / "policy")
    assert found["against"] == "tiny"
    code, _, _ = call(
        "evaluate", "tiny", *arguments, "--config", QUICKSTART, "--out", tmp_path / "one"
    )
    assert code == 0
    alone = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert alone["aligned"] == found["base"]
    assert "win_rate" not in alone
    assert (tmp_path / "one" / "evaluation.html").read_text().count("<img ") == 4


def test_export_writes_what_diffusers_loads(run_folder, call, refused, tmp_path):
    import torch
    from diffusers import DiffusionPipeline

    folder, _ = run_folder
    code, printed, _ = call("export", folder, tmp_path / "policy")
    assert code == 0
    assert "DiffusionPipeline.from_pretrained" in printed
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "policy", local_files_only=True)
    tensors = final_tensors(folder)
    assert all(torch.equal(p, tensors[f"policy/{n}"]) for n, p in pipeline.unet.named_parameters())
    base = DiffusionPipeline.from_pretrained(TINY, local_files_only=True).unet.state_dict()
    assert any(not torch.equal(p, base[n]) for n, p in pipeline.unet.named_parameters()), (
        "the run learnt nothing"
    )
    assert refused("export", folder, tmp_path / "policy").endswith(
        "is not empty; name another folder"
    )


@pytest.mark.slow
def test_export_of_a_lora_is_its_file_or_with_merged_a_whole_pipeline(call, tmp_path):
    import torch
    from diffusers import DiffusionPipeline

    folder = tmp_path / "run"
    settings = [*TWO_ROUNDS, "rounds=1", "policy.lora_rank=2"]
    assert call("train", QUICKSTART, *settings, "--local", "--out", folder)[0] == 0
    code, printed, _ = call("export", folder, tmp_path / "lora")
    assert code == 0
    assert "pipeline.load_lora_weights" in printed
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
    code, printed, _ = call("export", folder, tmp_path / "whole", "--merged")
    assert code == 0
    assert "DiffusionPipeline.from_pretrained" in printed
    merged, base = (
        DiffusionPipeline.from_pretrained(f, local_files_only=True).unet.state_dict()
        for f in (tmp_path / "whole", TINY)
    )
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed
    assert all(re.search(r"\.to_(q|k|v|out\.0)\.weight$", name) for name in changed)


@pytest.mark.promise
def test_pretrain_writes_a_pipeline_that_evaluate_reads(call, tmp_path):
    config = tmp_path / "pretrain.yaml"
    config.write_text(
        "images: 4\nautoencoder: {updates: 1, batch: 2}\ndenoiser: {updates: 1, batch: 2}\n"
    )
    code, printed, _ = call("pretrain", config, "seed=1", "--out", tmp_path / "made")
    assert code == 0
    assert printed.splitlines()[-1] == f"policy: {tmp_path}/made/policy"
    code, _, _ = call(
        "evaluate",
        tmp_path / "made",
        "evaluate.prompts=2",
        "plan.steps=2",
        "--out",
        tmp_path / "out",
    )
    assert code == 0


# the package


def test_every_public_name_has_a_home():
    assert sorted(rlalign._HOMES) == rlalign.__all__
    for name in rlalign.__all__:
        assert getattr(rlalign, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        rlalign.no_such_name  # noqa: B018


def test_the_version_is_the_projects():
    import tomllib

    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())["project"]
    assert rlalign.__version__ == project["version"]
