"""Options of R-Drop as records of earlier versions hold them."""

from collections.abc import Mapping
from typing import Any

from regdrop.alpha_options import RULE_MAX
from regdrop.config import RDropConfig

# What was done before an option existed, where that is not its default now: alpha="auto" was a
# ramp from 0 to 16.
AUTO_BEFORE = {"alpha_start": 0.0, "alpha_max": 16.0}


def with_later_options(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with all options of R-Drop, in the terms of today."""
    if not isinstance(found.get("rdrop"), Mapping):
        return dict(found)
    rdrop = {**RDropConfig().to_dict(), **AUTO_BEFORE, **found["rdrop"]}
    if rdrop["alpha"] != "auto":  # they mean nothing there, and are None today
        rdrop |= {name: None for name, value in AUTO_BEFORE.items() if rdrop[name] == value}
    elif rdrop["alpha_rule"] != "ramp":  # 16 was written for None, and is what it means
        rdrop |= {"alpha_start": None, "alpha_max": rdrop["alpha_max"] or RULE_MAX}
    return {**found, "rdrop": rdrop}
