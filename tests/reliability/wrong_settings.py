"""Settings that cannot be: values that a field does not take, and names that there are not."""

import json
import math
import random
import traceback
from dataclasses import fields, replace
from typing import Any, get_type_hints

from commands import Attack
from declared import fits, holders

from regdrop.experiments.running.optimisers import check_optimiser
from regdrop.tasks import PRESETS
from regdrop.tasks.configure import change_task

VALUES = (
    *(math.nan, math.inf, -math.inf, -1, -0.5, 0, 3, 10**30, 1e-3, True, False, None, ""),
    *("1", "nan", "auto", "\x00", [], [None], [{}], [math.nan], [-1.0], {}, {"a": [1]}),
)
OPTIONS = (
    *("eps=nan", "eps=0.5", "betas=0.5", "betas=nan", "momentum=7", "momentum=nan", "momentum=x"),
    *("momentum=0.9,nesterov=perhaps", "momentum", "=0.9", "weight_decay=0.5", "momentum=-1", ","),
    *("momentun=0.9", "lr=7", "fused=false", "dampening=inf", "momentum=0.9,momentum=0.8", "a=b=c"),
)
# Numbers that may be below 0.
_SIGNED = ("length_penalty", "unlabelled_index")


def set_a_wrong_option(attack: Attack) -> None:
    """Give a command a setting that cannot be, of any kind."""
    kind = attack.random.choice((a_value, a_value, a_name, options_of_an_optimiser, of_the_model))
    kind(attack)


def a_value(attack: Attack) -> None:
    """Set a field of a preset to what it does not take."""
    task = PRESETS[attack.random.choice(sorted(PRESETS))]
    prefix, holder = attack.random.choice(sorted(holders(task).items(), key=lambda item: item[0]))
    name = attack.random.choice([field.name for field in fields(holder)])
    hint = get_type_hints(type(holder), include_extras=True)[name]
    wrong = [value for value in VALUES if _is_wrong(name, value, hint)]
    value = attack.random.choice(wrong)
    _must_refuse(attack, task, f"{prefix}{name}={json.dumps(value)}", name)


def a_name(attack: Attack) -> None:
    """Misspell the name of a field."""
    task = PRESETS[attack.random.choice(sorted(PRESETS))]
    prefix, holder = attack.random.choice(sorted(holders(task).items(), key=lambda item: item[0]))
    names = [field.name for field in fields(holder)]
    name = attack.random.choice(names)
    wrong = misspell(attack.random, name)
    if wrong not in names:
        _must_refuse(attack, task, f"{prefix}{wrong}=1", wrong)


def options_of_an_optimiser(attack: Attack) -> None:
    """Give an optimiser options that it does not take, or that do not reach it."""
    task = PRESETS[attack.random.choice(sorted(PRESETS))]
    text = attack.random.choice(OPTIONS)

    def check() -> None:
        check_optimiser(change_task(task, settings=[f"training.optim_args={text}"]).training)

    _must_raise(attack, check, f"{task.name} {task.training.optim} {text}", "training.optim")


def of_the_model(attack: Attack) -> None:
    """Give a new model settings that there are not, or that it cannot have."""
    presets = [x for x in PRESETS.values() if getattr(x, "model_config", None)]
    task = attack.random.choice([x for x in presets if getattr(x, "model", None) is None])
    entries = {k: v for k, v in task.model_config.items() if type(v) in (int, float)}
    name = attack.random.choice(sorted(entries))
    value: Any = attack.random.choice((math.nan, math.inf, -1, -0.5, [math.nan]))
    if attack.random.random() < 0.5:
        name, value = misspell(attack.random, name), entries[name]
    # Its data is not here: what is looked at later is not reached.
    nowhere = {} if task.name == "digits" else {"dataset": "./nowhere"}
    changed = replace(task, model_config={**task.model_config, name: value}, **nowhere)
    _must_raise(attack, changed.prepare, f"{task.name} model_config.{name}={value}", name)


def misspell(generator: random.Random, name: str) -> str:
    """Return a name with a letter that is doubled, left out or exchanged with the next."""
    place = generator.randrange(len(name) - 1)
    head, first, second, tail = name[:place], name[place], name[place + 1], name[place + 2 :]
    middle = generator.choice((first + first + second, second, first, second + first))
    return head + middle + tail if middle != first + second else f"{name}s"


def _is_wrong(name: str, value: Any, hint: Any) -> bool:
    """Return whether no field of this type takes a value, whatever its range."""
    numbers = value if isinstance(value, list) else [value]
    is_negative = any(type(x) in (int, float) and x < 0 for x in numbers)
    return not fits(value, hint) or (is_negative and name not in _SIGNED)


def _must_refuse(attack: Attack, task: Any, setting: str, name: str) -> None:
    _must_raise(
        attack, lambda: change_task(task, settings=[setting]), f"{task.name} {setting}", name
    )


def _must_raise(attack: Attack, call: Any, what: str, name: str) -> None:
    """Note whether a call refuses what is wrong by one line that names it."""
    try:
        call()
    except ValueError as error:
        is_clear = name in str(error) and "\n" not in str(error)
        attack.note("refused" if is_clear else "silent", f"{what}: {error}")
    except Exception:
        attack.note("tracebacks", f"{what}: {traceback.format_exc()[-700:]}")
    else:
        attack.note("silent", what)
