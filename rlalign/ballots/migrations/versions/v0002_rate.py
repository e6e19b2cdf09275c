"""Frames a second of a clip."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "picture", sa.Column("rate", sa.Double(), nullable=False, server_default=sa.text("0"))
    )
