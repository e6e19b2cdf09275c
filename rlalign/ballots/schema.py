"""The tables of a store, for SQLite and PostgreSQL alike.

``vote``, ``undo``, ``standing`` and ``prompt`` are the log: rows are added and never changed, each
with its ``seq`` from one counter, so a cursor is one number. (Only a person's wish to be deleted
blanks rows.) ``item.held``, ``ballot.state`` and ``annotator.status`` say at once what the log
implies; ``rlalign.ballots.audit`` compares them.

A change here is a new file in ``migrations/versions/`` and a new ``REVISION``.
"""

from __future__ import annotations

import sqlalchemy as sa

REVISION = "0002"
"""The newest migration: the schema of this file."""

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

counter = sa.Table(
    "counter",
    METADATA,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

campaign = sa.Table(
    "campaign",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("mode", sa.String(16), nullable=False),
    sa.Column("settings", sa.JSON, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
)

picture = sa.Table(
    "picture",
    METADATA,
    sa.Column("uid", sa.String(32), primary_key=True),
    sa.Column("caption", sa.Text, nullable=False),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("frames", sa.Integer, nullable=False),
    sa.Column("media_type", sa.String(64), nullable=False),
    sa.Column("rate", sa.Double, nullable=False, server_default=sa.text("0")),
)

content = sa.Table(
    "content",
    METADATA,
    sa.Column("uid", sa.ForeignKey("picture.uid"), primary_key=True),
    sa.Column("bytes", sa.LargeBinary, nullable=False),
)

annotator = sa.Table(
    "annotator",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("token_digest", sa.String(64), nullable=False, unique=True),
    sa.Column("consent", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("joined", sa.Double, nullable=False),
)

item = sa.Table(
    "item",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("campaign", sa.ForeignKey("campaign.id"), nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("caption", sa.Text, nullable=False),
    sa.Column("uids", sa.JSON, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("truth", sa.String(32), nullable=False),
    sa.Column("of_ballot", sa.String(32), nullable=False),
    sa.Column("annotator", sa.String(32), nullable=False),
    sa.Column("rule", sa.String(32), nullable=False),
    sa.Column("propensity", sa.Double, nullable=False),
    sa.Column("target", sa.Integer, nullable=False),
    sa.Column("held", sa.Integer, nullable=False),
    sa.Column("withdrawn", sa.Boolean, nullable=False),
    sa.UniqueConstraint("campaign", "number"),
    sa.Index(None, "campaign", "kind", "withdrawn", "number"),
    sa.Index(None, "of_ballot"),
)

ballot = sa.Table(
    "ballot",
    METADATA,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("campaign", sa.ForeignKey("campaign.id"), nullable=False),
    sa.Column("item", sa.ForeignKey("item.id"), nullable=False),
    sa.Column("annotator", sa.ForeignKey("annotator.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("order", sa.JSON, nullable=False),
    sa.Column("rule", sa.String(32), nullable=False),
    sa.Column("propensity", sa.Double, nullable=False),
    sa.Column("issued", sa.Double, nullable=False),
    sa.Column("expires", sa.Double, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.UniqueConstraint("annotator", "campaign", "number"),
    sa.Index(None, "campaign", "state", "expires"),
    sa.Index(None, "item", "annotator"),
    sa.Index(None, "annotator", "campaign", "state"),
)
"""``state`` is open, voted, skipped, expired or deleted; the first two hold a place of the item."""

vote = sa.Table(
    "vote",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("ballot", sa.ForeignKey("ballot.id"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("nonce", sa.String(64), nullable=False),
    sa.Column("choice", sa.String(16), nullable=False),
    sa.Column("ranking", sa.JSON, nullable=False),
    sa.Column("reasons", sa.JSON, nullable=False),
    sa.Column("points", sa.JSON, nullable=False),
    sa.Column("visible_ms", sa.Double, nullable=False),
    sa.Column("decide_ms", sa.Double, nullable=False),
    sa.Column("device", sa.JSON, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.UniqueConstraint("ballot", "attempt"),
    sa.UniqueConstraint("ballot", "nonce"),
)
"""``attempt`` counts a ballot's votes: the database itself refuses two for one."""

undo = sa.Table(
    "undo",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("vote", sa.ForeignKey("vote.seq"), nullable=False, unique=True),
    sa.Column("annotator", sa.ForeignKey("annotator.id"), nullable=False),
    sa.Column("nonce", sa.String(64), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.UniqueConstraint("annotator", "nonce"),
)

standing = sa.Table(
    "standing",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("annotator", sa.ForeignKey("annotator.id"), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index(None, "annotator", "seq"),
)

prompt = sa.Table(
    "prompt",
    METADATA,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("campaign", sa.ForeignKey("campaign.id"), nullable=False),
    sa.Column("annotator", sa.ForeignKey("annotator.id"), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index(None, "campaign", "annotator", "seq"),
)
