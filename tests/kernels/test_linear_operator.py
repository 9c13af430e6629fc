"""A linear layer and its loss inside torch.compile: one operator, for any number of items."""

import pytest
import torch

from graphs import count_graphs
from regdrop import linear_rdrop_cross_entropy
from regdrop.kernels import linear_chunks, linear_operator

pytestmark = pytest.mark.slow

OPTIONS = [
    {},
    {"reduction": "none"},
    {"chunk_size": 3, "backward_passes": 1, "label_smoothing": 0.1},
    {"logit_scale": 0.5, "softcap": 3.0, "unlabelled_index": -1},
]


def make(length, dtype=torch.float32, batch=3):
    """Return hidden states of two passes, the target, and a layer's weight and bias."""
    target = torch.randint(0, 11, (batch, length))
    target[:1] = -100
    target[1:, :1] = -1
    tensors = torch.randn(2 * batch, length, 4), torch.randn(11, 4), torch.randn(11)
    return *(x.to(dtype).requires_grad_() for x in tensors), target


def loss_of(hidden, weight, bias, target, **options):
    options = {"alpha": 2.0, "unlabelled_index": -1, **options}
    return linear_rdrop_cross_entropy(2 * hidden, weight, target, bias=bias, **options).loss.sum()


@pytest.mark.parametrize(
    ("options", "dynamic"), [*((options, None) for options in OPTIONS), ({}, True)]
)
def test_lengths_make_one_graph_more(options, dynamic):
    calls = [make(length) for length in (2, 5, 150, 300, 11)]
    found = count_graphs(
        lambda *given: loss_of(*given, **options), calls, fullgraph=True, dynamic=dynamic
    )
    assert found in ([1, 2, 2, 2, 2], [1] * 5)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((options, torch.float32) for options in OPTIONS), (OPTIONS[0], torch.bfloat16)],
)
def test_it_has_the_value_and_the_gradients_of_the_plain_one(options, dtype):
    # Rows that are ignored are products too here, whose sums are rounded elsewhere.
    close = {"rtol": 0.03, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for length in (5, 0, 7):
        given = make(length, dtype)
        found, expected = (function(*given, **options) for function in (compiled, loss_of))
        torch.testing.assert_close(found, expected)
        ours, theirs = (torch.autograd.grad(loss, given[:3]) for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, **close)


def test_only_what_is_wanted_gets_a_gradient():
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    hidden, weight, bias, target = make(5)
    for wanted in (hidden, weight, bias):
        given = [x if x is wanted else x.detach() for x in (hidden, weight, bias)]
        found, expected = (function(*given, target) for function in (compiled, loss_of))
        torch.testing.assert_close(*(torch.autograd.grad(x, wanted) for x in (found, expected)))
    with torch.no_grad():
        torch.testing.assert_close(*(f(hidden, weight, bias, target) for f in (compiled, loss_of)))


def test_it_goes_through_the_items_by_the_same_chunks(monkeypatch):
    seen = []
    compare = linear_chunks._compare

    def noted(products, *rest):
        seen.append(products.shape)
        return compare(products, *rest)

    monkeypatch.setattr(linear_chunks, "_compare", noted)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    *tensors, target = make(300)
    target.clamp_(min=0)  # none that only code that is not compiled leaves out
    sizes = []
    for function in (compiled, loss_of):
        seen.clear()
        function(*tensors, target, chunk_size=256).backward()
        sizes.append([shape[1] for shape in seen])
    assert sizes == [[256, 256, 256, 132]] * 2


def test_the_compiler_is_told_the_shapes_that_come():
    hidden, weight, bias, _ = (x.detach() for x in make(6))
    hidden = hidden.reshape(18, 2, 4).transpose(0, 1)
    classes, ones = torch.randint(0, 11, (18,)), torch.ones(18)
    for wanted in ((True, True, True), (False, True, False)):
        for slopes in ((ones, ones), (ones, None), (None, None)):
            torch.library.opcheck(
                linear_operator._operator,
                (
                    *(hidden, weight, torch.float32, *wanted),
                    *(bias, classes, None, None, 0.1, 1.0, None, 7, "auto", *slopes, 1),
                ),
                test_utils=("test_schema", "test_faketensor"),
            )
