"""The files of a new home that a person goes on writing: policy and catalogue, with comments that say how."""

from __future__ import annotations

__all__ = ["CATALOG_TEMPLATE", "POLICY_TEMPLATE", "party_yaml"]

POLICY_TEMPLATE = """\
# What this party lets happen. What is not written here is refused: as it is, this file refuses every job.
# Take the # away from what you want, and put your own names in.
#   docs/how-to/write-a-policy.md says what each part means; docs/reference/policy.md lists every key.
version: 1

# Who may start jobs here. List yourself too, if you start any.
#initiators: [bank-a]

# What may run, and within which bounds (min, max, one_of, pattern; `optional: true` if it may be left out).
#components:
#  reader: {}
#  splitter: {}
#  homo_llm_trainer:
#    params:
#      rounds: {max: 50}
#      learning_rate: {max: 0.01}
#      peft.r: {max: 64}
#      max_length: {max: 2048}
#  evaluator: {}

# Which base models: package:NAME, hub:NAME@REVISION, or catalog:NAME; * stands for anything.
#models: ["package:llm_*", "catalog:*"]

# Which data sets of the catalogue, and who may use them. {} is: every initiator and component above.
#data:
#  loans-2025: {initiators: [bank-a], components: [reader, splitter, homo_llm_trainer, evaluator]}

# How updates are hidden, at least (plain, ckks, secagg), and the least number of contributors of a sum. For sums that
# hide them `threshold: 4` and `clip: 1.0` may stand there as well. Among two contributors nothing is hidden.
#protection: {least: plain, contributors: 3}

# none: jobs without differential privacy may run.
#privacy: {require: none}

# When jobs may start: always, or days and hours.
#schedule: always
#schedule: {days: [mon, tue, wed, thu, fri], hours: "20:00-06:00", timezone: Europe/Berlin}

# What one job may take of this machine.
#resources: {cpus: 4, memory: 16GiB, gpus: 0, hours: 12}

# What the guest of a job sees of what happens here: nothing, unless it is named.
#show: {progress: true, losses: false, logs: none}

# What a person decides before it starts (`fate_llm party approvals`): any, new_initiator, or by names and patterns.
# Without this line a person decides on everything; `manual: []` lets all jobs in that pass the rules above.
#manual: [new_initiator, {data: ["loans-*"]}]

# How long jobs are kept after their end.
#retention: {days: 365}
"""

CATALOG_TEMPLATE = """\
# This party's names for its data sets and models. Pipelines say catalog:NAME; no partner learns a path.
#   docs/how-to/data-catalogue.md
version: 1
entries: {}
# For example, instead of the {}:
#  loans-2025: {path: /data/loans/2025.jsonl, kind: dataset, description: Loans granted in 2025., records: 120000}
#  base-model: {path: /models/base, kind: model}
"""

_SERVICE = """
# --- the service: fate_llm party serve ---
sealing: sealing.key
policy: policy.yaml
catalog: catalog.yaml
state: state                 # all that the service keeps; the folder is for its owner only
#store: postgresql+psycopg://fate@localhost/fate    # a database instead of state/fate.db
#artifacts: s3://bucket/fate                        # instead of state/artifacts
api: {host: 127.0.0.1, port: 0, token: api.token}   # port 0: one that is free, written to state
#resources: {cpus: 8, memory: 32GiB, gpus: 1}       # what jobs may fill; all of the machine when not given
#launch: {nproc: 2}                                 # ranks of a worker, one for each of its GPUs
#lost_after: 10m                                    # a party that is silent for so long is lost
#heartbeat: 5s
"""


def party_yaml(basics: str) -> str:
    """A party's file. basics: its settings for parties and broker, as YAML."""
    return f"# One party's own settings; paths are relative to this file. It holds no secret.\n{basics}{_SERVICE}"
