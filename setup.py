"""What pyproject.toml cannot say: jobs and published numbers stand beside the package here, and travel inside it."""

from setuptools import find_namespace_packages, find_packages, setup

BESIDE = {"diffprune.jobs": "jobs", "diffprune.published": "reports/published"}

setup(
    packages=[
        *find_packages(include=["diffprune", "diffprune.*"]),
        *BESIDE,
        *(f"diffprune.jobs.{name}" for name in find_namespace_packages("jobs")),
    ],
    package_dir=BESIDE,
    package_data={"diffprune": ["embedded/checkpoint/*", "report/render/templates/*"], "diffprune.published": ["*.csv"]},
)
