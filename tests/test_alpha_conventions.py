import pytest
import torch
import torch.nn.functional as F

from regdrop import rdrop_cross_entropy
from regdrop.alpha_conventions import CONVENTIONS, convert_alpha

N, CLASSES, VALUE = 6, 9, 0.3


def losses(name, logits, target):
    """Return the loss as the implementation writes it, and its likelihoods' number."""
    first, second = logits.chunk(2)
    ce = F.cross_entropy(first, target), F.cross_entropy(second, target)
    p, q = logits.log_softmax(-1).chunk(2)
    kl = p.exp() * (p - q) + q.exp() * (q - p)
    return {
        "paper": (sum(ce) + VALUE * kl.sum() / N / 2, 2),
        "official-translation": (sum(ce) + VALUE * kl.sum() / N / 2, 2),
        "official-readme": (sum(ce) / 2 + VALUE * kl.sum() / 2, 1),
        "official-bert": (sum(ce) + VALUE * kl.sum() / 2, 2),
        "official-vit": (sum(ce) + VALUE * kl.sum(), 2),
        "bert4torch": (sum(ce) / 2 + VALUE / 4 * kl.mean(), 1),
    }[name]


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_converted_alpha_gives_the_same_loss(name):
    logits = torch.randn(2 * N, CLASSES, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (N,))
    expected, likelihoods = losses(name, logits, target)
    alpha = convert_alpha(VALUE, name, batch_size=N, num_classes=CLASSES)
    scale = "sum" if likelihoods == 2 else "mean"
    found = rdrop_cross_entropy(logits, target, alpha=alpha, scale=scale).loss
    torch.testing.assert_close(found, expected)


def test_tokens_take_the_place_of_the_batch_size():
    assert convert_alpha(0.1, "official-readme", batch_size=4, tokens=100) == pytest.approx(20)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1.0, "fairseq"), {}, "convention must be one of .* got 'fairseq'"),
        ((1.0, "official-roberta"), {}, "official-roberta has no equivalent"),
        ((1.0, "official-vit"), {}, r"official-vit needs batch_size \(or tokens\)"),
        ((1.0, "bert4torch"), {"batch_size": 3}, "bert4torch needs num_classes"),
        ((1.0, "official-bert"), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ((-1.0, "paper"), {}, "value must be at least 0"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        convert_alpha(*arguments, **options)
