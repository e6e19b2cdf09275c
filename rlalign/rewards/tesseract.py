"""Written text, read by Tesseract, a program of its own: a second reader beside ``ocr``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from rlalign.core.registry import UserError
from rlalign.rewards._written import Reader, WrittenText

if TYPE_CHECKING:
    from PIL.Image import Image

_ONE_LINE = "7"
_SPARSE_TEXT = "11"
"""Tesseract's modes of page segmentation."""
_PAGE_END = "\f"
_SECONDS_A_PICTURE = 60


class Tesseract(WrittenText):
    """Share of the wanted text that Tesseract reads in the picture, 0 to 1, by the rule of ``ocr``:
    a judge that a run against ``ocr`` does not aim at, since a single reader can be gamed.

    Letters should be some 30 pixels high: ``zoom`` enlarges small ones. All pictures of a call are
    read by one process, each as a page of its own.

    Weights: Debian's packages tesseract-ocr and tesseract-ocr-eng, or those of another language.

    Source: Smith 2007, "An Overview of the Tesseract OCR Engine"; the rule: Liu 2025,
    arXiv:2505.05470.
    """

    differentiable: ClassVar[bool] = False

    language: str = Field(
        default="eng",
        pattern=r"[A-Za-z0-9_+]+",
        description="language as Tesseract names it; several joined by +",
    )
    command: str = Field(
        default="tesseract", min_length=1, description="the program, on the PATH or with its path"
    )

    def reader(self) -> Reader:
        program = self._program()

        def read(pictures: Sequence[Image]) -> list[str]:
            if not pictures:
                return []
            with tempfile.TemporaryDirectory(prefix="rlalign-tesseract-") as folder:
                return self._pages(program, pictures, Path(folder))

        return read

    def _program(self) -> str:
        """The program's path, once it is known to have the language."""
        place = f"rewards.{self.title}"
        program = shutil.which(self.command)
        if program is None:
            raise UserError(
                f"{place}.command must name an installed program, got {self.command!r}; install it"
                " (Debian, Ubuntu: apt-get install tesseract-ocr), or name where it is"
            )
        listed = self._called([program, "--list-langs"], _SECONDS_A_PICTURE)
        missing = set(self.language.split("+")) - set(listed.split())
        if missing:
            raise UserError(
                f"{place}.language: {program} has no {', '.join(sorted(missing))}; install it"
                " (Debian, Ubuntu: apt-get install tesseract-ocr-LANGUAGE), or take one of"
                " tesseract --list-langs"
            )
        return program

    def _pages(self, program: str, pictures: Sequence[Image], folder: Path) -> list[str]:
        """The text of each picture."""
        # a list of files is read page by page
        files = [folder / f"{number:06}.png" for number in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            picture.save(file)
        listed = folder / "pictures.txt"
        listed.write_text("".join(f"{file}\n" for file in files), encoding="utf-8")

        # its neural engine alone: the older one adapts to the pages before
        mode = _SPARSE_TEXT if self.detect else _ONE_LINE
        settings = ["-l", self.language, "--oem", "1", "--psm", mode]
        printed = self._called(
            [program, str(listed), "stdout", *settings], _SECONDS_A_PICTURE * len(pictures)
        )
        pages = printed.split(_PAGE_END)
        if len(pages) != len(pictures):
            raise UserError(
                f"rewards.{self.title}: {program} must give a page for each of {len(pictures)}"
                f" pictures, got {len(pages)}; Tesseract 4.1 or newer does"
            )
        return pages

    def _called(self, command: Sequence[str], seconds: float) -> str:
        """What the program printed. One that fails, or takes too long, is a UserError."""
        place = f"rewards.{self.title}"
        try:
            done = subprocess.run(
                [*command],
                capture_output=True,
                timeout=seconds,
                check=False,
                env=os.environ | {"OMP_THREAD_LIMIT": str(self.threads)},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{place}: {command[0]} did not do its work: {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-300:]
            raise UserError(f"{place}: {command[0]} failed with {done.returncode}: {said}")
        return done.stdout.decode(errors="replace")
