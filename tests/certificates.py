"""Certificates that nobody knows, for servers of a test's own."""

from __future__ import annotations

import subprocess
from pathlib import Path


def write_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) in PEM files of a folder; ``name`` is as openssl's subjectAltName has it
    ("IP:127.0.0.1", "DNS:scores.example.org"). Valid for a day."""
    pem, key = folder / "certificate.pem", folder / "key.pem"
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test"]
    files = ["-keyout", str(key), "-out", str(pem)]
    command = ["openssl", "req", *kind, "-addext", f"subjectAltName={name}", *files]
    subprocess.run(command, check=True, capture_output=True)
    return pem, key
