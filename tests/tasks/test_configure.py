import json
import math
from dataclasses import fields, replace

import pytest

from regdrop.experiments.running.optimisers import check_optimiser
from regdrop.tasks import PRESETS
from regdrop.tasks.configure import change_task, find_task

DIGITS = PRESETS["digits"]


def test_settings_are_checked_together_not_one_by_one():
    # Neither of the two holds beside the preset's other value.
    settings = ["rdrop.num_passes=1", "rdrop.alpha=0"]
    for order in (settings, settings[::-1]):
        assert change_task(DIGITS, settings=order).rdrop.num_passes == 1
    settings = ["training.gradient_accumulation_steps=7", "training.batch_size=21"]
    assert change_task(DIGITS, settings=settings).training.batch_size == 21
    with pytest.raises(ValueError, match="num_passes=1 needs alpha=0"):
        change_task(DIGITS, settings=["rdrop.num_passes=1"])


def test_a_setting_of_the_command_line_comes_after_its_option():
    assert change_task(DIGITS, alpha=2.0, settings=["rdrop.alpha=3"]).rdrop.alpha == 3


def test_a_checkpoint_takes_the_place_of_the_presets_own_model_and_a_line_says_so(caplog):
    changed = change_task(DIGITS, model="folder/of/a/checkpoint")
    assert (changed.model, changed.model_config) == ("folder/of/a/checkpoint", {})
    says = "--model folder/of/a/checkpoint takes the place of the preset's model_config"
    assert [record.getMessage() for record in caplog.records] == [says]
    caplog.clear()
    change_task(PRESETS["minilm-cola"], model="folder/of/a/checkpoint")
    assert not caplog.records


def test_an_alpha_that_nobody_chose_is_chosen_by_name():
    rdrop = change_task(DIGITS, alpha="auto", settings=["rdrop.alpha_rule=stall"]).rdrop
    assert (rdrop.alpha, rdrop.alpha_rule) == ("auto", "stall")
    settings = ["rdrop.alpha_schedule=cosine", "rdrop.alpha_warmup_ratio=0.5"]
    assert change_task(DIGITS, settings=settings).rdrop.alpha_warmup_ratio == 0.5
    assert change_task(DIGITS, settings=["rdrop.alpha=auto"]).rdrop.alpha == "auto"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rdrop.beta=1", "RDropConfig has no setting 'beta'"),
        ("beta=1", "digits has no setting 'beta'"),
        ("beta.x=1", "digits has no setting 'beta'"),
        ("dropout.x=1", "setting 'dropout' has no parts, got x"),
        ("rdrop.alpha=true", "settings alpha=True cannot be: alpha must be a number, got bool"),
        ("alpha", "a setting must be name=value, got 'alpha'"),
        ("training.learning_rte=1", "no setting 'learning_rte'; .* did you mean 'learning_rate'"),
        ("training.max_steps=true", "max_steps must be a whole number, got True"),
        ("training.max_steps=2.5", "max_steps must be a whole number, got 2.5"),
        ("training.learning_rate=NaN", "learning_rate must be a finite number, got nan"),
        ("training.learning_rate=Infinity", "learning_rate must be a finite number, got inf"),
        ("training.weight_decay=-1", "weight_decay must be at least 0, got -1"),
        ("training.label_smoothing=1", "label_smoothing must be below 1, got 1"),
        ("training.mixed_precision=bf61", "mixed_precision must be 'bf16' or 'fp16', got 'bf61'"),
        ("training.average_checkpoints=13", "average_checkpoints must be at most 12, the check"),
        ("training=3", "training has parts, such as training.max_steps, and cannot be 3"),
        ("rdrop=null", "rdrop has parts, such as rdrop.alpha, and cannot be None"),
        ("num_channels=true", "num_channels must be a whole number, got True"),
        ("num_channels=2", "num_channels must be 1 for grey or 3 for RGB, got 2"),
        ("image_size=0", "image_size must be at least 1, got 0"),
        ("dropout=null", "dropout must be a number, got None"),
        ("streaming=0", "streaming must be true or false, got 0"),
        ("augmentation=flpi", "augmentation must be 'none', 'shift', 'flip' or 'crop', got 'flpi'"),
        ("selection_metric=acuracy", "got 'acuracy'; did you mean 'accuracy'"),
        ("model_config=[1]", r"model_config must be an object, got \[1\]"),
        ("name=../x", "name must be letters, digits, .*, got '../x'"),
        ("dataset=", "dataset must be a text that is not empty, got ''"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        change_task(DIGITS, settings=[setting])


def test_every_field_of_every_preset_refuses_what_it_is_not():
    """Objects, lists of objects and, but for options that may be on, true, fit nowhere."""
    for task in {task.family: task for task in PRESETS.values()}.values():
        for holder, prefix in ((task, ""), (task.training, "training.")):
            for field in fields(holder):
                for value in ([{}], True, math.nan):
                    if field.type is bool and value is True:
                        continue
                    with pytest.raises(ValueError, match=field.name):
                        change_task(task, settings=[f"{prefix}{field.name}={json.dumps(value)}"])


def test_data_for_digits_is_refused():
    with pytest.raises(ValueError, match="digits is of scikit-learn's digits and takes no other"):
        change_task(DIGITS, data="somewhere")


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("digts", None, "got 'digts'; did you mean 'digits'"),
        ("translation", "multi30k-de-n", "did you mean 'multi30k-de-en'"),
        ("digits", "ptb", "it takes no preset 'ptb'"),
    ],
)
def test_a_misspelt_preset_is_answered_with_the_nearest(name, preset, message):
    with pytest.raises(ValueError, match=message):
        find_task(name, preset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_troch"}, "got 'adamw_troch'; did you mean 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "got 'cosin'; did you mean 'cosine'"),
        (
            {"optim": "sgd", "optim_args": "momentun=0.9"},
            "takes no option 'momentun' here; did you",
        ),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args must be name=value"),
        ({"optim_args": "momentum=0.9"}, "adamw_torch_fused takes no option 'momentum' here"),
        (
            {"optim_args": "eps=0.5"},
            "'eps' does not reach adamw_torch_fused, which has 1e-08",
        ),
        ({"optim_args": "eps=nan"}, "eps must be a finite number, got nan"),
        ({"optim_args": "betas=0.5"}, "'betas' does not reach adamw_torch_fused"),
        ({"optim": "adafactor", "optim_args": "decay_rate=-0.5"}, "'decay_rate' does not reach"),
        # The Trainer gives each group of weights that of the settings.
        ({"optim": "sgd", "optim_args": "weight_decay=0.5"}, "'weight_decay' does not reach sgd"),
        ({"optim": "sgd", "optim_args": "momentum=7"}, "momentum must be below 1, got 7"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "momentum must be a finite number"),
        ({"optim": "sgd", "optim_args": "momentum=-0.1"}, "momentum=-0.1' cannot be: Invalid"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=perhaps"}, "must be true or false"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "cannot be: Nesterov momentum requires"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,momentum=0.8"}, "each name once"),
        ({"optim": "rmsprop", "optim_args": "alpha=5"}, "alpha must be below 1, got 5"),
        ({"optim": "galore_adamw"}, "training.optim='galore_adamw' cannot be: You need to install"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'cosine_with_min_lr' cannot be: .*min_lr"),
    ],
)
def test_optimisers_and_their_options_are_known(changes, message):
    with pytest.raises(ValueError, match=message):
        check_optimiser(replace(DIGITS.training, **changes))


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("sgd", "momentum=0.9, nesterov=yes"),
        ("rmsprop", "alpha=0.9,centered=true,eps=1e-6"),
        ("adagrad", "lr_decay=0.1"),
    ],
)
def test_options_that_reach_their_optimiser_are_taken(optim, optim_args):
    check_optimiser(replace(DIGITS.training, optim=optim, optim_args=optim_args))


@pytest.mark.parametrize("name", ["digits", "vit-base-cifar100", "wikitext103-adaptive"])
def test_the_optimisers_of_presets_are_known(name):
    check_optimiser(PRESETS[name].training)
