"""R-Drop around a loss of sentence-transformers: of a cross-encoder, or of embeddings."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regdrop.config import RDropConfig
from regdrop.integrations import extra
from regdrop.loss import (
    ItemTerms,
    binary_cross_entropy_terms,
    cross_entropy_terms,
    mse_terms,
    symmetric_kl,
)
from regdrop.passes import find_batch_size
from regdrop.schedule import (
    is_part_of_run,
    plan_step,
    refuse_unknown_length,
    refuse_validation_rule,
)
from regdrop.step import rdrop_step

with extra("sentence-transformers"):
    from sentence_transformers.base.losses.merged_forward import embed_columns
    from sentence_transformers.cross_encoder import losses as pair_losses
    from sentence_transformers.sentence_transformer import losses as embedding_losses
    from sentence_transformers.sentence_transformer.losses.adaptive_layer import (
        TransformerDecorator,
    )
    from sentence_transformers.util import batch_to_device
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Where a cross-encoder's loss keeps torch's.
_PAIRS: dict[type[nn.Module], str] = {
    pair_losses.CrossEntropyLoss: "ce_loss",
    pair_losses.BinaryCrossEntropyLoss: "bce_with_logits_loss",
    pair_losses.MSELoss: "loss_fct",
}
_IN_BATCH = (
    embedding_losses.MultipleNegativesRankingLoss,
    embedding_losses.MultipleNegativesSymmetricRankingLoss,
)
# Where a loss keeps the function that compares two columns; None: it is the cosine.
_COMPARED: dict[type[nn.Module], str | None] = {
    embedding_losses.AnglELoss: "similarity_fct",
    embedding_losses.CoSENTLoss: "similarity_fct",
    embedding_losses.ContrastiveLoss: "distance_metric",
    embedding_losses.CosineSimilarityLoss: None,
    embedding_losses.MarginMSELoss: "similarity_fct",
    embedding_losses.OnlineContrastiveLoss: "distance_metric",
    embedding_losses.TripletLoss: "distance_metric",
}


class RDropLoss(nn.Module):
    """A loss of sentence-transformers with R-Drop, in whose place the trainers take it.

    The NLL is the loss. The divergence is that of what the loss reads: the KL of a
    cross-encoder's scores (under `MSELoss` their squared difference), the KL of each pass's own
    softmax over the candidates in the batch, or the squared difference of the similarities of
    pairs. Rows are stacked; those of the other pass are no negatives. Evaluation is the loss's own.
    `MatryoshkaLoss` goes around it, not into it.

    Args:
        loss: Of a CrossEncoder `CrossEntropyLoss`, `BinaryCrossEntropyLoss` or `MSELoss`; of a
            SentenceTransformer `MultipleNegativesRankingLoss`,
            `MultipleNegativesSymmetricRankingLoss`, `AnglELoss`, `CoSENTLoss`, `ContrastiveLoss`,
            `CosineSimilarityLoss`, `MarginMSELoss`, `OnlineContrastiveLoss` or `TripletLoss`.
        alpha: Weight of the divergence, 1 by default.
        rdrop: All options instead of alpha alone. Those that change in the run need
            `trainer.add_callback(FollowSteps(loss))`.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        ValueError: For another loss, or an option of the loss or of `rdrop` that does not act here.

    Attributes:
        step: Optimiser step, counted from 0; None where nobody says it.
        total_steps: Optimiser steps of the whole run.
    """

    def __init__(
        self, loss: nn.Module, alpha: float | None = None, *, rdrop: RDropConfig | None = None
    ) -> None:
        super().__init__()
        if rdrop is None:
            rdrop = RDropConfig(alpha=1.0 if alpha is None else alpha)
        elif not isinstance(rdrop, RDropConfig):
            raise TypeError(f"rdrop must be an RDropConfig, got {type(rdrop).__name__}")
        elif alpha is not None:
            raise ValueError(f"alpha must be given in rdrop where there is one, got alpha={alpha}")
        _check_loss(loss)
        _check_options(rdrop, loss)
        self.loss, self.rdrop = loss, rdrop
        # By this name the trainer finds the model, to put a wrapped one in its place.
        self.model: Any = loss.model
        self.step: int | None = None
        self.total_steps: int | None = None

    def forward(
        self,
        inputs: list[Any],
        labels: Tensor | None = None,
        prompt: str | None = None,
        task: str | None = None,
    ) -> Any:
        """Compute the loss of a batch.

        Args:
            inputs: One entry a column: texts for a cross-encoder, tokens for embeddings.
            labels: The labels, where the loss has some.
            prompt: Of a cross-encoder.
            task: Of a cross-encoder.

        Returns:
            In training a dictionary of numbers, `nll`, `kl`, `alpha` and `rest`: the trainer logs
            each and minimises their sum, which `rest` makes the loss of the step. It can be
            weighed and added up as a loss.

        Raises:
            ValueError: If an option changes in the run and the step is not known, rows cannot be
                stacked, or `AdaptiveLayerLoss` or `Matryoshka2dLoss` is around it.
        """
        _refuse_layers(self.model)
        is_pairs = type(self.loss) in _PAIRS
        options = {"prompt": prompt, "task": task} if is_pairs else {}
        if not self.model.training:
            return self.loss(inputs, labels, **options)
        if self.step is None and _follows_steps(self.rdrop):
            raise ValueError(
                "rdrop has options that change in the run, whose steps a loss does not know: "
                "trainer.add_callback(FollowSteps(loss)), or set loss.step yourself"
            )
        step, total = self.step or 0, self.total_steps
        if total is None and is_part_of_run(self.rdrop):
            refuse_unknown_length(
                self.rdrop, "set loss.total_steps beside loss.step, or add FollowSteps(loss)"
            )
        enter = _enter_pairs if is_pairs else _enter_columns
        entered = enter(self.loss, inputs, labels, **options)
        plan = plan_step(self.rdrop, step, total_steps=total)
        size = find_batch_size(entered.batch[0])
        if plan.num_passes > 1 and self.rdrop.passes == "stacked":
            _check_rows(entered.batch, size)
        loss, nll, kl = rdrop_step(
            entered.forward,
            entered.batch,
            entered.target,
            config=self.rdrop,
            step=step,
            total_steps=total,
            loss=entered.terms,
            batch_size=size,
        )
        return _Parts(loss, nll, kl, torch.full_like(nll, plan.alpha))

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card tells of the loss."""
        return {"loss": type(self.loss).__name__, "rdrop": self.rdrop.to_dict()}


class FollowSteps(TrainerCallback):
    """Tells a loss the optimiser steps, which a schedule of alpha and its like read.

    Args:
        loss: The loss of the trainer that this callback is added to: an `RDropLoss`, another that
            holds some, or several losses by the names of their data.

    Raises:
        TypeError: If there is no `RDropLoss` in it.
    """

    def __init__(self, loss: nn.Module | Mapping[str, nn.Module]) -> None:
        given = list(loss.values()) if isinstance(loss, Mapping) else [loss]
        found = (part for one in given if isinstance(one, nn.Module) for part in one.modules())
        self._losses = [part for part in found if isinstance(part, RDropLoss)]
        if not self._losses:
            names = ", ".join(type(one).__name__ for one in given)
            raise TypeError(f"loss must be or hold an RDropLoss, got {names or loss}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the step."""
        for loss in self._losses:
            loss.step, loss.total_steps = state.global_step, state.max_steps


class _Parts(dict[str, Tensor]):
    """What is logged of a loss, whose values add up to it.

    A loss around it, such as `MatryoshkaLoss`, weighs and adds up what it takes for numbers: the
    terms too are weighed and added up then, and alpha stays as it is.
    """

    def __init__(self, loss: Tensor, nll: Tensor, kl: Tensor, alpha: Tensor) -> None:
        logged = {"nll": nll, "kl": kl, "alpha": alpha}
        super().__init__(logged, rest=loss - torch.stack([*logged.values()]).sum())
        self._loss = loss

    def __mul__(self, weight: Any) -> "_Parts":
        terms = (self._loss * weight, self["nll"] * weight, self["kl"] * weight)
        return _Parts(*terms, self["alpha"])

    __rmul__ = __mul__

    def __add__(self, other: Any) -> "_Parts":
        if not isinstance(other, _Parts):
            return _Parts(self._loss + other, self["nll"], self["kl"], self["alpha"])
        terms = (self._loss + other._loss, self["nll"] + other["nll"], self["kl"] + other["kl"])
        return _Parts(*terms, self["alpha"])

    __radd__ = __add__


class _Entered(NamedTuple):
    """A batch as `rdrop_step` takes it."""

    forward: Callable[[Any], Any]
    batch: list[dict[str, Any]]
    target: Tensor | None
    terms: Callable[..., ItemTerms]


def _enter_pairs(
    loss: Any, inputs: list[list[str]], labels: Any, prompt: str | None, task: str | None
) -> _Entered:
    """Return pairs of texts, tokenised once for all passes."""
    if len(inputs) != 2:
        raise ValueError(
            f"{type(loss).__name__} needs two columns beside the label, got {len(inputs)}"
        )
    pairs = list(zip(*inputs, strict=True))
    tokens = batch_to_device(
        loss.model.preprocess(pairs, prompt=prompt, task=task), loss.model.device
    )
    own = getattr(loss, _PAIRS[type(loss)])
    options: dict[str, Any] = {}
    if isinstance(own, nn.CrossEntropyLoss):
        terms: Callable[..., ItemTerms] = cross_entropy_terms
        options = {"weight": own.weight, "ignore_index": own.ignore_index}
        options["label_smoothing"] = own.label_smoothing
        is_column = not labels.is_floating_point() and labels.dim() == 2 and labels.shape[1] == 1
        target = labels.view(-1) if is_column else labels
    else:
        terms = mse_terms
        if isinstance(own, nn.BCEWithLogitsLoss):
            terms = binary_cross_entropy_terms
            options = {"weight": own.weight, "pos_weight": own.pos_weight}
        target = labels.view(-1).float()
    forward = partial(_score_pairs, loss, flat=terms is not cross_entropy_terms)
    return _Entered(forward, [tokens], target, partial(terms, **options))


def _score_pairs(loss: Any, batch: list[dict[str, Any]], *, flat: bool) -> Tensor:
    scores: Tensor = loss.model(batch[0])["scores"]
    activated: Tensor = loss.activation_fn(scores.view(-1) if flat else scores)
    return activated


def _enter_columns(loss: Any, inputs: list[dict[str, Any]], labels: Any) -> _Entered:
    """Return columns of tokens, which the model turns into embeddings."""
    divergence = _in_batch_kl if isinstance(loss, _IN_BATCH) else _squared_difference
    terms = partial(_embedding_terms, loss, divergence)
    return _Entered(partial(embed_columns, loss.model), list(inputs), labels, terms)


def _embedding_terms(
    loss: Any,
    divergence: Callable[[Any, list[tuple[Tensor, ...]]], Tensor],
    embeddings: list[Tensor],
    labels: Tensor | None,
    /,
    *,
    num_passes: int,
) -> ItemTerms:
    """Return the terms of the whole batch as one item: its rows depend on each other."""
    passes = list(zip(*(column.chunk(num_passes) for column in embeddings), strict=True))
    nll = torch.stack([loss.compute_loss_from_embeddings([*own], labels) for own in passes]).mean()
    kl = torch.zeros_like(nll) if num_passes == 1 else divergence(loss, passes)
    return ItemTerms(nll, kl, torch.ones_like(nll), torch.ones_like(nll))


def _in_batch_kl(loss: Any, passes: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the KL of the softmax over candidates, a mean over rows (and over directions)."""
    scores = [_in_batch_scores(loss, *own) for own in passes]
    kls = [symmetric_kl(torch.cat(own), num_passes=len(own)) for own in zip(*scores, strict=True)]
    return torch.stack(kls).mean()


def _in_batch_scores(loss: Any, queries: Tensor, *documents: Tensor) -> list[Tensor]:
    """Return the logits of each softmax of the loss, (batch, candidates)."""
    scores = [loss.similarity_fct(queries, torch.cat(documents)) * loss.scale]
    if "doc_to_query" in loss.directions:
        scores.append(loss.similarity_fct(queries, documents[0]).T * loss.scale)
    return scores if loss.partition_mode == "per_direction" else [torch.cat(scores, dim=1)]


def _squared_difference(loss: Any, passes: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the squared difference of the similarities of the first column to the others."""
    name = _COMPARED[type(loss)]
    compare = torch.cosine_similarity if name is None else getattr(loss, name)
    values = [torch.stack([compare(own[0], other) for other in own[1:]], 1) for own in passes]
    terms = mse_terms(torch.cat(values), values[0].detach(), num_passes=len(values))
    return terms.kl.mean()


def _check_loss(loss: nn.Module) -> None:
    """Refuse a loss, or an option of it, whose divergence is not known."""
    name, kind = type(loss).__name__, type(loss)
    if name.startswith("Cached") or name == "MegaBatchMarginLoss":
        raise ValueError(
            f"loss must not be {name}: it computes its embeddings twice under one random state and "
            "back-propagates by itself, so that a second pass would be the first one; use the loss "
            "that is not cached, with smaller batches"
        )
    if kind in _PAIRS:
        own = getattr(loss, _PAIRS[kind])
        if own.reduction != "mean":
            raise ValueError(f"reduction of {name} must be 'mean', got {own.reduction!r}")
    elif kind in _IN_BATCH:
        for option, accepted in (("gather_across_devices", False), ("hardness_mode", None)):
            if getattr(loss, option) != accepted:
                raise ValueError(
                    f"{option} of {name} must be {accepted}, got {getattr(loss, option)!r}: the "
                    "divergence is that of the plain softmax over one process's batch"
                )
        others = set(loss.directions) - {"query_to_doc", "doc_to_query"}  # type: ignore[arg-type]
        if others:
            raise ValueError(
                f"directions of {name} must be query_to_doc or doc_to_query, got {sorted(others)}"
            )
    elif kind not in _COMPARED:
        families = (_PAIRS, (*_IN_BATCH, *_COMPARED))
        pairs, columns = (", ".join(sorted(one.__name__ for one in known)) for known in families)
        # Both kinds of model have losses of the same names.
        raise ValueError(
            f"loss must be of a CrossEncoder one of {pairs}, or of a SentenceTransformer one of "
            f"{columns}, got {kind.__module__}.{name}"
        )


def _check_options(rdrop: RDropConfig, loss: nn.Module) -> None:
    """Refuse options that do not act on a loss, before any work is done."""
    refuse_validation_rule(rdrop, "a loss")
    if rdrop.fraction < 1 and type(loss) not in _PAIRS:
        raise ValueError(
            f"fraction must be 1 for {type(loss).__name__}, got {rdrop.fraction}: its rows depend "
            "on each other, so that a part of them has other candidates"
        )
    for option in ("class_weight", "unlabelled_index", "dropout_rates"):
        if getattr(rdrop, option) is not None:
            raise ValueError(f"{option} must be None here, got {getattr(rdrop, option)!r}")
    for option, accepted in (("method", "rdrop"), ("likelihood", "auto"), ("impl", "auto")):
        if getattr(rdrop, option) != accepted:
            raise ValueError(f"{option} must be {accepted!r} here, got {getattr(rdrop, option)!r}")
    if rdrop.fused_linear is True:
        raise ValueError("fused_linear must be 'auto' or False here, got True")


def _refuse_layers(model: nn.Module) -> None:
    """Refuse a loss around R-Drop that reads a batch by layers: it holds them in the batch."""
    forwards = (vars(part).get("forward") for part in model.modules())
    if any(isinstance(forward, TransformerDecorator) for forward in forwards):
        raise ValueError(
            "RDropLoss must not be in AdaptiveLayerLoss or Matryoshka2dLoss, which keep the "
            "outputs of all layers in the batch that they hand over, and R-Drop stacks another: "
            "use MatryoshkaLoss, or RDropLoss without them"
        )


def _follows_steps(rdrop: RDropConfig) -> bool:
    """Return whether a step does other things than the step before it."""
    return (
        rdrop.start_step > 0
        or rdrop.every_n_steps > 1
        or rdrop.alpha == "auto"
        or rdrop.alpha_schedule != "constant"
        or rdrop.monitor_steps is not None
    )


def _check_rows(columns: list[dict[str, Any]], size: int) -> None:
    """Refuse to stack what does not have one row an item, as texts without padding."""
    for column in columns:
        for name, value in column.items():
            is_tensor = isinstance(value, Tensor) and value.dim() > 0
            if is_tensor and value.shape[0] != size and name != "prompt_length":
                raise ValueError(
                    f"passes must be 'sequential' where tokens do not have one row an item: {name} "
                    f"has {value.shape[0]} rows for {size} items"
                )
