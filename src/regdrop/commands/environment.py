"""What `regdrop doctor --environment` prints: for a report of a fault."""

import torch

from regdrop import __version__
from regdrop.experiments.recording.environment import (
    describe_hardware,
    installed_versions,
    library_versions,
)
from regdrop.kernels.cpp_rows import missing_tools
from regdrop.kernels.selection import obstacle_to_triton

# Beside those that a run's record names.
_FRAMEWORKS = (
    *("triton", "peft", "trl", "lightning", "timm", "sentence-transformers"),
    *("deepspeed", "liger-kernel"),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def environment_lines() -> list[str]:
    """Return versions, devices, and which kernel impl="auto" takes on each and why."""
    hardware = describe_hardware()
    versions = {**library_versions(), **installed_versions(_FRAMEWORKS), "regdrop": __version__}
    return [
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"system: {hardware['system']}",
        f"processor: {hardware['processor']}, {hardware['cores']} cores, "
        f"{hardware['threads']} threads of torch",
        *(_gpu_line(torch.device("cuda", i)) for i in range(torch.cuda.device_count())),
        *(line for device in _devices() for line in _kernel_lines(device)),
        _cpp_line(),
    ]


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _gpu_line(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return (
        f"{device}: {found.name}, {found.total_memory / 2**30:.0f} GiB, "
        f"compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"
    )


def _kernel_lines(device: torch.device) -> list[str]:
    """Return the kernel of each group of dtypes that have the same."""
    obstacles = {dtype: obstacle_to_triton(device, dtype) for dtype in _DTYPES}
    lines = []
    for obstacle in dict.fromkeys(obstacles.values()):
        dtypes = [
            str(dtype).removeprefix("torch.") for dtype in _DTYPES if obstacles[dtype] == obstacle
        ]
        choice = '"triton"' if obstacle is None else f'"chunked": {obstacle}'
        lines.append(f'impl="auto" for logits on {device} ({", ".join(dtypes)}): {choice}')
    return lines


def _cpp_line() -> str:
    missing = missing_tools()
    found = f"finds no {' and no '.join(missing)}" if missing else "can be built on first use"
    return f'impl="cpp", on request, for logits on a CPU: {found}'
