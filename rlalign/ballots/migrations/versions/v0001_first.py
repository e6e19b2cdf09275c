"""The first schema.

A migration says the whole change by itself: the tables of ``schema.py`` go on changing.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_people()
    create_pictures()
    create_campaigns()
    create_items()
    create_ballots()
    create_votes()


def create_people() -> None:
    op.create_table(
        "annotator",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("token_digest", sa.String(length=64), nullable=False),
        sa.Column("consent", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("joined", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_annotator")),
        sa.UniqueConstraint("token_digest", name=op.f("uq_annotator_token_digest")),
    )
    op.create_table(
        "standing",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("annotator", sa.String(length=32), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["annotator"], ["annotator.id"], name=op.f("fk_standing_annotator")
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_standing")),
    )
    op.create_index(
        op.f("ix_standing_annotator_seq"), "standing", ["annotator", "seq"], unique=False
    )


def create_pictures() -> None:
    op.create_table(
        "picture",
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("caption", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("frames", sa.Integer(), nullable=False),
        sa.Column("media_type", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_picture")),
    )
    op.create_table(
        "content",
        sa.Column("uid", sa.String(length=32), nullable=False),
        sa.Column("bytes", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["uid"], ["picture.uid"], name=op.f("fk_content_uid")),
        sa.PrimaryKeyConstraint("uid", name=op.f("pk_content")),
    )


def create_campaigns() -> None:
    op.create_table(
        "counter",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counter")),
    )
    op.execute("INSERT INTO counter (name, value) VALUES ('log', 0)")
    op.create_table(
        "campaign",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("mode", sa.String(length=16), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign")),
    )
    op.create_table(
        "prompt",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("annotator", sa.String(length=32), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["annotator"], ["annotator.id"], name=op.f("fk_prompt_annotator")),
        sa.ForeignKeyConstraint(["campaign"], ["campaign.id"], name=op.f("fk_prompt_campaign")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_prompt")),
    )
    op.create_index(
        op.f("ix_prompt_campaign_annotator_seq"),
        "prompt",
        ["campaign", "annotator", "seq"],
        unique=False,
    )


def create_items() -> None:
    op.create_table(
        "item",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("caption", sa.Text(), nullable=False),
        sa.Column("uids", sa.JSON(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("truth", sa.String(length=32), nullable=False),
        sa.Column("of_ballot", sa.String(length=32), nullable=False),
        sa.Column("annotator", sa.String(length=32), nullable=False),
        sa.Column("rule", sa.String(length=32), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("held", sa.Integer(), nullable=False),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["campaign"], ["campaign.id"], name=op.f("fk_item_campaign")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_item")),
        sa.UniqueConstraint("campaign", "number", name=op.f("uq_item_campaign_number")),
    )
    op.create_index(
        op.f("ix_item_campaign_kind_withdrawn_number"),
        "item",
        ["campaign", "kind", "withdrawn", "number"],
        unique=False,
    )
    op.create_index(op.f("ix_item_of_ballot"), "item", ["of_ballot"], unique=False)


def create_ballots() -> None:
    op.create_table(
        "ballot",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("item", sa.String(length=64), nullable=False),
        sa.Column("annotator", sa.String(length=32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("order", sa.JSON(), nullable=False),
        sa.Column("rule", sa.String(length=32), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("issued", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(["annotator"], ["annotator.id"], name=op.f("fk_ballot_annotator")),
        sa.ForeignKeyConstraint(["campaign"], ["campaign.id"], name=op.f("fk_ballot_campaign")),
        sa.ForeignKeyConstraint(["item"], ["item.id"], name=op.f("fk_ballot_item")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ballot")),
        sa.UniqueConstraint(
            "annotator", "campaign", "number", name=op.f("uq_ballot_annotator_campaign_number")
        ),
    )
    op.create_index(
        op.f("ix_ballot_annotator_campaign_state"),
        "ballot",
        ["annotator", "campaign", "state"],
        unique=False,
    )
    op.create_index(
        op.f("ix_ballot_campaign_state_expires"),
        "ballot",
        ["campaign", "state", "expires"],
        unique=False,
    )
    op.create_index(op.f("ix_ballot_item_annotator"), "ballot", ["item", "annotator"], unique=False)


def create_votes() -> None:
    op.create_table(
        "vote",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("ballot", sa.String(length=32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("choice", sa.String(length=16), nullable=False),
        sa.Column("ranking", sa.JSON(), nullable=False),
        sa.Column("reasons", sa.JSON(), nullable=False),
        sa.Column("points", sa.JSON(), nullable=False),
        sa.Column("visible_ms", sa.Double(), nullable=False),
        sa.Column("decide_ms", sa.Double(), nullable=False),
        sa.Column("device", sa.JSON(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["ballot"], ["ballot.id"], name=op.f("fk_vote_ballot")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_vote")),
        sa.UniqueConstraint("ballot", "attempt", name=op.f("uq_vote_ballot_attempt")),
        sa.UniqueConstraint("ballot", "nonce", name=op.f("uq_vote_ballot_nonce")),
    )
    op.create_table(
        "undo",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("vote", sa.BigInteger(), nullable=False),
        sa.Column("annotator", sa.String(length=32), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["annotator"], ["annotator.id"], name=op.f("fk_undo_annotator")),
        sa.ForeignKeyConstraint(["vote"], ["vote.seq"], name=op.f("fk_undo_vote")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_undo")),
        sa.UniqueConstraint("annotator", "nonce", name=op.f("uq_undo_annotator_nonce")),
        sa.UniqueConstraint("vote", name=op.f("uq_undo_vote")),
    )
