"""Every argument of every public function: what is of a wrong kind is refused by its name."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import regdrop
import regdrop.loss
from regdrop import RDropConfig
from regdrop.kernels import Projection
from regdrop.loss import cross_entropy_terms

LOGITS, CLASSES = torch.randn(6, 4), torch.tensor([0, 3, 1])
LABELS, FRAMES = torch.ones(3, 4), torch.randn(4, 9, 6)
HIDDEN, WEIGHT = torch.randn(6, 5), torch.randn(4, 5)
SYMBOLS = torch.tensor([[1, 2, 3], [4, 5, -100]])


def network():
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 4))


def classes(**options):
    return {"logits": LOGITS, "target": CLASSES, **options}


def numbers(**options):
    return {"input": LOGITS, "target": LABELS, **options}


ALPHA, PASSES = {"alpha": 1.0}, {"num_passes": 2}
LAYER = {"hidden": HIDDEN, "target": CLASSES, "projection": Projection(WEIGHT)}
# What works, of every public function that computes something.
ARGUMENTS = {
    "rdrop_cross_entropy": classes(**ALPHA),
    "linear_rdrop_cross_entropy": {"hidden": HIDDEN, "weight": WEIGHT, "target": CLASSES, **ALPHA},
    "rdrop_binary_cross_entropy_with_logits": {"logits": LOGITS, "target": LABELS, **ALPHA},
    "rdrop_mse_loss": numbers(**ALPHA),
    "rdrop_l1_loss": numbers(**ALPHA),
    "rdrop_smooth_l1_loss": numbers(**ALPHA),
    "symmetric_kl": {"logits": LOGITS},
    "cross_entropy_terms": classes(**PASSES),
    "fraternal_terms": classes(**PASSES),
    "binary_cross_entropy_terms": {"logits": LOGITS, "target": LABELS, **PASSES},
    "mse_terms": numbers(**PASSES),
    "l1_terms": numbers(**PASSES),
    "smooth_l1_terms": numbers(**PASSES),
    "ctc_terms": {"logits": FRAMES, "target": SYMBOLS, **PASSES},
    "adaptive_softmax_terms": {
        "hidden": HIDDEN,
        "target": CLASSES,
        "softmax": nn.AdaptiveLogSoftmaxWithLoss(5, 4, [2]),
        **PASSES,
    },
    "linear_cross_entropy_terms": {**LAYER, **PASSES},
    "linear_cross_entropy_loss": {**LAYER, **ALPHA, **PASSES},
    "combine_terms": {"terms": cross_entropy_terms(LOGITS, CLASSES, **PASSES), **ALPHA, **PASSES},
    "rdrop_step": {
        "forward": network(),
        "batch": HIDDEN[:3],
        "target": CLASSES,
        "config": RDropConfig(),
        "step": 0,
    },
    "repeat_batch": {"batch": LOGITS},
    "share_prefix": {"model": network(), "until": "1"},
    "dropout_rates": {"model": network(), "rates": 0.1},
    "find_dropout": {"model": network()},
}
# What they are asked for is the model's or the trainer's own, or looked at by another check.
ELSEWHERE = {"adaptive_log_softmax", "count_items", "is_counted"}
# Where some of what follows is right, or is asked for by other checks.
TAKEN = {
    ("rdrop_step", "batch"),
    ("repeat_batch", "batch"),
    ("adaptive_softmax_terms", "softmax"),
    ("linear_cross_entropy_terms", "projection"),
    ("linear_cross_entropy_loss", "projection"),
}
WRONG = {
    "a string": "a",
    "bytes": b"x",
    "a list": [1, 2],
    "a dictionary": {"a": 1},
    "an object": object(),
    "a complex number": 3 + 0j,
    "a nan": float("nan"),
    "a fraction": -1.5,
    "an array": np.zeros((3, 4, 5, 6)),
    "complex numbers": torch.zeros(3, 4, dtype=torch.cfloat),
    "another shape": torch.zeros(3, 4, 5, 6, 7),
    "none": None,
}
RIGHT = {
    ("linear_rdrop_cross_entropy", "logit_scale", "a fraction"),
    ("share_prefix", "check_every", "none"),
    ("share_prefix", "shared", "a string"),
    ("share_prefix", "shared", "a dictionary"),
}
KINDS = [
    (function, argument, kind)
    for function, given in ARGUMENTS.items()
    for argument, parameter in inspect.signature(
        getattr(regdrop, function, None) or getattr(regdrop.loss, function)
    ).parameters.items()
    if (function, argument) not in TAKEN
    for kind, value in WRONG.items()
    if not (value is None and parameter.default is None) and (function, argument, kind) not in RIGHT
]


def call(function, arguments):
    found = getattr(regdrop, function, None) or getattr(regdrop.loss, function)
    parameters = inspect.signature(found).parameters.values()
    first = [arguments.pop(p.name) for p in parameters if p.kind == p.POSITIONAL_ONLY]
    result = found(*first, **arguments)
    if function == "dropout_rates":
        with result:
            pass


def test_every_public_function_is_here():
    names = {
        name
        for module in (regdrop, regdrop.loss)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    assert names - ELSEWHERE == set(ARGUMENTS)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_what_is_right_is_taken(function):
    call(function, dict(ARGUMENTS[function]))


@pytest.mark.parametrize(("function", "argument", "kind"), KINDS)
def test_what_is_wrong_is_refused_by_its_name(function, argument, kind):
    value = WRONG[kind]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(function, {**ARGUMENTS[function], argument: value})
    assert argument in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RDropCrossEntropyLoss", {"ignore_index": 1.5}),
        ("RDropCrossEntropyLoss", {"class_dim": None}),
        ("RDropCrossEntropyLoss", {"inplace": "yes"}),
        ("RDropCrossEntropyLoss", {"impl": "cuda"}),
        ("RDropCrossEntropyLoss", {"weight": [1.0, 2.0]}),
        ("RDropBCEWithLogitsLoss", {"pos_weight": 3.0}),
        ("RDropBCEWithLogitsLoss", {"weight": torch.zeros(4, dtype=torch.cfloat)}),
    ],
)
def test_a_module_refuses_before_the_first_step(name, options):
    (argument,) = options
    with pytest.raises((TypeError, ValueError), match=argument):
        getattr(regdrop, name)(1.0, **options)


CONTROLLERS = [
    (argument, kind)
    for argument in inspect.signature(regdrop.AlphaController).parameters
    for kind in WRONG
    if (argument, kind) not in {("alpha_max", "none"), ("alpha_start", "none")}
]


@pytest.mark.parametrize(("argument", "kind"), CONTROLLERS)
def test_a_controller_refuses_what_is_wrong_by_its_name(argument, kind):
    with pytest.raises((TypeError, ValueError), match=f"{argument} must be"):
        regdrop.AlphaController(**{"total_steps": 9, argument: WRONG[kind]})


@pytest.mark.parametrize("argument", ["alpha_max", "alpha_min", "alpha_start", "total_steps"])
def test_true_is_no_number_of_a_controller(argument):
    with pytest.raises(TypeError, match=f"{argument} must be an? (number|integer), got bool"):
        regdrop.AlphaController(**{"total_steps": 9, argument: True})


@pytest.mark.parametrize("argument", ["step", "nll", "kl", "validation_loss"])
@pytest.mark.parametrize("value", ["a", [1.0], 1j, torch.zeros(3)], ids=str)
def test_what_a_controller_is_told_is_refused_by_its_name(argument, value):
    controller = regdrop.AlphaController(9, rule="gap")
    with pytest.raises((TypeError, ValueError), match=f"{argument} must be"):
        controller.update(**{"step": 0, argument: value})


NUMPY = {
    "rdrop_cross_entropy": ["alpha", "num_passes", "backward_passes", "ignore_index", "class_dim"],
    "linear_rdrop_cross_entropy": ["num_passes", "softcap", "logit_scale", "chunk_size"],
    "rdrop_smooth_l1_loss": ["alpha", "beta", "num_items", "num_passes", "backward_passes"],
    "symmetric_kl": ["num_passes"],
    "ctc_terms": ["num_passes", "blank", "ignore_index"],
    "adaptive_softmax_terms": ["num_passes", "chunk_size", "backward_passes"],
    "rdrop_step": ["step", "total_steps", "alpha"],
    "repeat_batch": ["num_passes"],
}
INTEGERS = {"chunk_size": 3, "num_passes": 2, "backward_passes": 1, "class_dim": 1, "step": 3}
REALS = {"alpha": 0.5, "beta": 0.5, "softcap": 4.0, "logit_scale": 0.5, "num_items": 8.0}


@pytest.mark.parametrize(
    ("function", "argument"), [(name, each) for name, all_ in NUMPY.items() for each in all_]
)
def test_a_number_of_numpy_is_one(function, argument):
    def run(value):
        torch.manual_seed(0)
        found = getattr(regdrop, function, None) or getattr(regdrop.loss, function)
        return found(**{**ARGUMENTS[function], argument: value})

    if argument in REALS:
        value, number = np.float32(REALS[argument]), REALS[argument]
    else:
        number = INTEGERS.get(argument, 3)
        value = np.int64(number)
    torch.testing.assert_close(run(value), run(number), rtol=0, atol=0)


def test_terms_of_ones_own_are_terms():
    def pair(outputs, target, *, num_passes):
        return outputs.sum(), outputs.sum()

    with pytest.raises(TypeError, match=r"loss must return regdrop\.loss\.ItemTerms, got tuple"):
        regdrop.rdrop_step(**{**ARGUMENTS["rdrop_step"], "loss": pair})


@pytest.mark.parametrize("batch", [LOGITS, {"x": LOGITS, "n": 2}, [np.zeros(4)], ("a", [LOGITS])])
def test_a_batch_size_that_is_nowhere_is_refused(batch):
    with pytest.raises(ValueError, match="batch_size=7 is the size of nothing in the batch"):
        regdrop.repeat_batch(batch, batch_size=7)
    assert regdrop.repeat_batch({"names": ["a", "b"]}, batch_size=2) == {"names": ["a", "b"] * 2}
