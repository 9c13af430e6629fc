"""timm imports torchvision, whose compiled part does not load beside a CPU build of torch.

`make test` installs both without their dependencies into a folder of their own and runs these tests
in a process of their own. Nothing here calls an operator of torchvision: that its Python part can
be imported, they only have to be declared.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

OPERATORS = (
    *("nms", "qnms", "qroi_align"),
    *("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"),
    *("_roi_align_backward", "_ps_roi_align_backward", "_roi_pool_backward"),
    *("_ps_roi_pool_backward", "_deform_conv2d_backward"),
)

spec = find_spec("torchvision")
if spec is not None and Path(str(spec.origin)).parents[2].name == "apart":
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor x) -> Tensor")
