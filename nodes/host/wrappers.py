"""This pack's wrappers among the others in the host's model options."""

from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension

WRAPPER_KEY = "density_guidance"


def outermost(model_options: dict[str, Any], kind: str, wrapper: Callable[..., Any], key: str = WRAPPER_KEY) -> dict[str, Any]:
    """Copy of `model_options` in which `wrapper`, under `key`, surrounds all the others of its kind (a `WrappersMP`)."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    present = wrappers.get(kind, {})
    wrappers[kind] = {key: [wrapper, *present.get(key, [])], **{k: v for k, v in present.items() if k != key}}
    return options


def without_guidance(model_options: dict[str, Any]) -> dict[str, Any]:
    """`model_options` in which this pack wraps no prediction: a copy, or the same object where it wraps none."""
    kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    present = model_options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    if WRAPPER_KEY not in present:
        return model_options
    options = comfy.model_patcher.create_model_options_clone(model_options)
    options["transformer_options"]["wrappers"][kind] = {k: v for k, v in present.items() if k != WRAPPER_KEY}
    return options
