"""Run files: what they mean, and every way in which they can be wrong."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlalign.config import (
    Run,
    dump,
    identity_of,
    load_run,
    load_settings,
    override,
    parse_run,
    parse_yaml,
    resolved,
    schema,
    summarise_run,
)
from rlalign.core.registry import UserError
from rlalign.fitting.denoiser import Pretrain

LEAST = {
    "name": "least",
    "policy": {"name": "tiny"},
    "prompts": {"name": "shapes"},
    "rewards": [{"name": "shapes"}],
    "algorithm": {"name": "ddpo"},
}


def least(*overrides: str) -> Run:
    data = copy.deepcopy(LEAST)
    for one in overrides:
        override(data, one)
    return parse_run(data)


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        least(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# what a run means


def test_defaults_are_enough():
    run = least()
    assert (run.rounds, run.seed, run.plan.steps) == (30, 0, 10)
    assert (run.units_per_round, run.samples_per_unit, run.samples_per_round) == (4, 16, 64)
    assert run.rewards_for("train") == run.rewards


def test_dump_writes_every_default_and_round_trips(file):
    run = least(
        "evaluate.rewards=[{name: jpeg, label: bytes}]",
        "algorithm.clip_range=1e-3",
        "rewards.0.on_error=0.5",
    )
    assert load_run(file(dump(run))) == run
    written = yaml.safe_load(dump(run))
    assert written == resolved(run)
    assert written["learner"]["lr"] == 1e-4
    assert written["evaluate"]["rewards"][0]["quality"] == 95
    assert set(written) == set(Run.model_fields)


def test_held_out_rewards_score_evaluations_only():
    run = least("evaluate.rewards=[{name: jpeg}]")
    assert [r.title for r in run.rewards_for("train")] == ["shapes"]
    assert [r.title for r in run.rewards_for("evaluate")] == ["shapes", "jpeg"]


def test_what_touches_no_weight_keeps_the_identity():
    same = least(
        "rounds=7",
        "runtime.rollout.workers=5",
        "evaluate.prompts=3",
        "checkpoint.every=1",
        "name=other",
    )
    assert identity_of(same) == identity_of(least())
    assert identity_of(least("seed=1")) != identity_of(least())


def test_a_run_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        least().rounds = 3


# overrides


def test_overrides_are_yaml_by_dotted_path(file):
    run = load_run(
        file(yaml.safe_dump(LEAST)),
        ["rounds=5", "rewards.0.weight=2", "learner.lr=3e-4", "plan={steps: 4}"],
    )
    assert (run.rounds, run.rewards[0].weight, run.learner.lr, run.plan.steps) == (5, 2.0, 3e-4, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.5E3", 1500.0), ("-2e2", -200.0), ("1e", "1e"), ("e5", "e5")],
)
def test_exponents_are_numbers(text, value):
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ("rounds", "an override must read key=value, got 'rounds'"),
        ("=3", "an override must read key=value, got '=3'"),
        ("plan..steps=3", "an override must read key=value, got 'plan..steps=3'"),
        (
            "rewards.1.weight=3",
            "override 'rewards.1.weight=3': '1' must be an index from 0 to 0 here",
        ),
        ("rewards.-1=3", "override 'rewards.-1=3': '-1' must be an index from 0 to 0 here"),
        ("name.x=3", "override 'name.x=3': there is no 'x' inside 'least'"),
        (
            "seed=[",
            (
                "override 'seed=[': line 1: not YAML: expected the node content, but found '<stream"
                " end>'"
            ),
        ),
        (
            "seed={a: 1, a: 2}",
            "override 'seed={a: 1, a: 2}': line 1: the key 'a' appears twice; keep one",
        ),
    ],
)
def test_a_wrong_override(one, expected):
    assert refused(one) == expected


def test_an_override_inside_an_empty_list():
    message = refused("rewards=[]", "rewards.0.name=jpeg")
    assert (
        message
        == "override 'rewards.0.name=jpeg': the list is empty and has no '0'; give the whole list"
    )


# mistakes: place, rule, value, way out


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ("plan.steps=0", "plan.steps must be >= 1, got 0"),
        ("plan.step=3", "plan.step: unknown setting; did you mean 'steps'?"),
        ("plan=3", "plan must be a mapping of settings, got 3"),
        (
            "plan.rule=euler",
            (
                "plan.rule must be 'ddim', 'ddpm', 'flow_ode', 'flow_sde', 'flow_dance' or"
                " 'flow_cps', got 'euler'"
            ),
        ),
        ("plan.eta=.nan", "plan.eta must be a finite number, got nan"),
        (
            "learner.optimizer.betas=[0.9, 0.9, 1]",
            "learner.optimizer.betas must hold at most 2, got [0.9, 0.9, 1]",
        ),
        (
            "learner.optimizer={name: adamv}",
            "learner.optimizer.name: no plug-in 'adamv' on shelf optimizers; did you mean 'adamw'?",
        ),
        (
            "learner.optimizer={name: adafactor, betas: [0.8, 0.9]}",
            "learner.optimizer.betas: unknown setting; known: name, weight_decay",
        ),
        (
            "learner.optimizer=3",
            "learner.optimizer must be a mapping with a name, got 3; known: adafactor, adamw,"
            " adamw_8bit",
        ),
        ("learnr.lr=1", "learnr: unknown setting; did you mean 'learner'?"),
        ("name=a b", "name must match ^[A-Za-z0-9][A-Za-z0-9._-]*$, got 'a b'"),
        ("name=../up", "name must match ^[A-Za-z0-9][A-Za-z0-9._-]*$, got '../up'"),
        ("rounds=0", "rounds must be >= 1, got 0"),
        ("rewards=[]", "rewards must hold at least 1, got []"),
        (
            "rewards={name: jpeg}",
            "rewards must be a list of rewards such as [{name: shapes}], got {'name': 'jpeg'}",
        ),
        ("rewards.0=jpeg", "rewards.0 must be a mapping with a name, got 'jpeg'; known: "),
        (
            "rewards.0.name=shape",
            "rewards.0.name: no plug-in 'shape' on shelf rewards; did you mean 'shapes'?",
        ),
        ("rewards.0.wait=2", "rewards.0.wait: unknown setting; did you mean 'weight'?"),
        (
            "rewards.0.on_error=skip",
            "rewards.0.on_error must be 'raise' or 'drop' or a number, got 'skip'",
        ),
        (
            "evaluate.rewards=[{name: jpeg, qualty: 3}]",
            "evaluate.rewards.0.qualty: unknown setting; did you mean",
        ),
        (
            "evaluate.rewards=[{name: shapes}]",
            "rewards: 'shapes' appears twice; give one of them a label of its own",
        ),
        (
            "rewards.0.label=total",
            "a reward's label must be letters, digits, '.', '_' and '-', and not total",
        ),
        (
            "rewards.0.label=a/b",
            "a reward's label must be letters, digits, '.', '_' and '-', and not total",
        ),
        ("algorithm.clip_range=2", "algorithm.clip_range must be < 1, got 2"),
        ("algorithm.min_count=99", "algorithm.min_count must be <= buffer_size (16), got 99"),
        ("algorithm=ddpo", "algorithm must be a mapping with a name, got 'ddpo'; known: "),
        ("policy={name: stable_diffusion}", "policy.path is required"),
        ("prompts.per_unit=3", "prompts.per_unit must divide per_round (16), got 3"),
        ("prompts={name: list, prompts: [1]}", "prompts.prompts.0 must be a valid string, got 1"),
        (
            "learner.updates_per_round=3",
            "learner.updates_per_round must divide the units of a round (4 = ",
        ),
        (
            "runtime.learner.workers=2",
            "learner.shards must be a multiple of runtime.learner.workers (2), got 1",
        ),
        ("runtime.device=tpu", "runtime.device must match "),
        (
            "runtime.rollout.gpus=1.5",
            "runtime.rollout.gpus must be a share of one GPU or a whole number of them, got 1.5",
        ),
        (
            "runtime.learner.gpus=2.25",
            "runtime.learner.gpus must be a share of one GPU or a whole number of them, got 2.",
        ),
        (
            "runtime.reward.gpus=.inf",
            "runtime.reward.gpus must be 0 or a finite number >= 0.0001, got inf",
        ),
        (
            "runtime.reward.cpus=1e-5",
            "runtime.reward.cpus must be 0 or a finite number >= 0.0001, got 1e-05",
        ),
        (
            "runtime.rollout.resources={a: -1}",
            "runtime.rollout.resources must be 0 or a finite number >= 0.0001, got -1",
        ),
        (
            "runtime.reward.resources={GPU: 1}",
            "runtime.reward.resources must have names of their own, got 'GPU'",
        ),
        (
            "algorithm.form=score_function",
            "algorithm.form score_function is strictly on-policy: learner.updates_per",
        ),
    ],
)
def test_a_mistake_is_one_sentence(one, expected):
    assert refused(one).startswith(expected)


@pytest.mark.parametrize("amount", [0, 0.25, 0.75, 1, 2, 8])
def test_gpus_are_shares_of_one_or_whole_ones(amount):
    assert least(f"runtime.rollout.gpus={amount}").runtime.rollout.gpus == amount


def test_rewards_compute_on_the_cpu_unless_they_reserve_gpus():
    assert least("runtime.device=cuda").runtime.reward_device == "cpu"
    assert (
        least("runtime.device=cuda:1", "runtime.reward.gpus=0.5").runtime.reward_device == "cuda:1"
    )
    assert least("runtime.reward.gpus=0.5").runtime.reward_device == "cpu"


def test_the_score_function_takes_no_stale_samples():
    once = ("algorithm.form=score_function", "learner.updates_per_round=1")
    assert least(*once).algorithm.form == "score_function"
    assert "runtime.max_staleness must be 0, got 1" in refused(*once, "runtime.max_staleness=1")


SPREAD = "learner.shard=base"
FLUX = ("policy={name: flux, path: some/flux, lora_rank: 2}", SPREAD)
FULL = ("policy={name: flux, path: some/flux}", "learner.shard=all")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((SPREAD,), "learner.shard base needs a frozen base under an adapter"),
        ((*FLUX, "policy.lora_rank=0"), "learner.shard base needs a frozen base"),
        ((SPREAD, "policy.lora_rank=2"), "learner.shard must be none for policy tiny, whose"),
        (
            (*FLUX, "algorithm={name: reward_backprop, form: refl}"),
            "learner.shard must be none for reward_backprop as it is set",
        ),
        ((*FLUX, "learner.shard=all"), "learner.shard all is for runs that train all weights"),
        ((*FULL, "policy.name=tiny"), "learner.shard must be none for policy tiny, whose"),
        ((*FULL, "learner.optimizer={name: adafactor}"), "learner.optimizer must be adamw with"),
        (
            (*FULL, "policy={name: wan, path: some/wan, trained_experts: high}"),
            "policy.trained_experts must be both with learner.shard all, got 'high'",
        ),
        (("learner.shard=some",), "learner.shard must be "),
    ],
)
def test_a_denoiser_is_spread_where_that_can_be(more, expected):
    assert refused(*more).startswith(expected)


ROLLOUTS = "runtime.rollout.shard=2"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((ROLLOUTS,), "runtime.rollout.shard must be 1 where all weights are trained, got 2"),
        (
            (ROLLOUTS, "policy.lora_rank=2"),
            "runtime.rollout.shard must be 1 for policy tiny, whose",
        ),
        (
            (FLUX[0], ROLLOUTS, "runtime.rollout.gpus=0.5"),
            "runtime.rollout.gpus must be a whole number where shard is above 1",
        ),
        (("runtime.rollout.shard=0",), "runtime.rollout.shard must be >= 1, got 0"),
    ],
)
def test_a_rollout_worker_is_spread_where_that_can_be(more, expected):
    assert refused(*more).startswith(expected)


def test_over_how_many_learners_a_denoiser_is_spread_changes_no_number():
    assert identity_of(least(*FLUX)) == identity_of(least(FLUX[0]))
    assert identity_of(least(FLUX[0], ROLLOUTS)) == identity_of(least(FLUX[0]))
    shared = least(*FLUX, "learner.shards=4", "runtime.learner.workers=4")
    assert identity_of(shared) == identity_of(least(FLUX[0], "learner.shards=4"))


def test_a_run_whose_trained_weights_are_spread_is_the_same_run():
    """Its numbers are so up to rounding, and a run that goes on so says it."""
    assert identity_of(least(*FULL)) == identity_of(least(FULL[0]))


def test_a_missing_setting_is_named():
    with pytest.raises(UserError, match=r"^rewards is required$"):
        parse_run({k: v for k, v in LEAST.items() if k != "rewards"})


def test_a_long_value_is_cut():
    message = refused(f"rounds={'9x' * 5000}")
    assert len(message) < 250
    assert "10002 characters" in message


# files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "must hold a mapping of settings, and is empty"),
        ("# nothing\n", "must hold a mapping of settings, and is empty"),
        ("- a\n- b\n", "must hold a mapping of settings, got a list"),
        ("just words", "must hold a mapping of settings, got a str"),
        ("name: a\nseed: 1\nname: b\n", "line 3: the key 'name' appears twice; keep one"),
        ("name: a\nplan:\n  eta: 1\n  eta: 0\n", "line 4: the key 'eta' appears twice; keep one"),
        ("name: a\nplan: [1, 2\nseed: 3\n", "line 3: not YAML: "),
        ("name: a\n\tseed: 3\n", "line 2: not YAML: "),
        (
            "name: !!python/object:os.system x\n",
            "line 1: not YAML: could not determine a constructor",
        ),
        ("{[1]: 2}", "line 1: not YAML: found unhashable key"),
        ("a: &a {b: *a}", "not YAML: "),
        ("day: 2026-99-99", "not YAML: "),
        ("day: !!timestamp z", "not YAML: a value does not fit its !! tag"),
        ("flag: !!bool z", "not YAML: a value does not fit its !! tag"),
        ("---\na: 1\n---\nb: 2\n", "line 3: not YAML: but found another document"),
        (b"name: \x00", "must be UTF-8 text; line 1 holds a NUL"),
        (b"name: \xff\xfe", "must be UTF-8 text; byte 6 is not"),
        ("1: 2", "settings must have names, got 1"),
    ],
)
def test_a_broken_file_says_where(file, content, expected):
    with pytest.raises(UserError) as caught:
        load_run(file(content))
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_a_byte_order_mark_is_no_part_of_a_run_file(file):
    assert load_run(file("\ufeff" + yaml.safe_dump(LEAST))) == least()
    assert load_run(file("\ufeff" + json.dumps(LEAST))) == least()
    with pytest.raises(UserError, match=r"must be UTF-8 text; it is UTF-16; save it as UTF-8"):
        load_run(file(yaml.safe_dump(LEAST).encode("utf-16")))


@pytest.mark.parametrize(
    "text",
    ["a \U0001f600", "a \U0001f600\U0001f680 b \u00e9", "x\u2028 y\u2029z\x85 w", "a\tb\x7f"],
)
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, "\t"])
def test_json_is_the_text_of_its_standard(file, text, ascii_only, indent):
    """As a run file, as an override, and after the run has written its own config."""
    listed = {"name": "list", "prompts": [text], "held_out_prompts": [text]}
    written = json.dumps({**LEAST, "prompts": listed}, ensure_ascii=ascii_only, indent=indent)
    run = load_run(file(written))
    assert list(run.prompts.pool()) == [text]
    assert (
        least(f"prompts={json.dumps(listed, ensure_ascii=ascii_only, indent=indent)}").prompts
        == run.prompts
    )
    assert least(
        "prompts={name: list}", f"prompts.prompts={json.dumps([text])}"
    ).prompts.pool() == (text,)
    assert load_run(file(dump(run))) == run


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "least", "prompts": {"name": "list", "prompts": [\n"a \\ud83d"]}}',
        'name: least\nprompts: {name: list, prompts: ["a \\ude00\\ud83d"]}\n',
        '"\\ud83d": 1',
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_line(file, content):
    line = content.split("\\u")[0].count("\n") + 1
    with pytest.raises(
        UserError, match=rf"run\.yaml: line {line}: \\u[0-9a-f]+ is half of a surrogate pair"
    ):
        load_run(file(content))
    with pytest.raises(
        UserError, match=r"override '.*': line 1: \\u[0-9a-f]+ is half of a surrogate pair"
    ):
        least('prompts={name: list, prompts: ["a \\ude00\\ud83d"]}')


def test_yaml_keeps_its_own_rules_beside_json():
    assert parse_yaml("a: '\\ud83d'", "here") == {"a": "\\ud83d"}, "single quotes escape nothing"
    assert parse_yaml('{a: "\\ud83d\\ude00", b: 1e-4}', "here") == {"a": "\U0001f600", "b": 1e-4}
    assert parse_yaml('{"a": NaN}', "here") == {"a": "NaN"}, "JSON has no such number"
    with pytest.raises(UserError, match="here: line 2: the key 'a' appears twice"):
        parse_yaml('{"a": 1,\n"a": 2}', "here")


def test_a_missing_file_is_guessed(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match=r"no such file; did you mean '.*quickstart\.yaml'\?"):
        load_run(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_run(tmp_path)


def test_other_settings_load_the_same_way(file):
    assert load_settings(Pretrain, file("images: 5"), ["denoiser.batch=3"]).denoiser.batch == 3
    with pytest.raises(
        UserError, match=r"^denoiser\.bach: unknown setting; did you mean 'batch'\?$"
    ):
        load_settings(Pretrain, file("denoiser: {bach: 5}"))


# whatever is in the file

words = st.sampled_from(
    [
        "name",
        "weight",
        "steps",
        "shapes",
        "jpeg",
        "tiny",
        "ddpo",
        "list",
        "prompts",
        "",
        "on_error",
        "x",
    ]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats()
    | words
    | st.text(max_size=4)
    | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(0, 2), inner, max_size=3)
    ),
    max_leaves=6,
)
paths = st.sampled_from(
    [
        *Run.model_fields,
        *(
            "rewards.0",
            "rewards.0.name",
            "rewards.0.on_error",
            "policy.name",
            "prompts.per_unit",
            "algorithm.form",
        ),
        *(
            "plan.rule",
            "plan.steps",
            "evaluate.rewards",
            "learner.optimizer",
            "learner.optimizer.betas",
            "learner.weight_decay",
            "runtime.device",
            "nonsense",
            "plan.nonsense",
        ),
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(paths, values), min_size=1, max_size=3))
def test_any_value_anywhere_is_a_run_or_one_message(changes):
    data = copy.deepcopy(LEAST)
    try:
        for path, value in changes:
            override(data, f"{path}=0")
            *parents, last = path.split(".")
            place = data
            for part in parents:
                place = place[int(part)] if isinstance(place, list) else place[part]
            place[int(last) if isinstance(place, list) else last] = value
        run = parse_run(data)
    except UserError as error:
        message = str(error)
    else:
        message = "a run"
        assert parse_run(yaml.safe_load(dump(run))) == run
    assert 0 < len(message) < 600


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=60) | st.text("{}[]:,-&*!|>'\"%@`#? \n\tab01", max_size=40).map(str.encode)
)
def test_any_bytes_are_one_message(file, content):
    with pytest.raises(UserError):
        load_run(file(content))


# what follows


def test_derived_numbers():
    found = summarise_run(
        least("evaluate.every=10", "rounds=30", "learner.updates_per_round=2", "learner.epochs=3")
    )
    assert found["samples per round"] == "64 = 16 prompts x 4"
    assert found["units per round"] == "4 of 16 samples"
    assert found["denoiser calls per round"] == "640"
    assert found["updates per round"] == "6 of 32 samples each"
    assert found["passes per update"].startswith("at most 20 of 16")
    assert (
        found["in all"]
        == "30 rounds, 1,920 samples, 19,200 denoiser calls, 1,920 reward queries, 180 updates"
    )
    assert found["evaluations"] == "4 of 64 samples"
    assert summarise_run(least("evaluate.every=0"))["evaluations"] == "2 of 64 samples"


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_the_schema_accepts_what_loads(validator):
    assert validator.is_valid(LEAST)
    assert validator.is_valid({**LEAST, "rewards": [{"name": "my_lab:Sharpness", "radius": 3}]})


@pytest.mark.parametrize(
    "wrong",
    [
        {"nonsense": 1},
        {"rewards": []},
        {"rewards": [{"name": "shapes", "nonsense": 1}]},
        {"rewards": [{"name": "shape"}]},
        {"rewards": [{"weight": 1.0}]},
        {"policy": {"name": "stable_diffusion"}},
        {"evaluate": {"rewards": [{"name": "jpeg", "direction": "up"}]}},
        {"plan": {"steps": 0}},
    ],
)
def test_the_schema_refuses_what_does_not_load(validator, wrong):
    assert not validator.is_valid({**LEAST, **wrong})
    with pytest.raises(UserError):
        parse_run({**LEAST, **wrong})
