"""How far the sub-models of dropout are apart, and from the model that is deployed."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX, check_integer
from regdrop.kernels import whole_tensor
from regdrop.passes import (
    copy_structure,
    forget_converted_weights,
    preserve_buffers,
    preserve_modes,
    preserve_random_state,
    train_without_statistics,
)

# A class that is masked has no probability: so large a number times 0 is 0, and stays finite in
# sums over masks.
_NO_PROBABILITY = -1e30
# Below it sub-models differ by rounding alone.
_ROUNDING = 1e-12
_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """How good the predictions of one model are.

    Attributes:
        nll: Mean negative log-likelihood of the labels, in nats.
        accuracy: Part of the items whose most probable class is their label.
        calibration_error: Expected calibration error: over 15 equal bins of the highest
            probability, the mean distance between it and the accuracy, weighted by items
            (arXiv 1706.04599).
    """

    nll: float
    accuracy: float
    calibration_error: float


@dataclass(frozen=True)
class Disagreement:
    """What the sub-models of some dropout masks predict for the same items.

    P_m is the sub-model of mask m, Pbar the arithmetic mean of all of them, G their normalised
    geometric mean, D the deployed model, which has dropout off. E is the mean over the masks, KLs
    are means over items, in nats.

    Attributes:
        items: Number of items that count.
        num_masks: Number of masks.
        epkl: E KL(P_m || P_m'), over all ordered pairs of masks, also m = m', whose KL is 0. So the
            identities of docs/theory.md hold exactly for the masks that were drawn.
        kl_submodel_mean: E KL(P_m || Pbar), the mutual information of Monte Carlo dropout.
        kl_mean_submodel: E KL(Pbar || P_m).
        kl_submodel_geometric: E KL(P_m || G).
        kl_geometric_submodel: E KL(G || P_m).
        kl_geometric_deployed: KL(G || D).
        kl_mean_deployed: KL(Pbar || D).
        submodel: Predictions of P_m, a mean over the masks.
        mean: Predictions of Pbar, which Monte Carlo dropout gives.
        geometric: Predictions of G.
        deployed: Predictions of D.
    """

    items: int
    num_masks: int
    epkl: float
    kl_submodel_mean: float
    kl_mean_submodel: float
    kl_submodel_geometric: float
    kl_geometric_submodel: float
    kl_geometric_deployed: float
    kl_mean_deployed: float
    submodel: Predictions
    mean: Predictions
    geometric: Predictions
    deployed: Predictions

    @property
    def gap(self) -> float:
        """Return what training with dropout pays above the model that it deploys, in NLL."""
        return self.submodel.nll - self.deployed.nll

    @property
    def kl_of_two_masks(self) -> float:
        """Return the mean KL over pairs of different masks: without bias that of any two.

        A trainer logs it as `kl`.
        """
        return self.epkl * self.num_masks / (self.num_masks - 1)


def measure_disagreement(
    model: nn.Module,
    batches: Iterable[Any],
    num_masks: int = 32,
    *,
    forward: Callable[[Any], Any] | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Disagreement:
    """Measure how far the sub-models of dropout are apart, and from the deployed model.

    Every batch passes with dropout off, then with each mask. All figures come from sums over the
    masks, so that two distributions of a batch are kept, however many masks there are; in float64
    where the device has it. BatchNorm uses its running statistics throughout. Modes, buffers and
    random states are left as they were; the same random state gives the same masks.

    Args:
        model: A classifier of items.
        batches: Pairs (inputs, target), or mappings with "labels", with all of which the model is
            called by name. Targets are class indices, (batch, ...), integers.
        num_masks: Number of masks, at least 2.
        forward: Maps the inputs of a pair to logits (batch, ..., classes), or to an output with
            `logits`; by default the model.
        ignore_index: Label of items that do not count.

    Raises:
        TypeError: For targets that are no class indices, or outputs without logits.
        ValueError: For fewer masks than 2, shapes that do not fit, labels out of range, no item
            that counts, or labels that are not those of the model's logits, as in a causal model,
            which moves them.
    """
    check_integer("num_masks", num_masks, low=2)
    total = _Total(num_masks)
    try:
        with (
            torch.no_grad(),
            preserve_random_state(),
            preserve_buffers(model),
            preserve_modes(model),
        ):
            for batch in batches:
                predict, target = _enter(model, batch, forward)
                counted = target != ignore_index
                labels = target[counted]
                model.eval()
                output = predict()
                deployed = _log_probabilities(output, target, counted, labels)
                if isinstance(batch, Mapping) and not total.items:
                    _check_own_loss(output, deployed, labels)
                train_without_statistics(model)
                masks = (_keeping_buffers(model, predict) for _ in range(num_masks))
                submodels = (_log_probabilities(mask, target, counted, labels) for mask in masks)
                total.add(deployed, submodels, labels)
    finally:
        forget_converted_weights()
    result = total.result()
    if result.epkl < _ROUNDING:
        warnings.warn(
            "all sub-models are the same: the model has no dropout above 0, so that there is "
            "nothing to disagree about (regdrop.find_dropout lists its sources)",
            stacklevel=2,
        )
    return result


class _Total:
    """Sums over items, from which the means are taken at the end."""

    def __init__(self, num_masks: int) -> None:
        self.num_masks = num_masks
        self.items = 0
        self.sums: dict[str, Tensor] = {}
        self.submodel = _Score(num_masks)
        self.mean, self.geometric, self.deployed = _Score(), _Score(), _Score()

    def add(self, deployed: Tensor, submodels: Iterator[Tensor], labels: Tensor) -> None:
        """Add the items of a batch, from log-probabilities (items, classes)."""
        log_mean, log_geometric, kl = self._over_masks(deployed, submodels, labels)
        mean, geometric = log_mean.exp(), log_geometric.exp()
        kl["kl_geometric_deployed"] = _dot(geometric, log_geometric - deployed)
        kl["kl_mean_deployed"] = _dot(mean, log_mean - deployed)
        self.items += len(labels)
        for name, values in kl.items():
            self.sums[name] = self.sums.get(name, 0) + values.sum()
        self.mean.add(log_mean, labels)
        self.geometric.add(log_geometric, labels)
        self.deployed.add(deployed, labels)

    def _over_masks(
        self, like: Tensor, submodels: Iterator[Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return log Pbar, log G and the KLs between them and the sub-models.

        With L the mean of log P_m, H that of sum_v P_m log P_m, and Z the sum of exp(L), so that
        log G = L - log Z: E KL(P_m||Q) = H - sum_v Pbar log Q for any Q, and likewise
        E KL(Q||P_m) = sum_v Q (log Q - L), which is -log Z for G.
        """
        mean, mean_log = torch.zeros_like(like), torch.zeros_like(like)
        negative_entropy = like.new_zeros(len(like))
        for mask, log_p in enumerate(submodels):
            self.submodel.add(log_p, labels, row=mask)
            p = log_p.exp()
            negative_entropy += _dot(p, log_p)
            mean += p
            mean_log += log_p
        mean /= self.num_masks
        mean_log /= self.num_masks
        negative_entropy /= self.num_masks
        log_z = mean_log.logsumexp(-1)
        log_mean = mean.log().clamp(min=_NO_PROBABILITY)
        crossed, own = _dot(mean, mean_log), _dot(mean, log_mean)
        kl = {
            "epkl": negative_entropy - crossed,
            "kl_submodel_mean": negative_entropy - own,
            "kl_mean_submodel": own - crossed,
            "kl_submodel_geometric": negative_entropy - crossed + log_z,
            "kl_geometric_submodel": -log_z,
        }
        return log_mean, mean_log - log_z[:, None], kl

    def result(self) -> Disagreement:
        """Return the means over all items."""
        if not self.items:
            raise ValueError("batches must hold at least one item that counts, got none")
        return Disagreement(
            items=self.items,
            num_masks=self.num_masks,
            **{name: float(value) / self.items for name, value in self.sums.items()},
            submodel=self.submodel.result(self.items),
            mean=self.mean.result(self.items),
            geometric=self.geometric.result(self.items),
            deployed=self.deployed.result(self.items),
        )


class _Score:
    """Likelihood, accuracy and calibration of one or several models, in sums over items."""

    def __init__(self, models: int = 1) -> None:
        # For each model and bin: items' confidence minus correctness, then likelihood and hits.
        self.excess = torch.zeros(models, _BINS, dtype=torch.float64)
        self.nll = torch.zeros((), dtype=torch.float64)
        self.hits = torch.zeros((), dtype=torch.float64)

    def add(self, log_p: Tensor, labels: Tensor, row: int = 0) -> None:
        """Add items from log-probabilities (items, classes) of the model of a row."""
        self.nll -= log_p.gather(-1, labels[:, None]).sum().cpu()
        highest, guess = log_p.max(-1)
        confidence, hit = highest.exp().double().cpu(), (guess == labels).double().cpu()
        self.hits += hit.sum()
        bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
        self.excess[row].index_add_(0, bins, confidence - hit)

    def result(self, items: int) -> Predictions:
        """Return the means over items and models."""
        count = items * len(self.excess)
        return Predictions(
            nll=float(self.nll) / count,
            accuracy=float(self.hits) / count,
            calibration_error=float(self.excess.abs().sum()) / count,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _enter(
    model: nn.Module, batch: Any, forward: Callable[[Any], Any] | None
) -> tuple[Callable[[], Any], Tensor]:
    """Return a function that runs a batch once, and its target."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f'a batch must hold "labels", got {sorted(batch)}')
        if forward is not None:
            raise ValueError("forward needs batches that are pairs (inputs, target), got a mapping")
        target = _checked_target(batch["labels"])
        return (lambda: model(**copy_structure(dict(batch), clones=True))), target
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            "batches must hold pairs (inputs, target) or mappings with labels, got "
            f"{type(batch).__name__}"
        )
    inputs, target = batch
    run = model if forward is None else forward
    return (lambda: run(copy_structure(inputs, clones=True))), _checked_target(target)


def _keeping_buffers(model: nn.Module, predict: Callable[[], Any]) -> Any:
    """Return what a forward in training mode gives, which updates no statistics for the next."""
    with preserve_buffers(model):
        return predict()


def _checked_target(target: Any) -> Tensor:
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        kind = str(target.dtype) if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(
            "a target must hold class indices, an integer tensor (several labels an item and "
            f"numbers are no distribution over classes), got {kind}"
        )
    return target.long()


def _log_probabilities(output: Any, target: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probabilities of the items that count, (items, classes)."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    logits = whole_tensor(getattr(logits, "logits", logits))
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"forward must return logits or an output with logits, got {type(output).__name__}"
        )
    if logits.shape[:-1] != target.shape:
        raise ValueError(
            "logits must be (batch, ..., classes) for a target (batch, ...), classes last; got "
            f"{tuple(logits.shape)} for {tuple(target.shape)}"
        )
    classes = logits.shape[-1]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"target must be from 0 to {classes - 1} or ignore_index, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    # Apple's GPU has no float64.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    return logits[counted].log_softmax(-1, dtype=dtype).clamp_(min=_NO_PROBABILITY)


def _check_own_loss(output: Any, log_p: Tensor, labels: Tensor) -> None:
    """Check on the first batch that the labels are those of the model's logits."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() or not len(labels):
        return
    own, found = float(loss), -float(log_p.gather(-1, labels[:, None]).mean())
    if abs(own - found) > 1e-2 * max(abs(own), abs(found), 1e-2):
        raise ValueError(
            f"the model's own loss must be the cross entropy of its logits and labels, got {own:g} "
            f"and {found:g}: a causal model moves its labels; "
            "regdrop.integrations.transformers.disagreement.measure_model knows how, and pairs "
            "(inputs, target) with forward=... say it"
        )
