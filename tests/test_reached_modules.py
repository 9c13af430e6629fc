"""What a function calls is found through helpers, decorators and inner functions."""

import dis
from functools import lru_cache, partial, wraps
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import regdrop.passes.stacking
from regdrop import RDropConfig, rdrop_step, repeat_batch
from regdrop.divergence_watch import reached_modules

ENCODER = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
HEAD = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))


def encode(batch):
    return ENCODER(batch)


def by_helper(batch):
    return HEAD(encode(batch))


def by_inner_code(batch):
    def whole(rows):
        return HEAD(ENCODER(rows))

    return sum(whole(rows) for rows in (batch, -batch))


@torch.autocast("cpu", torch.bfloat16)
def by_autocast(batch):
    return HEAD(ENCODER(batch))


@lru_cache
def by_cache(batch):
    return HEAD(ENCODER(batch))


def decorated(function):
    @wraps(function)
    def call(batch):
        return function(batch)

    return call


def by_decorated_helper(batch):
    return HEAD(decorated_encode(batch))


decorated_encode = torch.enable_grad()(torch.autocast("cpu", torch.bfloat16)(encode))

OTHER_FILE = ModuleType("other_file")
OTHER_FILE.ENCODER = ENCODER
exec("def embed(batch):\n    return ENCODER(batch)", vars(OTHER_FILE))
embed_of_other_file = OTHER_FILE.embed


def by_other_file(batch):
    return HEAD(embed_of_other_file(batch))


def by_module(batch):
    return HEAD(OTHER_FILE.embed(batch))


def by_import(batch):
    import OTHER_FILE

    return HEAD(OTHER_FILE.embed(batch))


def by_import_of_a_name(batch):
    from OTHER_FILE import embed

    return HEAD(embed(batch))


def by_import_of_a_name_of_the_file(batch):
    from unknown import embed_of_other_file

    return HEAD(embed_of_other_file(batch))


PACKAGE = ModuleType("package")
PACKAGE.inner = OTHER_FILE


def by_import_from_a_package(batch):
    from PACKAGE.inner import embed

    return HEAD(embed(batch))


def by_three(batch):
    return by_helper(batch)


def by_four(batch):
    return by_three(batch)


def by_five(batch):
    return by_four(batch)


class Methods:
    def forward(self, batch):
        return self.compute(batch)

    def compute(self, batch):
        return HEAD(encode(batch))

    __call__ = forward


METHODS = Methods()


class Static:
    @staticmethod
    def forward(batch):
        return Static.head(encode(batch))

    @classmethod
    def head(cls, batch):
        return HEAD(batch)


def bare(function):
    def call(batch):
        return function(batch)

    return call


# As by a decorator of a library that does not name what it wraps.
bare_encode = bare(encode)
bare_encode.__module__ = "torch.nn"
WAYS = {
    "helper": by_helper,
    "inner code": by_inner_code,
    "autocast": by_autocast,
    "cache": by_cache,
    "decorator": decorated(by_helper),
    "decorated helper": by_decorated_helper,
    "partial inside": decorated(partial(by_helper)),
    "compiled": torch.compile(by_helper, backend="eager"),
    "other file": by_other_file,
    "module": by_module,
    "import inside": by_import,
    "import of a name inside": by_import_of_a_name,
    "import of a name of the file inside": by_import_of_a_name_of_the_file,
    "import from a package inside": by_import_from_a_package,
    "chain of helpers": by_five,
    "method of a method": Methods().forward,
    "callable object": Methods(),
    "static method": Static.forward,
    "static method around": lambda batch: Static.forward(batch),
    "static method of an object": lambda batch: Static().forward(batch),
    "bare decorator of a library": lambda batch: HEAD(bare_encode(batch)),
    "callable object around": lambda batch: METHODS(batch),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_modules_are_found(way):
    assert {*reached_modules(WAYS[way])} == {ENCODER, HEAD}


def test_a_monitored_pass_leaves_the_statistics_of_a_helpers_model():
    config = RDropConfig(alpha=0.0, num_passes=1, monitor_steps=1)
    before = ENCODER[1].num_batches_tracked.item()
    rdrop_step(by_helper, torch.randn(4, 6), torch.arange(4) % 3, config=config, step=0)
    assert ENCODER[1].num_batches_tracked.item() == before + 1


def test_functions_of_libraries_are_not_searched(monkeypatch):
    monkeypatch.setattr(regdrop.passes.stacking, "find_batch_size", nn.Identity())
    assert {*reached_modules(lambda batch: HEAD(repeat_batch(batch)))} == {HEAD}


def test_code_is_read_once_however_many_functions_there_are(monkeypatch):
    space = {"call_300": HEAD}
    for i in range(300):
        exec(f"def call_{i}(batch): return call_{i + 1}(batch)", space)
    assert [*reached_modules(space["call_0"])] == [HEAD]
    monkeypatch.delattr(dis, "get_instructions")
    assert [*reached_modules(space["call_0"])] == [HEAD]


def test_an_attribute_is_not_the_variable_of_its_name():
    other = SimpleNamespace(ENCODER=HEAD)
    assert {*reached_modules(lambda batch: other.ENCODER(batch))} == {HEAD}


def test_a_name_without_a_value_is_passed_over():
    def forward(batch):
        return later(batch)

    assert [*reached_modules(forward)] == []
    later = HEAD
    assert [*reached_modules(forward)] == [HEAD]


class Counted(list):
    reads = 0

    def __getitem__(self, key):
        Counted.reads += 1
        return super().__getitem__(key)


def test_large_data_beside_the_model_is_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(Counted, "reads", 0)
    data = Counted(Counted(Counted([0.5]) for _ in range(100)) for _ in range(100))
    assert [*reached_modules(lambda batch: (data, HEAD(batch)))] == [HEAD]
    assert Counted.reads < 3000


def test_what_many_examples_share_is_looked_at_once(monkeypatch):
    monkeypatch.setattr(Counted, "reads", 0)
    shared = Counted([HEAD])
    data = [[shared] for _ in range(50)]
    assert [*reached_modules(lambda batch: data)] == [HEAD]
    assert Counted.reads == 1
