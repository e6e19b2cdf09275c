"""Who a person is: the secret of a page, join links, and the keys of pictures.

A join link ends in ``#join=TOKEN``. What stands behind the # is never sent with a request, so it is
in no log and in no Referer; the page takes it from the address and posts it once. A token is a
random word that is signed with the page's secret: no list of invitations is kept. The store keeps
its digest alone.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from itsdangerous import BadSignature, Signer

from rlalign.core.registry import UserError
from rlalign.web.token import MIN_TOKEN_CHARACTERS

ONE_PERSON = "p"
MANY_PEOPLE = "m"


class Secret:
    """What signs a page's cookies, join links and keys of pictures."""

    def __init__(self, secret: str) -> None:
        assert len(secret) >= MIN_TOKEN_CHARACTERS
        self.text = secret
        self._invitations = Signer(secret, salt=b"rlalign.vote.join")

    def invitation(self, *, many: bool = False) -> str:
        """A token for one person, who is the same on each machine that opens the link, or for many,
        each of whom is a new person."""
        kind = MANY_PEOPLE if many else ONE_PERSON
        return self._invitations.sign(f"{kind}{secrets.token_urlsafe(18)}").decode()

    def invites(self, token: str) -> str | None:
        """``ONE_PERSON``, ``MANY_PEOPLE``, or None for a token that is not of this page."""
        try:
            kind = self._invitations.unsign(token.encode()).decode()[:1]
        except (BadSignature, UnicodeError):
            return None
        return kind if kind in (ONE_PERSON, MANY_PEOPLE) else None

    def key_of(self, annotator: str, uid: str) -> str:
        """The key under which this person may ask for a picture, and nobody else."""
        return self._pictures(annotator).sign(uid).decode()

    def uid_of(self, annotator: str, key: str) -> str | None:
        """The picture of a key, None where it was not made for this person."""
        try:
            return self._pictures(annotator).unsign(key.encode()).decode()
        except (BadSignature, UnicodeError):
            return None

    def _pictures(self, annotator: str) -> Signer:
        return Signer(self.text, salt=b"rlalign.vote.picture." + annotator.encode())


def join_url(page: str, token: str) -> str:
    """The link that a person gets."""
    return f"{page.rstrip('/')}/#join={token}"


def read_secret(path: Path) -> Secret:
    """The secret in a file that only its owner may read; it is made where there is none.

    Raises UserError for a file that holds no secret.
    """
    # made whole under another name first, so that two servers that start at once agree
    if not path.exists():
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(secrets.token_urlsafe(32) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(scratch, path)
        except FileExistsError:
            pass
        finally:
            scratch.unlink()

    # what is in it
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if len(text) < MIN_TOKEN_CHARACTERS or not text.isascii() or not text.isprintable():
        raise UserError(
            f"{path}: the secret of a page has at least {MIN_TOKEN_CHARACTERS} printable ASCII"
            " characters; delete the file, and a new one is made (people join again then)"
        )
    return Secret(text)
