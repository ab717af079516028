"""The `job` that a job file defines."""

from __future__ import annotations

import runpy
import sys

from pydantic import ValidationError

from diffprune.io.job_files import find_job
from diffprune.job.job import Job, explain


def load_job(text: str) -> Job:
    """The `job` a file defines. Modules beside the file can be imported, as by a script.

    Raises:
        ValueError: no such job, a file that does not run, or one that defines none.
    """
    path = find_job(text)
    if (beside := str(path.parent.resolve())) not in sys.path:
        sys.path.insert(0, beside)
    try:
        found = runpy.run_path(str(path), run_name="diffprune_job").get("job")
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Job):
        raise ValueError(f"{path} defines no job: it must end with a line such as job = Job(name={path.stem!r}, ...)")
    return found
