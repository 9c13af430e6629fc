"""What a GPU runs for `triton_rows.py`: a program for each item, and one for each tile of an item.

A tile holds the passes of a class in one thread: the mean over passes needs no exchange between
threads. In the forward each lane keeps sums of its own, so that threads wait for each other only
at the end of a row. A number of passes that is no power of 2 is filled up with rows of zeros.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _exp(x: tl.tensor) -> tl.tensor:
    """Return exp(x); in float32 without denormal results, which cost more than all the rest."""
    if INTERPRETED or x.dtype != tl.float32:
        e = tl.exp(x)
    else:
        e = libdevice.exp2(x * 1.4426950408889634)
    return e


# Compiled in: an interpreter has no functions of a device's own library.
INTERPRETED = tl.constexpr(not isinstance(_exp, triton.JITFunction))


@triton.jit
def _cap(z: tl.tensor, SCALE: tl.constexpr, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Return the logits that a layer's products give."""
    if SCALE != 1:
        z *= SCALE
    if SOFTCAP is not None:
        t = _exp(tl.abs(z) * (-2 / SOFTCAP))
        capped = SOFTCAP * (1 - t) / (1 + t)
        z = tl.where(z < 0, -capped, capped)
    return z


@triton.jit
def _mean_of_passes(x: tl.tensor, PASSES: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Return the mean over passes of numbers of at most 0, finite where all of them are."""
    # A mask is often the least finite number, whose sum would not be. A power of 2 rounds nothing.
    mean = tl.sum(x * (1 / ROWS), 0)
    if ROWS > PASSES:
        # Nor must rounding take the mean below all of them.
        mean = tl.maximum(mean * (ROWS / PASSES), tl.min(x, 0))
    return mean


@triton.jit
def _difference(
    x: tl.tensor, rows: tl.tensor, PASSES: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """Return x_i - mean_j x_j in multiples of `_unit`; 0 where a class is masked in every pass.

    `rows` holds the passes' numbers along dimension 0, and as many dimensions as `x`.
    """
    if PASSES == 2:
        # Once for both: where the first is above the mean the second is below it.
        sign = tl.where(rows == 0, 1.0, -1.0).to(x.dtype)
        above = tl.sum(x * sign, 0)
        above = tl.where(above == above, above, 0)
        difference = sign * tl.expand_dims(above, 0)
    else:
        difference = x - tl.expand_dims(_mean_of_passes(x, PASSES, ROWS), 0)
        difference = tl.where(difference == difference, difference, 0)
    return difference


@triton.jit
def _unit(PASSES: tl.constexpr) -> tl.constexpr:
    """Return what a sum of differences is multiplied by."""
    return 0.5 if PASSES == 2 else 1.0


@triton.jit
def _rise(maximum: tl.tensor, higher: tl.tensor) -> tl.tensor:
    """Return how far sums relative to one maximum are below a higher one; 0 for no sums yet."""
    return tl.where(maximum == -float("inf"), 0, higher - maximum)


@triton.jit
def _spread(
    probabilities: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    weight: tl.tensor,
    item: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    num_classes: tl.tensor,
    dtype: tl.dtype,
    LABEL_SMOOTHING: tl.constexpr,
) -> tl.tensor:
    """Return the target's mass on the classes `columns`, but for that on the class index itself."""
    mass = tl.zeros_like(columns).to(dtype)
    if LABEL_SMOOTHING > 0:
        mass += LABEL_SMOOTHING / (mass + num_classes)
    if probabilities is not None:
        pointers = probabilities + item.to(tl.int64) * stride_item
        pointers += columns.to(tl.int64) * stride_class
        given = tl.load(pointers, mask=inside, other=0).to(dtype)
        mass += given * (1 - LABEL_SMOOTHING)
    if weight is not None:
        mass *= tl.load(weight + columns, mask=inside, other=0).to(dtype)
    return tl.where(inside, mass, 0)


@triton.jit
def _class_mass(
    weight: tl.tensor, index: tl.tensor, dtype: tl.dtype, LABEL_SMOOTHING: tl.constexpr
) -> tl.tensor:
    """Return the target's mass on the class index itself."""
    mass = tl.full([], 1 - LABEL_SMOOTHING, dtype)
    if weight is not None:
        mass *= tl.load(weight + index).to(dtype)
    return mass


@triton.jit
def _add_tile(
    maximum: tl.tensor,
    total: tl.tensor,
    weighted: tl.tensor,
    cross: tl.tensor,
    mass: tl.tensor,
    row_pointers: tl.tensor,
    stride_class: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    probabilities: tl.tensor,
    probabilities_stride_item: tl.tensor,
    probabilities_stride_class: tl.tensor,
    weight: tl.tensor,
    item: tl.tensor,
    first: tl.tensor,
    num_classes: tl.tensor,
    LABEL_SMOOTHING: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Add the classes `columns`, (1, LANES, WIDE), to the sums, (ROWS, LANES).

    `MASKED` if some lie behind the last one, `width`.
    """
    dtype = total.dtype
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    is_pass = (rows < PASSES)[:, :, None]
    pointers = row_pointers[:, None, None] + columns.to(tl.int64) * stride_class
    inside = columns < width
    if MASKED:
        z = tl.load(pointers, mask=is_pass & inside, other=-float("inf")).to(dtype)
    elif ROWS > PASSES:
        z = tl.load(pointers, mask=is_pass).to(dtype)
    else:
        z = tl.load(pointers).to(dtype)
    z = _cap(z, SCALE, SOFTCAP)
    if MASKED and (SCALE != 1 or SOFTCAP is not None):
        z = tl.where(inside, z, -float("inf"))
    if ROWS > PASSES:
        z = tl.where(is_pass, z, 0)  # contributes nothing to a sum over passes
    # A higher maximum: what was summed is expressed relative to it.
    higher = tl.maximum(maximum, tl.max(z, 2))
    rise = _rise(maximum, higher)
    x = z - tl.where(higher == -float("inf"), 0, higher)[:, :, None]
    e = _exp(x)
    scale = _exp(-rise)
    weighted += total * _difference(-rise, rows, PASSES, ROWS)
    weighted = weighted * scale + tl.sum(e * _difference(x, rows[:, :, None], PASSES, ROWS), 2)
    total = total * scale + tl.sum(e, 2)
    if probabilities is not None or (LABEL_SMOOTHING > 0 and weight is not None):
        spread = _spread(
            probabilities,
            probabilities_stride_item,
            probabilities_stride_class,
            weight,
            item,
            columns + first,
            inside,
            num_classes,
            dtype,
            LABEL_SMOOTHING,
        )
        cross += tl.sum(tl.where(spread == 0, 0, spread * x), 2) - mass * rise
        mass += tl.sum(spread, 2)
    elif LABEL_SMOOTHING > 0:
        # The same mass on every class.
        share = LABEL_SMOOTHING / num_classes.to(dtype)
        if MASKED:
            x = tl.where(inside, x, 0)
            count = tl.sum(tl.where(inside, share, 0), 2)
        else:
            count = share * z.shape[2]
        cross += share * tl.sum(x, 2) - mass * rise
        mass += count
    return higher, total, weighted, cross, mass


# The number of items differs from batch to batch: nothing is compiled anew for it.
@triton.jit(do_not_specialize=["num_items"])
def forward_kernel(
    logits: tl.tensor,
    stride_pass: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    classes: tl.tensor,
    probabilities: tl.tensor,
    probabilities_stride_item: tl.tensor,
    probabilities_stride_class: tl.tensor,
    weight: tl.tensor,
    valid: tl.tensor,
    statistics: tl.tensor,
    num_items: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    num_classes: tl.tensor,
    LABEL_SMOOTHING: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Sum over the classes from `first` to `first + width` of one item.

    `statistics` is laid out as `RowSums` says, and holds the sums of the blocks before unless it is
    the `FIRST`. After the `LAST` one the terms are written, else the sums for those to come.
    """
    dtype = statistics.dtype.element_ty
    item = tl.program_id(0)
    counts = item < num_items
    if valid is not None:
        counts = tl.load(valid + item) != 0
    stop = tl.where(counts, width, 0)  # nothing of an ignored item is read
    # Offsets beyond 2^31 elements are usual: in 64 bits.
    passes = tl.arange(0, ROWS).to(tl.int64)
    is_pass = passes < PASSES
    row_pointers = logits + passes * stride_pass + item.to(tl.int64) * stride_item
    lane = (tl.arange(0, LANES) * WIDE)[None, :, None] + tl.arange(0, WIDE)[None, None, :]

    maximum = tl.full([ROWS, LANES], -float("inf"), dtype)
    total = tl.zeros([ROWS, LANES], dtype)  # of e = exp(z - maximum)
    weighted = tl.zeros([ROWS, LANES], dtype)  # of e * difference
    cross = tl.zeros([ROWS, LANES], dtype)  # of target * (z - maximum)
    mass = tl.zeros([ROWS, LANES], dtype)  # of target
    whole = stop // (LANES * WIDE) * (LANES * WIDE)
    # Loads ahead of their use, in more stages, made an H100 slower.
    for start in tl.range(0, whole, LANES * WIDE, num_stages=1):
        maximum, total, weighted, cross, mass = _add_tile(
            maximum,
            total,
            weighted,
            cross,
            mass,
            row_pointers,
            stride_class,
            start + lane,
            width,
            probabilities,
            probabilities_stride_item,
            probabilities_stride_class,
            weight,
            item,
            first,
            num_classes,
            LABEL_SMOOTHING,
            PASSES,
            ROWS,
            SCALE,
            SOFTCAP,
            MASKED=False,
        )
    if whole < stop:
        maximum, total, weighted, cross, mass = _add_tile(
            maximum,
            total,
            weighted,
            cross,
            mass,
            row_pointers,
            stride_class,
            whole + lane,
            width,
            probabilities,
            probabilities_stride_item,
            probabilities_stride_class,
            weight,
            item,
            first,
            num_classes,
            LABEL_SMOOTHING,
            PASSES,
            ROWS,
            SCALE,
            SOFTCAP,
            MASKED=True,
        )

    # The lanes' sums in one.
    higher = tl.max(maximum, 1)
    rise = _rise(maximum, higher[:, None])
    scale = _exp(-rise)
    weighted += total * _difference(-rise, passes[:, None], PASSES, ROWS)
    weighted = tl.sum(weighted * scale, 1) * _unit(PASSES)
    total = tl.sum(total * scale, 1)
    cross = tl.sum(cross - mass * rise, 1)
    mass = tl.max(tl.sum(mass, 1), 0)  # the same for every pass
    maximum = higher

    if classes is not None:
        column = tl.load(classes + item) - first
        is_here = (column >= 0) & (column < width)
        column = tl.where(is_here, column, 0)  # no memory is read by the index of another block
        on_class = _class_mass(weight, first + column, dtype, LABEL_SMOOTHING)
        on_class = tl.where(is_here, on_class, 0)
        pointers = row_pointers + column * stride_class
        at_class = tl.load(pointers, mask=is_pass, other=0)
        at_class = _cap(at_class.to(dtype), SCALE, SOFTCAP)
        reference = tl.where(maximum == -float("inf"), 0, maximum)
        cross += tl.where(on_class != 0, on_class * (at_class - reference), 0)
        mass += on_class

    offset = passes * num_items + item
    second = statistics + PASSES * num_items
    third = second + PASSES * num_items
    shared = third + PASSES * num_items + item  # the target's mass, the NLL, the divergence
    fourth = third + (PASSES + 3) * num_items
    if not FIRST:
        before = tl.load(statistics + offset, mask=is_pass, other=0)
        before_total = tl.load(second + offset, mask=is_pass, other=0)
        before_weighted = tl.load(third + offset, mask=is_pass, other=0)
        before_cross = tl.load(fourth + offset, mask=is_pass, other=0)
        before_mass = tl.load(shared)
        higher = tl.maximum(maximum, before)
        rise = _rise(maximum, higher)
        before_rise = _rise(before, higher)
        weighted += total * _difference(-rise, passes, PASSES, ROWS) * _unit(PASSES)
        fall = _difference(-before_rise, passes, PASSES, ROWS)
        before_weighted += before_total * fall * _unit(PASSES)
        weighted = weighted * _exp(-rise) + before_weighted * _exp(-before_rise)
        total = total * _exp(-rise) + before_total * _exp(-before_rise)
        cross += before_cross - mass * rise - before_mass * before_rise
        mass += before_mass
        maximum = higher

    if LAST:
        mean_difference = weighted / total
        # As in `_mean_of_passes`: the sum of several might not be finite.
        share = (mass * tl.log(total) - cross) * (1 / ROWS)
        nll = tl.sum(tl.where(is_pass, share, 0), 0) / (PASSES / ROWS)
        kl = tl.sum(tl.where(is_pass, mean_difference, 0), 0)
        if PASSES > 1:
            kl = kl / (PASSES - 1)
        # A class masked in one pass only is infinitely unlikely there; 0 * inf above hides it.
        kl = tl.where((kl != kl) & (nll == nll), float("inf"), kl)
        tl.store(shared + num_items, tl.where(counts, nll, 0))
        tl.store(shared + 2 * num_items, tl.where(counts, kl, 0))
        total = 1 / total
        weighted = mean_difference
    else:
        tl.store(fourth + offset, cross, mask=is_pass)
    tl.store(statistics + offset, maximum, mask=is_pass)
    tl.store(second + offset, total, mask=is_pass)
    tl.store(third + offset, weighted, mask=is_pass)
    tl.store(shared, mass)


@triton.jit(do_not_specialize=["num_items"])
def backward_kernel(
    out: tl.tensor,
    out_stride_pass: tl.tensor,
    out_stride_item: tl.tensor,
    out_stride_class: tl.tensor,
    logits: tl.tensor,
    stride_pass: tl.tensor,
    stride_item: tl.tensor,
    stride_class: tl.tensor,
    classes: tl.tensor,
    probabilities: tl.tensor,
    probabilities_stride_item: tl.tensor,
    probabilities_stride_class: tl.tensor,
    weight: tl.tensor,
    valid: tl.tensor,
    statistics: tl.tensor,
    grad_nll: tl.tensor,
    grad_kl: tl.tensor,
    grad_nll_stride: tl.tensor,
    grad_kl_stride: tl.tensor,
    num_items: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    num_classes: tl.tensor,
    tiles: tl.tensor,
    LABEL_SMOOTHING: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BACKWARD_PASSES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write `p (mass a + b (1 - E + d)) - b mean(p) - a target` for the first passes, else 0."""
    dtype = statistics.dtype.element_ty
    program = tl.program_id(0)
    item = num_items - 1 - program // tiles  # first what the forward read last: it may be cached
    counts = item < num_items
    if valid is not None:
        counts = tl.load(valid + item) != 0
    start = (program % tiles) * TILE
    columns = start + tl.arange(0, TILE)
    passes = tl.arange(0, ROWS).to(tl.int64)
    rows = passes[:, None]
    inside = columns < width
    is_stored = (rows < PASSES) & inside[None, :]
    out += rows * out_stride_pass + item.to(tl.int64) * out_stride_item
    out += columns.to(tl.int64)[None, :] * out_stride_class
    if counts:
        pointers = logits + rows * stride_pass + item.to(tl.int64) * stride_item
        pointers += columns.to(tl.int64)[None, :] * stride_class
        z = tl.load(pointers, mask=is_stored, other=0).to(dtype)
        z = _cap(z, SCALE, SOFTCAP)
        offset = passes * num_items + item
        is_pass = passes < PASSES
        second = statistics + PASSES * num_items
        third = second + PASSES * num_items
        maximum = tl.load(statistics + offset, mask=is_pass, other=0)
        inverse_sum = tl.load(second + offset, mask=is_pass, other=0)
        x = z - maximum[:, None]
        p = _exp(x) * inverse_sum[:, None]
        slope = tl.zeros([ROWS], dtype)
        if grad_nll is not None:
            a = tl.load(grad_nll + item * grad_nll_stride)
            slope += a * tl.load(third + PASSES * num_items + item)
        if grad_kl is not None:
            b = tl.load(grad_kl + item * grad_kl_stride)
            mean_difference = tl.load(third + offset, mask=is_pass, other=0)
            slope += b * (1 - mean_difference)
            difference = _difference(x, rows, PASSES, ROWS)
            grad = p * (slope[:, None] + (b * _unit(PASSES)) * difference)
            grad -= (b * (1 / PASSES) * tl.sum(p, 0))[None, :]
        else:
            grad = p * slope[:, None]
        if grad_nll is not None:
            if LABEL_SMOOTHING > 0 or probabilities is not None:
                spread = _spread(
                    probabilities,
                    probabilities_stride_item,
                    probabilities_stride_class,
                    weight,
                    item,
                    columns + first,
                    inside,
                    num_classes,
                    dtype,
                    LABEL_SMOOTHING,
                )
                grad -= (a * spread)[None, :]
            if classes is not None:
                index = tl.load(classes + item)
                column = (index - first).to(tl.int32)
                if (column >= start) & (column < start + TILE):
                    on_class = a * _class_mass(weight, index, dtype, LABEL_SMOOTHING)
                    grad -= tl.where(columns == column, on_class, 0)[None, :]
        if SOFTCAP is not None:
            capped = z * (1 / SOFTCAP)
            grad *= 1 - capped * capped
        if SCALE != 1:
            grad *= SCALE
        if BACKWARD_PASSES < PASSES:
            grad = tl.where(rows < BACKWARD_PASSES, grad, 0)
        tl.store(out, grad.to(out.dtype.element_ty), mask=is_stored)
    else:
        nothing = tl.zeros([ROWS, TILE], out.dtype.element_ty)
        tl.store(out, nothing, mask=is_stored)
