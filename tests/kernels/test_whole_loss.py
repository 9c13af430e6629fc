"""One operation for the whole loss: of impl="cpp" alone, and for the tensors that it takes."""

import pytest
import torch

from implementations import WHY_NO_CPP
from regdrop import rdrop_cross_entropy
from regdrop.kernels import cpp_rows, whole_loss

LOGITS = torch.arange(20.0).view(4, 5)
CLASSES = torch.tensor([1, 2])
WEIGHT = torch.ones(5)
OPTIONS = {
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "nll_weight": 1.0,
    "kl_weight": 0.5,
    "is_mean": True,
    "num_passes": 2,
    "backward_passes": 2,
    "inplace": False,
    "largest_divergence": 1e29,
}


class Mine(torch.Tensor):
    pass


@pytest.fixture
def nothing_built(monkeypatch):
    """Fail where the operation would be called, or built for it."""
    monkeypatch.setattr(cpp_rows, "_library", lambda: pytest.fail("the operation was looked for"))


@pytest.mark.parametrize("weight", [None, WEIGHT, WEIGHT.double(), torch.nn.Buffer(WEIGHT)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.slow
@pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)
def test_usual_tensors_take_it(weight, dtype):
    found = whole_loss(LOGITS.to(dtype), CLASSES, weight, **OPTIONS)
    expected = rdrop_cross_entropy(LOGITS.double(), CLASSES, alpha=1.0, impl="eager")
    torch.testing.assert_close(found, tuple(x.to(found[0].dtype) for x in expected))


@pytest.mark.parametrize(
    ("logits", "classes", "weight"),
    [
        (LOGITS, CLASSES.int(), None),
        (LOGITS.t().contiguous().t(), CLASSES, None),
        (LOGITS, torch.tensor([1, 0, 2, 0])[::2], None),
        (torch._neg_view(LOGITS), CLASSES, None),
        (LOGITS.int(), CLASSES, None),
        (LOGITS, CLASSES.float(), None),
        (LOGITS, torch.tensor([1, 2, 3]), None),
        (LOGITS.view(2, 2, 5), CLASSES, None),
        (LOGITS.view(2, 2, 5), CLASSES.view(1, 2).repeat(1, 2)[:, :3], None),
        (LOGITS[:, 0].contiguous(), CLASSES, None),
        (LOGITS, torch.tensor(1), None),
        (LOGITS, CLASSES, WEIGHT[:4]),
        (LOGITS, CLASSES, WEIGHT.view(1, 5)),
    ],
    ids=[
        "int32",
        "logits across",
        "classes apart",
        "negated",
        "integers",
        "numbers",
        "too many",
        "no dimension",
        "another shape",
        "no classes",
        "no batch",
        "too few weights",
        "a row of weights",
    ],
)
@pytest.mark.slow
@pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)
def test_other_tensors_do_not(logits, classes, weight):
    assert whole_loss(logits, classes, weight, **OPTIONS) is None


@pytest.mark.parametrize(
    ("logits", "classes", "weight"),
    [
        (LOGITS.to("meta"), CLASSES, None),
        (LOGITS, CLASSES, WEIGHT.clone().requires_grad_()),
        (LOGITS, CLASSES, WEIGHT.as_subclass(Mine)),
        (LOGITS.as_subclass(Mine), CLASSES, None),
        (LOGITS, CLASSES.as_subclass(Mine), None),
        (LOGITS.tolist(), CLASSES, None),
        (LOGITS, CLASSES.tolist(), None),
    ],
    ids=[
        "another device",
        "weight's gradient",
        "own weight",
        "own logits",
        "own classes",
        "no logits",
        "no classes",
    ],
)
def test_what_is_no_tensor_of_torch_does_not(nothing_built, logits, classes, weight):
    assert whole_loss(logits, classes, weight, **OPTIONS) is None


@pytest.mark.parametrize("impl", ["auto", "chunked", "eager"])
def test_no_other_implementation_takes_it(nothing_built, impl):
    assert rdrop_cross_entropy(LOGITS, CLASSES, alpha=1.0, impl=impl).loss.isfinite()


@pytest.mark.slow
@pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)
def test_forward_mode_does_not():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(LOGITS, torch.ones_like(LOGITS))
        assert whole_loss(dual, CLASSES, None, **OPTIONS) is None
        weight = torch.autograd.forward_ad.make_dual(WEIGHT, torch.ones_like(WEIGHT))
        assert whole_loss(LOGITS, CLASSES, weight, **OPTIONS) is None


@pytest.mark.slow
@pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("classes", [5, 20_000], ids=["small", "large"])
def test_its_second_derivative_is_refused_whichever_way_it_is_asked_for(classes, inplace):
    x = torch.randn(4, classes, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    options = {"alpha": 1.0, "impl": "cpp", "inplace": inplace}
    loss = rdrop_cross_entropy(x * x, CLASSES, **options).loss * scale
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    for wanted in (x, scale):
        with pytest.raises(RuntimeError, match=r"no second derivative; use .* or RDropConfig"):
            torch.autograd.grad(gradient.sum(), wanted, retain_graph=True)
