"""The schema's history, for Alembic: one file in ``versions/`` per change."""
