"""The first version: jobs, tasks, approvals, lines, replay protection, leases, models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

__all__ = ["upgrade"]

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables of the first version."""
    _jobs()
    _talk()
    _models()


def _words(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _jobs() -> None:
    op.create_table(
        "jobs",
        *_words("job"),
        sa.Column("lead", sa.Boolean, nullable=False),
        *_words("digest", "name", "initiator", "state"),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        sa.Column("priority", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.Column("ended", sa.Double),
        *_words("specification", "machine"),
        sa.Column("trouble", sa.Text),
        sa.PrimaryKeyConstraint("job", "lead", name="pk_jobs"),
    )
    op.create_index("ix_jobs_created", "jobs", ["created"])
    op.create_table(
        "tasks",
        *_words("job", "task"),
        sa.Column("attempt", sa.BigInteger, nullable=False),
        *_words("state"),
        sa.Column("started", sa.Double),
        sa.Column("ended", sa.Double),
        *_words("outputs", "fingerprint"),
        sa.PrimaryKeyConstraint("job", "task", name="pk_tasks"),
    )
    op.create_index("ix_tasks_fingerprint", "tasks", ["fingerprint"])
    op.create_table(
        "approvals",
        *_words("job", "digest"),
        sa.Column("asked", sa.Double, nullable=False),
        *_words("findings", "summary"),
        sa.Column("decided", sa.Double),
        sa.Column("decision", sa.Text),
        *_words("decided_by", "reason"),
        sa.PrimaryKeyConstraint("job", "digest", name="pk_approvals"),
    )


def _talk() -> None:
    op.create_table(
        "lines",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True, nullable=False),
        *_words("job", "party"),
        sa.Column("number", sa.BigInteger, nullable=False),
        *_words("content"),
        sa.PrimaryKeyConstraint("id", name="pk_lines"),
        sa.UniqueConstraint("job", "party", "number", name="uq_lines_job_party_number"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_lines_job_id", "lines", ["job", "id"])
    op.create_table(
        "line_floors",
        *_words("job", "party"),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("job", "party", name="pk_line_floors"),
    )
    op.create_table("senders", *_words("sender", "position"), sa.PrimaryKeyConstraint("sender", name="pk_senders"))
    op.create_table(
        "epochs",
        *_words("name"),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_epochs"),
    )
    op.create_table(
        "leases",
        *_words("name", "holder"),
        sa.Column("until", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )


def _models() -> None:
    op.create_table(
        "models",
        *_words("name"),
        sa.Column("version", sa.BigInteger, autoincrement=False, nullable=False),
        *_words("digest", "job", "task"),
        sa.Column("created", sa.Double, nullable=False),
        *_words("content"),
        sa.PrimaryKeyConstraint("name", "version", name="pk_models"),
        sa.UniqueConstraint("name", "job", "task", "digest", name="uq_models_name_job_task_digest"),
    )
    op.create_index("ix_models_digest", "models", ["digest"])
