"""The C++ kernel, where it can be built."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from implementations import WHY_NO_CPP, gradient
from regdrop import rdrop_cross_entropy
from regdrop.kernels import cpp_rows

builds = [pytest.mark.slow, pytest.mark.skipif(WHY_NO_CPP != "", reason=WHY_NO_CPP)]


def built(test):
    for mark in builds:
        test = mark(test)
    return test


@built
@pytest.mark.parametrize("num_passes", [2, 3])
def test_gradcheck(num_passes):
    logits = torch.randn(num_passes * 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 3])
    options = {"alpha": 1.3, "num_passes": num_passes, "label_smoothing": 0.1, "impl": "cpp"}
    assert torch.autograd.gradcheck(
        lambda x: rdrop_cross_entropy(x, target, **options).loss, logits
    )


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (35, 17), (33, 128), (7, 1000), (3, 2048), (5, 4097)])
@pytest.mark.parametrize(
    ("num_passes", "settings"),
    [(2, {}), (2, {"label_smoothing": 0.1}), (3, {"backward_passes": 1}), (4, {})],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_error_is_at_most_that_of_eager(dtype, shape, num_passes, settings, inplace):
    """Against float64 on the same rounded logits, with ignored rows and an upstream gradient."""
    batch, classes = shape
    logits = (torch.randn(num_passes * batch, classes) * 2).to(dtype)
    target = torch.randint(0, classes, (batch,))
    target[1] = -100
    options = {"alpha": 1.0, "num_passes": num_passes, **settings}
    upstream = 3.7
    truth = rdrop_cross_entropy(logits.double(), target, impl="eager", **options)
    true_grad = gradient(logits.double(), target, upstream, impl="eager", **options)
    errors = []
    for choice in ({"impl": "cpp", "inplace": inplace}, {"impl": "eager"}):
        output = rdrop_cross_entropy(logits, target, **choice, **options)
        grad = gradient(logits, target, upstream, **choice, **options)
        assert grad.dtype == dtype
        errors.append(
            [
                (output.kl - truth.kl).abs().item(),
                (output.nll - truth.nll).abs().item(),
                (grad.double() - true_grad).norm().item(),
            ]
        )
    # One rounding of the result is granted where both are that close.
    slack = [truth.kl.item() * 2e-7, truth.nll.item() * 2e-7, true_grad.norm().item() * 1e-7]
    for ours, eager, granted in zip(*errors, slack, strict=True):
        assert ours <= eager + granted


@built
@settings(max_examples=60, deadline=None)
@given(
    num_passes=st.integers(1, 5),
    batch=st.one_of(st.integers(0, 6), st.integers(7, 40)),
    classes=st.one_of(
        st.integers(1, 140), st.integers(1000, 2100), st.sampled_from([1024, 1056, 2048])
    ),
    backward_passes=st.integers(1, 5),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    probabilities=st.booleans(),
    transposed=st.booleans(),
    inplace=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_eager_on_any_shape(
    num_passes,
    batch,
    classes,
    backward_passes,
    label_smoothing,
    weighted,
    probabilities,
    transposed,
    inplace,
    seed,
):
    # Chances of one class are refused, but for a single item.
    assume(not probabilities or classes > 1 or batch < 2)
    generator = torch.Generator().manual_seed(seed)
    shape = (num_passes * batch, classes)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    if transposed:
        logits = logits.T.contiguous().T
    target = torch.randint(0, classes, (batch,), generator=generator)
    target[torch.rand(batch, generator=generator) < 0.3] = -100
    if probabilities:
        target = torch.rand(batch, classes, generator=generator).double().softmax(-1)
    options = {
        "alpha": 0.0 if num_passes == 1 else 1.7,
        "num_passes": num_passes,
        "backward_passes": min(num_passes, backward_passes),
        "label_smoothing": label_smoothing,
        "weight": torch.rand(classes, generator=generator) + 0.1 if weighted else None,
    }
    ours = rdrop_cross_entropy(logits, target, impl="cpp", **options)
    eager = rdrop_cross_entropy(logits, target, impl="eager", **options)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        gradient(logits, target, 1.5, impl="cpp", inplace=inplace, **options),
        gradient(logits, target, 1.5, impl="eager", **options),
        rtol=1e-8,
        atol=1e-11,
    )


@built
@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rising_maxima_and_masked_blocks(num_passes, dtype):
    """Over blocks of 1024 classes, of which the first and the third are masked in every pass."""
    logits = (torch.randn(num_passes * 3, 4000) + torch.arange(4000) * 0.01).to(dtype)
    logits[:, :1024] = logits[:, 2048:3072] = -math.inf
    target = torch.tensor([1100, 3500, 3999])
    options = {"alpha": 1.0, "num_passes": num_passes}
    truth = rdrop_cross_entropy(logits.double(), target, impl="eager", **options)
    output = rdrop_cross_entropy(logits, target, impl="cpp", **options)
    assert output.kl.item() == pytest.approx(truth.kl.item(), rel=1e-6)
    assert output.nll.item() == pytest.approx(truth.nll.item(), rel=1e-6)
    expected = gradient(logits.double(), target, impl="eager", **options)
    grad = gradient(logits, target, impl="cpp", **options)
    rounding = {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=rounding * 1e-4)
    assert (grad[:, :1024] == 0).all()


@built
@pytest.mark.parametrize("position", [0, 5, 500, 1030, 2099])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1], ids=hex)  # a GPU's are the second
@pytest.mark.parametrize("num_passes", [1, 2])
def test_a_nan_anywhere_in_a_row_reaches_the_loss(position, bits, num_passes):
    logits = torch.randn(2 * num_passes, 2100)
    logits.view(torch.int32)[1, position] = bits
    options = {"alpha": 1.0 if num_passes > 1 else 0.0, "num_passes": num_passes, "impl": "cpp"}
    output = rdrop_cross_entropy(logits, torch.tensor([7, 8]), **options)
    assert output.nll.isnan()
    assert output.loss.isnan()


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("classes", "position"), [(8, 5), (30, 29), (2100, 5), (2100, 1030), (2100, 2099)]
)
def test_a_nan_reaches_the_gradient_of_its_item_alone(dtype, classes, position):
    logits = torch.randn(2 * 2, classes).to(dtype)
    logits[1, position] = math.nan
    grad = gradient(logits, torch.tensor([7, 6]), alpha=1.0, impl="cpp")
    assert grad[[1, 3]].isnan().all()
    assert grad[[0, 2]].isfinite().all()


@built
@pytest.mark.parametrize("classes", [30, 3000])
def test_logits_far_apart_lose_no_digits(classes):
    logits, target = torch.randn(2 * 50, classes) * 40, torch.randint(0, classes, (50,))
    truth = rdrop_cross_entropy(logits.double(), target, alpha=1.0, impl="eager")
    output = rdrop_cross_entropy(logits, target, alpha=1.0, impl="cpp")
    for ours, exact in zip(output, truth, strict=True):
        assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    grad = gradient(logits, target, alpha=1.0, impl="cpp")
    exact = gradient(logits.double(), target, alpha=1.0, impl="eager")
    assert (grad - exact).norm() < 1e-5 * exact.norm()


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 30])
@pytest.mark.parametrize("inplace", [False, True])
def test_many_items_of_few_classes(dtype, classes, inplace):
    """More than one thread takes; every third does not count, and holds what is no number."""
    items = 40_001
    logits, target = torch.randn(2 * items, classes).to(dtype), torch.randint(0, classes, (items,))
    target[::3] = -100
    logits.view(2, items, classes)[:, ::3] = math.nan
    options = {"alpha": 2.0, "weight": torch.rand(classes) + 0.5}
    truth = rdrop_cross_entropy(logits.double(), target, impl="eager", **options)
    output = rdrop_cross_entropy(logits, target, impl="cpp", inplace=inplace, **options)
    for ours, exact in zip(output, truth, strict=True):
        assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    found = gradient(logits, target, impl="cpp", inplace=inplace, **options)
    exact = gradient(logits.double(), target, impl="eager", **options)
    close = (
        {"rtol": 1e-4, "atol": 1e-10} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-8}
    )
    torch.testing.assert_close(found.double(), exact, **close)


@built
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (20, 30), (9, 500)])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(dtype, shape):
    batch, classes = shape
    logits = torch.randn(2 * batch, classes).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (batch,))
    loss = rdrop_cross_entropy(logits, target, alpha=1.0, impl="cpp").loss
    loss.backward(retain_graph=True)
    first = logits.grad.clone()
    for times in (2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, first * times)


@built
def test_a_gradient_is_scaled_before_it_is_rounded_to_half():
    logits, target = torch.randn(2 * 4000, 4).half() * 3, torch.randint(0, 4, (4000,))
    found = gradient(logits, target, 1024.0, alpha=1.0, impl="cpp")
    exact = gradient(logits.double(), target, 1024.0, alpha=1.0, impl="eager")
    smallest = 2.0**-24
    assert ((exact / 1024).abs() < smallest).any()
    torch.testing.assert_close(found.double(), exact, rtol=2**-10, atol=smallest)


@built
def test_a_gradient_of_many_pages_of_memory_is_that_of_the_plain_form():
    logits, target = torch.randn(2 * 40, 40_000), torch.randint(0, 40_000, (40,))
    grads = [gradient(logits, target, alpha=1.0, impl=impl) for impl in ("cpp", "chunked")]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-9)


@built
def test_result_does_not_depend_on_the_number_of_threads():
    logits, target = torch.randn(2 * 300, 1000), torch.randint(0, 1000, (300,))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(gradient(logits, target, alpha=1.0, impl="cpp"))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.long
@built
def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    code = (
        "import torch; from regdrop import rdrop_cross_entropy\n"
        "x, y = torch.eye(4), torch.tensor([0, 1])\n"
        "print(rdrop_cross_entropy(x, y, alpha=1.0, impl='cpp').loss.item())"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1


HOLD = """
import sys, time
from pathlib import Path
from regdrop.kernels.cpp_rows import build_alone
folder = Path(sys.argv[1])
with build_alone(folder):
    (folder / "lock").touch()
    print("builds", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_a_build_waits_for_one_that_runs_and_not_for_one_that_was_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "builds\n"
    started = []
    waiting = threading.Thread(target=enter, args=(tmp_path, started), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert (tmp_path / "lock").exists()
    first.kill()
    first.wait()
    waiting.join(10)
    assert started == [False]  # the lock of the killed build is gone


def enter(folder, started):
    with cpp_rows.build_alone(folder):
        started.append((folder / "lock").exists())


@pytest.mark.long
@built
def test_a_killed_build_does_not_block_the_next(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *rows.cpp*) touch {tmp_path}/compiles; sleep 600;; '
        '*) exec c++ "$@";; esac\n'
    )
    compiler.chmod(0o755)
    code = (
        "import torch; from regdrop import rdrop_cross_entropy\n"
        "x, y = torch.eye(4), torch.tensor([0, 1])\n"
        "print(rdrop_cross_entropy(x, y, alpha=1.0, impl='cpp').loss.item())"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    slow = {**environment, "CXX": str(compiler)}
    killed = subprocess.Popen([sys.executable, "-c", code], env=slow, start_new_session=True)
    while not (tmp_path / "compiles").exists():
        assert killed.poll() is None
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list((tmp_path / "extensions").glob("*/lock"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


@pytest.mark.long
@built
@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="the CPU has no AVX2"
)
def test_a_build_for_cpus_with_avx2_agrees_with_eager(tmp_path):
    code = """if True:
        import torch
        from regdrop import rdrop_cross_entropy
        assert torch.backends.cpu.get_cpu_capability() == "AVX2"
        roundings = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
        for dtype, rounding in roundings.items():
            for classes in (70, 1024, 2085):
                logits = (torch.randn(2 * 3, classes) * 2).to(dtype).requires_grad_()
                target = torch.tensor([1, -100, 69])
                losses, grads = [], []
                for impl in ("cpp", "eager"):
                    loss = rdrop_cross_entropy(logits, target, alpha=1.0, impl=impl).loss
                    losses.append(loss)
                    grads += torch.autograd.grad(loss, logits)
                torch.testing.assert_close(*losses)
                torch.testing.assert_close(*grads, rtol=rounding, atol=rounding * 1e-3)
    """
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "avx2",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_error_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp_rows, "_library", cpp_rows._library.__wrapped__)
    with pytest.raises(ValueError, match=r"finds no C\+\+ compiler \(no-such-compiler"):
        rdrop_cross_entropy(torch.eye(4), torch.tensor([0, 1]), alpha=1.0, impl="cpp")


def test_logits_elsewhere_are_refused():
    logits = torch.empty(2, 3, 4, device="meta")
    with pytest.raises(ValueError, match="impl='cpp' needs logits on a CPU, got meta"):
        cpp_rows.cpp_kernel(logits.device)
