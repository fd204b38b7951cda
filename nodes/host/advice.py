"""What a user should know about guidance with the sampler and the patches of a run."""

import re
from typing import Any

# Names of the host's list, of newer hosts too.
RENOISING = re.compile(r"cfg_?pp")
STOCHASTIC = re.compile(r"ancestral|sde|^(lcm.*|ddpm|seeds_\d|sa_solver.*)$")
OVERLAPPING = {"EpsilonScaling": "Epsilon Scaling", "TemporalScoreRescaling": "Temporal Score Rescaling"}


def advice(sampler_name: str, model_options: dict[str, Any]) -> list[str]:
    """Sentences for the log.

    sampler_name: as in the host's list of samplers, "" for another's. How much each sampler makes of the asked-for shift is
    in docs/detail_shift.md.
    """
    sentences = []
    if RENOISING.search(sampler_name):
        sentences.append(
            f"{sampler_name} adds noise with a prediction that is not guided, so the change is not the one asked for "
            "(measured: 0.4 to 43 times as much): use a sampler without CFG++"
        )
    elif STOCHASTIC.search(sampler_name):
        sentences.append(
            f"{sampler_name} adds noise at every step and forgets part of the guidance (measured: mostly 0.3 to 0.5 of the "
            "asked-for change is left): use euler, ddim, deis, dpm_2, uni_pc or the pack's own solver"
        )
    for function in model_options.get("sampler_post_cfg_function", ()):
        node = OVERLAPPING.get(getattr(function, "__qualname__", "").split(".")[0])
        if node:
            sentences.append(f"{node} scales the predicted noise too; the amounts add up")
    return sentences


def innermost(sampler: Any) -> Any:
    """The SAMPLER of the host behind one that may be guided."""
    while hasattr(sampler, "sampler"):  # of a `steering.GuidedSampler`
        sampler = sampler.sampler
    return sampler


def function_of(sampler: Any) -> Any:
    """The host's sampler function behind a SAMPLER, guided or not; None where it has none."""
    return getattr(innermost(sampler), "sampler_function", None)


def name_of(sampler: Any) -> str:
    """The host's name of a SAMPLER; "" where it has none."""
    return getattr(function_of(sampler), "__name__", "").removeprefix("sample_")


def adds_noise(sampler: Any) -> bool:
    """Whether a SAMPLER draws noise on its way, as far as its name and options tell."""
    options = getattr(innermost(sampler), "extra_options", {})
    if options.get("variation") is not None or options.get("s_churn"):
        return True
    return bool(STOCHASTIC.search(name_of(sampler))) and options.get("eta", 1.0) != 0
