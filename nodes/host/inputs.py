"""The inputs of the nodes, each declared once.

A declaration gives the schema, the check of a value with its error, the tooltip (also that of the English locale) and the row
of the help page. Inputs that several nodes share are declared below, others in the file of their node.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ...dg_core.units import require_number, require_whole

CATEGORY = "sampling/density guidance"
BITS = "bits per dimension (-log2 p / D)"
SHARE = "share of the sampling"
NUMBERS = "write numbers separated by commas, like 0.05, 0.5, 0.95"
Floats = io.Custom("FLOATS")


@dataclass(frozen=True)
class Input:
    """One input of a node. Subclasses say which widget or socket it is, and what values are right."""

    name: str  # its id in workflows
    text: str  # what it does, in sentences

    def facts(self) -> list[str]:
        """What else there is to know: symbol, unit, range, default."""
        return []

    @property
    def tooltip(self) -> str:
        """What the page shows beside the input."""
        return " ".join([self.text, *(f"{fact}." for fact in self.facts())])

    @property
    def row(self) -> str:
        """The row of the help page's table, in Markdown."""
        shown = getattr(self, "shown", "")
        name = f"`{self.name}`" + (f", shown as *{shown}*" if shown else "")
        return f"| {name} | {'<br>'.join([self.text, *self.facts()])} |"

    def schema(self) -> io.Input:
        """The input as the host wants it."""
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """Return `value`, converted where need be; raise ValueError, naming the input, the value and what would be right."""
        return value


@dataclass(frozen=True)
class Socket(Input):
    """An input that takes a link, of one of the host's types."""

    kind: Any  # for instance io.Model
    unlinked: str = ""  # what holds while nothing is connected; the link is optional where this is said
    symbol: str = ""

    def facts(self) -> list[str]:
        return [
            *([f"Symbol: {self.symbol}"] if self.symbol else []),
            *([f"Not connected: {self.unlinked}"] if self.unlinked else []),
        ]

    def schema(self) -> io.Input:
        widget = {"force_input": True} if issubclass(self.kind, io.Float) else {}
        return self.kind.Input(self.name, optional=bool(self.unlinked), tooltip=self.tooltip, **widget)

    def check(self, value: Any) -> Any:
        return value if value is None and self.unlinked else require(self.name, value, *WANTED[self.kind])


WANTED = {  # what an object of each type has, and where to get one
    io.Guider: ("model_patcher", "a GUIDER, for instance of CFGGuider or BasicGuider"),
    io.Latent: ("keys", "a LATENT"),
    io.Model: ("add_wrapper", "a MODEL"),
    io.Noise: ("generate_noise", "a NOISE, for instance of RandomNoise"),
    io.Sampler: ("sample", "a SAMPLER, for instance of KSamplerSelect"),
}


@dataclass(frozen=True, kw_only=True)
class Widget(Input):
    """An input with a widget: a switch where the default is a bool, else a text."""

    default: Any  # a number, a text or a bool
    neutral: float | str | bool | None = None  # with which it does nothing
    optional: bool = False
    shown: str = ""  # its name on the node, where that is not the id

    def facts(self) -> list[str]:
        if self.neutral == self.default:
            return [f"Default: {_written(self.default)} (neutral)"]
        return [f"Default: {_written(self.default)}", *([] if self.neutral is None else [f"Neutral: {_written(self.neutral)}"])]

    def schema(self) -> io.Input:
        return self._widget(io.Boolean if isinstance(self.default, bool) else io.String)

    def _widget(self, kind: Any, **options: Any) -> io.Input:
        return kind.Input(
            self.name,
            display_name=self.shown or None,
            optional=self.optional,
            tooltip=self.tooltip,
            default=self.default,
            **options,
        )


def _written(value: float | str | bool) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Number(Widget):
    """A number from `low` to `high`, a whole one where the default is."""

    low: float
    high: float
    step: float = 0.01  # of the widget, as `round`; not of whole numbers
    round: float = 0.001
    unit: str = ""
    symbol: str = ""

    def facts(self) -> list[str]:
        unit = f"Unit: {self.unit}" if self.unit else f"Symbol: {self.symbol}, no unit" if self.symbol else "No unit"
        counts = isinstance(self.default, int) and not self.unit
        return [*([] if counts else [unit]), f"Range: {self.low:g} to {self.high:g}", *super().facts()]

    def schema(self) -> io.Input:
        if isinstance(self.default, int):
            return self._widget(io.Int, min=self.low, max=self.high)
        return self._widget(io.Float, min=self.low, max=self.high, step=self.step, round=self.round)

    def check(self, value: Any, name: str = "") -> Any:
        """`value` as a float or an int; `name`: for the error, in place of the input's."""
        if isinstance(self.default, int):
            return require_whole(name or self.name, value, int(self.low), int(self.high))
        return require_number(name or self.name, value, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Seed(Number):
    """A seed, which the page can change after each run."""

    default: int = 0
    low: int = 0
    high: int = 2**64 - 1
    neutral: str = "any"

    def facts(self) -> list[str]:
        return [f"Neutral: {self.neutral}"]

    def schema(self) -> io.Input:
        return self._widget(io.Int, min=self.low, max=self.high, control_after_generate=True)


@dataclass(frozen=True, kw_only=True)
class Choice(Widget):
    """One of some words."""

    options: tuple[str, ...]

    def schema(self) -> io.Input:
        return self._widget(io.Combo, options=list(self.options))

    def check(self, value: Any) -> str:
        if value not in self.options:
            raise ValueError(f"{self.name} is {value!r}; it must be one of {', '.join(self.options)}")
        return value


@dataclass(frozen=True, kw_only=True)
class NumberText(Widget):
    """Numbers in a text, separated by commas or lines; `each`: what each of them has to be, if more than finite."""

    each: Number | None = None

    def facts(self) -> list[str]:
        return [*(self.each.facts()[:2] if self.each else []), *super().facts()]

    def check(self, value: Any) -> list[float]:
        """The numbers; raises ValueError where there are none, or one is not right."""
        if not isinstance(value, str):
            raise ValueError(f"{self.name} is {value!r}; {NUMBERS}")
        words = [word.strip() for word in value.replace("\n", ",").split(",") if word.strip()]
        if not words:
            raise ValueError(f"{self.name} is empty; {NUMBERS}")
        numbers = [self._number(word) for word in words]
        return numbers if self.each is None else [self.each.check(v, f"{self.name}, row {i},") for i, v in enumerate(numbers)]

    def _number(self, word: str) -> float:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{self.name} has {word!r}; {NUMBERS}")
        return number


@dataclass(frozen=True, kw_only=True)
class Numbers(Socket):
    """A FLOATS socket: a list of numbers, which `each` checks; `item`: what each is for."""

    kind: Any = Floats
    each: Number
    item: str = "image"

    def check(self, value: Any) -> tuple[float, ...] | None:
        """The numbers as a tuple, None as None; raises ValueError where one is not right."""
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(
                f"{self.name} is {value!r}; connect a list with a number for each {self.item}, for instance the "
                "all_values of Density Levels"
            )
        return tuple(self.each.check(v, f"{self.name}, for {self.item} {i},") for i, v in enumerate(value))


@dataclass(frozen=True, kw_only=True)
class Mask(Socket):
    """A MASK socket."""

    kind: Any = io.Mask

    def check(self, value: Any) -> torch.Tensor | None:
        """A tensor (N, height, width) of numbers from 0 to 1, None as None."""
        if value is None:
            return None
        if not torch.is_tensor(value) or value.ndim < 2 or not value.numel():
            shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f"{self.name} is {shape}; connect a MASK: (number of masks, height, width)")
        low, high = value.min().item(), value.max().item()
        if not (0 <= low and high <= 1):
            raise ValueError(f"{self.name} has numbers from {low:g} to {high:g}; they must be from 0 to 1")
        return value.reshape(-1, *value.shape[-2:])


def schemas(inputs: Iterable[Input]) -> list[io.Input]:
    """The inputs as a schema wants them."""
    return [declared.schema() for declared in inputs]


def defaults(inputs: Iterable[Input]) -> dict[str, Any]:
    """{name: default} of the inputs that have one."""
    return {declared.name: declared.default for declared in inputs if isinstance(declared, Widget)}


def check_fields(settings: object, inputs: Iterable[Input]) -> None:
    """Check the fields of a frozen dataclass that bear an input's name, and keep what the checks return.

    Raises ValueError, naming the input, where one is not right.
    """
    for declared in inputs:
        if hasattr(settings, declared.name):
            object.__setattr__(settings, declared.name, declared.check(getattr(settings, declared.name)))


QUANTILE = Number(
    "quantile",
    "Below 0.5 adds detail, above 0.5 smooths, 0.5 does nothing. Acts less on larger images: from 1024 pixels on use "
    "detail_shift.",
    symbol="q",
    default=0.5,
    neutral=0.5,
    low=0.001,
    high=0.999,
)
DETAIL_SHIFT = Number(
    "detail_shift",
    "Positive adds detail, negative smooths; begin with 0.05 or -0.05. Adds to quantile. Means the same at every resolution. "
    "Trained models amplify the change; use Density Target Sampler or Calibrate Detail when the number matters. A short guided "
    "range allows only a small shift.",
    unit=BITS,
    default=0.0,
    neutral=0.0,
    low=-2.0,
    high=2.0,
    step=0.05,
)
START_PERCENT = Number(
    "start_percent",
    "Guidance begins here; 0 is pure noise. Begin late to change texture and keep the composition.",
    unit=SHARE,
    default=0.0,
    neutral=0.0,
    low=0.0,
    high=1.0,
)
END_PERCENT = Number(
    "end_percent",
    "Guidance ends here; 1 is the finished image. The last step to zero noise is never guided.",
    unit=SHARE,
    default=1.0,
    neutral=1.0,
    low=0.0,
    high=1.0,
)
QUANTILES = Numbers(
    "quantiles",
    "One quantile for each image of the batch, in place of quantile; a single number holds for all. Connect "
    "all_values of Density Levels.",
    symbol="q",
    each=QUANTILE,
    unlinked="quantile holds for every image",
)
DETAIL_SHIFTS = Numbers(
    "detail_shifts",
    f"One shift for each image of the batch, in {BITS}, in place of detail_shift; a single number holds for all.",
    each=DETAIL_SHIFT,
    unlinked="detail_shift holds for every image",
)
MASK = Mask(
    "mask",
    "Where the node acts and how strongly, from 0 to 1. Any size, soft edges; one mask for all, or one per image (per "
    "frame of a video). quantile and detail_shift then mean this region. Chain two nodes for two regions.",
    symbol="w",
    unlinked="everywhere",
)
CURVE = Numbers(
    "curve",
    "When guidance acts: its strength from the beginning to the end of the guided range, in equal parts of log-SNR. 0, 1 "
    "begins gently and ends strongly. Only ratios count; the total shift stays the same. The node plots the curve.",
    each=Number("curve", "", default=1.0, low=0.0, high=math.inf),
    item="point",
    unlinked="constant strength",
)
PROBES = Number(
    "probes",
    "Number of random directions (probes) in which the model's response is measured at each evaluation. The error falls with "
    "the square root of their number. Each probe costs a model call with its derivative, about two plain calls; or three plain "
    "calls where the model has no derivative.",
    default=1,
    low=1,
    high=64,
)
LEVELS = QUANTILE, DETAIL_SHIFT
WINDOW = START_PERCENT, END_PERCENT


def require(name: str, value: Any, attribute: str, hint: str) -> Any:
    """Return `value`; raise ValueError, naming the input, unless it has `attribute`."""
    if not hasattr(value, attribute):
        raise ValueError(f"{name} is a {type(value).__name__}; connect {hint}")
    return value


def samples_of(name: str, latent: Any) -> Any:
    """The tensor of a LATENT input (several in one for video with audio); raises ValueError, naming the input, for others."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not (torch.is_tensor(samples) or getattr(samples, "is_nested", False)):
        raise ValueError(
            f"{name} is a {type(latent).__name__} without samples; connect a LATENT, from VAEEncode, an empty "
            "latent or a sampler"
        )
    return samples


def require_no_mask(name: str, mask: Any, subject: str, instead: str = "") -> None:
    """Raise ValueError for a LATENT with a noise mask: subject, for instance "the trace", is about whole images."""
    if mask is not None:
        raise ValueError(f"{name} has a noise mask; {subject} needs whole images: remove the mask{instead}")


def parts_refusal(name: str, advice: str = "connect a single image or video latent") -> ValueError:
    """The error for a latent of several parts, which density guidance and readouts do not take."""
    return ValueError(f"{name} combines video and audio; its density is not defined: {advice}")


def batch_index_of(name: str, latent: dict[str, Any], count: int) -> list[int] | None:
    """The batch_index of a LATENT input of `count` images, None where it has none; raises ValueError, naming the input,
    unless it numbers every image."""
    indices = latent.get("batch_index")
    if indices is not None and len(indices) != count:
        raise ValueError(
            f"{name} has {count} images and a batch_index for {len(indices)}; it must number every image: take images out "
            "of a batch with LatentFromBatch, which keeps the two together"
        )
    return indices


def sigmas_of(values: Any) -> list[float]:
    """SIGMAS as a list of floats; raises ValueError for what is no row of numbers."""
    if not torch.is_tensor(values) or values.ndim != 1:
        shape = f"of shape {tuple(values.shape)}" if torch.is_tensor(values) else f"a {type(values).__name__}"
        raise ValueError(f"sigmas are {shape}; connect SIGMAS, a row of noise levels, for instance of BasicScheduler")
    return values.tolist()
