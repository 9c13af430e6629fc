from functools import partial

import pytest
import torch
import torch.nn.functional as F

from regdrop import rdrop_binary_cross_entropy_with_logits, rdrop_cross_entropy, rdrop_mse_loss
from regdrop.alpha_conventions import CONVENTIONS, convert_alpha
from regdrop.loss import combine_terms, ctc_terms

N, CLASSES, VALUE, SMOOTHING = 6, 9, 0.3, 0.1


def losses(name, logits, target):
    """Return the loss as the implementation writes it, and its likelihoods' number."""
    first, second = logits.chunk(2)
    ce = F.cross_entropy(first, target), F.cross_entropy(second, target)
    # Of every element, as F.kl_div(..., reduction="none") gives it.
    kl = torch.stack([kl_elements(first, second), kl_elements(second, first)])
    return {
        "paper": (sum(ce) + VALUE * kl.sum() / N / 2, 2),
        "official-translation": (sum(ce) + VALUE * kl.sum() / N / 2, 2),
        "official-readme": (sum(ce) / 2 + VALUE * kl.sum() / 2, 1),
        "official-bert": (sum(ce) + VALUE * kl.sum() / 2, 2),
        "official-vit": (sum(ce) + VALUE * kl.sum(), 2),
        "paddlenlp": (sum(ce) / 2 + VALUE * kl.sum() / 2, 1),
        "bert4keras": (sum(ce) / 2 + kl.sum(-1).sum(0).mean() / 4 * VALUE, 1),
        "bert4torch": (sum(ce) / 2 + kl.sum(0).mean() / 4 * VALUE, 1),
        "batchmean": (sum(ce) / 2 + VALUE * kl.sum() / N / 2, 1),
        "batchmean-unhalved": (sum(ce) / 2 + VALUE * kl.sum() / N, 1),
        "element-mean": (sum(ce) / 2 + VALUE * (kl[0].mean() + kl[1].mean()) / 2, 1),
    }[name]


def kl_elements(log_q, p):
    return F.kl_div(log_q.log_softmax(-1), p.softmax(-1), reduction="none")


def make(*shape):
    return torch.randn(*shape, dtype=torch.float64)


OF_OTHER_LOSSES = ["fairseq", "multi-label", "regression", "cr-ctc"]  # below


@pytest.mark.parametrize("name", [name for name in CONVENTIONS if name not in OF_OTHER_LOSSES])
def test_the_converted_alpha_gives_the_same_loss(name):
    logits, target = make(2 * N, CLASSES), torch.randint(0, CLASSES, (N,))
    expected, likelihoods = losses(name, logits, target)
    alpha = convert_alpha(VALUE, name, batch_size=N, num_classes=CLASSES)
    scale = "sum" if likelihoods == 2 else "mean"
    found = rdrop_cross_entropy(logits, target, alpha=alpha, scale=scale).loss
    torch.testing.assert_close(found, expected)


def test_fairseq_smooths_over_the_other_classes():
    logits, target = make(2 * N, CLASSES), torch.randint(0, CLASSES, (N,))
    log_p = logits.log_softmax(-1)
    own = -log_p.gather(-1, target.repeat(2)[:, None])[:, 0]
    share = SMOOTHING / (CLASSES - 1)
    nll = (1 - SMOOTHING - share) * own - share * log_p.sum(-1)
    first, second = logits.chunk(2)
    kl = (kl_elements(first, second).sum() + kl_elements(second, first).sum()) / 2
    smoothing = SMOOTHING * CLASSES / (CLASSES - 1)
    alpha = convert_alpha(VALUE, "fairseq")
    options = {"label_smoothing": smoothing, "scale": "sum"}
    found = rdrop_cross_entropy(logits, target, alpha=alpha, **options).loss
    torch.testing.assert_close(found, (nll.sum() + VALUE * kl) / N)


@pytest.mark.parametrize("rows", ["tokens", "sentences"])
def test_batchmean_of_tokens(rows):
    """F.kl_div divides by the first dimension: of (batch, length, classes) by the sentences."""
    length, logits = 4, make(2 * N, 4, CLASSES)
    target = torch.randint(0, CLASSES, (N, length))
    first, second = (z.flatten(0, 1) if rows == "tokens" else z for z in logits.chunk(2))
    ce = F.cross_entropy(logits.flatten(0, 1), target.repeat(2, 1).flatten())
    kl = partial(F.kl_div, reduction="batchmean")
    both = kl(first.log_softmax(-1), second.softmax(-1))
    both = both + kl(second.log_softmax(-1), first.softmax(-1))
    alpha = convert_alpha(VALUE, "batchmean") * (1 if rows == "tokens" else length)
    found = rdrop_cross_entropy(logits, target, alpha=alpha).loss
    torch.testing.assert_close(found, ce + VALUE * both / 2)


def test_multi_label():
    logits, target = make(2 * N, CLASSES), torch.randint(0, 2, (N, CLASSES)).double()
    bce = F.binary_cross_entropy_with_logits(logits, target.repeat(2, 1))
    p = torch.stack([logits.sigmoid(), (-logits).sigmoid()], -1)
    p, q = p.chunk(2)
    kl = (p * (p / q).log() + q * (q / p).log()).sum() / 2 / N
    alpha = convert_alpha(VALUE, "multi-label", num_classes=CLASSES)
    found = rdrop_binary_cross_entropy_with_logits(logits, target, alpha=alpha).loss
    torch.testing.assert_close(found, bce + VALUE * kl)


def test_regression():
    first, second, target = make(3, N)
    mse = (F.mse_loss(first, target) + F.mse_loss(second, target)) / 2
    alpha = convert_alpha(VALUE, "regression")
    found = rdrop_mse_loss(torch.cat([first, second]), target, alpha=alpha).loss
    torch.testing.assert_close(found, mse + VALUE * F.mse_loss(first, second))


def test_cr_ctc_detaches_one_side():
    """Near each other both KLs are one quadratic form, so that each side has half its gradient."""
    frames, once = 8, make(N, 8, CLASSES)
    logits = torch.cat([once, once + 1e-4 * make(N, frames, CLASSES)]).requires_grad_()
    target = torch.randint(1, CLASSES, (N, 3))
    first, second = logits.log_softmax(-1).chunk(2)
    kl = partial(F.kl_div, reduction="sum", log_target=True)
    theirs = VALUE * (kl(first, second.detach()) + kl(second, first.detach())) / 2
    terms = ctc_terms(logits, target, num_passes=2, reduction="sum")
    divergence = terms._replace(nll=torch.zeros_like(terms.nll))

    def ours(alpha):
        return combine_terms(divergence, alpha=alpha, num_passes=2).loss

    alpha = convert_alpha(VALUE, "cr-ctc")
    torch.testing.assert_close(ours(2 * alpha), theirs, rtol=1e-4, atol=0)
    expected, found = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (theirs, ours(alpha))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


def test_tokens_take_the_place_of_the_batch_size():
    assert convert_alpha(0.1, "official-readme", batch_size=4, tokens=100) == pytest.approx(20)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1.0, "keras"), {}, "convention must be one of .* got 'keras'"),
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
