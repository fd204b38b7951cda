"""The pack's nodes: schemas and wiring to the host. The mathematics is in `dg_core`."""

from .builtin_models import ExactLogDensity, LoadDemoModel, LoadExactDensityModel
from .contact_sheet import DensityContactSheet, DensityLevels
from .density_guidance import DensityGuidanceModel, DensityGuidanceSampler
from .density_scheduler import DensityScheduler
from .density_target import DensityTargetSampler
from .density_trace import DensityTrace
from .log_density import LogDensity
from .prior_guidance import PriorGuidanceModel, PriorGuidanceScale
from .score_alignment import ScoreAlignmentCheck
from .stochastic_variation import StochasticDetailVariation, VariationGrid

NODES = [
    DensityGuidanceSampler,
    DensityGuidanceModel,
    DensityTargetSampler,
    DensityScheduler,
    PriorGuidanceScale,
    PriorGuidanceModel,
    StochasticDetailVariation,
    VariationGrid,
    LoadDemoModel,
    LoadExactDensityModel,
    ExactLogDensity,
    LogDensity,
    DensityTrace,
    ScoreAlignmentCheck,
    DensityLevels,
    DensityContactSheet,
]
