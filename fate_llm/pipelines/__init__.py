"""The pipeline language: schema, loader, checks, plan, prediction and the Python builder."""

from .builder import Output, Pipeline, Task, set_submitter
from .check import CODES, check, load_pipeline
from .export import json_schema
from .graph import order
from .plan import PartyTotals, Plan, TaskPlan, make_plan
from .predict import Prediction, derive_prediction
from .schema import Folder, InputValue, PipelineSpec, Reference, TaskSpec, load_component, sources_of

__all__ = [
    "CODES",
    "Folder",
    "InputValue",
    "Output",
    "PartyTotals",
    "Pipeline",
    "PipelineSpec",
    "Plan",
    "Prediction",
    "Reference",
    "Task",
    "TaskPlan",
    "TaskSpec",
    "check",
    "derive_prediction",
    "json_schema",
    "load_component",
    "load_pipeline",
    "make_plan",
    "order",
    "set_submitter",
    "sources_of",
]
