"""A job: the value, the file that defines it, and the run from training to report.

A job file needs one import: `from diffprune.job import Evaluation, Job, Measurement, Recipe, Search, Tuning`.
"""

from diffprune.job.job import Evaluation, Job, Measurement, Recipe, Search, Tuning

__all__ = ["Evaluation", "Job", "Measurement", "Recipe", "Search", "Tuning"]
