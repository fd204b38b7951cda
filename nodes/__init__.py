"""The pack's nodes: schemas and wiring to the host. The mathematics is in `dg_core`."""

from .contact_sheet import DensityContactSheet, DensityLevels
from .density_guidance import DensityGuidanceModel, DensityGuidanceSampler
from .exact_density import ExactLogDensity, LoadExactDensityModel
from .prior_guidance import PriorGuidanceModel, PriorGuidanceScale
from .score_alignment import ScoreAlignmentCheck

NODES = [
    DensityGuidanceSampler,
    DensityGuidanceModel,
    PriorGuidanceScale,
    PriorGuidanceModel,
    LoadExactDensityModel,
    ExactLogDensity,
    ScoreAlignmentCheck,
    DensityLevels,
    DensityContactSheet,
]
