import dataclasses
import json
import random
import re

import pytest

from patch_based_ddpm import Config
from patch_based_ddpm.config import DiffusionConfig, ModelConfig, TrainerConfig
from patch_based_ddpm.errors import InputError
from support.commands import ROOT
from support.config_page import PAGE, updated
from support.config_page import SECTIONS as PAGE_SECTIONS

REQUIRED = {"trainer": {"train_dataset_dir": "data", "log_dir": "logs"}, "model": {"dim": 128}}

# Every key of a published config file and the default that the published implementation gives it.
PUBLISHED = {
    "trainer": {
        "train_dataset_dir": "data",
        "log_dir": "logs",
        "ema_decay": 0.995,
        "train_batch_size": 32,
        "train_lr": 1e-4,
        "train_num_steps": 100000,
        "gradient_accumulate_every": 1,
        "use_amp": False,
        "step_start_ema": 2000,
        "update_ema_every": 10,
        "save_and_sample_every": 1000,
        "num_workers": None,
        "seed": 1234,
        "wandb_enabled": False,
        "wandb_project": None,
        "wandb_name": None,
    },
    "model": {
        "dim": 128,
        "init_dim": None,
        "out_dim": None,
        "dim_mults": [1, 2, 4, 8],
        "channels": 3,
        "resnet_block_groups": 8,
        "learned_variance": False,
        "patch_divider": 4,
        "image_size": 128,
    },
    "diffusion": {"timesteps": 1000, "loss_type": "l1", "objective": "pred_noise"},
}

# Our own keys leave a run as the published implementation would do it.
OURS = {
    "trainer": {
        "mixed_precision": None,
        "patch_batch_size": None,
        "horizontal_flip": True,
        "cache_images": False,
        "max_grad_norm": None,
        "lr_warmup_steps": 0,
        "preview_sampler": "ddpm",
        "preview_steps": None,
        "preview_eta": 0.0,
        "preview_order": None,
    },
    "model": {"position_conditioning": True, "global_content_conditioning": True},
}

WRONG = {  # values of every type that is none of the kind's
    "int": [1.5, 2.0, True, "1", [1], {}],
    "float": [True, "1", [0.5], {}],
    "bool": [0, 1, "true", [True], {}],
    "text": [1, True, ["a"], {}],
    "name": [1, True, ["a"], {}],
    "tuple": [1, "1", True, {}, [], [1.0], [True], ["1"], [[1]], [None]],
    "int | pair": [1.5, True, "8", [], [8], [8, 8, 8], [8.0, 8], [True, 8], {}],
}
KINDS = {
    "int": "train_batch_size train_num_steps gradient_accumulate_every step_start_ema update_ema_every "
    "save_and_sample_every num_workers? seed patch_batch_size? lr_warmup_steps max_skipped_steps log_every "
    "preview_count preview_steps? preview_order? dim init_dim? out_dim? channels resnet_block_groups patch_divider "
    "timesteps",
    "float": "ema_decay train_lr max_grad_norm? preview_eta",
    "bool": "use_amp wandb_enabled horizontal_flip cache_images learned_variance position_conditioning "
    "global_content_conditioning",
    "text": "train_dataset_dir log_dir wandb_project? wandb_name?",
    "name": "mixed_precision? on_bad_image preview_sampler loss_type objective",
    "tuple": "dim_mults",
    "int | pair": "image_size",
}
SECTIONS = {"trainer": TrainerConfig, "model": ModelConfig, "diffusion": DiffusionConfig}
SECTION_OF = {field.name: name for name, kind in SECTIONS.items() for field in dataclasses.fields(kind)}


def with_value(key, value, section=None):
    section = section or SECTION_OF[key]
    return REQUIRED | {section: {**REQUIRED.get(section, {}), key: value}}


def refusal(data):
    """The one sentence with which data is refused."""
    with pytest.raises(InputError) as error:
        Config.from_dict(data)
    message = str(error.value)
    assert re.fullmatch(r"[^\n]+[.?]", message)
    assert not re.search(r"[.?!] [A-Z]", message)
    return message


def test_defaults_are_the_published_ones():
    data = Config.from_dict(REQUIRED).to_dict()
    for section, values in PUBLISHED.items():
        assert {key: data[section][key] for key in values} == values


def test_additions_are_off_by_default():
    data = Config.from_dict(REQUIRED).to_dict()
    for section, values in OURS.items():
        assert {key: data[section][key] for key in values} == values


def test_a_published_file_loads(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED))
    assert Config.load(path) == Config.load(str(path)) == Config.from_dict(REQUIRED)


def test_save_and_load_return_the_same(tmp_path, make_config):
    path = tmp_path / "config.json"
    for config in (
        make_config(),
        make_config(
            trainer={"log_dir": 'a "ü"\n', "max_grad_norm": 0.1, "train_lr": 1, "preview_sampler": "ddim"},
            model={"image_size": [8, 24], "dim_mults": [1, 2, 4], "channels": 1},
            diffusion={"objective": "pred_v"},
        ),
    ):
        config.save(path)
        assert Config.load(path) == config
        assert Config.from_dict(config.to_dict()) == config
        assert json.loads(path.read_text(encoding="utf-8")) == config.to_dict()


def test_a_saved_file_states_every_field(tmp_path, make_config):
    make_config().save(tmp_path / "config.json")
    data = json.loads((tmp_path / "config.json").read_text())
    assert {name: set(values) for name, values in data.items()} == {
        name: {field.name for field in dataclasses.fields(kind)} for name, kind in SECTIONS.items()
    }


def test_geometry(make_config):
    model = make_config(model={"image_size": [24, 8], "patch_divider": 2}).model
    assert (model.image_shape, model.patch_shape) == ((24, 8), (12, 4))
    model = make_config(model={"image_size": 16, "patch_divider": 4}).model
    assert (model.image_shape, model.patch_shape) == ((16, 16), (4, 4))


def test_is_frozen(make_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().model.dim = 16


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind, keys in KINDS.items() for key in keys.split()], ids=lambda name: name
)
def test_wrong_types(kind, key):
    name = key.removesuffix("?")
    for value in WRONG[kind] + [None] * (not key.endswith("?")):
        message = refusal(with_value(name, value))
        assert message.startswith(f"{SECTION_OF[name]}.{name} is {json.dumps(value)}; it must be ")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("ema_decay", -0.001, "a number from 0 to 1"),
        ("ema_decay", 1.001, "a number from 0 to 1"),
        ("train_batch_size", 0, "at least 1"),
        ("train_lr", 0, "more than 0"),
        ("train_lr", -1e-4, "more than 0"),
        ("train_num_steps", 0, "at least 1"),
        ("gradient_accumulate_every", 0, "at least 1"),
        ("step_start_ema", -1, "at least 0"),
        ("update_ema_every", 0, "at least 1"),
        ("save_and_sample_every", 0, "at least 1"),
        ("num_workers", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, f"less than {2**63}"),
        ("mixed_precision", "fp8", 'one of "no", "fp16", "bf16"'),
        ("patch_batch_size", 0, "at least 1"),
        ("on_bad_image", "Stop", 'one of "stop", "skip"'),
        ("max_grad_norm", 0, "more than 0"),
        ("lr_warmup_steps", -1, "at least 0"),
        ("max_skipped_steps", 0, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("preview_count", -1, "at least 0"),
        ("preview_steps", 0, "at least 1"),
        ("dim", 2, "even and at least 4"),
        ("init_dim", 0, "from 1 to"),
        ("dim_mults", [1, 0], "from 1 to"),
        ("channels", 2, "1, 3 or 4"),
        ("resnet_block_groups", 0, "at least 1"),
        ("patch_divider", 0, "at least 1"),
        ("image_size", 0, "from 1 to"),
        ("image_size", 65537, "to 65536"),
        ("image_size", [128, -128], "from 1 to"),
        ("timesteps", 1, "from 2 to"),
        ("timesteps", 10**6 + 1, "to 1000000"),
        ("dim", 10**9, "to 1048576"),
        ("dim_mults", [1, 10**9], "to 1048576"),
        ("dim_mults", [1] * 17, "a list of 1 to 16 values, each a whole number"),
        ("dim_mults", [], "a list of 1 to 16 values"),
        ("image_size", [8], "or a list of 2 values, each a whole number"),
        ("halo", 10**9, "to 65536"),
        *((key, "", "non-empty text") for key in ("train_dataset_dir", "log_dir")),
        *((key, "a\0b", "text without NUL characters") for key in KINDS["text"].replace("?", "").split()),
        ("loss_type", "L1", 'one of "l1", "l2", "huber"'),
        ("objective", "pred_eps", 'one of "pred_noise", "pred_x0", "pred_v"'),
    ],
)
def test_out_of_range(key, value, rule):
    message = refusal(with_value(key, value))
    section = SECTION_OF[key]
    start = f"{section}.{key} is {json.dumps(value)}; it must be "
    assert message.startswith(start)
    assert rule in message.removeprefix(start)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ema_decay", 0),
        ("ema_decay", 1),
        ("train_batch_size", 1),
        ("train_lr", 1),
        ("step_start_ema", 0),
        ("num_workers", 0),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("preview_count", 0),
        ("out_dim", 3),
        ("image_size", [64, 32]),
        ("patch_divider", 1),
        ("timesteps", 2),
        ("wandb_name", ""),
    ],
)
def test_the_ends_of_a_range_are_in_it(key, value):
    got = getattr(getattr(Config.from_dict(with_value(key, value)), SECTION_OF[key]), key)
    assert got == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("section", "key", "suggestion"),
    [
        ("trainer", "train_batchsize", "train_batch_size"),
        ("trainer", "ema_dacay", "ema_decay"),
        ("model", "dims_mult", "dim_mults"),
        ("model", "patch_dividers", "patch_divider"),
        ("diffusion", "timestep", "timesteps"),
        ("diffusion", "loss", "loss_type"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(section, key, suggestion):
    assert refusal(with_value(key, 1, section)) == f'{section} has an unknown key "{key}"; did you mean "{suggestion}"?'


def test_unknown_section():
    assert refusal(REQUIRED | {"trainers": {}}) == (
        'the configuration has an unknown key "trainers"; did you mean "trainer"?'
    )
    assert refusal(REQUIRED | {"xyz": 1}) == (
        'the configuration has an unknown key "xyz"; the known ones are trainer, model, diffusion.'
    )


@pytest.mark.parametrize(
    ("section", "key"), [("trainer", "train_dataset_dir"), ("trainer", "log_dir"), ("model", "dim")]
)
def test_required_keys(section, key):
    data = REQUIRED | {section: {name: value for name, value in REQUIRED[section].items() if name != key}}
    assert refusal(data) == f'{section} lacks the required key "{key}".'


@pytest.mark.parametrize("section", ["trainer", "model"])
def test_required_sections(section):
    data = {name: values for name, values in REQUIRED.items() if name != section}
    assert refusal(data) == f'the configuration lacks the required key "{section}".'


def test_the_diffusion_section_may_be_missing():
    assert Config.from_dict(REQUIRED).diffusion == Config.from_dict(REQUIRED | {"diffusion": {}}).diffusion


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_an_object(section):
    assert refusal(REQUIRED | {section: [1]}) == f"{section} is [1]; it must be an object."


@pytest.mark.parametrize(
    ("section", "changes", "parts"),
    [
        ("model", {"learned_variance": True}, ["model.learned_variance is true", "must be false"]),
        ("model", {"out_dim": 6}, ["model.out_dim is 6", "null or channels (3)"]),
        ("model", {"out_dim": 3, "channels": 4}, ["model.out_dim is 3", "null or channels (4)"]),
        ("model", {"dim_mults": [2, 4]}, ["model.dim_mults is [2, 4]", "first value is 1"]),
        ("model", {"dim": 12}, ["model.dim is 12", "multiple of resnet_block_groups (8)"]),
        ("model", {"dim": 15, "resnet_block_groups": 5}, ["model.dim is 15", "must be even"]),
        (
            "model",
            {"patch_divider": 3},
            ["model.patch_divider is 3", "image_size 128", "one of 1, 2, 4, 8, 16,", "multiples of 8 (4 levels)"],
        ),
        (
            "model",
            {"patch_divider": 4, "image_size": [48, 72], "dim_mults": [1, 2, 4]},
            ["model.patch_divider is 4", "image_size [48, 72]", "one of 1, 2, 3, 6,", "multiples of 4 (3 levels)"],
        ),
        ("model", {"halo": 2}, ["model.halo is 2", "4 levels", "a multiple of 4"]),
        ("model", {"halo": -4}, ["model.halo is -4", "from 0 to"]),
        ("model", {"halo": 4, "patch_divider": 1}, ["model.halo is 4", "0 where patch_divider is 1"]),
        ("model", {"image_size": 100}, ["model.image_size is 100", "4 levels", "multiple of 8"]),
        ("model", {"image_size": [64, 100]}, ["model.image_size is [64, 100]", "4 levels", "multiple of 8"]),
        (
            "trainer",
            {"use_amp": True, "mixed_precision": "bf16"},
            ['trainer.mixed_precision is "bf16"', "use_amp is true"],
        ),
        ("trainer", {"use_amp": True, "mixed_precision": "no"}, ['trainer.mixed_precision is "no"', "use_amp is true"]),
        (
            "trainer",
            {"preview_steps": 1001, "preview_sampler": "ddim"},
            ["trainer.preview_steps is 1001", "at most", "1000", "diffusion.timesteps"],
        ),
    ],
)
def test_combinations_that_cannot_be(section, changes, parts):
    message = refusal(REQUIRED | {section: REQUIRED[section] | changes})
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "changes",
    [
        {"use_amp": True, "mixed_precision": "fp16"},
        {"use_amp": True},
        {"preview_steps": 1000},
        {"preview_steps": 50},
        {"preview_steps": 50, "preview_sampler": "dpm-solver++"},
        {"preview_sampler": "dpm-solver++", "preview_eta": 1.0, "preview_order": 3},
        {"preview_sampler": "ddim", "preview_eta": 0.3},
        {"preview_steps": 1000, "preview_sampler": "ddim"},
        {"preview_steps": 1, "preview_sampler": "ddim"},
    ],
)
def test_combinations_that_can_be(changes):
    Config.from_dict(REQUIRED | {"trainer": REQUIRED["trainer"] | changes})


@pytest.mark.parametrize("size", [8, 12, 16, [16, 24], 20])
@pytest.mark.parametrize("mults", [[1], [1, 2], [1, 2, 4]])
def test_exactly_the_suggested_dividers_do(size, mults):
    """What the sentence suggests is what loads, for every divider up to the image's side."""
    height, width = size if isinstance(size, list) else (size, size)
    loads, suggestions = set(), set()
    for divider in range(1, 25):
        model = {"dim": 8, "image_size": size, "dim_mults": mults, "patch_divider": divider}
        try:
            config = Config.from_dict(REQUIRED | {"model": model})
        except InputError as error:
            suggestions.add(re.search(r"must be one of ([\d, ]+), because", str(error)).group(1))
        else:
            loads.add(divider)
            h, w = config.model.patch_shape
            for _ in mults[1:]:
                assert h % 2 == w % 2 == 0
                h, w = h // 2, w // 2
            assert (h * 2 ** (len(mults) - 1) * divider, w * 2 ** (len(mults) - 1) * divider) == (height, width)
    assert suggestions == {", ".join(map(str, sorted(loads)))}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b'{"trainer": 1,}', "is not JSON: .* at line 1, column 1[45]"),
        (b'{\n\n "trainer" 1}', "is not JSON: .* at line 3, column 12"),
        (b'{"trainer": NaN}', "trainer is NaN; it must be an object"),
        (b'{"trainer": {}, "trainer": {}}', 'has the key "trainer" twice'),
        (b'{"trainer": "\xff"}', "cannot be read: 'utf-8' .* position 13: "),
        (b"[" * 200_000, "is nested too deeply"),
        (b"[]", r"the configuration is \[\]; it must be an object"),
        (json.dumps(with_value("dim", 0)).encode(), r"model\.dim is 0; it must be a whole number from 1 to"),
        (
            json.dumps(with_value("dim_mults", [2])).encode(),
            r"model\.dim_mults is \[2\]; it must be a list whose first value is 1",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:12],
)
def test_load_names_the_file(tmp_path, content, complaint):
    path = tmp_path / "some config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {complaint}") as error:
        Config.load(path)
    assert re.fullmatch(r"[^\n]*[^.]\.", str(error.value))


def test_load_of_what_is_no_file(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "missing" / "config.json"):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot be read: .+[^.]\.$"):
            Config.load(path)


def odd_value(chance):
    return chance.choice(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            2,
            3,
            7,
            8,
            64,
            10**30,
            -(10**30),
            10**400,
            0.0,
            0.5,
            -1.5,
            1e300,
            "",
            "ddim",
            "fp16",
            "pred_v",
            "\ud800\0",
            "x" * 200,
            [],
            [1],
            [1, 2],
            [8, 16],
            [1, 2, 4],
            [[1]],
            [None],
            [0, 10**30],
            {},
            {"dim": 8},
        ]
    )


def mutated(data, chance):
    """A copy in which a few keys are changed, added, dropped or moved."""
    data = json.loads(json.dumps(data))
    for _ in range(chance.randint(1, 4)):
        section = chance.choice([*data, None])
        inside = data if section is None or not isinstance(data[section], dict) else data[section]
        key = chance.choice([*inside, *SECTION_OF, "", "ü", "trainer"])
        if chance.random() < 0.2:
            inside.pop(key, None)
        else:
            inside[key] = odd_value(chance)
        if not data:
            break
    return data


def outcome(make, given):
    """Whether it loaded; anything but a configuration or one sentence fails the test."""
    try:
        config = make()
    except Exception as error:
        if isinstance(error, InputError) and re.fullmatch(r"[^\n]+[.?]", str(error)):
            return "refused"
        pytest.fail(f"{type(error).__name__}({error}) for {given!r}")
    assert Config.from_dict(config.to_dict()) == config, given
    return "loaded"


def test_any_data_is_a_config_or_one_sentence():
    chance = random.Random(0)
    start = Config.from_dict(REQUIRED).to_dict()
    outcomes = []
    for _ in range(3000):
        data = mutated(start, chance)
        outcomes.append(outcome(lambda data=data: Config.from_dict(data), data))
    assert outcomes.count("loaded") > 100
    assert outcomes.count("refused") > 1000


def test_any_file_is_a_config_or_one_sentence(tmp_path):
    chance = random.Random(1)
    path = tmp_path / "config.json"
    start = json.dumps(Config.from_dict(REQUIRED).to_dict()).encode()
    outcomes = []
    for _ in range(1200):
        content = bytearray(start)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(content))
            stop = place + chance.choice([0, 1, 1, 5])
            content[place:stop] = chance.choice(
                [b"", b"0", b"9", b"-", b'"', b"{", b"]", b",", b"e5", b"\xff", b"\0", b"null", chance.randbytes(2)]
            )
        path.write_bytes(content)
        outcomes.append(outcome(lambda: Config.load(path), bytes(content)))
    assert outcomes.count("loaded") > 10
    assert outcomes.count("refused") > 600


def test_replace_checks_what_it_is_given(make_config):
    config = make_config()
    with pytest.raises(InputError, match=r"^model\.dim is 2\.5; it must be a whole number from 1 to"):
        dataclasses.replace(config.model, dim=2.5)
    with pytest.raises(InputError, match=r"^model\.patch_divider is 3; it must be one of 1, 2, 4, because"):
        config.model.divided(3)
    with pytest.raises(InputError, match=r'^the configuration has an unknown key "modle"; did you mean "model"\?$'):
        dataclasses.replace(config, modle=config.model)
    assert dataclasses.replace(config, model=config.model) == config


def test_the_page_names_every_key():
    page = PAGE.read_text(encoding="utf-8")
    assert updated(page) == page, "run `PYTHONPATH=.:tests python -m support.config_page`"
    assert page.count("<!-- keys of ") == len(PAGE_SECTIONS)


def test_the_page_shows_the_published_example():
    (example,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert json.loads(example) == json.loads((ROOT / "configs" / "config_patch_divider=4.json").read_text())


def test_the_page_shows_sentences_as_they_are(tmp_path):
    sentences = [line for line in PAGE.read_text(encoding="utf-8").split("\n") if line.startswith("error: my.json: ")]
    refused = [
        refusal(with_value("patch_dividers", 4, "model")),
        refusal(with_value("train_batch_size", "32")),
        refusal(with_value("halo", 3)),
    ]
    assert [f"error: my.json: {sentence}" for sentence in refused] == sentences[:3]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"grids": 3}, "model.grids is 3; it must be 1, 2 or 4."),
        ({"grids": 2, "patch_divider": 1}, "model.grids is 2; it must be 1 where patch_divider is 1."),
        ({"grids": True}, "model.grids is true; it must be a whole number from 1 to 4."),
    ],
)
def test_wrong_grids_are_one_sentence(make_config, model, words):
    with pytest.raises(InputError) as refused:
        make_config(model=model)
    assert str(refused.value) == words
    assert make_config(model={"grids": 2}).model.divided(1).grids == 1
