"""Recipes: a preset says what becomes of a teacher's weights and how the student is trained, `distill` does it.

import compresskit.recipes as recipes
from compresskit.tasks import find_task

preset = recipes.preset("kroneckerbert:k21").with_values({"task.epochs": 3})
result = recipes.distill(preset, teacher_folder, "run", task=find_task("sst2"), data="glue", corpus="text")
"""

from compresskit.recipes.definition import Compressed, Preset, ShapeRule, Smaller, StageRecipe, preset_from_data
from compresskit.recipes.find import preset, preset_text, presets
from compresskit.recipes.results import Distilled, StageResult, combined_log
from compresskit.recipes.run import distill
from compresskit.recipes.stages import OnStage
from compresskit.recipes.students import MakeStudent, compression_plan, student_maker

__all__ = [
    "Compressed",
    "Distilled",
    "MakeStudent",
    "OnStage",
    "Preset",
    "ShapeRule",
    "Smaller",
    "StageRecipe",
    "StageResult",
    "combined_log",
    "compression_plan",
    "distill",
    "preset",
    "preset_from_data",
    "preset_text",
    "presets",
    "student_maker",
]
