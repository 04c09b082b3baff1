"""The one door into the runtimes, for the command line and for the Python builder.

Time and ids enter here: the system's clock, and an unpredictable suffix for the job's name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from fate_llm.core.errors import ConfigurationError
from fate_llm.core.names import is_name, nearest
from fate_llm.pipelines.builder import Pipeline
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.security.randomness import random_id

from .attempt import Runtime
from .events import Observer
from .federation import load_party
from .job import JobResult, Submission, job_name

__all__ = ["DEFAULT_WORKDIR", "over_broker", "prepare", "submit_pipeline"]

DEFAULT_WORKDIR = Path("jobs")


def prepare(
    spec: PipelineSpec,
    *,
    base: Path,
    workdir: Path = DEFAULT_WORKDIR,
    observers: Sequence[Observer] = (),
    runtime: Runtime | None = None,
) -> Submission:
    """A job that is ready to run, in a new folder below `workdir`. base: where relative paths of data start.

    runtime: where the parties run; by default all in this process.
    """
    job_id = job_name(spec.name, now=time.time(), unique=random_id(2))
    return Submission(
        spec,
        job_id=job_id,
        base=base.absolute(),
        workdir=workdir.absolute(),
        now=time.time,
        observers=observers,
        runtime=runtime,
    )


def over_broker(spec: PipelineSpec, brokers: Sequence[str]) -> Runtime:
    """A process per party, talking over a message broker.

    brokers: one address for all, or `PARTY=ADDRESS` for each, or `PARTY=party.yaml`: the party's own settings.

    Raises:
        ConfigurationError: an address that cannot be, or a party without one.
    """
    from .processes import ProcessRuntime  # pika is loaded only where a broker is used

    named = [text.partition("=") for text in brokers]
    given = {name: url for name, sign, url in named if sign and is_name(name)}
    common = [text for text, (name, sign, _) in zip(brokers, named, strict=True) if not (sign and is_name(name))]
    if len(common) > 1:
        raise ConfigurationError("more than one broker for everybody", hint="Name whose each is: PARTY=ADDRESS")
    for name in given:
        if name not in spec.members:
            raise ConfigurationError(f"a broker for {name!r}, who is no party", hint=nearest(name, spec.members))
    lacking = [party for party in spec.members if party not in given]
    if lacking and not common:
        raise ConfigurationError(f"no broker for {', '.join(lacking)}", hint="Give each its own: PARTY=ADDRESS")
    return ProcessRuntime({party: _address(given.get(party) or common[0]) for party in spec.members})


def _address(text: str) -> str:
    """A broker's URL as it is, or the one in a party's settings, with its password."""
    if "://" in text:
        return text
    settings, _ = load_party(Path(text))
    url, password = settings.broker_url(), settings.load_password()
    scheme, _, rest = url.partition("://")
    user, at, place = rest.partition("@")
    return url if password is None or not at else f"{scheme}://{user}:{quote(password, safe='')}@{place}"


def submit_pipeline(
    pipeline: Pipeline, *, workdir: str | Path = DEFAULT_WORKDIR, observers: Sequence[Observer] = ()
) -> JobResult:
    """Run a pipeline of the builder with all its parties in this process.

    Returns when the job has ended, whatever way: `JobResult.raise_for_status` raises what it ended with.
    """
    return prepare(pipeline.spec(), base=pipeline.folder, workdir=Path(workdir), observers=observers).run()
