"""Checks of the arguments that the losses share: errors name the argument and what it was."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from regdrop.arguments import check_alpha, check_integer, check_number
from regdrop.kernels import is_distributed
from regdrop.loss.output import Reduction, Scale
from regdrop.tracing import can_read, is_transformed

REDUCTIONS, _SCALES = get_args(Reduction), get_args(Scale)
# Above this, which a difference of logits by a billion gives, a divergence is that of a mask.
LARGEST_DIVERGENCE = 1e9
# How far from 0 to 1 a probability may be by rounding, such as that of a mixture in half precision.
_ROUNDING = 1e-2
_INFINITE_DIVERGENCE = (
    "the KL is infinite: logits hold -inf (or finfo.min, or a difference beyond float32) for a "
    "class in one pass and not in another; a mask must be the same in every pass"
)

_NO_CHANCE = (
    "target must be between 0 and 1, got {}; leave padding and missing labels out by a mask, such "
    "as mask=target >= 0 (of rdrop_step by loss=functools.partial("
    "regdrop.loss.binary_cross_entropy_terms, mask=target >= 0))"
)

_OF_ONE_LOGIT = (
    "for a yes or no of one logit take rdrop_binary_cross_entropy_with_logits, of rdrop_step "
    "loss='binary_cross_entropy', and for its divergence alone "
    "regdrop.loss.binary_cross_entropy_terms(logits, target, num_passes=2).kl"
)


def check_options(
    *,
    alpha: float,
    num_passes: int,
    reduction: str,
    scale: str,
    backward_passes: int | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Raise ValueError or TypeError for an option that is out of range."""
    check_alpha(alpha)
    check_passes(num_passes, backward_passes)
    if num_passes == 1 and alpha != 0:
        raise ValueError(
            f"num_passes must be at least 2 for alpha={alpha} (one pass has nothing to be "
            f"compared with), got {num_passes}"
        )
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("scale", scale, _SCALES)
    check_label_smoothing(label_smoothing)


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise ValueError unless the argument is one of some names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise for a label smoothing out of range."""
    check_number("label_smoothing", label_smoothing, low=0, high=1)


def check_passes(num_passes: int, backward_passes: int | None) -> None:
    """Raise for numbers of passes that are no integers, or not those of any passes."""
    check_integer("num_passes", num_passes, low=1)
    if backward_passes is not None:
        check_integer("backward_passes", backward_passes)
        if not 1 <= backward_passes <= num_passes:
            raise ValueError(
                f"backward_passes must be None or from 1 to num_passes={num_passes}, "
                f"got {backward_passes}"
            )


def check_counts(reduction: str, **counts: Tensor | float | None) -> None:
    """Raise for a denominator that is not positive, not a scalar, or unused by the reduction.

    A tensor may be 0: that is the count of a window in which nothing counts. Its value is checked
    on the CPU.
    """
    for name, count in counts.items():
        if count is None:
            continue
        if reduction != "mean":
            raise ValueError(f"{name} is only used with reduction='mean', got {reduction!r}")
        if isinstance(count, Tensor):
            if count.numel() != 1:
                raise ValueError(f"{name} must be a scalar, got shape {tuple(count.shape)}")
            if can_read(count.device) and not 0 <= count.item() < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {count.item()}")
            continue
        check_number(name, count, above=0)


def check_tensor(name: str, given: Any) -> None:
    """Raise TypeError unless the argument is a tensor, and say which of its own it may be."""
    if not isinstance(given, Tensor):
        place = place_of_tensor(given)
        way_out = "" if place is None else f"; take one of its tensors, as {name}{place}"
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}{way_out}")


def place_of_tensor(given: Any) -> str | None:
    """Return where in a mapping or a sequence its first tensor is, in brackets; None without."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(given, Mapping):
        items = given.items()
    elif isinstance(given, (tuple, list)):
        items = enumerate(given)
    return next((f"[{key!r}]" for key, item in items if isinstance(item, Tensor)), None)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the argument is a floating-point tensor."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor; of tensors that are jagged alike give "
            f"{name}.values() and target.values()"
        )


def check_real(name: str, tensor: Tensor | None) -> None:
    """Raise TypeError unless the argument is None or a tensor of real numbers."""
    if tensor is None:
        return
    check_tensor(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")


def check_indices(target: Tensor, advice: str = "") -> None:
    """Raise TypeError for a target that cannot hold class indices."""
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices, got {target.dtype}{advice}")


def check_class_weight(name: str, weight: Tensor | None, num_classes: int) -> None:
    """Raise unless the argument is None or one number a class, without a gradient."""
    check_real(name, weight)
    if weight is None:
        return
    if weight.requires_grad:
        raise ValueError(f"{name} must not require a gradient, got one that does; detach it")
    if tuple(weight.shape) != (num_classes,):
        raise ValueError(
            f"{name} must have one entry a class, shape ({num_classes},), got {tuple(weight.shape)}"
        )


def check_plain(
    name: str,
    tensor: Any,
    advice: str = "rdrop_cross_entropy and symmetric_kl alone take one, for logits",
) -> None:
    """Raise TypeError for a DTensor, which only the losses of classes take."""
    if is_distributed(tensor):
        raise TypeError(f"{name} must be a plain tensor, got a DTensor; {advice}")


def check_stacked(name: str, stacked: Tensor, target: Tensor, num_passes: int) -> None:
    """Raise unless the first dimension of `stacked` is num_passes times that of the target."""
    check_tensor("target", target)
    if stacked.dim() == 0 or target.dim() == 0:
        raise ValueError(
            f"{name} and target need a batch dimension, got shapes {tuple(stacked.shape)} "
            f"and {tuple(target.shape)}"
        )
    if stacked.shape[0] == num_passes * target.shape[0]:
        return
    is_time_first = (
        stacked.dim() > 2
        and target.dim() > 1
        and stacked.shape[:2] == (target.shape[0], num_passes * target.shape[1])
    )
    if is_time_first:
        raise ValueError(
            f"{name} must hold num_passes={num_passes} times the items of target along the first "
            f"dimension, got shapes {tuple(stacked.shape)} and {tuple(target.shape)}: time comes "
            f"first; give {name}.transpose(0, 1) and target.transpose(0, 1)"
        )
    if num_passes > 1 and stacked.shape[0] == target.shape[0]:
        raise ValueError(
            f"{name} must hold num_passes={num_passes} times the items of target, got "
            f"{stacked.shape[0]} rows for {target.shape[0]} targets: either target was stacked "
            f"too (pass the original one), or the model saw the batch once (use repeat_batch)"
        )
    raise ValueError(
        f"{name} must hold num_passes={num_passes} times the items of target, got "
        f"{stacked.shape[0]} rows for {target.shape[0]} targets"
    )


def check_class_dim(name: str, logits: Tensor, class_dim: int) -> None:
    """Raise unless the logits have a dimension of classes behind that of the batch."""
    check_integer("class_dim", class_dim)
    if logits.dim() < 2:
        raise ValueError(
            f"{name} must be (num_passes * batch, ..., classes), got shape {tuple(logits.shape)}"
        )
    if not -logits.dim() < class_dim < logits.dim() or class_dim == 0:
        raise ValueError(
            f"class_dim must name a dimension of {name} behind the batch, 1 to {logits.dim() - 1} "
            f"or -1 to {1 - logits.dim()}, got {class_dim} for shape {tuple(logits.shape)}"
        )


def check_several_classes(logits: Tensor, class_dim: int, num_passes: int) -> None:
    """Raise ValueError for logits of one class, whose softmax is 1 and whose KL is exactly 0.

    One item alone may have one class: the last batch of a contrastive loss may be a single pair.
    """
    if logits.shape[class_dim] == 1 and logits.numel() > num_passes:
        raise ValueError(
            f"logits must have more than one class, got shape {tuple(logits.shape)} with "
            f"class_dim={class_dim}; {_OF_ONE_LOGIT}"
        )


def check_sums(target: Tensor, class_dim: int) -> None:
    """Raise ValueError on the CPU for probabilities whose classes are in dimension 1.

    The shape does not tell; they sum to 1 there and not along the last dimension.
    """
    is_last = class_dim % target.dim() == target.dim() - 1
    if not is_last or target.dim() < 3 or not can_read(target.device) or not target.numel():
        return
    if _sums_to_1(target[:1], -1):
        return
    if _sums_to_1(target, 1):
        raise ValueError(
            f"target holds class probabilities along dimension 1 (they sum to 1 there, and not "
            f"along the last), got shape {tuple(target.shape)} with class_dim={class_dim}; "
            f"pass class_dim=1"
        )


def _sums_to_1(target: Tensor, dim: int) -> bool:
    sums = target.detach().sum(dim, dtype=torch.float64)
    return bool(((sums - 1).abs() < 1e-2).all())


def check_probabilities(target: Tensor) -> None:
    """Raise ValueError on the CPU for class probabilities below 0, such as padding."""
    if not can_read(target.device) or not target.numel():
        return
    low = target.detach().min().item()
    if low < -_ROUNDING:
        raise ValueError(
            f"target must hold class probabilities, which are at least 0, got {low:g}; leave out "
            "the items that do not count before the loss"
        )


def check_chances(target: Tensor) -> None:
    """Raise ValueError for labels of yes or no that are no chances, such as padding.

    On CUDA, and inside torch.compile, the check is an assertion on the device, as that of
    `check_finite_divergence`. `torch.func` has none.
    """
    if not target.numel() or is_transformed():
        return
    is_asserted = torch.compiler.is_compiling() or target.device.type == "cuda"
    if not is_asserted and not can_read(target.device):
        return
    low, high = target.detach().aminmax()
    if is_asserted:
        are_chances = (low >= -_ROUNDING) & (high <= 1 + _ROUNDING)
        torch._assert_async(are_chances, _NO_CHANCE.format("others"))
        return
    for extreme in (low.item(), high.item()):
        if not -_ROUNDING <= extreme <= 1 + _ROUNDING:
            raise ValueError(_NO_CHANCE.format(f"{extreme:g}"))


def check_unlabelled_index(
    unlabelled_index: int | None, ignore_index: int, num_classes: int = 0
) -> None:
    """Raise for an index of unlabelled items that means something else too."""
    if unlabelled_index is None:
        return
    check_integer("unlabelled_index", unlabelled_index)
    if unlabelled_index == ignore_index:
        raise ValueError(
            f"unlabelled_index must differ from ignore_index={ignore_index}, which leaves items "
            f"out of both terms, got {unlabelled_index}"
        )
    if 0 <= unlabelled_index < num_classes:
        raise ValueError(
            f"unlabelled_index must be no class (0 to {num_classes - 1}), got {unlabelled_index}; "
            f"use -1"
        )


def check_classes(
    index: Tensor, num_classes: int, ignore_index: int, unlabelled_index: int | None = None
) -> None:
    """Raise ValueError on the CPU for an index of an item that counts but names no class."""
    if not can_read(index.device) or not index.numel():
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_classes:
        others = f"ignore_index={ignore_index}"
        if unlabelled_index is not None:
            others += f" or unlabelled_index={unlabelled_index}"
        raise ValueError(
            f"target must hold class indices from 0 to {num_classes - 1} or {others}, "
            f"got {low if low < 0 else high}" + (f"; {_OF_ONE_LOGIT}" if num_classes == 1 else "")
        )


def all_are_classes(index: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Return whether every index is known to name a class, and none of them is ignored.

    Known on the CPU, where nobody waits for a device.
    """
    if not can_read(index.device) or not index.numel():
        return False
    lowest, highest = index.aminmax()
    low, high = lowest.item(), highest.item()
    return low >= 0 and high < num_classes and not low <= ignore_index <= high


def check_mask(
    mask: Tensor | None, target: Tensor, of: str = "the shape of target"
) -> Tensor | None:
    """Return the mask (True counts) expanded to the shape of the target; raise if it cannot be."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, True where an element counts, got {got}")
    check_broadcastable("mask", mask, target, of)
    return mask.expand(target.shape)


def check_broadcastable(
    name: str, given: Tensor | None, target: Tensor, of: str = "the shape of target"
) -> None:
    """Raise for what is no tensor that can be expanded to the shape of the target."""
    check_real(name, given)
    if given is None:
        return
    sizes = zip(reversed(given.shape), reversed(target.shape), strict=False)
    if given.dim() > target.dim() or any(ours not in (1, theirs) for ours, theirs in sizes):
        raise ValueError(
            f"{name} must be broadcastable to {of} {tuple(target.shape)}, got {tuple(given.shape)}"
        )


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Raise ValueError where two elements share memory, as in an expanded tensor."""
    reach = 0
    dimensions = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dimensions:
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"inplace=True needs {name} whose elements do not share memory (no expanded "
                    f"or overlapping view), got shape {tuple(tensor.shape)} with strides "
                    f"{tensor.stride()}"
                )
            reach += stride * (size - 1)


def check_finite_divergence(kl: Tensor) -> None:
    """Raise ValueError where a class is masked in one pass only, with -inf or a lowest number.

    A mask of `finfo.min` gives a finite divergence that no two passes of a model have. Half
    precision's own lowest number, -65504, is too near to ordinary logits to be told.

    On CUDA, and inside torch.compile, the check is an assertion on the device, so that training
    is not stopped for it at every step. `torch.func` has none.
    """
    if is_transformed():
        return
    if torch.compiler.is_compiling() or kl.device.type == "cuda":
        is_infinite = (kl > LARGEST_DIVERGENCE).any()
        torch._assert_async(~is_infinite, _INFINITE_DIVERGENCE)
    # The highest of one number is itself, without an operation.
    elif can_read(kl.device) and kl.numel() and _highest(kl) > LARGEST_DIVERGENCE:
        raise ValueError(_INFINITE_DIVERGENCE)


def _highest(numbers: Tensor) -> float:
    return (numbers if numbers.numel() == 1 else numbers.detach().nan_to_num(0.0).amax()).item()
