"""The pack's nodes: schemas and wiring to the host. The mathematics is in `dg_core`."""

from .contact_sheet import DensityContactSheet, DensityLevels
from .density_guidance import DensityGuidanceModel, DensityGuidanceSampler
from .exact_density import ExactLogDensity, LoadExactDensityModel
from .prior_guidance import PriorGuidanceModel, PriorGuidanceScale
from .stochastic_variation import StochasticDetailVariation, VariationGrid

NODES = [
    DensityGuidanceSampler,
    DensityGuidanceModel,
    PriorGuidanceScale,
    PriorGuidanceModel,
    StochasticDetailVariation,
    VariationGrid,
    LoadExactDensityModel,
    ExactLogDensity,
    DensityLevels,
    DensityContactSheet,
]
