"""MLflow (extra `mlflow`), by the library's own client from the process that drives the run.

Records go where MLFLOW_TRACKING_URI says, else into `mlruns/` of the run's folder; MLFLOW_EXPERIMENT_NAME names the experiment,
else it is `diffprune`. A run that goes on is the same run there, and is not told again what it knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffprune.io.blob_store import remote
from diffprune.track.tracker import Scalars, Told, clean, flat

AT_ONCE = 1000  # metrics that the server takes in one call
PARAMETERS = 100  # and parameters
LONGEST = 500  # letters of a parameter's value that every server takes


class MLflow:
    """A run of MLflow.

    Raises:
        ValueError: the run's folder is a bucket, and MLFLOW_TRACKING_URI is not set.
    """

    name = "mlflow"

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place and remote(folder):
            raise ValueError("MLflow needs MLFLOW_TRACKING_URI where the run's folder is a bucket")
        if not place:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # of a run's own folder, which needs no data base
        from mlflow import MlflowClient

        self.told = Told(folder, self.name)
        self._client = MlflowClient(place or (folder.resolve() / "mlruns").as_uri())
        if not self.told.run:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "diffprune"
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            self.told.run = self._client.create_run(experiment, run_name=run).info.run_id
            self.told.save()
        self._client.update_run(self.told.run, status="RUNNING")
        self._describe(settings)

    def _describe(self, settings: Mapping[str, Any]) -> None:
        """Settings as parameters, which cannot be changed later: those that are there stay."""
        from mlflow.entities import Param

        there = self._client.get_run(self.told.run).data.params
        new = [Param(k, v[:LONGEST]) for k, v in flat(settings).items() if k not in there]
        for start in range(0, len(new), PARAMETERS):
            self._client.log_batch(self.told.run, params=new[start : start + PARAMETERS])

    def log(self, rows: Iterable[Scalars]) -> None:
        """New rows as metrics `<series>/<name>` at the step of their series."""
        from mlflow.entities import Metric

        now, found = int(1000 * time.time()), []
        for row in self.told.new(rows):
            series = "/".join(map(clean, row.series.split("/", 1)))
            found += [Metric(f"{series}/{clean(name)}", value, now, row.step) for name, value in row.finite.items()]
        for start in range(0, len(found), AT_ONCE):
            self._client.log_batch(self.told.run, metrics=found[start : start + AT_ONCE])
        self.told.save()

    def close(self, failed: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self.told.run, "FAILED" if failed else "FINISHED")
