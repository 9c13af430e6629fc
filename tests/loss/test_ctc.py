"""CTC: the likelihood is torch's, the divergence that of every frame that counts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import reference
from regdrop.loss import combine_terms, count_items, ctc_terms

BATCH, FRAMES, CLASSES = 3, 9, 5
FRAME_LENGTHS = torch.tensor([9, 6, 7])


def make(num_passes=2, dtype=torch.float64, seed=0):
    """Return logits, and targets of lengths 3, 2 and 0, padded by -100."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_passes * BATCH, FRAMES, CLASSES)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.tensor([[1, 1, 3, -100], [4, 2, -100, -100], [-100] * 4])


def plain(logits, target, blank=0, **options):
    """Return torch's loss of one pass, as transformers computes it."""
    kept = (target >= 0) & (target != blank)
    return F.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        target[kept],
        FRAME_LENGTHS,
        kept.sum(-1),
        blank=blank,
        **options,
    )


def slow_kl(logits, num_passes):
    passes = logits.view(num_passes, BATCH, FRAMES, CLASSES).tolist()
    return [
        sum(reference.symmetric_kl([p[n][t] for p in passes]) for t in range(FRAME_LENGTHS[n]))
        for n in range(BATCH)
    ]


@pytest.mark.parametrize("num_passes", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("blank", [0, 4])
def test_both_terms(num_passes, reduction, blank):
    logits, target = make(num_passes)
    options = {"reduction": reduction, "blank": blank}
    terms = ctc_terms(logits, target, num_passes=num_passes, logit_lengths=FRAME_LENGTHS, **options)
    passes = logits.chunk(num_passes)
    expected = sum(plain(z, target, **options) for z in passes) / num_passes
    output = combine_terms(terms, alpha=0.0, num_passes=num_passes)
    torch.testing.assert_close(output.nll, expected)
    divisors = [1, 1, 1]
    if reduction == "mean":
        divisors = [3, 2, 1] if blank == 0 else [3, 1, 1]
    slow = [kl / d for kl, d in zip(slow_kl(logits, num_passes), divisors, strict=True)]
    torch.testing.assert_close(terms.kl, torch.tensor(slow, dtype=torch.float64))
    assert terms.nll.shape == (BATCH,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_counts_are_known_from_the_target(reduction):
    logits, target = make()
    terms = partial(ctc_terms, reduction=reduction, logit_lengths=FRAME_LENGTHS)
    counts, found = count_items(terms, target), terms(logits, target, num_passes=2)
    expected = BATCH if reduction == "mean" else 1
    assert counts.nll.item() == counts.kl.item() == expected
    assert found.nll_count.item() == found.kl_count.item() == expected


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_window_of_batches(reduction):
    """A mean is one over all sequences, sums are averaged over batches, as transformers does."""
    logits, target = make()
    first, second = logits.chunk(2)
    losses, totals = [], 0
    parts = [slice(0, 2), slice(2, 3)]
    bound = partial(ctc_terms, num_passes=2, reduction=reduction)
    for part in parts:
        totals += count_items(bound, target[part]).nll
    for part in parts:
        stacked = torch.cat([first[part], second[part]])
        terms = bound(stacked, target[part], logit_lengths=FRAME_LENGTHS[part])
        losses.append(combine_terms(terms, alpha=1.0, num_passes=2, num_items=totals).loss)
    whole = combine_terms(
        bound(logits, target, logit_lengths=FRAME_LENGTHS), alpha=1.0, num_passes=2
    ).loss
    torch.testing.assert_close(sum(losses), whole if reduction == "mean" else whole / 2)


@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(num_passes, reduction):
    logits, target = make(num_passes)

    def loss(z):
        options = {"logit_lengths": FRAME_LENGTHS, "reduction": reduction}
        terms = ctc_terms(z, target, num_passes=num_passes, **options)
        return combine_terms(terms, alpha=0.7, num_passes=num_passes).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_padding_of_any_kind_changes_nothing():
    logits, target = make()
    expected = ctc_terms(logits, target, num_passes=2, logit_lengths=FRAME_LENGTHS)
    padded = logits.clone()
    for n, length in enumerate(FRAME_LENGTHS):
        padded[[n, n + BATCH], length:] = torch.nan
    more = torch.full((2 * BATCH, 2, CLASSES), torch.nan, dtype=torch.float64)
    padded = torch.cat([padded, more], 1).requires_grad_()
    inside = torch.tensor([[1, -1, 1, 0, 3], [-100, 4, 2, 0, -7], [0, 0, -1, -1, -100]])
    beyond = torch.tensor([[1, 1, 3, 2, 2], [4, 2, 1, 1, 1], [3, 3, 3, 3, 3]])
    lengths = torch.tensor([3, 2, 0])
    marked = torch.tensor([[1, 1, 3, 2], [4, 2, 2, 2], [2, 2, 2, 2]])
    for given, options in (
        (inside, {}),
        (beyond, {"target_lengths": lengths}),
        (marked, {"target_lengths": torch.tensor([3, 3, 4]), "ignore_index": 2}),
    ):
        found = ctc_terms(padded, given, num_passes=2, logit_lengths=FRAME_LENGTHS, **options)
        if "ignore_index" in options:  # the 2 of the second target is padding there
            found = found._replace(nll=found.nll[[0, 2]], kl=found.kl[[0, 2]])
            expected = expected._replace(nll=expected.nll[[0, 2]], kl=expected.kl[[0, 2]])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        (gradient,) = torch.autograd.grad((found.nll + found.kl).sum(), padded)
        for n, length in enumerate(FRAME_LENGTHS):
            assert (gradient[[n, n + BATCH], length:] == 0).all()


def test_all_frames_count_where_no_lengths_are_given():
    logits, target = make()
    found = ctc_terms(logits, target, num_passes=2)
    everywhere = torch.full((BATCH,), FRAMES)
    expected = ctc_terms(logits, target, num_passes=2, logit_lengths=everywhere)
    torch.testing.assert_close(found, expected)


def test_a_target_longer_than_its_frames():
    logits, target = make()
    short = torch.tensor([9, 1, 7])
    infinite = ctc_terms(logits, target, num_passes=2, logit_lengths=short)
    assert infinite.nll.isinf().tolist() == [False, True, False]
    leaf = logits.clone().requires_grad_()
    zero = ctc_terms(leaf, target, num_passes=2, logit_lengths=short, zero_infinity=True)
    assert zero.nll[1].item() == 0
    (zero.nll + zero.kl).sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("num_passes", [2, 3])
def test_a_symbol_of_the_least_finite_number_costs_what_torch_says(num_passes):
    logits = torch.zeros(1, 1, CLASSES)
    logits[..., 1] = torch.finfo(torch.float32).min
    target = torch.tensor([[1]])
    expected = ctc_terms(logits, target, num_passes=1).nll
    assert expected.isfinite().all()
    stacked = logits.repeat(num_passes, 1, 1)
    torch.testing.assert_close(ctc_terms(stacked, target, num_passes=num_passes).nll, expected)


def test_one_backward_pass_is_twice_the_gradient_of_the_first():
    logits, target = make()
    gradients = []
    for backward_passes in (2, 1):
        leaf = logits.clone().requires_grad_()
        terms = ctc_terms(leaf, target, num_passes=2, backward_passes=backward_passes)
        (terms.nll + 0.7 * terms.kl).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1][:BATCH], 2 * gradients[0][:BATCH])
    assert (gradients[1][BATCH:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    logits, target = make(dtype=dtype)
    found = ctc_terms(logits, target, num_passes=2)
    assert found.nll.dtype == found.kl.dtype == torch.float32
    torch.testing.assert_close(found, ctc_terms(logits.float(), target, num_passes=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.randn(6, 5)}, ValueError, "logits must be .* got "),
        ({"logits": torch.randn(3, 9, 5)}, ValueError, "the model saw the batch once"),
        (
            {"target": torch.ones(9, dtype=torch.long)},
            ValueError,
            r"target must be .batch, symbols., padded, got shape \(9,\); of .*pad_sequence",
        ),
        ({"target": [1, 2, 3]}, TypeError, "target must be a tensor, got list"),
        (
            {"logits": torch.randn(9, 6, 5)},
            ValueError,
            r"got shape \(9, 6, 5\): time comes first; give logits\.transpose\(0, 1\)",
        ),
        ({"target": torch.ones(3, 4)}, TypeError, "target must hold class indices"),
        ({"target": torch.full((3, 4), 5)}, ValueError, "from 0 to 4 or padding, got 5"),
        ({"blank": 5}, ValueError, "blank must be a class, 0 to 4, got 5"),
        ({"reduction": "none"}, ValueError, "reduction must be one of"),
        ({"logit_lengths": torch.tensor([9, 9])}, ValueError, "logit_lengths must have one entry"),
        ({"logit_lengths": torch.tensor([9, 10, 9])}, ValueError, "from 0 to 9, got 10"),
        ({"target_lengths": torch.tensor([1, -1, 1])}, ValueError, "from 0 to 4, got -1"),
        ({"logit_lengths": [9, 9, 9]}, TypeError, "logit_lengths must be a tensor of integers"),
        ({"logit_lengths": torch.ones(3)}, TypeError, "got torch.float32"),
    ],
)
def test_bad_input_is_named(change, error, message):
    logits, target = make()
    arguments = {"logits": logits, "target": target, "num_passes": 2} | change
    with pytest.raises(error, match=message):
        ctc_terms(**arguments)


def test_concatenated_targets_are_padded_as_the_message_says():
    logits, target = make()
    lengths = torch.tensor([3, 2, 0])
    flat = torch.tensor([1, 1, 3, 4, 2])
    with pytest.raises(ValueError, match="give torch") as caught:
        ctc_terms(logits, flat, num_passes=2, target_lengths=lengths)
    way_out = str(caught.value).split("give ")[1]
    padded = eval(way_out, {"torch": torch, "target": flat, "target_lengths": lengths})
    found = ctc_terms(logits, padded, num_passes=2)
    torch.testing.assert_close(found, ctc_terms(logits, target, num_passes=2))


@pytest.mark.slow  # imports transformers, whose formula `plain` is
def test_the_likelihood_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(8,),
        conv_kernel=(4,),
        conv_stride=(4,),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=CLASSES,
        pad_token_id=0,
        ctc_zero_infinity=True,
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    sounds, mask = torch.randn(2, 64), torch.ones(2, 64, dtype=torch.long)
    mask[1, 40:] = 0
    labels = torch.tensor([[1, 1, 3], [4, -100, -100]])
    for reduction in ("mean", "sum"):
        model.config.ctc_loss_reduction = reduction
        output = model(sounds, attention_mask=mask, labels=labels)
        lengths = model._get_feat_extract_output_lengths(mask.sum(-1))
        terms = ctc_terms(
            output.logits, labels, num_passes=1, logit_lengths=lengths, reduction=reduction
        )
        torch.testing.assert_close(combine_terms(terms, alpha=0.0, num_passes=1).nll, output.loss)


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_a_batch_without_sequences_costs_nothing(num_passes, reduction, has_lengths):
    logits = torch.randn(0, FRAMES, CLASSES, requires_grad=True)
    lengths = torch.zeros(0, dtype=torch.long) if has_lengths else None
    terms = ctc_terms(
        logits,
        torch.zeros(0, 4, dtype=torch.long),
        num_passes=num_passes,
        logit_lengths=lengths,
        target_lengths=lengths,
        reduction=reduction,
        backward_passes=1,
    )
    assert terms.nll.shape == terms.kl.shape == (0,)
    output = combine_terms(terms, alpha=num_passes - 1.0, num_passes=num_passes)
    output.loss.backward()
    assert output.loss == output.nll == output.kl == 0
    assert logits.grad.shape == logits.shape
