"""R-Drop in TRL's trainers for supervised fine-tuning and for reward models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.config import RDropConfig
from regdrop.heads import Head
from regdrop.integrations import extra
from regdrop.kernels import project
from regdrop.reading import Reading

with extra("trl"):
    import trl
    from trl import RewardTrainer, SFTTrainer

    from regdrop.integrations.transformers import RDropTrainerMixin
    from regdrop.integrations.transformers.internals import missing_attributes, refuse_without
    from regdrop.integrations.transformers.likelihood.divergence import Divergence

# What is used of TRL's trainers that is not their public interface.
INTERNALS: dict[type, tuple[str, ...]] = {
    SFTTrainer: ("_metrics", "_total_train_tokens", "_tp_size"),
    RewardTrainer: ("_metrics", "_total_train_tokens"),
}
# Tokens whose logits are in memory at once for TRL's metrics.
_CHUNK = 1024

_NO_PREFERENCES = (
    "R-Drop has no form for {name}: its loss reads the log-probabilities of whole answers against "
    "those of a reference model without dropout, and its config switches dropout off, so that two "
    "passes are one. Train by RDropSFTTrainer before it, or a reward model by RDropRewardTrainer"
)


def __getattr__(name: str) -> Any:
    """Say why a trainer is not here."""
    if name in ("RDropDPOTrainer", "RDropKTOTrainer"):
        raise ImportError(_NO_PREFERENCES.format(name=name.removeprefix("RDrop")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RDropSFTTrainer(RDropTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`.

    The NLL is that of the answers' tokens, computed by R-Drop from the logits, or from the
    states before the last layer (`fused_linear`); TRL's own head returns log-probabilities of the
    labels alone, which cannot be compared. Its metrics are kept: entropy, token accuracy and
    number of tokens, each of one pass. Evaluation is TRL's.

    Args:
        rdrop: The options; `RDropConfig()` by default.
        args: Everything else is SFTTrainer's.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        ValueError: For a `loss_type` other than "nll", a `compute_loss_func`, or a sequence that is
            split over processes.
    """

    def __init__(self, *args: Any, rdrop: RDropConfig | None = None, **kwargs: Any) -> None:
        refuse_without(missing_attributes(SFTTrainer, INTERNALS[SFTTrainer]), trl)
        super().__init__(*args, rdrop=rdrop, **kwargs)
        loss_type = self.args.loss_type  # type: ignore[attr-defined]
        if loss_type != "nll":
            raise ValueError(
                f"loss_type must be 'nll', got {loss_type!r}: TRL computes others from "
                "the labels' log-probabilities alone, which leave no distributions to compare"
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func must be None: SFTTrainer gives it logits that R-Drop cannot "
                "reach; use regdrop.integrations.transformers.RDropTrainer, which keeps it"
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled):
            raise ValueError(
                "sequences must lie on one process, got sequence or context parallelism: R-Drop "
                "shifts the labels of whole rows"
            )

    def _loss_owner(self) -> str | None:
        # R-Drop computes the NLL of SFTTrainer.compute_loss itself.
        return None

    def _own_source(self, inputs: Mapping[str, Any], is_first: bool = True) -> Any:
        raise ValueError(
            f"the loss of {type(self._unwrapped(self.model)).__name__} is not known, or "
            "likelihood='model' was asked for: SFTTrainer's own loss returns no logits with a "
            "gradient; use regdrop.integrations.transformers.RDropTrainer, or override rdrop_head"
        )

    def _head(self, inputs: Mapping[str, Any]) -> Head:
        return super()._head(_without_cache(inputs))

    def _examine(self, window: Sequence[Mapping[str, Any]]) -> Any:
        return super()._examine([_without_cache(inputs) for inputs in window])

    @torch.no_grad()
    def _note_reading(self, inputs: dict[str, Any], head: Head, reading: Reading) -> None:
        """Note TRL's metrics of pass 0, as its own loss does."""
        gather = self.accelerator.gather_for_metrics
        metrics = self._metrics["train"]
        counted = head.target != IGNORE_INDEX
        states, labels = reading.scores[: head.rows][counted], head.target[counted]
        sums = torch.zeros(2, device=states.device)
        for read, label in zip(states.split(_CHUNK), labels.split(_CHUNK), strict=True):
            logits = read if reading.projection is None else project(read, reading.projection)
            log_p = logits.float().log_softmax(-1)
            entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum()
            sums += torch.stack([entropy, (log_p.argmax(-1) == label).sum().float()])
        mask = inputs.get("attention_mask")
        tokens = inputs["position_ids"].shape[1] if mask is None else mask.sum()
        counts = torch.stack([counted.sum(), torch.as_tensor(tokens, device=states.device)])
        entropy_sum, right = gather(sums[None]).sum(0).tolist()
        valid, tokens = gather(counts[None]).sum(0).tolist()
        metrics["entropy"].append(entropy_sum / max(1, valid))
        metrics["mean_token_accuracy"].append(right / max(1, valid))
        self._total_train_tokens += tokens // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        auxiliary = getattr(reading.output, "aux_loss", None)
        if auxiliary is not None:
            metrics["aux_loss"].append(gather(auxiliary.detach()).mean().item())


class RDropRewardTrainer(RDropTrainerMixin, RewardTrainer):
    """`trl.RewardTrainer` with R-Drop: the same arguments, and `rdrop=RDropConfig(...)`.

    The NLL is TRL's own loss of the pairs, the divergence the Bernoulli KL of their margin:
    a reward alone means nothing. Passes run one after the other. TRL's metrics are means over
    passes.

    Args:
        model: As in RewardTrainer.
        args: As in RewardTrainer, with `disable_dropout=False`.
        rdrop: The options; `RDropConfig()` by default.
        kwargs: Everything else is RewardTrainer's.

    Raises:
        TypeError: If `rdrop` is no RDropConfig.
        ValueError: If dropout is switched off where passes are compared.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *others: Any,
        rdrop: RDropConfig | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_without(missing_attributes(RewardTrainer, INTERNALS[RewardTrainer]), trl)
        is_off = args is None or args.disable_dropout
        is_compared = rdrop is None or getattr(rdrop, "num_passes", 2) > 1
        if is_off and is_compared:
            raise ValueError(
                "disable_dropout must be False in the RewardConfig, got True, its default: without "
                "dropout both passes are the same"
            )
        super().__init__(model, args, *others, rdrop=rdrop, **kwargs)
        self._pass_tokens = 0

    def rdrop_head(self, model: nn.Module, inputs: Mapping[str, Any]) -> Head:
        """Return what is compared: the margin of each pair, whose better rows come first."""
        return Divergence("margins", "logits").head(inputs, rows=inputs["input_ids"].shape[0])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss; with R-Drop in training."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._total_train_tokens += self._pass_tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return result

    def _own_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Any = None
    ) -> tuple[Tensor, Any]:
        # All passes of a batch read the same tokens, which count once.
        tokens = self._total_train_tokens
        result = super()._own_loss(model, inputs, num_items)
        self._pass_tokens, self._total_train_tokens = self._total_train_tokens - tokens, tokens
        return result

    def _own_source(self, inputs: Mapping[str, Any], is_first: bool = True) -> Any:
        with _kept(self._metrics):
            source: Any = super()._own_source(inputs, is_first)
        # TRL takes the first half of the rows for the better answers: stacked rows are others.
        return replace(source, own=replace(source.own, is_rowwise=False))


def _without_cache(inputs: Mapping[str, Any]) -> dict[str, Any]:
    # With a cache the library's models do not tell packed documents apart.
    return {**inputs, "use_cache": False}


@contextmanager
def _kept(metrics: dict[str, Any]) -> Iterator[None]:
    """Leave TRL's metrics as they are while a loss is tried out."""
    kept = deepcopy(metrics)
    try:
        yield
    finally:
        metrics.clear()
        metrics.update(kept)
